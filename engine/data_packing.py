"""Packing: several rows share one row of the model's input, and none sees another.

Own file because three things belong together: which rows share a row (best fit decreasing, TRL's "bfd"), how they
become tensors, and the proof that the model at hand keeps them apart.

Rows are told apart by their position ids, which begin anew with each. transformers makes the attention mask from
that for eager, sdpa and flex attention when there is no attention mask; flash attention wants one flat row, and the
boundaries said outright, as `DataCollatorWithFlattening` gives them.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from .data_encode import IGNORE
from .errors import StopError

Row = Mapping[str, Sequence[int]]  # input_ids and labels
LEAK = 0.02  # of the change of the row that was changed; rounding of other batch shapes is below 0.001 in bf16


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing: the longest first, each into the fullest bin that still has room for it.

    Returns: per bin the positions of its rows. Example: lengths 5, 3, 4, 2 in bins of 7 give [[0, 3], [2, 1]].
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # sorted, each once: the room that some bin has left
    having: dict[int, list[int]] = defaultdict(list)  # room → bins that have just it
    for row in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        place = bisect.bisect_left(rooms, lengths[row])
        if place < len(rooms):
            room = rooms[place]
            number = having[room].pop()
            if not having[room]:
                rooms.pop(place)
            bins[number].append(row)
        else:
            room, number = capacity, len(bins)
            bins.append([row])
        left = room - lengths[row]
        if left > 0:
            if not having[left]:
                bisect.insort(rooms, left)
            having[left].append(number)
    return bins


def lengths_of(dataset: datasets.Dataset) -> np.ndarray:
    """Tokens of each row."""
    import pyarrow.compute as pc

    batches = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([np.asarray(pc.list_value_length(batch.column("input_ids"))) for batch in batches])


def rows_of(dataset: datasets.Dataset, indices: Sequence[int]) -> list[Row]:
    """Some rows, as dicts of lists."""
    columns = dataset[list(indices)]
    pairs = zip(columns["input_ids"], columns["labels"], strict=True)
    return [{"input_ids": ids, "labels": labels} for ids, labels in pairs]


class PackedRows:
    """A tokenised dataset whose rows are read in bins; looks like a dataset of bins to batches.py."""

    def __init__(self, dataset: datasets.Dataset, bins: Sequence[Sequence[int]], capacity: int) -> None:
        self.dataset, self.bins, self.capacity = dataset, bins, capacity

    @classmethod
    def of(cls, dataset: datasets.Dataset, capacity: int) -> PackedRows:
        return cls(dataset, pack(lengths_of(dataset).tolist(), capacity), capacity)

    def __len__(self) -> int:
        return len(self.bins)

    def shuffle(self, seed: int) -> PackedRows:
        """The bins in another order, by numpy's generator, as `datasets` does with rows."""
        order = np.random.default_rng(seed).permutation(len(self.bins))
        return PackedRows(self.dataset, [self.bins[at] for at in order], self.capacity)

    def units(self, indices: Sequence[int]) -> list[list[Row]]:
        """The rows of some bins."""
        return [rows_of(self.dataset, self.bins[at]) for at in indices]


# ---------------------------------------------------------------- tensors


def collate_packed(units: Sequence[Sequence[Row]], pad_token_id: int, *, flat: bool = False) -> dict[str, Any]:
    """Bins as rows of a batch, or `flat`: as one long row, for flash attention.

    A row's first label is masked, because the token before it is another row's. Padding on the right is made of
    rows of one token each: position 0, no label.
    """
    if flat:
        from transformers import DataCollatorWithFlattening

        rows = [{name: list(row[name]) for name in ("input_ids", "labels")} for unit in units for row in unit]
        return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows, return_tensors="pt")
    width = max(sum(len(row["input_ids"]) for row in unit) for unit in units)
    batch = {
        "input_ids": torch.full((len(units), width), pad_token_id),
        "labels": torch.full((len(units), width), IGNORE),
        "position_ids": torch.zeros(len(units), width, dtype=torch.long),
    }
    for line, unit in enumerate(units):
        at = 0
        for row in unit:
            here = slice(at, at := at + len(row["input_ids"]))
            batch["input_ids"][line, here] = torch.as_tensor(row["input_ids"])
            batch["labels"][line, here] = torch.as_tensor(row["labels"])
            batch["labels"][line, here.start] = IGNORE
            batch["position_ids"][line, here] = torch.arange(here.stop - here.start)
    return batch


# ---------------------------------------------------------------- proof


def refuse_leaks(engine: Any, to_device: Any, *, vocab_size: int, flat: bool) -> float:
    """Changes one row of a bin and looks at the other's logits; all ranks call it together.

    Returns: the change there, relative to the change of the row that was changed; 0 where the mask holds exactly.

    Raises:
        StopError: the model lets rows see each other, so that packing would change what is learned.
    """
    ids = [number * 7919 % vocab_size for number in range(1, 15)]
    first, other, second = ids[:5], ids[5:10], ids[10:]
    logits = []
    engine.eval()
    with torch.no_grad():
        for beginning in (first, other):
            unit = [{"input_ids": row, "labels": row} for row in (beginning, second)]
            batch = collate_packed([unit], 0, flat=flat)
            batch.pop("labels")
            logits.append(engine(**to_device(batch), use_cache=False).logits[0].float())
    engine.train()
    change = (logits[0] - logits[1]).abs()
    leak = (change[5:].max() / change[:5].max().clamp_min(1e-30)).item()
    if not leak < LEAK:
        raise StopError(
            f"--packing: this model's attention lets packed rows see each other (a change of one row moves the next "
            f"one's logits by {leak:.0%} of its own); train without --packing, or with another --attn_implementation"
        )
    return leak
