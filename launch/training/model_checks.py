"""Checks a base model by its files, without reading weights.

A folder is inspected; of a hub name that is not in the cache only the configuration is known, and the rest is checked
when it is loaded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.engine.export.writer import foreign_weights

ADAPTER, CHECKPOINT = "adapter_config.json", "checkpoint.json"
# Of transformers' weight files, those that an index may name, too.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Heads that answer with something else than the next token. A base without any head may be tied, so it is let pass.
OTHER_HEADS = re.compile(r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM)$")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without warnings: a model that is only looked at is built again when it is used, and warns then."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def check_folder(name: str) -> None:
    """Refuses an adapter, which transformers would look for the base of, and a folder without a config.json.

    Raises:
        ConfigError: with the file.
    """
    if (Path(name) / ADAPTER).is_file():
        raise ConfigError(
            f"--model_name_or_path {name}: holds {ADAPTER}, so it is an adapter, not a whole model; merge it into its "
            f"base (PEFT's merge_and_unload, then save_pretrained) and give the folder with the merged model"
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ConfigError(
            f"--model_name_or_path {name}: no usable model there (it holds no config.json); give a Hugging Face folder "
            f"or name"
        )


def check_export(folder: Path, option: str, **others: str | Path | None) -> None:
    """Refuses a folder in which an export would take the place of a model that no export wrote, or of a checkpoint.

    Args:
        option: the option with its value, for the message.
        others: what the export is made from, by what it is: `base="Qwen/Qwen3-0.6B"` (or a folder), `checkpoint=…`.

    Raises:
        ConfigError: with what would be lost.
    """
    for what, where in others.items():
        if where and folder.is_dir() and Path(where).is_dir() and folder.samefile(where):
            raise ConfigError(
                f"{option}: {folder} is the {what} itself, which the export would replace; give another folder"
            )
    if (folder / CHECKPOINT).is_file():
        raise ConfigError(f"{option}: {folder} is a checkpoint, which the export would damage; give another folder")
    if weights := foreign_weights(folder):
        raise ConfigError(
            f"{option}: {folder} holds a model that no export wrote ({weights.name}), and that would be lost; give "
            f"another folder"
        )


def check_weights(name: str, *, option: str = "--model_name_or_path") -> None:
    """Refuses a folder whose weights are not all there.

    Raises:
        ConfigError: with the file.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    if not any(path.is_file() for weights in WEIGHTS for path in (folder / weights, folder / f"{weights}.index.json")):
        other = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "only other files"
        raise ConfigError(
            f"{option} {name}: holds no weights ({other}); there must be {' or '.join(WEIGHTS)}, or an "
            f"index of several: get the model again"
        )
    _check_safetensors(name, option=option)


def _check_safetensors(name: str, *, option: str) -> None:
    """Headers and lengths of all safetensors files: downloads that broke off, and pointers of Git LFS."""
    from hdpissa.engine.sharding.base_files import checkpoint_files, open_tensors

    for path in sorted(set(checkpoint_files(name).values())):
        if not Path(path).is_file():
            raise ConfigError(
                f"{option} {name}: its index names {Path(path).name}, which must be there and is not; get "
                f"the file again"
            )
        with open_tensors(path):
            pass


def check_config(name: str, config: Any) -> None:
    """Refuses what the configuration says of weights and head.

    Raises:
        ConfigError: quantised weights; a head that does not predict tokens.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    quantized = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if quantized:
        settings = quantized if isinstance(quantized, dict) else quantized.to_dict()
        method = settings.get("quant_method", "unknown method")
        raise ConfigError(
            f"--model_name_or_path {name}: its weights are quantised ({method}), and W must be bf16, fp16 or fp32 to "
            f"be updated in its shards; give the model that it was made from"
        )
    head = next((a for a in getattr(config, "architectures", None) or [] if OTHER_HEADS.search(a)), None)
    if head is not None:
        raise ConfigError(
            f"--model_name_or_path {name}: is a {head}, which must be a causal language model; give one that predicts "
            f"the next token"
        )


def check_causal(name: str, model: Any) -> None:
    """Refuses a model in which a token sees those that follow it: it would read the answer that it is to give.

    transformers builds BERT and its kin as language models with nothing but a warning.

    Raises:
        ConfigError: no attention is causal.
    """
    causal = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if causal and not any(causal):
        raise ConfigError(
            f"--model_name_or_path {name}: in a {type(model).__name__} every token sees the whole text, the answer "
            f"included; it must be a causal language model"
        )
