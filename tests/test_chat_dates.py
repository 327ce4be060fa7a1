"""Chat templates that ask for today's date get the same one every day; nothing else about them changes."""

from __future__ import annotations

import json
from datetime import datetime

import datasets
import pytest
from data_cases import CHAT, ROWS, character_tokenizer, encode, texts
from launch_runs import flags
from transformers.utils import chat_template_utils

from hdpissa.engine.chat_template import TODAY, ChatTemplate
from hdpissa.launch import train_arguments
from hdpissa.launch.train_data import read_rows, tell_sources

DATED = "{{ strftime_now('%d %b %Y') }}" + CHAT
QUESTION = [{"role": "user", "content": "q"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def go_to(monkeypatch, day: datetime) -> None:
    """What transformers takes for now."""
    clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, tz=None: day)})
    monkeypatch.setattr(chat_template_utils, "datetime", clock)


def test_rows_are_the_same_on_another_day(monkeypatch):
    rows = datasets.Dataset.from_list(ROWS["messages"][0])
    words = "{{ m.content }}</s>"
    marked = DATED.replace("[{{ m.role }}]" + words, "{% generation %}" + words + "{% endgeneration %}")
    found = []
    for day in (datetime(2025, 1, 2), datetime(2025, 1, 3)):
        go_to(monkeypatch, day)
        found.append([texts(encode(rows, chat=text))[0] for text in (DATED, marked)])
    assert found[0] == found[1]
    assert found[0][0].startswith("26 Jul 2024[system]s</s>[user]q</s>[assistant]«a</s>»")
    assert found[0][1].startswith("26 Jul 2024«s</s>q</s>a</s>")


@pytest.mark.parametrize(
    "text",
    [
        "\n  {% if true %}x{% endif %}\n {{ strftime_now('%d %b %Y') }}|{{ strftime_now('%-d %B, %A %H:%M %j %%') }}",
        "  {%- if strftime_now is defined %}{% set d = strftime_now('%Y') | int + 1 %}{{ d }}{% endif %}",
        "{% for m in messages %}{{ strftime_now(format='%y') }}{% endfor %}",
        "{% macro f() %}{{ strftime_now('%F') }}{% endmacro %}{{ f() }}",
    ],
)
def test_the_date_is_written_as_the_clock_would_write_it(monkeypatch, text):
    """With all blanks around it."""
    go_to(monkeypatch, TODAY)
    (expected,), _ = chat_template_utils.render_jinja_template([QUESTION], chat_template=text)
    assert ChatTemplate(text, character_tokenizer()).write(QUESTION) == expected


def test_the_line_of_a_set_says_which_date(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS["messages"][0]))
    required = {"ds_config": "a.json", "model_name_or_path": "m", "output_dir": "o", "dataset_name": str(path)}
    for template, told in ((DATED, "prompts chat template (today is 26 Jul 2024),"), (CHAT, "prompts chat template,")):
        args, given = train_arguments.parse(flags(required))
        found = read_rows(args, given, character_tokenizer(chat_template=template))
        assert told in tell_sources(found.sources)[0]
