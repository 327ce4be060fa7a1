"""Reading, masking and the order of data, without a network or a model."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time

import datasets
import pandas
import pytest
import torch
from data_cases import BOS, EOS, character_tokenizer, ids

from hdpissa.engine import data
from hdpissa.engine.batches import EvalBatches, SliceBatches, collate, count_target_tokens
from hdpissa.engine.data import IGNORE, load_rows, tokenize_rows
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.prompts import ALPACA, PromptTemplate, resolve_template

ROWS = [{"question": f"ab{i}", "answer": "c" * (i % 5 + 1)} for i in range(12)]
BARE = PromptTemplate("{instruction}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def encode(rows, tokenizer=None, template=BARE, max_length=100, **options):
    return tokenize_rows(
        rows,
        tokenizer or character_tokenizer(),
        prompt_field=options.pop("prompt_field", "question"),
        response_field=options.pop("response_field", "answer"),
        template=template,
        max_length=max_length,
        **options,
    )


# ---------------------------------------------------------------- prompts


def test_alpaca_ends_with_the_response_header_and_braces_are_harmless(tmp_path):
    assert resolve_template("alpaca").text == ALPACA
    assert resolve_template("alpaca").render("{x} {instruction}") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\n{x} {instruction}\n\n### Response:"
    )
    assert resolve_template("none").render("2{}") == "2{}"
    assert resolve_template(r"\boxed{} {instruction}").render("a") == r"\boxed{} a"
    (tmp_path / "prompt.txt").write_text("Q: {instruction}\nA:\n")
    assert resolve_template(str(tmp_path / "prompt.txt")).render("x") == "Q: x\nA:"


@pytest.mark.parametrize("value", ["alpacca", "Answer:\n{input}", "{instruction} {instruction}", "a" * 9999, ""])
def test_bad_template_is_one_line(value):
    with pytest.raises(ConfigError, match="instruction") as caught:
        resolve_template(value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_reads_every_format_alone_and_from_a_folder(tmp_path, suffix):
    frame = pandas.DataFrame(ROWS)
    path = tmp_path / "folder" / f"train.{suffix}"
    path.parent.mkdir()
    match suffix:
        case "jsonl":
            frame.to_json(path, orient="records", lines=True)
        case "json":
            frame.to_json(path, orient="records")
        case "csv":
            frame.to_csv(path, index=False)
        case "parquet":
            frame.to_parquet(path)
    assert load_rows(str(path)).to_list() == ROWS
    assert load_rows(str(path.parent)).to_list() == ROWS
    assert load_rows(str(path), split="train[:5]").to_list() == ROWS[:5]


def test_bad_sources_are_one_line(tmp_path, jsonl):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"question": "a"}\n{"question": \n')
    (tmp_path / "header.csv").write_text("question,answer\n")
    (tmp_path / "rows.xlsx").touch()
    cases = {
        ("missing.jsonl", "train"): "no such file",
        ("./missing", "train"): "no such file",
        (str(tmp_path / "missing" / "folder"), "train"): "no such file",
        (str(tmp_path / "empty"), "train"): "holds no .jsonl",
        (str(tmp_path / "empty.jsonl"), "train"): "it is empty",
        (str(tmp_path / "broken.jsonl"), "train"): "cannot be read",
        (str(tmp_path / "header.csv"), "train"): "no data",
        (str(tmp_path / "rows.xlsx"), "train"): "convert it",
        (str(jsonl), "validation"): "Unknown split",
        (str(jsonl), "train[:0]"): "no data",
    }
    for (source, split), message in cases.items():
        with pytest.raises(ConfigError, match=message) as caught:
            load_rows(source, split=split)
        assert "\n" not in str(caught.value)


def test_missing_column_names_the_nearest_first(jsonl):
    with pytest.raises(ConfigError, match="'answers' is not in the dataset; its columns are answer, question"):
        encode(load_rows(str(jsonl)), response_field="answers")


# ---------------------------------------------------------------- tokenising


@pytest.mark.parametrize("num_proc", [None, 2])
def test_prompt_is_masked_and_the_answer_ends_in_newline_and_eos(jsonl, num_proc):
    result = encode(load_rows(str(jsonl)), template=PromptTemplate("<{instruction}>"), num_proc=num_proc)
    assert (result.dropped_without_labels, result.truncated, len(result.dataset)) == (0, 0, len(ROWS))
    assert result.dataset.column_names == ["input_ids", "labels"]
    for row, encoded in zip(ROWS, result.dataset, strict=True):
        prompt = [BOS, *ids(f"<{row['question']}>")]
        answer = [*ids(row["answer"] + "\n"), EOS]
        assert encoded["input_ids"] == prompt + answer
        assert encoded["labels"] == [IGNORE] * len(prompt) + answer


@pytest.mark.parametrize("side", ["left", "right"])
def test_cut_at_max_length_and_rows_without_labels_dropped(side):
    rows = datasets.Dataset.from_list(
        [
            {"question": "abc", "answer": "d"},  # 1 + 3 + 1 + newline + EOS = 7 tokens: fits
            {"question": "abc", "answer": "defgh"},  # cut after "def"
            {"question": "abcdef", "answer": "g"},  # prompt fills all 7: dropped
            {"question": "abcdefghij", "answer": "k"},  # prompt alone is longer: dropped
        ]
    )
    tokenizer = character_tokenizer(truncation_side=side)
    result = encode(rows, tokenizer, max_length=7)
    assert (result.dropped_without_labels, result.truncated) == (2, 1)
    assert result.dataset["labels"][1] == [IGNORE] * 4 + ids("def")
    assert result.dataset["input_ids"][1] == [BOS, *ids("abcdef")]
    with pytest.raises(ConfigError, match="max_length 4"):
        encode(rows, tokenizer, max_length=4)


def test_bad_rows_and_tokenizers_are_one_line(tmp_path):
    rows = datasets.Dataset.from_list([{"question": "a", "answer": "b"}, {"question": "a", "answer": None}])
    with pytest.raises(ConfigError, match=r"row 1 .* column 'answer'"):
        encode(rows)
    with pytest.raises(ConfigError, match="no EOS"):
        encode(rows, character_tokenizer(eos_token=None))
    with pytest.raises(ConfigError, match="at least 2"):
        encode(rows, max_length=1)
    with pytest.raises(ConfigError, match="plain text"):
        encode(datasets.Dataset.from_list([{"question": ["a"], "answer": "b"}]))
    numbers = encode(datasets.Dataset.from_list([{"question": "a", "answer": 42}]))
    assert numbers.dataset["labels"][0] == [IGNORE, IGNORE, *ids("42\n"), EOS]


def test_second_call_reads_the_cache_and_every_setting_is_in_its_key(jsonl, monkeypatch):
    rows, tokenizer = load_rows(str(jsonl)), character_tokenizer()
    first = encode(rows, tokenizer)
    tokenizer("abc", truncation=True, max_length=2)  # leaves its mark in the tokenizer's state

    def refuse(*_, **__):
        raise AssertionError("tokenised again")

    monkeypatch.setattr("hdpissa.engine.data.encode_batch", refuse)
    again = encode(load_rows(str(jsonl)), tokenizer)
    assert again.dataset.to_list() == first.dataset.to_list()
    assert again.dataset._fingerprint == first.dataset._fingerprint
    for other in (
        {"max_length": 50},
        {"template": PromptTemplate("Q {instruction}")},
        {"prompt_field": "answer"},
        {"tokenizer": character_tokenizer(eos_token="<pad>")},
    ):
        with pytest.raises(AssertionError, match="tokenised again"):
            encode(rows, **{"tokenizer": tokenizer} | other)


def tokenise_together(path, barrier, results):
    """Both children pass the barrier before either looks for the cache."""
    worked = []

    def slow(*arguments, work=data.encode_batch, **options):
        worked.append(1)
        time.sleep(0.3)
        return work(*arguments, **options)

    data.encode_batch = slow
    rows = load_rows(path)
    barrier.wait(30)
    fingerprint = encode(rows).dataset._fingerprint
    results.put((len(worked), fingerprint))


def test_of_two_processes_at_once_one_tokenises(jsonl):
    # fork, because a fresh interpreter would spend 10 s of this test importing
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    children = [context.Process(target=tokenise_together, args=(str(jsonl), barrier, results)) for _ in range(2)]
    for child in children:
        child.start()
    outcomes = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert sorted(calls for calls, _ in outcomes) == [0, 1]
    assert len({fingerprint for _, fingerprint in outcomes}) == 1


@pytest.mark.parametrize("num_proc", [None, 2])
def test_nothing_is_written_into_a_folder_that_was_saved(tmp_path, monkeypatch, num_proc):
    """It is cached all the same, and read anew when the folder is."""
    folder = tmp_path / "saved"
    for answer in "ab":
        rows = datasets.Dataset.from_list([{**row, "answer": answer} for row in ROWS])
        rows._fingerprint = "same"  # as of rows that a function made that reads something else
        shutil.rmtree(folder, ignore_errors=True)
        rows.save_to_disk(folder)
        before = sorted(path.name for path in folder.iterdir())
        first = encode(load_rows(str(folder), split="train[:3]"), num_proc=num_proc)
        SliceBatches(first.dataset, slices=1, micro_batches_per_slice=1, micro_batch_size=1, seed=7, pad_token_id=9)
        assert sorted(path.name for path in folder.iterdir()) == before
        assert first.dataset[0]["labels"][-3:] == [*ids(f"{answer}\n"), EOS]
        with monkeypatch.context() as patch:
            patch.setattr("hdpissa.engine.data.encode_batch", lambda *_, **__: pytest.fail("tokenised again"))
            again = encode(load_rows(str(folder), split="train[:3]"), num_proc=num_proc)
        assert again.dataset.to_list() == first.dataset.to_list()


# ---------------------------------------------------------------- order


def numbered(count: int) -> datasets.Dataset:
    """Row i is [i, i, …], of a length that varies."""
    return datasets.Dataset.from_list(
        [{"input_ids": [i] * (i % 3 + 2), "labels": [IGNORE] + [i] * (i % 3 + 1)} for i in range(count)]
    )


def slice_batches(count: int = 50, **changes) -> SliceBatches:
    sizes = {"slices": 4, "micro_batches_per_slice": 2, "micro_batch_size": 2, "seed": 7, "pad_token_id": 99}
    return SliceBatches(numbered(count), **sizes | changes)


def test_worked_example_of_the_docstring():
    batches = slice_batches(8, slices=2, micro_batch_size=1)
    assert batches.steps_per_epoch == 2
    assert [batches.sample_indices(1, 0, j) for j in (0, 1)] == [[4], [6]]
    assert [batches.sample_indices(1, 1, j) for j in (0, 1)] == [[5], [7]]


def test_shuffle_is_that_of_datasets_and_the_same_every_epoch():
    batches = slice_batches()
    expected = numbered(50).shuffle(seed=7)
    for step in range(2 * batches.steps_per_epoch):
        for slice_id in range(4):
            batch = batches.batch(step, slice_id, 1)
            rows = batches.sample_indices(step % batches.steps_per_epoch, slice_id, 1)
            assert batch["input_ids"][:, 0].tolist() == [expected[row]["input_ids"][0] for row in rows]


def test_slices_are_disjoint_and_cover_all_but_the_dropped():
    batches = slice_batches(50)
    assert (batches.steps_per_epoch, batches.dropped_samples) == (3, 2)
    of_slice = {
        slice_id: [
            row for step in range(3) for micro in range(2) for row in batches.sample_indices(step, slice_id, micro)
        ]
        for slice_id in range(4)
    }
    assert of_slice[1] == list(range(1, 48, 4))  # in stream order
    assert sorted(row for rows in of_slice.values() for row in rows) == list(range(48))


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_step_means_the_same_at_every_world_size(step):
    """Four slices on 1, 2, 4 ranks and on 8, of which two share a slice: the same samples to each."""

    def dealt(world_size: int) -> dict[int, list[int]]:
        batches = slice_batches()
        got: dict[int, list[int]] = {slice_id: [] for slice_id in range(4)}
        for rank in range(world_size):
            pairs = [
                (slice_id, micro)
                for slice_id in range(4)
                for micro in range(2)
                if (2 * slice_id + micro) * world_size // 8 == rank
            ]
            for slice_id, micro in pairs:
                got[slice_id] += batches.batch(step, slice_id, micro)["input_ids"][:, 0].tolist()
        return got

    assert dealt(1) == dealt(2) == dealt(4) == dealt(8)


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError, match="global batch is 16 samples but the dataset has only 15"):
        slice_batches(15)
    with pytest.raises(ConfigError, match="micro_batch_size is 0"):
        slice_batches(micro_batch_size=0)
    with pytest.raises(IndexError, match="slice 4"):
        slice_batches().sample_indices(0, 4, 0)
    with pytest.raises(IndexError, match="micro-batch 2"):
        slice_batches().sample_indices(0, 0, 2)


def test_collate_pads_on_the_right_and_attends_to_an_eos_that_is_also_pad():
    batch = collate(
        [{"input_ids": [5, 6, 9], "labels": [IGNORE, 6, 9]}, {"input_ids": [7, 9], "labels": [IGNORE, 9]}], 9
    )
    assert batch["input_ids"].tolist() == [[5, 6, 9], [7, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 9], [IGNORE, 9, IGNORE]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())
    assert count_target_tokens(batch["labels"]) == 3
    assert count_target_tokens(torch.tensor([[1, 2, IGNORE]])) == 1  # the first is never predicted


@pytest.mark.parametrize("count", [1, 3, 8, 13])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_eval_gives_every_rank_equally_many_batches_and_every_row_weight_one(count, world_size):
    dataset, seen, lengths = numbered(count), [], set()
    for rank in range(world_size):
        batches = EvalBatches(dataset, rank=rank, world_size=world_size, batch_size=2, pad_token_id=99)
        pairs = list(batches)
        assert len(pairs) == len(batches)
        lengths.add(len(pairs))
        assert all(count_target_tokens(batch["labels"]) > 0 for batch, _ in pairs)
        seen += [row for batch, real in pairs if real for row in batch["input_ids"][:, 0].tolist()]
    assert len(lengths) == 1
    assert sorted(seen) == list(range(count))


def test_eval_refuses_no_rows():
    with pytest.raises(ConfigError, match="no rows"):
        EvalBatches(numbered(4).select([]), rank=0, world_size=1, batch_size=2, pad_token_id=0)
