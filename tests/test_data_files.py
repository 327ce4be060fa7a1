"""Files as they are: cells of CSV files, names with every character, splits of a folder, files that are zipped."""

from __future__ import annotations

import gzip
import json

import datasets
import pytest
from data_cases import CONVERSATION, TURNS, encode, texts

from hdpissa.engine.data_sources import load_rows
from hdpissa.engine.errors import ConfigError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def put(path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- cells of CSV files ----------------------------------------------------------------------------

CELLS = ["007", "1.50", "None", "NA", "null", "nan", "1e5", "True", "2024-01-01", '"a, ""b"""']


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", ["csv", "tsv", "csv.gz", "folder"])
def test_a_cell_is_the_text_that_it_is(tmp_path, source, streaming):
    separator = "\t" if source == "tsv" else ","
    text = "".join(separator.join(cells) + "\n" for cells in [("instruction", "response"), *((c, c) for c in CELLS)])
    path = tmp_path / ("rows/train.csv" if source == "folder" else f"rows.{source}")
    put(path, "")
    path.write_bytes(gzip.compress(text.encode()) if source == "csv.gz" else text.encode())
    found = load_rows(str(path.parent if source == "folder" else path), streaming=streaming)
    expected = [*CELLS[:-1], 'a, "b"']
    assert [(row["instruction"], row["response"]) for row in found] == [(cell, cell) for cell in expected]
    if not streaming:
        assert texts(encode(found)) == [f"<s><{cell}>«{cell}\n</s>»" for cell in expected]


def test_an_empty_cell_is_nothing(tmp_path):
    """An input that is not there, an answer that is missing; also where a column has nothing else."""
    path = put(tmp_path / "rows.csv", 'instruction,input,output\nq,,a\nr,"",b\n')
    assert texts(encode(load_rows(path))) == ["<s><q>«a\n</s>»", "<s><r>«b\n</s>»"]
    path = put(tmp_path / "rows.csv", "instruction,response\nq,a\nr,\n")
    with pytest.raises(ConfigError, match=r"row 1 \(from 0\) has nothing in column 'response'"):
        encode(load_rows(path))


def test_a_cell_of_json_is_a_conversation(tmp_path):
    cell = json.dumps(CONVERSATION).replace('"', '""')
    assert texts(encode(load_rows(put(tmp_path / "rows.csv", f'messages\n"{cell}"\n')))) == [TURNS]


def test_csv_files_whose_columns_are_not_those_of_their_header(tmp_path):
    with pytest.raises(ConfigError, match="more cells in its first row than in its header"):
        load_rows(put(tmp_path / "rows.csv", "instruction,response\nq,a,b\n"))
    put(tmp_path / "folder" / "a.csv", "instruction,response\nq,a\n")
    put(tmp_path / "folder" / "b.csv", "instruction,answer\nq,a\n")
    with pytest.raises(ConfigError, match=r"b\.csv' has the columns instruction, answer, and a\.csv beside it"):
        load_rows(str(tmp_path / "folder"))


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["d[1]", "d*", "d?", "d[!2]", "{a,d1}", "d[", "[d]1"])
def test_a_name_is_no_pattern(tmp_path, name, streaming):
    """Beside each there is a file that it would match."""
    put(tmp_path / "d1.jsonl", lines({"text": "another"}))
    put(tmp_path / "d1" / "train.jsonl", lines({"text": "another"}))
    row = {"text": name}
    assert list(load_rows(put(tmp_path / f"{name}.jsonl", lines(row)), streaming=streaming)) == [row]
    put(tmp_path / name / "train.jsonl", lines(row))
    assert list(load_rows(str(tmp_path / name), streaming=streaming)) == [row]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz"])
def test_zipped_files_are_read_anew_when_they_change(tmp_path, name):
    for text in ("first", "second"):
        content = lines({"text": text}) if "jsonl" in name else json.dumps([{"text": text}])
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        assert load_rows(str(tmp_path / name)).to_list() == [{"text": text}]


@pytest.mark.parametrize("name", ["train.tsv", "a.jsonl.gz", "a.txt", "a.xlsx", "a.zip", "a.jsonl.zst", "data/a.txt"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: pytest.fail("asked for"))
    with pytest.raises(ConfigError, match=f"'{name}': no such file or folder; check the path"):
        load_rows(name)


def test_files_of_no_known_kind(tmp_path):
    for name in ("a.txt", "a.jsonl.zst", "a.parquet.gz", "a.gz"):
        with pytest.raises(ConfigError, match=r"is none of \.jsonl, .*; convert it"):
            load_rows(put(tmp_path / name, "x"))


# --- folders ---------------------------------------------------------------------------------------


def test_splits_of_a_folder_may_have_other_columns(tmp_path):
    train, test = {"instruction": "q", "response": "a"}, {"question": "r", "answer": "b"}
    put(tmp_path / "train.jsonl", lines(train, train))
    put(tmp_path / "test.csv", "question,answer\nr,b\n")
    assert load_rows(str(tmp_path)).to_list() == [train] * 2
    assert load_rows(str(tmp_path), split="test[:1]").to_list() == [test]
    with pytest.raises(ConfigError, match=r"Unknown split .validation., it has train, test"):
        load_rows(str(tmp_path), split="validation")
    with pytest.raises(ConfigError, match=r"more than one kind \(test\.csv and train\.jsonl\)"):
        load_rows(str(tmp_path), split="train+test")
    put(tmp_path / "train_2.jsonl", lines(test))
    with pytest.raises(ConfigError, match=r"same columns: there are 2 new columns .*question"):
        load_rows(str(tmp_path))


def test_a_folder_that_says_what_it_holds_is_read_so(tmp_path):
    put(tmp_path / "README.md", "---\nconfigs:\n- config_name: main\n  data_files: b.jsonl\n---\n")
    put(tmp_path / "a.jsonl", lines({"text": "a"}))
    put(tmp_path / "b.jsonl", lines({"text": "b"}))
    assert load_rows(str(tmp_path)).to_list() == load_rows(str(tmp_path), config_name="main").to_list()
    assert load_rows(str(tmp_path))["text"] == ["b"]
    put(tmp_path / "README.md", "---\nlicense: mit\n---\nconfigs: none\n")
    assert sorted(load_rows(str(tmp_path))["text"]) == ["a", "b"]
