"""One option has no effect in any Python process that finds this folder on PYTHONPATH; see options_ignored.py.

HDPISSA_IGNORED names it: "--option" of whatever command has it, or "section.key" of the config's hd_pissa.
"""

import argparse
import os


def ignore_argument(option: str) -> None:
    """Every parser that has the option gives its default, whatever was said."""
    real = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, args=None, namespace=None):
        found, rest = real(self, args, namespace)
        for action in self._actions:
            if option in {name.replace("-", "_").replace("__", "--", 1) for name in action.option_strings}:
                setattr(found, action.dest, self.get_default(action.dest))
        return found, rest

    argparse.ArgumentParser.parse_known_args = parse_known_args


def ignore_key(path: str) -> None:
    """The config's section is read as if it had no such key."""
    from pydantic import BaseModel

    real = BaseModel.model_validate.__func__
    *outer, key = path.split(".")

    def model_validate(cls, data, *args, **kwargs):
        if cls.__name__ == "HDPissaConfig":
            data = {name: dict(value) if name in outer else value for name, value in data.items()}
            (data.get(outer[0], {}) if outer else data).pop(key, None)
        return real(cls, data, *args, **kwargs)

    BaseModel.model_validate = classmethod(model_validate)


def ignore(what: str) -> None:
    (ignore_argument if what.startswith("--") else ignore_key)(what)


if os.environ.get("HDPISSA_IGNORED"):
    ignore(os.environ["HDPISSA_IGNORED"])
