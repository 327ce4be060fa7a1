"""The section "data" of the command line: each option changes what is read, how it is masked, or in what order."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
from data_cases import CHAT, ROWS, TURNS, character_tokenizer, jsonl, parse, read, texts, write
from launch_runs import flags, make_inputs, read_json, read_metrics, train_here
from mistakes import Case, argument, assert_told, collect, make_broken_files
from ranks import run_ranks

from hdpissa.engine.batches import collate
from hdpissa.engine.data_stream import StreamBatches
from hdpissa.launch import train, train_arguments
from hdpissa.launch.train_checks import check
from hdpissa.launch.train_data import describe_rows, make_batches, read_rows, tell_sources


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


# --- what is read ----------------------------------------------------------------------------------


def test_format_is_recognised_told_and_given(tmp_path):
    path = jsonl(tmp_path, "both", [{"text": "t", "instruction": "q", "input": "i", "response": "a"}])
    found = read(path, prompt_template="{instruction}")
    assert texts(found.train) == ["<s>q«a\n</s>»"]
    assert tell_sources(found.sources) == [
        f"train data {path}: alpaca (columns instruction, response); input is not read, --dataset_format alpaca reads "
        f"it; prompts template {{instruction}}, loss on the answer; 1 of 1 rows"
    ]
    assert texts(read(path, dataset_format="alpaca", prompt_template="none").train) == ["<s>q\ni«a\n</s>»"]
    assert texts(read(path, dataset_format="text").train) == ["«<s>t</s>»"]
    assert texts(read(path, dataset_format="text", dataset_text_field="input").train) == ["«<s>i</s>»"]
    assert texts(read(path, prompt_field="text", prompt_template="none").train) == ["<s>t«a\n</s>»"]


def test_a_mix_has_its_own_columns_counts_and_report(tmp_path):
    math = jsonl(tmp_path, "math", [{"query": str(i), "response": "m"} for i in range(9)])
    code = jsonl(tmp_path, "code", [{"instruction": str(i), "output": "c"} for i in range(8)])
    chat = jsonl(tmp_path, "chat", ROWS["messages"][0])
    options = {"prompt_field": "query - -", "response_field": "response - -", "prompt_template": "none", "seed": 3}
    found = read(f"{math}:5 {code}:0.5 {chat}", **options)
    assert [source["used"] for source in found.sources] == [5, 4, 2]
    assert [source["format"].split()[0] for source in found.sources] == ["alpaca", "alpaca", "messages"]
    shown = texts(found.train)
    assert [sum(text.endswith(end) for text in shown) for end in ("«m\n</s>»", "«c\n</s>»", TURNS)] == [5, 4, 2]
    assert shown == texts(read(f"{math}:5 {code}:0.5 {chat}", **options).train)
    assert shown != texts(read(f"{math}:5 {code}:0.5 {chat}", **options | {"seed": 4}).train)
    # the evaluation set of the same name has the same columns; of a mix, its rows without the amounts
    held_out = read(f"{math}:5 {code}:0.5 {chat}", **options, eval_dataset_name=str(math)).held_out
    assert len(held_out.dataset) == 9
    assert len(read(f"{math}:5 {code}:0.5 {chat}", **options, eval_split="train[:1]").held_out.dataset) == 3


def test_a_mix_of_many_sets_is_longer_than_any_name(tmp_path, monkeypatch):
    """Below Python 3.12 pathlib raises where a text is too long for a path."""
    monkeypatch.chdir(tmp_path)
    names = [jsonl(tmp_path, f"data_{n:03}", [{"text": f"{n} {i}"} for i in range(5)]).name for n in range(20)]
    mix = " ".join(f"{name}:2" for name in names)
    assert len(mix) > 255
    found = read(mix, eval_dataset_name=mix.replace(":2", ":1"))
    assert (len(found.train.dataset), len(found.held_out.dataset)) == (40, 20)


def test_one_set_may_be_said_to_have_no_format_of_its_own(tmp_path):
    path = jsonl(tmp_path, "one", [{"text": "t"}])
    assert texts(read(path, dataset_format="-").train) == ["«<s>t</s>»"]


def test_revision_configuration_and_split_reach_the_hub_for_each_set(monkeypatch):
    """There is no hub in tests: what `datasets` is asked for is what can be seen."""
    asked = []

    def load(**named):
        asked.append((named["path"], named["name"], named["revision"], named["split"]))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    read("a org/b", dataset_revision="v1 -", dataset_config="main", dataset_split="train test", eval_split="valid")
    assert asked == [
        ("a", "main", "v1", "train"),
        ("org/b", "main", None, "test"),
        ("a", "main", "v1", "valid"),
        ("org/b", "main", None, "valid"),
    ]


# --- prompts and what carries loss -----------------------------------------------------------------


def test_a_chat_template_is_used_for_alpaca_too_and_exported(tmp_path):
    path = jsonl(tmp_path, "alpaca", ROWS["alpaca"][0])
    (tmp_path / "chat.jinja").write_text("!" + CHAT)
    assert texts(read(path, chat_template="tokenizer").train)[1] == "[user]q\ni</s>[assistant]«b</s>»"
    args, given = parse(path, chat_template=tmp_path / "chat.jinja")
    tokenizer = character_tokenizer(chat_template=CHAT)
    found = read_rows(args, given, tokenizer)
    assert texts(found.train)[0] == "![user]q</s>[assistant]«a</s>»"
    assert tokenizer.chat_template == "!" + CHAT
    assert found.template.render("x") == "![user]x</s>[assistant]"
    assert read(path, prompt_template="<{instruction}>").template.render("x") == "<x>"


@pytest.mark.parametrize(
    ("format", "options", "expected"),
    [
        ("prompt_completion", {}, "<s>q «a</s>»"),
        ("prompt_completion", {"train_on_prompt": True}, "«<s>q a</s>»"),
        ("prompt_completion", {"completion_only_loss": "false"}, "«<s>q a</s>»"),
        ("messages", {"assistant_only_loss": True}, TURNS),
        ("messages", {"assistant_only_loss": "false"}, f"«{TURNS.translate(str.maketrans('', '', '«»'))}»"),
    ],
)
def test_what_carries_loss(tmp_path, format, options, expected):
    assert texts(read(write(ROWS[format][0], tmp_path, "jsonl"), **options).train)[0] == expected


def test_lengths_are_reported(tmp_path):
    path = jsonl(tmp_path, "lengths", [{"text": "a" * n} for n in (3, 9, 20)])
    cut = read(path, max_length=8)
    assert [len(row) for row in cut.train.dataset["input_ids"]] == [5, 8, 8]
    args, _ = parse(path, max_length=8, truncation="drop", per_device_train_batch_size=1)
    dropped = read_rows(args, frozenset(), character_tokenizer())
    batches = make_batches(args, dropped, character_tokenizer(), slices=1, micro_batches=1, size=1)
    told = describe_rows(dropped, batches)
    assert (told["used"], told["dropped_too_long"], told["truncated"]) == (1, 2, 0)
    assert tell_sources(dropped.sources)[0].endswith("1 of 3 rows, 2 dropped too long")


# --- order -----------------------------------------------------------------------------------------


def batches_of(path, **options):
    args, given = parse(path, max_length=24, **options)
    tokenizer = character_tokenizer()
    return make_batches(args, read_rows(args, given, tokenizer), tokenizer, slices=2, micro_batches=2, size=1)


def test_packing_grouping_and_streaming(tmp_path):
    path = jsonl(tmp_path, "texts", [{"text": chr(48 + i) * (i % 9 + 1)} for i in range(60)])
    plain, grouped = batches_of(path), batches_of(path, group_by_length=True)
    assert plain.sample_indices(3, 1, 0) != grouped.sample_indices(3, 1, 0)
    packed = batches_of(path, packing=True)
    assert "position_ids" in packed.batch(0, 0, 0)
    assert "cu_seq_lens_q" in batches_of(path, packing=True, attn_implementation="flash_attention_2").batch(0, 0, 0)
    assert packed.identity()["order"] == f"packed into {len(packed.dataset)} of 24 tokens"
    streamed = batches_of(path, streaming=True, max_steps=3)
    assert isinstance(streamed, StreamBatches)
    assert streamed.steps_per_epoch == 3
    in_order = batches_of(path, streaming=True, max_steps=3, shuffle_buffer_size=1)
    assert [in_order.units(0, i, 0)[0][0]["input_ids"][1] - 3 - 48 for i in (0, 1)] == [0, 1]
    assert in_order.units(0, 0, 0) != streamed.units(0, 0, 0)
    told = describe_rows(read(path, streaming=True, max_steps=3), streamed)
    assert told == {"streamed": True, "sources": told["sources"]}


# --- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def inputs(folder):
    found = make_inputs(folder / "inputs")
    rows = [json.loads(line) for line in Path(found["dataset_name"]).read_text().splitlines()]
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["response"]},
            ]
        }
        for row in rows
    ]
    (folder / "chat.jinja").write_text(CHAT.replace("</s>", "<pad>"))  # an end of turn that is no EOS
    found["dataset_name"] = f"{jsonl(folder, 'chats', chats)}:40 {found['dataset_name']}:0.5"
    return found | {"chat_template": str(folder / "chat.jinja"), "max_length": 320, "learning_rate": 3e-3}


def test_preview_shows_rows_and_trains_nothing(inputs, folder, capsys):
    output = folder / "preview"
    assert train.run(flags({**inputs, "output_dir": output, "preview": 2, "packing": True})) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- sample ") == 2
    rows, samples = re.search(r"packing: (\d+) rows in (\d+) samples", shown).groups()
    assert int(rows) > int(samples)
    assert re.search(r"--- sample 1 \(\d+ rows?\): \d+ tokens", shown)
    assert "messages (column messages); prompts chat template, loss on the assistant's turns; 40 of 40 rows" in shown
    assert "[assistant]⟪" in shown
    assert "<pad>⟫" in shown
    assert "⟪[user]" not in shown
    assert not output.exists()


@pytest.fixture(scope="module")
def mixed_run(inputs, folder):
    """Two ranks: a mix, a chat template, packing, weights per token, all at once."""
    arguments = {**inputs, "output_dir": str(folder / "mixed"), "max_steps": 2, "packing": True}
    arguments |= {"loss_normalization": "tokens", "truncation": "drop", "per_device_train_batch_size": 2}
    arguments |= {"gradient_accumulation_steps": 2, "warmup_ratio": 0.5, "export_format": "hf", "save_strategy": "no"}
    results = run_ranks(2, train_here, flags(arguments), str(folder / "cache"))
    assert [(result["code"], result["error"]) for result in results] == [(0, None)] * 2, results
    return arguments


def test_first_loss_of_a_packed_run_is_that_of_its_rows_alone(mixed_run, monkeypatch):
    """In plain transformers, row by row: every target token of a slice's step weighs the same."""
    import torch
    from transformers import AutoModelForCausalLM

    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    args, given = train_arguments.parse(flags(mixed_run | {"overwrite_output_dir": True}))
    job = check(args, given)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    losses, means, tokens = [], [], 0
    for slice_id in range(2):
        micro_batches = [job.data.units(0, slice_id, j) for j in range(2)]
        sums = []
        for units in micro_batches:
            rows = [row for unit in units for row in unit]
            assert len(rows) > len(units)  # really packed
            tokens += sum(len(row["input_ids"]) for row in rows)
            with torch.no_grad():
                own = [(model(**collate([row], 0)).loss.item(), targets(row)) for row in rows]
            sums.append((sum(loss * count for loss, count in own), sum(count for _, count in own)))
        losses.append(sum(total for total, _ in sums) / sum(count for _, count in sums))
        means.append(sum(total / count for total, count in sums) / 2)
    steps, _ = read_metrics(Path(mixed_run["output_dir"]))
    assert steps[0]["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert abs(steps[0]["loss"] - sum(means) / 2) > 1e-4  # --loss_normalization mean
    assert steps[0]["tokens"] == tokens


def targets(row) -> int:
    return sum(label != -100 for label in row["labels"][1:])


def test_a_run_tells_what_it_has_read(mixed_run, inputs):
    told = read_json(Path(mixed_run["output_dir"]) / "run.json")["rows"]
    assert [source["rows"] for source in told["sources"]] == [40, 32, 15]
    assert [source["use"] for source in told["sources"]] == ["train", "train", "evaluation"]
    assert told["used"] == sum(source["used"] for source in told["sources"][:2])
    assert told["used"] + told["dropped_too_long"] == 72
    assert told["truncated"] == 0
    assert told["packed_into"] < told["used"]
    export = Path(mixed_run["output_dir"]) / "model"
    assert (export / "chat_template.jinja").read_text() == Path(inputs["chat_template"]).read_text()
    assert read_json(export / "generation_config.json")["eos_token_id"] == [0, 1]  # <eos>, and the end of turn


def test_a_streamed_run_goes_on_where_it_was(inputs, folder):
    """Four steps, or two and then two more in another process: the same losses."""
    common = {**inputs, "dataset_name": str(folder / "chats.jsonl"), "streaming": True, "shuffle_buffer_size": 20}
    common |= {"max_steps": 4, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 2}
    common["export_format"] = "none"
    common.pop("eval_dataset_name")
    whole, parts = folder / "whole", folder / "parts"
    runs = [{**common, "output_dir": str(whole), "save_strategy": "no"}]
    halves = {**common, "output_dir": str(parts)}
    runs += [halves | {"max_steps": 2}, halves | {"resume_from_checkpoint": "auto"}]
    for arguments in runs:
        (result,) = run_ranks(1, train_here, flags(arguments), str(folder / "cache"))
        assert (result["code"], result["error"]) == (0, None), result
    told = [read_json(output / "run.json")["rows"] for output in (whole, parts)]
    assert (told[0], told[0]["kept"]) == (told[1], 8)  # counted from the beginning of the stream
    losses = [[row["loss"] for row in read_metrics(output)[0]] for output in (whole, parts)]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


# --- mistakes --------------------------------------------------------------------------------------

CASES = [
    argument("unknown format", ("--dataset_format is csv", "alpaca, sharegpt"), dataset_format="csv"),
    argument("columns of another format", ("--dataset_format messages wants",), dataset_format="messages"),
    argument("streaming without steps", ("--streaming without --max_steps",), streaming=True, max_steps=-1),
    argument("grouping what is packed", ("--group_by_length with --packing",), group_by_length=True, packing=True),
    argument("grouping a stream", ("nobody knows the lengths",), group_by_length=True, streaming=True),
    argument("unknown truncation", ("--truncation is cut", "truncate, drop, error"), truncation="cut"),
    argument("rows longer than allowed", ("64 of 64 rows", "--max_length 4"), truncation="error", max_length=4),
    argument("unknown normalisation", ("--loss_normalization is sum", "mean, tokens"), loss_normalization="sum"),
    argument("a preview of fewer than none", ("--preview is -1", "must not be negative"), preview=-1),
    argument("no buffer", ("--shuffle_buffer_size is 0", "at least 1"), streaming=True, shuffle_buffer_size=0),
    argument("no turns", ("--assistant_only_loss", "have no turns"), assistant_only_loss="true"),
    argument("two names", ("contradict each other",), train_on_prompt=True, completion_only_loss="true"),
    argument("half a mix", ("prompt_field", "3 values for 2 datasets"), dataset_name="a b", prompt_field="x y z"),
    argument("a data set's name of blanks", ("--dataset_name is '  '", "must name a dataset"), dataset_name="  "),
    argument(
        "an evaluation set's name of blanks", ("--eval_dataset_name is ' '", "leave it out"), eval_dataset_name=" "
    ),
    argument("two formats for one set", ("2 values for 1 dataset;",), dataset_format="alpaca text"),
    argument("a user who is not there", ("no such file or folder",), dataset_name="~nobody_here/a.jsonl"),
    argument("a data set's name too long", ("cannot be read", "check its name"), dataset_name="x" * 300),
    argument("a template of nobody's", ("~nobody_here/a", "No such file"), chat_template="~nobody_here/a"),
    argument("a prompt of nobody's", ("~nobody_here/a", "No such file"), prompt_template="~nobody_here/a"),
    argument("evaluation columns of another set", ("set --eval_prompt_field and",), eval_prompt_field="query"),
    argument("unknown evaluation format", ("--eval_dataset_format is csv", "alpaca"), eval_dataset_format="csv"),
    argument("a wrong evaluation format", ("--eval_dataset_format text wants",), eval_dataset_format="text"),
    argument(
        "too many evaluation columns",
        ("--eval_prompt_field is 'a b'", "2 values"),
        eval_prompt_field="a b",
        eval_dataset_name="DIR/a.jsonl DIR/b.jsonl DIR/c.jsonl",
    ),
    argument(
        "a configuration of no evaluation rows",
        ("--eval_dataset_config needs evaluation rows", "give --eval_dataset_name"),
        eval_dataset_name=None,
        eval_dataset_config="main",
    ),
    argument("more rows than there are", (":65 asks for 65 rows", "has 64"), dataset_name="DIR/train.jsonl:65"),
    argument("more evaluation rows", ("--eval_dataset_name: ", "has 64"), eval_dataset_name="DIR/train.jsonl:65"),
    argument("a file that is not there", ("'train.tsv': no such file",), dataset_name="train.tsv"),
    argument("none of a set", ("train.jsonl:0 asks for 0",), dataset_name="DIR/train.jsonl:0 DIR/train.jsonl"),
    argument(
        "a share of a stream",
        ("with --streaming", "a share of a stream"),
        dataset_name="DIR/train.jsonl:0.5 DIR/train.jsonl",
        streaming=True,
    ),
    argument("chats without a template", ("need a chat template", "Jinja"), dataset_name="DIR/chats.jsonl"),
    argument("broken chat template", ("no Jinja template", "line 1"), chat_template="{% for %}"),
    argument("chat template that is not there", ("DIR/none", "No such file"), chat_template="DIR/none"),
    argument(
        "two templates", ("--chat_template and --prompt_template",), chat_template="{{ 1 }}", prompt_template="none"
    ),
    argument(
        "a broken row of one set of a mix",
        ("dataset DIR/hole.jsonl: row 1", "'response'"),
        dataset_name="DIR/train.jsonl DIR/hole.jsonl",
    ),
    argument(
        "template that refuses a row",
        ("row 0", "refuses it (no)"),
        dataset_name="DIR/chats.jsonl",
        chat_template="{{ raise_exception('no') }}",
    ),
    argument(
        "a stream of less than one batch", ("is 128 samples", "only 64"), streaming=True, gradient_accumulation_steps=64
    ),
]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "inputs"
    found = make_inputs(folder)
    make_broken_files(folder)
    jsonl(folder, "chats", ROWS["messages"][0])
    return collect(CASES, folder, found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.mistake)
def test_one_line_and_exit_code_2(mistakes, case: Case):
    assert_told(case, mistakes[case.mistake])
