"""Every format from every kind of source; what carries loss, token by token; mixes of sets."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from data_cases import (
    ANSWER,
    CHAT,
    CONVERSATION,
    QUESTION,
    ROWS,
    SOURCES,
    TOOL_ROWS,
    TOOLS_CHAT,
    TURNS,
    character_tokenizer,
    encode,
    texts,
    write,
)

from hdpissa.engine import data_sources
from hdpissa.engine.chat_template import ChatTemplate, resolve_chat_template
from hdpissa.engine.data_formats import FORMATS, Fields, recognise
from hdpissa.engine.data_sources import Source, load_rows, parse_sources, spread, take
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.prompts import ALPACA, PromptTemplate

SMOLLM2 = Path("~/.cache/hdpissa/smollm2-135m-instruct").expanduser()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def table(rows) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


# --- each format × each source ---------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_from_every_source(tmp_path, format, source):
    rows, expected = ROWS[format]
    found = load_rows(str(write(rows, tmp_path, source)))
    assert texts(encode(found)) == expected
    assert texts(encode(found, dataset_format=format)) == expected


@pytest.mark.parametrize("source", SOURCES)
def test_tools_from_every_source(tmp_path, source):
    """Two rows with other tools and other arguments: neither has a key of the other's, at any depth."""
    rows, expected = TOOL_ROWS
    assert texts(encode(load_rows(str(write(rows, tmp_path, source))), chat=TOOLS_CHAT)) == expected


@pytest.mark.parametrize("source", SOURCES)
def test_streams_have_the_same_rows(tmp_path, source):
    path = str(write(ROWS["messages"][0], tmp_path, source))
    assert list(load_rows(path, streaming=True)) == load_rows(path).to_list()


def test_saved_splits_and_their_slices(tmp_path):
    parts = {name: table([{"text": f"{name}{i}"} for i in range(4)]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    cases = {"test": 4, "test[1:3]": 2, "train[:50%]+test[3:]": 3}
    for split, count in cases.items():
        assert len(load_rows(str(tmp_path / "both"), split=split)) == count
    assert load_rows(str(tmp_path / "both"), split="test[1:2]")["text"] == ["test1"]
    with pytest.raises(ConfigError, match='Unknown split "valid"'):
        load_rows(str(tmp_path / "both"), split="valid")


def test_a_hub_name_is_asked_for_with_its_configuration_split_and_revision(monkeypatch):
    """There is no hub in tests: what `datasets` is asked for is what can be seen."""
    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda **named: asked.update(named) or table([{"text": "a"}]))
    load_rows("openai/gsm8k", split="test[:5]", config_name="main", revision="v1")
    assert asked == {
        "path": "openai/gsm8k",
        "name": "main",
        "split": "test[:5]",
        "revision": "v1",
        "streaming": False,
    }


# --- recognising -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"instruction": "a", "response": "b"}, "alpaca (columns instruction, response)"),
        ({"instruction": "a", "input": "b", "output": "c"}, "alpaca (columns instruction, input, output)"),
        (
            {"instruction": "a", "input": "b", "response": "c"},
            "alpaca (columns instruction, response); input is not read, --dataset_format alpaca reads it",
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt (column conversations)"),
        ({"conversations": [QUESTION], "id": 3}, "messages (column conversations)"),
        ({"messages": [QUESTION], "prompt": "a", "completion": "b"}, "messages (column messages)"),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, "prompt_completion (columns prompt, completion)"),
        ({"text": "a", "label": 0}, "text (column text)"),
    ],
)
def test_columns_say_what_they_are(columns, expected):
    assert str(recognise(columns, Fields())) == expected


def test_named_columns_are_meant_whatever_others_there_are():
    columns = {"question": "a", "answer": "b", "messages": [QUESTION], "text": "c"}
    assert str(recognise(columns, Fields("question", "answer", given=True))) == "alpaca (columns question, answer)"
    assert recognise(columns, Fields(text="answer"), "text").columns == (("text", "answer"),)
    with pytest.raises(ConfigError, match=r"sharegpt wants a column 'conversations'.*question, answer"):
        recognise(columns, Fields(), "sharegpt")
    with pytest.raises(ConfigError, match=r"'instruction' is not in the dataset; .* another format"):
        recognise({"a": 1, "b": 2}, Fields())


def test_an_input_has_alpacas_own_wording():
    template = PromptTemplate(ALPACA)
    assert template.render("{input}", "x").endswith("### Instruction:\n{input}\n\n### Input:\nx\n\n### Response:")
    assert template.render("x", "y").startswith("Below is an instruction that describes a task, paired with an input")
    assert template.render("x", "") == template.render("x")
    assert PromptTemplate("Q {instruction} A").render("x", "y") == "Q x\ny A"


def test_speakers_of_sharegpt_and_rows_that_are_wrong():
    turns = [("human", "q"), ("function_call", "f"), ("observation", "o"), ("gpt", "a")]
    rows = [{"conversations": [{"from": who, "value": text} for who, text in turns], "system": "S"}]
    expected = "[system]S</s>[user]q</s>[assistant]«f</s>»[tool]o</s>[assistant]«a</s>»"
    assert texts(encode(table(rows))) == [expected]
    good = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    wrong = {"conversations": [{"from": "narrator", "value": "once"}]}
    with pytest.raises(ConfigError, match=r"row 1 \(from 0\), column 'conversations': a turn from 'narrator'"):
        encode(table([good, wrong]))
    with pytest.raises(ConfigError, match=r"row 1 \(from 0\) has no list of messages"):
        encode(table([good, {"conversations": []}]))


def test_roles_have_sharegpts_names_or_the_templates_own():
    """Of both spellings of a role one is the template's; a role that nobody knows is no row without labels."""
    turns = [("System", "s"), ("human", "q"), ("GPT", "a"), ("user", "r"), ("model", "b")]
    messages = [{"role": who, "content": text} for who, text in turns]
    assert texts(encode(table([{"messages": messages}]))) == [TURNS]
    found = encode(table([{"prompt": messages[:2], "completion": messages[2:3]}]))
    assert texts(found) == ["[system]s</s>[user]q</s>[assistant]«a</s>»"]
    seen = [{"role": "observation", "content": "o"}, {"role": "gpt", "content": "a"}]
    assert texts(encode(table([{"messages": seen}]))) == ["[tool]o</s>[assistant]«a</s>»"]
    told = [{"role": "Developer", "content": "d"}, QUESTION, ANSWER]
    assert texts(encode(table([{"messages": told}])))[0].startswith("[developer]d</s>[user]")
    naming = "{{ 'gpt' if '' == 'observation' }}" + CHAT
    assert texts(encode(table([{"messages": seen}]), chat=naming)) == ["[observation]o</s>[assistant]«a</s>»"]
    good = {"messages": [QUESTION, ANSWER]}
    for role in ("narrator", "assistent", ""):
        with pytest.raises(ConfigError, match=rf"^row 1 \(from 0\), column 'messages': a turn with the role '{role}'"):
            encode(table([good, {"messages": [QUESTION, {"role": role, "content": "once"}]}]))
    with pytest.raises(ConfigError, match=r"^no row has anything to learn, with loss on the assistant's turns; add"):
        encode(table([{"messages": [QUESTION]}]))


# --- what carries loss -----------------------------------------------------------------------------

CHATTED = [{"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER, QUESTION, ANSWER]}]
HISTORY = "[user]q</s>[assistant]a</s>[user]q</s>[assistant]"


@pytest.mark.parametrize(
    ("format", "options", "expected"),
    [
        ("alpaca", {"train_on_prompt": True}, "«<s><q>a\n</s>»"),
        ("alpaca", {"completion_only_loss": False}, "«<s><q>a\n</s>»"),
        ("alpaca", {"completion_only_loss": True}, "<s><q>«a\n</s>»"),
        ("prompt_completion", {"train_on_prompt": True}, "«<s>q a</s>»"),
        ("prompt_completion", {"completion_only_loss": False}, "«<s>q a</s>»"),
        ("messages", {"train_on_prompt": True}, f"«{TURNS.translate(str.maketrans('', '', '«»'))}»"),
        ("messages", {"assistant_only_loss": False}, f"«{TURNS.translate(str.maketrans('', '', '«»'))}»"),
        ("messages", {"assistant_only_loss": True, "completion_only_loss": False}, TURNS),
        ("chatted", {}, f"{HISTORY}«a</s>[user]q</s>[assistant]a</s>»"),
        ("chatted", {"assistant_only_loss": True}, f"{HISTORY}«a</s>»[user]q</s>[assistant]«a</s>»"),
        ("chatted", {"train_on_prompt": True}, f"«{HISTORY}a</s>[user]q</s>[assistant]a</s>»"),
    ],
)
def test_three_names_for_what_carries_loss(format, options, expected):
    rows = CHATTED if format == "chatted" else ROWS[format][0]
    assert texts(encode(table(rows), **options))[0] == expected


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("alpaca", {"train_on_prompt": True, "completion_only_loss": True}, "contradict each other"),
        ("messages", {"train_on_prompt": True, "assistant_only_loss": True}, "contradict each other"),
        ("alpaca", {"assistant_only_loss": True}, "have no turns"),
        ("text", {"completion_only_loss": True}, "have no completion"),
        ("messages", {"completion_only_loss": True}, "use --assistant_only_loss"),
    ],
)
def test_names_that_cannot_be_meant(format, options, message):
    with pytest.raises(ConfigError, match=message):
        encode(table(ROWS[format][0]), **options)


# In the manner of the families' own templates, shortened to what matters here: where a turn begins and ends.
FAMILIES = {
    "ChatML": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n",
    ),
    "Llama 2: no generation prompt, BOS by the template, blanks around the answer": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] q [/INST]« a <|im_end|>»<s>[INST] r [/INST]« b <|im_end|>»",
    ),
    "Gemma: another name for the assistant": (
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<|im_start|>' + role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}",
        "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>model\n«a<|im_end|>»\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>model\n«b<|im_end|>»\n",
    ),
    "Qwen 3: the last turn shows its thoughts, the ones before do not": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nb<|im_end|>»\n",
    ),
    "DeepSeek-R1: the generation prompt opens a thought that the conversation does not have": (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}",
        "<user>q<assistant>«a<|im_end|>»<user>r<assistant>«b<|im_end|>»",
    ),
    "Vicuna: one line, the end of turn and a new line after the answer": (
        "{% for m in messages %}{{ ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content }}"
        "{{ eos_token + '\n' if m.role == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        "USER: q ASSISTANT:« a<|im_end|>»\nUSER: r ASSISTANT:« b<|im_end|>»\n",
    ),
    "marked by the template itself": (
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "<user>q<assistant>«a<|im_end|>»<user>r<assistant>«b<|im_end|>»",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_of_families(family):
    """The mask is the assistant's words and the end of turn, in every turn, and no character more."""
    template, expected = FAMILIES[family]
    tokenizer = character_tokenizer(eos_token="<|im_end|>")
    found = encode(table([{"messages": CONVERSATION[1:]}]), chat=template, tokenizer=tokenizer)
    assert texts(found, tokenizer) == [expected]


def test_templates_that_do_not_show_whose_words_are_whose():
    """One that says at the top how many turns there are; no boundary of a shorter conversation is one of the whole."""
    counting = "{{ messages | length }}" + CHAT
    rows = table([{"messages": CONVERSATION[1:]}])
    with pytest.raises(ConfigError, match=r"row 0 .* does not show .* --assistant_only_loss false"):
        encode(rows, chat=counting)
    assert texts(encode(rows, chat=counting, assistant_only_loss=False))[0].startswith("«4[user]q</s>")
    refusing = "{{ raise_exception('no system please') }}"
    with pytest.raises(ConfigError, match=r"row 0 \(from 0\): the chat template refuses it \(no system please\)"):
        encode(rows, chat=refusing)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="the demo's model is not here")
def test_the_demo_models_own_template_token_by_token():
    """Labels are the tokens that the model would have to write, no more and no less, turn by turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    answers = ["Two.\n\nIt is **two**.", "4, because 2 + 2 = 4 <b>  "]
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": answers[0]}]
    messages += [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answers[1]}]
    chat = ChatTemplate(resolve_chat_template(None, tokenizer), tokenizer)
    (row,) = encode(table([{"messages": messages}]), chat=chat.text, tokenizer=tokenizer).dataset
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert row["input_ids"] == ids
    expected = []
    for turn in (1, 3):
        prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
        written = tokenizer(answers[turn // 2] + "<|im_end|>")["input_ids"]
        assert ids[: len(prompt)] == prompt
        expected += [-100] * (len(prompt) - len(expected)) + written
    newline = [-100]
    assert row["labels"] == expected + newline
    assert chat.render("1 + 1?") == tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, tokenize=False
    )


def test_a_single_question_does_not_get_two_bos():
    tokenizer = character_tokenizer()
    chat = ChatTemplate("{{ bos_token }}" + CHAT, tokenizer)
    assert chat.render("q") == "[user]q</s>[assistant]"
    assert tokenizer.decode(tokenizer(chat.render("q"))["input_ids"][0]) == "<s>"


def test_chat_templates_by_file_text_and_name(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHAT)
    tokenizer = character_tokenizer()
    assert resolve_chat_template(None, tokenizer) is None
    assert resolve_chat_template(str(tmp_path / "chat.jinja"), tokenizer) == CHAT
    assert resolve_chat_template(CHAT, tokenizer) == CHAT
    tokenizer.chat_template = "{{ 'own' }}"
    assert resolve_chat_template("tokenizer", tokenizer) == resolve_chat_template(None, tokenizer) == "{{ 'own' }}"
    for value, message in {"{% for %}": "no Jinja template", str(tmp_path / "none"): "No such file"}.items():
        with pytest.raises(ConfigError, match=message):
            resolve_chat_template(value, tokenizer)
    with pytest.raises(ConfigError, match="no template of its own"):
        resolve_chat_template("tokenizer", character_tokenizer())
    with pytest.raises(ConfigError, match=r"messages \(column messages\) need a chat template"):
        encode(table(ROWS["messages"][0]), chat=None)


# --- lengths ---------------------------------------------------------------------------------------


def test_rows_that_are_too_long():
    """Cut, dropped, or an error that names the first and how many there are."""
    rows = table([{"prompt": "q", "completion": "a" * n} for n in (2, 9, 3, 12)])  # tokens: n + 3
    cut = encode(rows, max_length=8)
    assert (cut.truncated, cut.dropped_too_long, texts(cut)[1]) == (2, 0, "<s>q«aaaaaa»")
    dropped = encode(rows, max_length=8, truncation="drop")
    assert (dropped.truncated, dropped.dropped_too_long) == (0, 2)
    assert texts(dropped) == ["<s>q«aa</s>»", "<s>q«aaa</s>»"]
    with pytest.raises(ConfigError, match=r"2 of 4 rows have more than --max_length 8 tokens .* row 1, .* with 12\)"):
        encode(rows, max_length=8, truncation="error")
    assert len(encode(rows, max_length=15, truncation="error").dataset) == 4
    with pytest.raises(ConfigError, match="leaves no row"):
        encode(rows, max_length=4, truncation="drop")


# --- mixes -----------------------------------------------------------------------------------------


def test_sets_of_a_mix(tmp_path):
    assert parse_sources("metamath:100000 org/python:0.5 c.jsonl") == [
        Source("metamath", 100000),
        Source("org/python", 0.5),
        Source("c.jsonl"),
    ]
    odd = tmp_path / "a b:5"
    odd.mkdir()
    assert parse_sources(str(odd)) == [Source(str(odd))]
    for text in ("a:0", "a:0.0", "a:1.5"):
        with pytest.raises(ConfigError, match=f"{text} asks for"):
            parse_sources(text)
    assert spread("question -", 2, "--prompt_field") == ["question", None]
    assert spread("my question", 1, "--prompt_field") == ["my question"]
    with pytest.raises(ConfigError, match="2 values for 3 datasets"):
        spread("a b", 3, "--prompt_field")


def test_rows_of_a_mix_are_drawn_by_the_seed():
    rows = table([{"text": str(i)} for i in range(100)])
    drawn = {seed: take(rows, Source("a", 30), seed)["text"] for seed in (1, 2)}
    assert len(set(drawn[1])) == 30
    assert drawn[1] == take(rows, Source("a", 0.3), 1)["text"]
    assert drawn[1] != drawn[2]
    assert take(rows, Source("a"), 1) is rows
    with pytest.raises(ConfigError, match="a:101 asks for 101 rows and a has 100"):
        take(rows, Source("a", 101), 1)


def test_streams_are_mixed_in_proportion_to_what_is_asked_of_them():
    streams = [table([{"text": f"{name}{i}"} for i in range(90)]).to_iterable_dataset() for name in "ab"]
    sources = [Source("a", 60), Source("b", 20)]
    found = [row["text"] for row in data_sources.mix_streams(streams, sources, seed=1)]
    assert [sum(name in text for text in found) for name in "ab"] == [60, 20]
    first = [sum(name in text for text in found[:40]) for name in "ab"]
    assert first[0] > first[1] > 2
    assert found == [row["text"] for row in data_sources.mix_streams(streams, sources, seed=1)]
    assert found != [row["text"] for row in data_sources.mix_streams(streams, sources, seed=2)]
    for sources, message in (
        ([Source("a", 0.5), Source("b", 9)], "share of a stream"),
        ([Source("a", 9), Source("b")], "or for none"),
    ):
        with pytest.raises(ConfigError, match=message):
            data_sources.mix_streams(streams, sources, seed=1)
