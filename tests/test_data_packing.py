"""Packed rows do not see each other, weigh what they should, and come in an order that nothing else decides."""

from __future__ import annotations

from itertools import chain, pairwise
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from data_cases import CHAT, ROWS, TURNS, character_tokenizer, marked
from hypothesis import given, settings
from hypothesis import strategies as some
from tiny import tiny_llama

from hdpissa.engine.batches import SliceBatches, collate
from hdpissa.engine.data import Encoding
from hdpissa.engine.data_formats import Fields, recognise
from hdpissa.engine.data_packing import PackedRows, collate_packed, lengths_of, pack, refuse_leaks
from hdpissa.engine.data_stream import StreamBatches, encode_stream
from hdpissa.engine.engine import _count_tokens
from hdpissa.engine.errors import ConfigError, StopError
from hdpissa.launch.train_data import record_stream

VOCABULARY = 61
SIZES = {"slices": 2, "micro_batches_per_slice": 2, "micro_batch_size": 2, "pad_token_id": 0}


def make_rows(count: int, seed: int = 0) -> datasets.Dataset:
    """Rows of 3 to 12 tokens, of which the first one or two carry no loss; the first token is the row's number."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = [number, *generator.integers(0, VOCABULARY, generator.integers(2, 12)).tolist()]
        masked = int(generator.integers(1, 3))
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return datasets.Dataset.from_list(rows)


# --- which rows share a row ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(some.lists(some.integers(1, 20), min_size=1, max_size=80))
def test_bins(lengths):
    """Every row once, no bin too full, and never two bins that would fit into one: less than twice the least."""
    bins = pack(lengths, 20)
    assert sorted(row for one in bins for row in one) == list(range(len(lengths)))
    loads = sorted(sum(lengths[row] for row in one) for one in bins)
    assert loads[-1] <= 20
    assert len(loads) < 2 or loads[0] + loads[1] > 20
    assert pack(lengths, 20) == bins


def test_worked_example_of_pack():
    assert pack([5, 3, 4, 2], 7) == [[0, 3], [2, 1]]


# --- no attention across rows ----------------------------------------------------------------------


def gpt2():
    """Absolute positions: wrong position ids would show, which rotary embeddings could hide."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=20, n_layer=2, n_head=2, n_positions=64, use_cache=False)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return model


def token_losses(model, batch) -> dict[tuple[int, ...], list[float]]:
    """A row's ids → the losses of its target tokens, in fp32."""
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    found = {}
    for line, ids in enumerate(batch["input_ids"]):
        if "position_ids" in batch:
            starts = [*(batch["position_ids"][line] == 0).nonzero().flatten().tolist(), len(ids)]
        else:
            starts = [0, int(batch["attention_mask"][line].sum())]
        for start, stop in pairwise(starts):
            if stop - start > 1:  # padding is rows of one token
                kept = labels[line, start + 1 : stop] != -100
                found[tuple(ids[start:stop].tolist())] = losses[line, start : stop - 1][kept].tolist()
    return found


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("family", ["llama eager", "llama sdpa", "gpt2 eager", "gpt2 sdpa"])
def test_packed_losses_are_those_of_rows_alone(family, flat):
    """Token by token, in fp32: 1e-5 is asked for. Both layouts, in two families, by both kinds of mask."""
    rows, (kind, attention) = make_rows(24), family.split()
    model = gpt2() if kind == "gpt2" else tiny_llama().eval()
    model.set_attn_implementation(attention)
    alone = {}
    for row in rows:
        alone |= token_losses(model, collate([row], 0))
    packed = PackedRows.of(rows, 30)
    assert len(packed) < 10
    together = {}
    for first in range(0, len(packed), 3):
        units = packed.units(range(first, min(first + 3, len(packed))))
        together |= token_losses(model, collate_packed(units, 0, flat=flat))
    assert together.keys() == alone.keys()
    for row, losses in alone.items():
        assert together[row] == pytest.approx(losses, abs=1e-5)


def test_flat_rows_tell_flash_attention_where_rows_end():
    """What flash attention is told cannot be run without a GPU; it is what transformers' own collator says."""
    units = PackedRows.of(make_rows(5), 20).units([0, 1])
    batch = collate_packed(units, 0, flat=True)
    lengths = [len(row["input_ids"]) for unit in units for row in unit]
    assert batch["cu_seq_lens_q"].tolist() == [0, *np.cumsum(lengths)]
    assert batch["max_length_k"] == max(lengths)
    assert batch["input_ids"].shape == (1, sum(lengths))
    assert "attention_mask" not in batch


def test_tokens_are_counted_without_padding():
    units = [[{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2, [{"input_ids": [4, 5], "labels": [4, 5]}]]
    batch = collate_packed(units, 7)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 1, 2, 3], [4, 5, 7, 7, 7, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 2, 3], [-100, 5, -100, -100, -100, -100]]
    assert _count_tokens(batch) == 8
    assert _count_tokens(collate_packed(units, 7, flat=True)) == 8


class WithoutPositions(torch.nn.Module):
    """A model that numbers its tokens itself, and so sees one row where there are several."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, **others):
        return self.model(input_ids, use_cache=False)


def test_a_model_that_lets_packed_rows_see_each_other_is_refused():
    model = tiny_llama()
    assert refuse_leaks(model, dict, vocab_size=VOCABULARY, flat=False) == 0
    assert model.training
    with pytest.raises(StopError, match="lets packed rows see each other"):
        refuse_leaks(WithoutPositions(model), dict, vocab_size=VOCABULARY, flat=False)


# --- order -----------------------------------------------------------------------------------------


def numbers(batches, steps) -> dict[tuple[int, int, int], list[int]]:
    places = [(step, i, j) for step in range(steps) for i in range(2) for j in range(2)]
    return {at: [row["input_ids"][0] for unit in batches.units(*at) for row in unit] for at in places}


def test_packed_batches_have_every_row_once_and_the_same_number_for_every_slice():
    batches = SliceBatches(PackedRows.of(make_rows(100), 24), **SIZES, seed=1)
    seen = numbers(batches, batches.steps_per_epoch)
    rows = [row for found in seen.values() for row in found]
    assert len(rows) == len(set(rows))
    assert len(rows) >= 100 - 8 * batches.dropped_samples
    assert batches.steps_per_epoch == len(batches.dataset) // 8
    assert numbers(SliceBatches(PackedRows.of(make_rows(100), 24), **SIZES, seed=1), 2) == numbers(batches, 2)
    assert numbers(SliceBatches(PackedRows.of(make_rows(100), 24), **SIZES, seed=2), 2) != numbers(batches, 2)
    assert numbers(batches, 1)[0, 1, 1] == numbers_of_step(batches, batches.steps_per_epoch)  # epochs are alike


def numbers_of_step(batches, step) -> list[int]:
    return [row["input_ids"][0] for unit in batches.units(step, 1, 1) for row in unit]


def test_grouping_by_length_changes_only_the_order():
    rows = make_rows(200)
    plain, grouped = (SliceBatches(rows, **SIZES, seed=1, group_by_length=by) for by in (False, True))
    lengths = dict(zip(range(200), lengths_of(rows).tolist(), strict=True))
    both = [numbers(batches, batches.steps_per_epoch) for batches in (plain, grouped)]
    assert sorted(chain.from_iterable(both[0].values())) == sorted(chain.from_iterable(both[1].values()))

    def waste(found) -> int:
        """Tokens of padding, all slices waiting for the longest row of their micro-batch."""
        columns = [found[step, 0, j] + found[step, 1, j] for step in range(plain.steps_per_epoch) for j in range(2)]
        return sum(max(lengths[row] for row in column) * 4 - sum(lengths[row] for row in column) for column in columns)

    assert waste(both[1]) < waste(both[0]) / 5
    means = [
        np.mean([lengths[row] for (at, _, _), own in both[1].items() if at == step for row in own])
        for step in range(25)
    ]
    assert abs(np.corrcoef(range(25), means)[0, 1]) < 0.5  # steps do not go from long to short
    assert plain.identity()["tokens"] == grouped.identity()["tokens"]
    assert plain.identity()["order"] != grouped.identity()["order"]


# --- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_weigh_as_in_one_large_batch(packed):
    """The gradient of a slice's step, its micro-batches weighted, is that of all its rows at once, in float64."""
    rows = make_rows(40)
    batches = SliceBatches(PackedRows.of(rows, 24) if packed else rows, **SIZES, seed=3)
    model = tiny_llama(dtype=torch.float64)
    gradients = []
    for weighted in (True, False):
        model.zero_grad()
        for micro_batch in range(2):
            at = 0, 1, micro_batch
            weight = batches.loss_weight(*at) if weighted else 1.0
            (model(**batches.batch(*at), use_cache=False).loss.double() * weight / 2).backward()
        gradients.append(flat_gradient(model))
    units = [unit for micro_batch in range(2) for unit in batches.units(0, 1, micro_batch)]
    large = collate([row for unit in units for row in unit], 0)
    model.zero_grad()
    model(**large, use_cache=False).loss.double().backward()
    expected = flat_gradient(model)
    # the loss itself is computed in fp32 by transformers, so its gradient is exact to fp32
    assert (gradients[0] - expected).norm() < 1e-6 * expected.norm()
    assert (gradients[1] - expected).norm() > 1e-2 * expected.norm()
    assert sum(batches.loss_weight(0, 1, j) for j in range(2)) == pytest.approx(2, abs=1e-12)


def flat_gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# --- streams ---------------------------------------------------------------------------------------


def stream_batches(rows, *, steps=50, seed=1, buffer_size=10, **options) -> StreamBatches:
    """Texts of the letters a, b, c, … as a stream: batches of their tokens."""
    limit = options.get("capacity") or 100
    encoding = Encoding(
        recognise({"text": ""}, Fields()), "", None, "everything", limit, options.pop("truncation", "truncate")
    )
    stream = encode_stream(
        rows.to_iterable_dataset(),
        character_tokenizer(),
        encoding,
        columns=["text"],
        seed=seed,
        buffer_size=buffer_size,
    )
    law = encoding.truncation == "error"
    return StreamBatches(stream, sizes=SIZES, steps=steps, seed=seed, max_length_is_law=law, **options)


def letters(count: int) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"text": chr(48 + i) * (i % 7 + 1)} for i in range(count)])


def ordered(batches, steps) -> list[str]:
    return [
        chr(row["input_ids"][1] - 3)
        for step in range(steps)
        for j in range(2)
        for row_in_slice in range(2)
        for slice_id in range(2)
        for row in batches.units(step, slice_id, j)[row_in_slice]
    ]


def test_a_stream_is_shuffled_by_the_seed_and_begins_anew_in_the_same_order():
    batches = stream_batches(letters(20))
    epoch = ordered(batches, 2)
    assert len(set(epoch)) == 16  # of 20 rows two steps of 8; four fill none and are left out
    assert epoch != sorted(epoch)
    assert [batches.units(step, 0, 0) for step in (2, 4)] == [stream_batches(letters(20)).units(0, 0, 0)] * 2
    assert batches.passes == 2
    assert ordered(stream_batches(letters(20)), 2) == epoch
    assert ordered(stream_batches(letters(20), seed=2), 2) != epoch
    assert ordered(stream_batches(letters(20), buffer_size=1), 2) == [chr(48 + i) for i in range(16)]
    assert batches.identity() == stream_batches(letters(20)).identity()
    assert batches.identity() != stream_batches(letters(20).select(range(1, 20))).identity()


def test_a_resumed_stream_goes_on_where_it_was():
    """At any step, and back again: what is read in between is left away."""
    once = stream_batches(letters(40))
    expected = [once.units(step, 1, 0) for step in range(7)]
    assert stream_batches(letters(40)).units(5, 1, 0) == expected[5]
    assert once.units(2, 1, 0) == expected[2]


def test_a_packed_stream():
    batches = stream_batches(letters(60), capacity=12)
    bins = [unit for step in range(2) for i in range(2) for j in range(2) for unit in batches.units(step, i, j)]
    assert max(len(unit) for unit in bins) > 1
    assert all(sum(len(row["input_ids"]) for row in unit) <= 12 for unit in bins)
    assert "position_ids" in batches.batch(0, 0, 0)
    assert batches.loss_weight(0, 0, 0) + batches.loss_weight(0, 0, 1) == pytest.approx(2)


def test_streams_that_end_a_run():
    with pytest.raises(ConfigError, match="global batch is 8 samples but the dataset has only 7"):
        stream_batches(letters(7))
    rows = datasets.concatenate_datasets([letters(20), datasets.Dataset.from_list([{"text": "x" * 150}])])
    late = stream_batches(rows, truncation="error", buffer_size=1)
    with pytest.raises(StopError, match=r"after step 2, .* row 20 of the stream .* has 152 tokens"):
        late.units(2, 0, 0)
    with pytest.raises(ConfigError, match="row 0 of the stream"):
        stream_batches(rows.select([20, *range(20)]), truncation="error", buffer_size=1)
    dropped = stream_batches(rows, truncation="drop", buffer_size=1)
    dropped.units(2, 0, 0)
    assert dropped.read_so_far()["dropped_too_long"] == 1


def test_what_became_of_a_streams_rows_is_said_and_recorded():
    """Of ten rows one is too long; the second step of eight finds one more and begins anew."""
    rows = datasets.Dataset.from_list([{"text": "x" * n} for n in (1, 2, 150, *range(3, 10))])
    batches = stream_batches(rows, truncation="drop", buffer_size=1)
    batches.units(1, 0, 0)
    said, written = [], {}
    recorder = SimpleNamespace(say=said.append, save_json=lambda name, content: written.update({name: content}))
    record_stream(batches, {"world_size": 1, "rows": {"streamed": True}}, recorder)
    counts = {"read": 19, "passes": 1, "kept": 17, "dropped_without_labels": 0, "dropped_too_long": 2, "truncated": 0}
    assert written == {"run.json": {"world_size": 1, "rows": {"streamed": True, **counts}}}
    assert said == ["stream: 19 rows read (1 time to its end), 17 kept, 2 dropped too long"]
    record_stream(SliceBatches(make_rows(8), **SIZES, seed=1), {}, recorder)  # which has told it at the start
    assert len(said) == 1


def test_streams_of_conversations():
    rows = datasets.Dataset.from_list(ROWS["messages"][0] * 10).to_iterable_dataset()
    format = recognise(ROWS["messages"][0][0], Fields())
    encoding = Encoding(format, "", CHAT, "assistant", 200)
    stream = encode_stream(rows, character_tokenizer(), encoding, columns=["messages"], seed=1, buffer_size=4)
    batches = StreamBatches(stream, sizes=SIZES, steps=2, seed=1)
    assert marked(character_tokenizer(), batches.units(1, 1, 1)[0][0]) == TURNS
