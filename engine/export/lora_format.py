"""The format of a PEFT LoRA adapter, written without PEFT: tensor names, configuration, and the cut to a smaller rank.

A_i and B_i never change, so to first order a run changes a weight by  −s · Σ_i (ΣΔB_i A_i + B_i ΣΔA_i).  PEFT computes
W + (lora_alpha / r) · lora_B lora_A.  Hence, slice by slice,

    lora_A = [A_i ; −ΣΔA_i]  (2·R·S × I)        lora_B = [−ΣΔB_i | B_i]  (O × 2·R·S)        lora_alpha / r = s

and stock PEFT on the unmodified base gives the trained model, up to the sum of the steps' second-order terms, which
`residual` measures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraWeight:
    """One weight of an adapter.

    Attributes:
        names: module names of all Linears that share it; the adapter names each.
        rows, cols: O and I of the Linear.
        r: components of its pair, 2·R·S or fewer after a cut.
        scale: s, multiplies the product.
        transposed: whether the model stores the matrix as I × O (Conv1D); the pair is a Linear's nevertheless.
    """

    names: tuple[str, ...]
    rows: int
    cols: int
    r: int
    scale: float
    transposed: bool = False

    def cut(self, r: int) -> LoraWeight:
        """The same with at most `r` components, and no more than the matrix has."""
        return replace(self, r=min(r, self.r, self.rows, self.cols))

    @property
    def alpha(self) -> int | float:
        """lora_alpha; an integer where it is one, as some servers require."""
        alpha = self.scale * self.r
        return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha


def key_A(name: str) -> str:
    return f"base_model.model.{name}.lora_A.weight"


def key_B(name: str) -> str:
    return f"base_model.model.{name}.lora_B.weight"


# --- configuration --------------------------------------------------------------------------------


def adapter_config(weights: Sequence[LoraWeight], modules: Iterable[str], base: str) -> dict[str, Any]:
    """adapter_config.json as `peft.LoraConfig` reads it; keys that are left out have PEFT's defaults.

    Args:
        modules: names of all modules of the model. A suffix stands for all modules that end so only where all of them
            are in the adapter.
        base: name or folder of the unmodified model.
    """
    by_name = {name: weight for weight in weights for name in weight.names}
    suffixes = {_suffix(n) for n in by_name} - {_suffix(m) for m in modules if m not in by_name}
    (r, alpha), _ = Counter((w.r, w.alpha) for w in by_name.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": _keys(dict.fromkeys(by_name, True), True, suffixes),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _pattern({n: w.r for n, w in by_name.items()}, r, suffixes),
        "alpha_pattern": _pattern({n: w.alpha for n, w in by_name.items()}, alpha, suffixes),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(w.transposed for w in weights),
        "use_rslora": False,
        "use_dora": False,
    }


def _suffix(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _keys(values: dict[str, Any], value: Any, suffixes: set[str]) -> list[str]:
    """Keys for exactly the modules with this value: a suffix where all that end so have it, full names elsewhere."""
    mixed = {_suffix(n) for n, v in values.items() if v != value}
    return sorted({s if (s := _suffix(n)) in suffixes - mixed else n for n, v in values.items() if v == value})


def _pattern(values: dict[str, Any], default: Any, suffixes: set[str]) -> dict[str, Any]:
    """What differs from the default, for PEFT's rank_pattern and alpha_pattern."""
    others = sorted({v for v in values.values() if v != default})
    return {key: value for value in others for key in _keys(values, value, suffixes)}


# --- a smaller rank --------------------------------------------------------------------------------


@dataclass
class Truncation:
    """What cutting has left out: sums of squared singular values, over all weights so far."""

    dropped: float = 0.0
    whole: float = 0.0

    @property
    def relative(self) -> float:
        return (self.dropped / self.whole) ** 0.5 if self.whole else 0.0


def truncate(lora_A: Tensor, lora_B: Tensor, r: int, *, scale: float, tail: Truncation) -> tuple[Tensor, Tensor]:
    """The best pair of r components for scale · lora_B lora_A, float64: QR of both factors and a small SVD.

    The matrix itself is never formed. Both factors get the square roots of the singular values.
    """
    Q_A, R_A = torch.linalg.qr(lora_A.double().T)
    Q_B, R_B = torch.linalg.qr(lora_B.double())
    U, sigma, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    tail.dropped += scale**2 * sigma[r:].square().sum().item()
    tail.whole += scale**2 * sigma.square().sum().item()
    root = sigma[:r].sqrt()
    return root[:, None] * (Vt[:r] @ Q_A.T), (Q_B @ U[:, :r]) * root
