"""Turns the libraries' errors about the Hugging Face hub into one problem and one remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

MOST = 200  # characters of a library's own words
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


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
    if any(isinstance(e, errors.LocalEntryNotFoundError | ConnectionError) for e in found):
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
