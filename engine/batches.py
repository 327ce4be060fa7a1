"""Which sample goes to which slice, and how samples become tensors.

Own file because this order is part of the method: it is a function of (seed,
step, slice, micro-batch) and of nothing else. No class here but EvalBatches
knows a rank or a world size; engine/slicing.py says which rank asks for which
slice's micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import datasets
import torch

from . import pulse
from .data import IGNORE
from .errors import ConfigError


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest: three int64 tensors of shape (rows, longest).

    attention_mask is 1 over a row's real length, also where the pad token is a
    real token of the row (pad is often EOS); labels are padded with -100.
    """
    width = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), width), pad_token_id, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORE, dtype=torch.long),
    }
    for position, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][position, :length] = torch.as_tensor(row["input_ids"])
        batch["attention_mask"][position, :length] = 1
        batch["labels"][position, :length] = torch.as_tensor(row["labels"])
    return batch


def count_target_tokens(labels: torch.Tensor) -> int:
    """How many tokens of (rows, length) labels are predicted: a causal model never predicts the first."""
    return int((labels[:, 1:] != IGNORE).sum())


class SliceBatches:
    """Training batches by (step, slice, micro-batch); the same at every world size.

    The dataset is shuffled once, by `dataset.shuffle(seed=seed)`, and **every
    epoch runs through that same order**, as in the reference. With S slices,
    slice i's stream is samples i, i+S, i+2S, … of the shuffled dataset. Its
    micro-batch j in step t of an epoch is rows [(t·M + j)·micro, +micro) of its
    stream, M being `micro_batches_per_slice` of one optimizer step. What does
    not fill a whole step at the end of an epoch is left out (`dropped_samples`).

    Example: 8 samples, S = 2, M = 2, micro = 1 gives 2 steps an epoch; in step 1
    slice 0 gets shuffled samples 4 and 6, slice 1 gets 5 and 7.

    Raises ConfigError if a size is below 1 or an epoch has not one whole step.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        slices: int,
        micro_batches_per_slice: int,
        micro_batch_size: int,
        seed: int,
        pad_token_id: int,
    ) -> None:
        sizes = {
            "slices": slices,
            "micro_batches_per_slice": micro_batches_per_slice,
            "micro_batch_size": micro_batch_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        global_batch = slices * micro_batches_per_slice * micro_batch_size
        self.steps_per_epoch = len(dataset) // global_batch
        self.dropped_samples = len(dataset) - self.steps_per_epoch * global_batch
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"the global batch is {global_batch} samples but the dataset has only {len(dataset)}; "
                f"lower the accumulation steps or the micro-batch size, or add samples"
            )
        self.slices = slices
        self.micro_batches_per_slice = micro_batches_per_slice
        self.micro_batch_size = micro_batch_size
        self.pad_token_id = pad_token_id
        self.dataset = dataset.shuffle(seed=seed)

    def sample_indices(self, step: int, slice_id: int, micro_batch: int) -> list[int]:
        """Positions in the shuffled dataset; `step` counts from the start of the run.

        Raises IndexError for a slice or micro-batch that does not exist.
        """
        exists = 0 <= slice_id < self.slices and 0 <= micro_batch < self.micro_batches_per_slice
        if step < 0 or not exists:
            raise IndexError(f"no micro-batch {micro_batch} of slice {slice_id} in step {step}")
        step_in_epoch = step % self.steps_per_epoch
        first = (step_in_epoch * self.micro_batches_per_slice + micro_batch) * self.micro_batch_size
        return [slice_id + self.slices * row for row in range(first, first + self.micro_batch_size)]

    def batch(self, step: int, slice_id: int, micro_batch: int) -> dict[str, torch.Tensor]:
        """The tensors of `collate` for one micro-batch."""
        pulse.reach("step.data")
        return _gather(self.dataset, self.sample_indices(step, slice_id, micro_batch), self.pad_token_id)


class EvalBatches:
    """Every row once, dealt round-robin to the ranks, with equally many batches on each.

    Under ZeRO-3 each forward is a collective, so a rank that has run out of rows
    must still take part. It gets a batch of one repeated row, marked not real:
    its labels are that row's own, so that the mean loss is finite, and the
    caller multiplies by zero. A rank's last real batch may be smaller.

    Iterating yields (batch, real); `len()` is the number of batches. Raises
    ConfigError for an empty dataset or a batch size below 1.
    """

    def __init__(
        self, dataset: datasets.Dataset, *, rank: int, world_size: int, batch_size: int, pad_token_id: int
    ) -> None:
        if len(dataset) == 0:
            raise ConfigError("the evaluation dataset has no rows; give one with rows, or do not evaluate")
        if batch_size < 1:
            raise ConfigError(f"the evaluation batch size is {batch_size}; it must be at least 1")
        self.dataset = dataset
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.rows = range(rank, len(dataset), world_size)
        longest_share = -(-len(dataset) // world_size)
        self.batches = -(-longest_share // batch_size)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
        for number in range(self.batches):
            mine = list(self.rows[number * self.batch_size : (number + 1) * self.batch_size])
            yield _gather(self.dataset, mine or [0], self.pad_token_id), bool(mine)


def _gather(dataset: datasets.Dataset, indices: list[int], pad_token_id: int) -> dict[str, torch.Tensor]:
    columns = dataset[indices]
    pairs = zip(columns["input_ids"], columns["labels"], strict=True)
    return collate([{"input_ids": ids, "labels": labels} for ids, labels in pairs], pad_token_id)
