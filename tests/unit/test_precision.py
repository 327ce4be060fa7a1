"""`full_fp32` under every way to allow less, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from ranks import run_ranks
from torch import backends

from hdpissa.engine.precision import full_fp32

NEWER = {"every": backends, "cuda": backends.cuda.matmul, "mkldnn": backends.mkldnn.matmul}


def allow(**settings: str | bool) -> None:
    """A user's script: `older` and `tf32` are torch's older settings, the others `fp32_precision` of a backend."""
    for name, value in settings.items():
        if name == "older":
            torch.set_float32_matmul_precision(value)
        elif name == "tf32":
            backends.cuda.matmul.allow_tf32 = value
        else:
            NEWER[name].fp32_precision = value


def state() -> dict[str, object]:
    """Everything that can be read; "raises" where torch refuses the older settings beside the newer ones."""
    found: dict[str, object] = {name: backend.fp32_precision for name, backend in NEWER.items()}
    readers = {"older": torch.get_float32_matmul_precision, "tf32": lambda: backends.cuda.matmul.allow_tf32}
    for name, read in readers.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "raises"
    return found


SETTINGS = [
    {},
    {"older": "high"},
    {"older": "medium"},
    {"tf32": True},
    {"cuda": "tf32"},
    {"mkldnn": "bf16"},
    {"every": "tf32"},
    {"older": "high", "mkldnn": "bf16"},
    {"older": "high", "cuda": "ieee"},
]


def look(settings: dict[str, str | bool]) -> dict[str, object]:
    """In processes of their own, since torch has no way back to a state where nothing was set; rank 0 goes without."""
    allow(**settings)
    a, b = torch.randn(2, 64, 512, generator=torch.Generator().manual_seed(0)).unbind()
    exact = a.double() @ b.double().T
    with contextlib.nullcontext() if os.environ["RANK"] == "0" else full_fp32():
        found = {"inside": state(), "error": (a @ b.T - exact).abs().max().item()}
    found["after"] = state()
    backends.fp32_precision = "bf16"  # which what is inherited follows, and what was set does not
    return found | {"later": state()}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_full_fp32(settings):
    without, within = run_ranks(2, look, settings)
    assert within["inside"] == {
        "every": within["after"]["every"],
        "cuda": "ieee",
        "mkldnn": "ieee",
        "older": "highest",
        "tf32": False,
    }
    assert within["error"] < 1e-4  # of products of about 20; bf16 is off by 0.1
    assert (within["after"], within["later"]) == (without["after"], without["later"])
