"""The order of a run's rows under accelerate, so that what a slice learns from does not depend on the number of ranks.

accelerate gives rank k the batches k, k + K, k + 2K, … of a sampler. So batch m·K + k of a step has to be what rank k
works off m-th (`SlicePlan.schedule`): micro-batch j of slice i, rows i, i + S, i + 2·S, … of the shuffled dataset.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, Sampler

from hdpissa.engine.errors import ConfigError
from hdpissa.engine.slicing import SlicePlan


class SliceOrder:
    """Where the rows of one optimizer step go.

    Args:
        plan: slices and ranks.
        accumulation: micro-batches of a rank and step. micro: rows of a micro-batch.

    Attributes:
        rows: of a step.
    """

    def __init__(self, plan: SlicePlan, accumulation: int, micro: int) -> None:
        per_slice = plan.micro_batches_per_slice(accumulation)
        self.rows = plan.slices * per_slice * micro
        schedules = [SlicePlan(plan.slices, plan.world_size, k).schedule(accumulation) for k in range(plan.world_size)]
        self.places = [
            i + plan.slices * row
            for turn in zip(*schedules, strict=True)
            for i, j in turn
            for row in range(j * micro, (j + 1) * micro)
        ]

    def __call__(self, rows: list[Any]) -> Iterator[Any]:
        """The rows of a step as accelerate is to deal them; `rows` in shuffled order."""
        return (rows[place] for place in self.places)


class SliceSampler(Sampler):
    """Row numbers of a dataset, every epoch alike: shuffled once, by the permutation of `Dataset.shuffle(seed)`.

    Rows that fill no whole step are left out; `dropped` counts them.

    Args:
        seed: None leaves the rows as they are.

    Raises:
        ConfigError: there are fewer rows than a step takes.
    """

    def __init__(self, rows: int, order: SliceOrder, seed: int | None) -> None:
        self._order, self.steps = order, rows // order.rows
        self.dropped = rows - self.steps * order.rows
        if self.steps == 0:
            left_out = "" if rows else " (TRL leaves out rows whose prompt alone fills max_length)"
            raise ConfigError(
                f"an optimizer step takes {order.rows} rows and the dataset has {rows}{left_out}: lower "
                f"gradient_accumulation_steps or per_device_train_batch_size, or add rows"
            )
        self._shuffled = np.arange(rows) if seed is None else np.random.default_rng(seed).permutation(rows)

    def __len__(self) -> int:
        return self.steps * self._order.rows

    def __iter__(self) -> Iterator[int]:
        for step in range(self.steps):
            yield from self._order(self._shuffled[step * self._order.rows :][: self._order.rows].tolist())


class SliceStream(IterableDataset):
    """A stream whose rows are reordered step by step; an incomplete last step is left out."""

    def __init__(self, dataset: Any, order: SliceOrder) -> None:
        self.dataset, self._order = dataset, order

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        held: list[Any] = []
        for row in self.dataset:
            held.append(row)
            if len(held) == self._order.rows:
                yield from self._order(held)
                held = []
