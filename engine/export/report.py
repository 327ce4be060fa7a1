"""The report of an export, as it is printed and as `hdpissa_export.json` has it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Residual:
    """How far the trained model's change ΔW is from the adapter's, in Frobenius norms relative to ‖ΔW‖.

    Attributes:
        overall: over all weights together. worst, worst_target: the largest of a single weight, and whose.
        floor: what the rounding of fp32 weights in each step alone is expected to leave, overall: an estimate.
    """

    overall: float
    worst: float
    worst_target: str
    floor: float

    def __str__(self) -> str:
        return (
            f"residual {self.overall:.1e} of the change of W (worst {self.worst:.1e}: {self.worst_target}; rounding of "
            f"fp32 weights alone is estimated to leave {self.floor:.1e})"
        )


@dataclass(frozen=True)
class ExportReport:
    """What an export has written.

    Attributes:
        format: "hf" or "peft". dtype: of its weights. nbytes: of the tensor files.
        r: of an adapter, components per weight (the most frequent number).
        residual: of an adapter, measured from the written file; None where it could not be, and `unknown` says why.
        truncation: of an adapter cut to a smaller rank, what that left out, relative to the whole adapter.
        step: optimizer steps that the weights have behind them, skipped ones included.
    """

    format: str
    folder: str
    dtype: str
    nbytes: int
    r: int | None = None
    residual: Residual | None = None
    unknown: str = ""
    truncation: float | None = None
    step: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is infinite or not a number becomes null."""
        content = asdict(self)
        residual = content["residual"] or {}
        bad = [k for k, v in residual.items() if isinstance(v, float) and not math.isfinite(v)]
        return {k: v for k, v in content.items() if k != "folder"} | {"residual": residual | dict.fromkeys(bad) or None}

    def __str__(self) -> str:
        text = f"{self.folder}: {self.format} export in {self.dtype}, {self.nbytes / 1e6:.1f} MB, verified"
        if self.format == "hf":
            return text
        text += f"; adapter of rank {self.r}, "
        text += str(self.residual) if self.residual else f"residual unknown: {self.unknown}"
        return text + ("" if self.truncation is None else f"; cutting the rank left out {self.truncation:.1e}")
