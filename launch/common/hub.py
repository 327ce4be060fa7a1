"""Names of models and datasets: paths here or repositories on the Hugging Face hub, and what can be wrong with them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from hdpissa.engine.errors import ConfigError

T = TypeVar("T")
PROBE_S = 10.0  # for the one request that tells whether the hub has a model
MOST = 200  # characters of a library's own words
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def is_path(name: str) -> bool:
    """Whether a name stands for a file or folder, existing or not, and not for a repository on the hub (OWNER/NAME)."""
    like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".json", ".jsonl"))
    return like_a_path or os.path.exists(os.path.expanduser(name))


def check_path(option: str, name: str) -> None:
    """Raises ConfigError for a path at which there is nothing; a name that is none passes."""
    if is_path(name) and not os.path.exists(os.path.expanduser(name)):
        raise ConfigError(f"{option} {name}: no such file or folder; give one that exists, or a hub name OWNER/NAME")


def check_model(option: str, name: str) -> None:
    """Raises ConfigError, after at most one request, for a model that is neither here nor on the hub.

    The libraries would retry for half a minute.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    check_path(option, name)
    if is_path(name) or constants.HF_HUB_OFFLINE:
        return
    files = ("config.json", "adapter_config.json")
    if not reading(option, name, lambda: any(isinstance(try_to_load_from_cache(name, file), str) for file in files)):
        reading(option, name, lambda: HfApi().model_info(name, timeout=PROBE_S))


def reading(option: str, name: str, read: Callable[[], T], remedy: str = "give another one") -> T:
    """What `read` returns; whatever goes wrong in it, a damaged file or the hub, is a ConfigError with this remedy."""
    try:
        return read()
    except Exception as error:
        problem, remedy = (None if os.path.exists(os.path.expanduser(name)) else explain(error)) or (
            reason(error),
            remedy,
        )
        raise ConfigError(f"{option} {name}: cannot be used ({problem}); {remedy}") from error


def explain(error: BaseException) -> tuple[str, str] | None:
    """(what is wrong, the remedy) where a name on the hub could not be had; None for any other error."""
    from huggingface_hub import errors

    found = list(_causes(error))
    if any(isinstance(e, errors.GatedRepoError) for e in found):
        return "it is only for those who have accepted the conditions on its page", "accept them, then hf auth login"
    if any(isinstance(e, errors.RevisionNotFoundError) for e in found):
        return "the hub has no such revision of it", "check the name of the branch, tag or commit"
    if any(isinstance(e, errors.HFValidationError) for e in found):
        return "on the hub a name is OWNER/NAME", "give a folder, or such a name"
    missing = errors.RepositoryNotFoundError
    if any(isinstance(e, missing) or type(e).__name__ == "DatasetNotFoundError" for e in found):
        return "the hub has nothing of this name, or it is private", "check the name, or hf auth login"
    unreachable = ("ConnectionError", "TransportError", "LocalEntryNotFoundError")  # Python's, httpx's, the hub's
    if any(base.__name__ in unreachable for e in found for base in type(e).__mro__):
        offline = next((f", as {name} is set" for name in OFFLINE if os.environ.get(name, "0") not in ("0", "")), "")
        return (
            f"it is not in this machine's cache, and the hub was not reached{offline}",
            "check name and network, or give a folder",
        )
    return None


def reason(error: BaseException) -> str:
    """The first sentences of an error message, on one line; of one long sentence its beginning, and that it goes on."""
    text = " ".join(str(error).split())
    if len(text) > MOST:
        ends = [found.end() for found in re.finditer(r"[.!?](?= )", text[: MOST + 1])]
        text = text[: ends[-1]] if ends else text[:MOST].rsplit(" ", 1)[0] + " …"
    return text.rstrip(".")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """It, and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
