"""Factors, flat ranges and shards for the tests of the kernels that make and apply deltas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from tensors import BF16, DEVICE, randn

from hdpissa.kernels import reference

FORMS = ["split", "master and half", "alone"]
GUARD = 8  # elements on either side of a shard that no kernel may touch


@dataclass(frozen=True)
class Case:
    """A delta on a flat range: Q slices' ranks side by side, I columns, elements [start, start + numel)."""

    Q: int
    cols: int
    start: int
    numel: int
    second_order: bool = True
    wire: torch.dtype = torch.float32
    seed: int = 0
    sizes: tuple[float, float, float, float] = (2e-5, 2e-5, 0.1, 0.1)  # of ΔA, ΔB, A, B

    @property
    def rows(self) -> int:
        return -(-(self.start % self.cols + self.numel) // self.cols)

    def factors(self) -> list[torch.Tensor]:
        """ΔA, ΔB, A, B; the deltas in the wire's dtype."""
        shapes = ((self.Q, self.cols), (self.rows, self.Q)) * 2
        made = [
            (randn(*shape, seed=4 * self.seed + n) * size).float().to(DEVICE)
            for n, (shape, size) in enumerate(zip(shapes, self.sizes, strict=True))
        ]
        return [made[0].to(self.wire), made[1].to(self.wire), made[2], made[3]]

    @property
    def where(self) -> dict:
        return {"start": self.start, "second_order": self.second_order}

    def truth(self) -> torch.Tensor:
        """D in float64, of the factors as they are."""
        doubles = [f.cpu().double() for f in self.factors()]
        return reference.dense_delta(*doubles, numel=self.numel, dtype=torch.float64, **self.where)


@st.composite
def cases(draw) -> Case:
    """Ranges that begin and end anywhere, Q around the blocks, one column to several tiles."""
    cols = draw(st.sampled_from([1, 5, 31, 64, 127, 129, 200]))
    start = draw(st.integers(0, 3 * cols))
    numel = draw(st.sampled_from([1, cols, max(1, cols - 1), 3 * cols + 1, 70 * cols + cols // 2]))
    return Case(
        Q=draw(st.sampled_from([1, 2, 15, 16, 17, 32, 33, 64, 100])),
        cols=cols,
        start=start,
        numel=numel,
        second_order=draw(st.booleans()),
        wire=draw(st.sampled_from([torch.float32, BF16])),
        seed=draw(st.integers(0, 3)),
    )


class HeldShard:
    """A shard in one of its three forms, inside larger buffers whose ends must stay as they are."""

    def __init__(self, exact: torch.Tensor, form: str) -> None:
        self.form = form
        exact = exact.to(DEVICE)
        high, low = reference.split_fp32(exact)
        whole = {"split": (high, low), "master and half": (exact, high), "alone": (exact,)}[form]
        self._around = [torch.cat([t[:1].expand(GUARD), t, t[:1].expand(GUARD)]).clone() for t in whole]
        self._before = [t.clone() for t in self._around]
        self.bad = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        return tuple(t[GUARD:-GUARD] for t in self._around)

    def exact(self) -> torch.Tensor:
        """The fp32 values, and a check that the half agrees with them and that nothing else was written."""
        for now, before in zip(self._around, self._before, strict=True):
            ends = torch.cat([now[:GUARD], now[-GUARD:]]), torch.cat([before[:GUARD], before[-GUARD:]])
            assert torch.equal(*(integers(e) for e in ends)), "written beyond the shard"
        parts = tuple(p.contiguous() for p in self.parts)
        if self.form == "split":
            return reference.merge_fp32(*parts)
        if self.form == "master and half":
            assert torch.equal(integers(parts[1]), integers(reference.split_fp32(parts[0])[0]))
        return parts[0]


def integers(t: torch.Tensor) -> torch.Tensor:
    """Bit patterns: as floats a NaN would differ from itself, and −0 equal +0."""
    return t.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def patterns() -> torch.Tensor:
    """fp32 numbers of every class: zeros, subnormals, ties, the largest, infinities, NaN with odd payloads."""
    low = [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    upper = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3F81, 0x4049, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF]
    bits = [(sign | u) << 16 | v for sign in (0, 0x8000) for u in upper for v in low]
    random = torch.randint(-(2**31), 2**31, (2000,), generator=torch.Generator().manual_seed(5))
    return torch.cat([torch.tensor(bits), random]).to(torch.int32).view(torch.float32)
