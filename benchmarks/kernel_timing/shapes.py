"""The Linear shapes of two Llamas. No GPU, no torch.

A decoder layer reads four different inputs: the attention norm's (q, k and v share it), the attention's
own output (o), the MLP norm's (gate and up share it) and the gated activations (down).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Linear's weight: rows = out_features, cols = in_features."""

    name: str
    rows: int
    cols: int


@dataclass(frozen=True)
class Group:
    """Linears of one decoder layer that read the same input."""

    name: str
    members: tuple[Shape, ...]


def groups(model: str, hidden: int, intermediate: int, kv: int) -> tuple[Group, ...]:
    def group(**sizes: tuple[int, int]) -> Group:
        members = tuple(Shape(f"{model} {name}", *size) for name, size in sizes.items())
        return Group(f"{model} {','.join(sizes)}", members)

    return (
        group(q=(hidden, hidden), k=(kv, hidden), v=(kv, hidden)),
        group(o=(hidden, hidden)),
        group(gate=(intermediate, hidden), up=(intermediate, hidden)),
        group(down=(hidden, intermediate)),
    )


def distinct(groups: tuple[Group, ...]) -> tuple[Shape, ...]:
    """Each size once, under the name of the first Linear that has it."""
    first: dict[tuple[int, int], Shape] = {}
    for shape in (shape for group in groups for shape in group.members):
        first.setdefault((shape.rows, shape.cols), shape)
    return tuple(first.values())


LLAMA_2_7B = groups("llama-2-7b", 4096, 11008, 4096)
LLAMA_3_70B = groups("llama-3-70b", 8192, 28672, 1024)
