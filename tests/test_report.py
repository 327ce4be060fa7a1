"""A run's report: what it tells, that it needs nothing but itself, and that it never fails a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch_runs import parsed, read_json
from report_runs import PICTURES, Page, write_run

from hdpissa.engine import pictures, report
from hdpissa.engine.recorder import Recorder
from hdpissa.engine.run_record import RunRecord
from hdpissa.launch import command_line, train_report
from hdpissa.launch import report as report_command
from hdpissa.launch.options_reporting import ReportingOptions

# --- from files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A short run without a GPU, and a long one on many, with their reports."""
    root = tmp_path_factory.mktemp("runs")
    folders = {
        "short": write_run(root / "short", steps=12, slices=2, gpu=False),
        "long": write_run(root / "long", steps=5000, slices=32),
    }
    for folder in folders.values():
        assert report.write_report(folder, defaults={"max_length": 512}) == [*PICTURES, "report.html"]
    return folders


@pytest.mark.parametrize("name", ["short", "long"])
def test_the_page_needs_nothing_but_itself(drawn, name):
    page = Page((drawn[name] / "report.html").read_text())
    assert page.unclosed == []
    assert page.tags.count("svg") == len(PICTURES)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    outside = [r for r in page.references if not r.startswith("#")]
    assert outside == []
    targets = {r.removeprefix("#") for r in page.references}
    targets |= {found for style in page.styles for found in re.findall(r"url\(#([^)]*)\)", style)}
    assert targets
    assert targets <= set(page.ids), "a picture refers to what is not there"
    assert not [s for s in page.styles if re.search(r"url\((?!#)|@import", s)]
    assert page.policy.startswith("default-src 'none'")


def test_pictures_on_one_page_do_not_share_ids(drawn):
    ids = Page((drawn["short"] / "report.html").read_text()).ids
    assert ids
    assert len(ids) == len(set(ids))


def test_dark_and_light(drawn):
    """Every colour of a picture is a variable that both schemes define; nothing is fixed to ink on white."""
    text = (drawn["short"] / "report.html").read_text()
    head, body = text.split("</style>", 1)
    assert "prefers-color-scheme: dark" in head
    assert re.findall(r"#[0-9a-fA-F]{6}", re.sub(r'(href|id)="[^"]*"|url\([^)]*\)', "", body)) == []
    used = set(re.findall(r"var\(--(\w+)\)", body))
    assert used >= {"blue", "red"}
    assert all(head.count(f"--{name}:") == 2 for name in used)
    assert set(report.DARK) == set(pictures.PALETTE)
    assert all(_contrast(colour, "#171b21") >= 3 for colour in report.DARK.values())
    light = {k: v for k, v in pictures.PALETTE.items() if k not in ("orange", "sky", "pink")}  # those come with dashes
    assert all(_contrast(colour, "#ffffff") >= 3 for colour in light.values())


def _contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_what_the_page_tells(drawn):
    page = Page((drawn["short"] / "report.html").read_text())
    for text in (
        "Llama-2-7b-hf · meta-math/MetaMathQA · HD-PiSSA, 2 slices of rank 16 · 2 × cpu",
        "2.9000 → 1.0547",  # validation loss
        "18.17 → 2.87",  # perplexity
        "12 of 12",
        "one step was skipped, it is 6: rank 1: a loss is not finite",
        "checkpoint-2 could not be saved",
        "How many <apples> & pears?",
        "<script>alert(1)</script>",  # as text
        "14 + 18 - 5 = 27",
        "1 more in samples.jsonl",
        "17.00 GiB",
        "123,456,789",
        "git revision",
        "stage",
    ):
        assert text in page.text, text
    assert "the middle one" not in page.text


def test_arguments_of_the_default_are_folded(drawn):
    page = Page((drawn["short"] / "report.html").read_text())
    before, after = page.text.split("The other 1 arguments")
    assert "meta-llama" in before
    assert "max_length" not in before
    assert "max_length" in after


def test_what_the_config_says_is_not_told_as_absent(tmp_path, drawn):
    """r stands in the JSON, and --r was not given."""
    shutil.copytree(drawn["short"], tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    run["arguments"] |= {"r": None, "lora_alpha": None}
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    report.write_report(tmp_path / "run", defaults={"r": None, "lora_alpha": None})
    rows = Page((tmp_path / "run" / "report.html").read_text()).text.split()
    assert " ".join(rows).count("16 (by the config)") == 1
    assert " ".join(rows).count("not given") == 1


def test_files_are_small(drawn):
    """A long run's curves are thinned: its report is hardly larger than a short one's."""
    sizes = {name: {p.name: p.stat().st_size for p in folder.iterdir()} for name, folder in drawn.items()}
    assert sizes["long"]["metrics.jsonl"] > 1e6
    assert sizes["long"]["report.html"] < 400_000
    assert all(sizes["long"][name] < 250_000 for name in PICTURES)


# --- what is not there -----------------------------------------------------------------------------


def test_a_run_that_was_killed_early(tmp_path):
    """Half a line, no state, a loss that is not finite; and a picture of an earlier run, which goes."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null, "learning_rate": 0.0}\n{"step": 2, "lo')
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "spectra.png").touch()
    assert report.write_report(tmp_path) == ["learning_rate.png", "report.html"]
    assert not (tmp_path / "spectra.png").exists()
    assert Page((tmp_path / "report.html").read_text()).unclosed == []


def test_an_empty_folder(tmp_path):
    assert report.write_report(tmp_path) == ["report.html"]
    assert "nothing to draw yet" in (tmp_path / "report.html").read_text()


def test_odd_files(tmp_path):
    """Rows that are no objects, fields of another type, a slice field whose length changes."""
    lines = ["[]", "3", '{"step": "x"}', '{"loss": 1}', '{"step": 1, "loss": "much", "slice_grad_norms": [1, 2]}']
    lines += ['{"step": 2, "loss": 2.0, "learning_rate": 1e-3, "slice_grad_norms": [1]}', '{"step": 3, "loss": true}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    for name in ("run.json", "run_state.json", "report.json", "sample_before_training.json"):
        (tmp_path / name).write_text("[1, 2]")
    record = RunRecord.read(tmp_path)
    assert [row["step"] for row in record.rows] == [1, 2, 3]
    assert record.per_slice() == {"slice_grad_norms": ([1.0], [[1.0, 2.0]])}
    assert "report.html" in report.write_report(tmp_path)


# --- its options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--output_dir"),
        (["--output_dir", "x" * 300], "the name is too long, at most 255 bytes"),
        (["--output_dir", "nowhere"], "no such folder; give the output folder of a run"),
        (["--output_dir", "."], "no metrics.jsonl and no run.json there"),
        (["--output_dir", ".", "--dpi", "9"], "unrecognized arguments: --dpi"),
    ],
)
def test_bad_command_lines(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line.exit_code(report_command.main, argv) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_report_spectra_is_not_negative():
    from hdpissa.engine.errors import ConfigError
    from hdpissa.launch import options_reporting

    with pytest.raises(ConfigError, match="--report_spectra is -1: must not be negative"):
        options_reporting.check(ReportingOptions(report_spectra=-1))


# --- never able to fail a run ----------------------------------------------------------------------


def ended(folder: Path, **options) -> tuple[list[str], list[str]]:
    """What `train_report.write` returns for a run that ended in this folder, and what it says."""
    lines: list[str] = []
    recorder = Recorder(folder, total_steps=1, weights=1, device_name="cpu", devices=1, rank=0)
    recorder.say("warning: the disk was full")
    recorder.say("no warning")
    recorder.say = lines.append
    engine = SimpleNamespace(plan=SimpleNamespace(rank=0))
    return train_report.write(parsed(folder, **options), engine, recorder, spectra=False), lines


def test_the_report_is_an_option(tmp_path):
    assert ended(tmp_path, report=False) == ([], [])
    assert not list(tmp_path.iterdir())
    assert ReportingOptions().report


def test_warnings_are_kept_for_the_report(tmp_path):
    write_run(tmp_path, steps=3, slices=1)
    (tmp_path / "metrics.jsonl").unlink()  # what would only cost time
    names, told = ended(tmp_path)
    assert (names[-1], told) == ("report.html", [])
    assert read_json(tmp_path / "report.json")["warnings"] == ["checkpoint-2 could not be saved", "the disk was full"]
    assert "the disk was full" in (tmp_path / "report.html").read_text()
    assert len(read_json(tmp_path / "report.json")["spectra"]["weights"]) == 9  # an earlier part's are kept


def test_what_goes_wrong_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "TEMPLATE", tmp_path / "gone")
    names, told = ended(tmp_path)
    assert names == []
    (line,) = told
    assert line.startswith("warning: no report: FileNotFoundError: ")
    assert line.endswith("; the run itself is complete")


def test_a_new_run_clears_the_old_report(tmp_path):
    write_run(tmp_path, steps=3, slices=2)
    for name in (*PICTURES, "report.html"):
        (tmp_path / name).touch()
    report.clear(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "run.json", "run_state.json"]
