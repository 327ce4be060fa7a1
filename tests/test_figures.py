"""README's figures are those of the committed results; compare.py tells what moved from noise."""

from __future__ import annotations

import json
import re

import pytest

from hdpissa.benchmarks import compare, figures, timing


def test_readme_says_what_the_results_say():
    """`python benchmarks/figures.py --write` after a new result."""
    text = (figures.ROOT / "README.md").read_text()
    assert figures.replaced(text) == text


def test_every_figure_names_a_script_that_is_there():
    for figure in figures.FIGURES:
        script = figure.command.split()[0]
        assert (figures.ROOT / "benchmarks" / script).is_file(), script


def test_no_other_table_of_readme_has_measured_numbers():
    """Seconds, megabytes and ratios stand in the generated table alone."""
    text = (figures.ROOT / "README.md").read_text()
    rest = text[: text.index(figures.BEGIN)] + text[text.index(figures.END) :]
    rows = [line for line in rest.splitlines() if line.startswith("|")]
    assert not [row for row in rows if re.search(r"\d+\.\d+ ?(?:s|MB|GB|x|×|%)(?:\W|$)", row)]


def result(folder, name, values, **row):
    rows = [{"method": "ours", "time": sorted(values)[len(values) // 2], "samples": {"time": values}, **row}]
    timing.write("x", rows, ["time"], identity=("method",), folder=folder / name)
    return folder / name / "x.json"


NOISY = [1.0, 1.1, 0.95, 1.05, 1.02, 0.98, 1.07]


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "equal"), (1.01, "within noise"), (1.5, "moved"), (0.6, "moved")]
)
def test_noise_and_change(tmp_path, capsys, factor, verdict):
    old = result(tmp_path, "old", NOISY)
    new = result(tmp_path, "new", [factor * value for value in NOISY])
    capsys.readouterr()
    assert compare.main([str(old), str(new), "--all"]) == 0
    said = capsys.readouterr().out
    assert f"| {verdict} |" in said
    assert f"1 figures compared, {int(verdict == 'moved')} moved" in said


def test_the_interval_holds_the_true_ratio():
    """95 of a hundred intervals of samples with a known ratio; with this seed not less than 90."""
    import numpy as np

    generator = np.random.default_rng(1)
    draw = lambda scale: (scale * generator.lognormal(0, 0.05, 15)).tolist()  # noqa: E731
    holds = 0
    for _ in range(100):
        low, high = compare.interval(draw(1.0), draw(1.2))
        holds += low <= 1.2 <= high
    assert holds >= 90


def test_figures_without_samples_are_not_judged(tmp_path, capsys):
    old, new = result(tmp_path, "old", NOISY, bytes=100), result(tmp_path, "new", NOISY, bytes=110)
    capsys.readouterr()
    assert compare.main([str(old.parent), str(new.parent)]) == 0
    said = capsys.readouterr().out
    assert "| bytes | 100 | 110 | 1.1 |  | differs; noise unknown |" in said
    assert "| time |" not in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "TypeError"),
        ("{", "JSONDecodeError"),
        ('{"name": "x", "rows": [1]}', "no list of records"),
        (None, "no result"),
    ],
)
def test_bad_results(tmp_path, capsys, content, words):
    good = result(tmp_path, "old", NOISY)
    bad = tmp_path / "bad"
    bad.mkdir()
    if content is not None:
        (bad / "x.json").write_text(content)
    capsys.readouterr()
    assert compare.main([str(good), str(bad)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


def test_other_configurations_are_named(tmp_path, capsys):
    old = result(tmp_path, "old", NOISY)
    content = json.loads(old.read_text())
    content["configuration"] = {**(content.get("configuration") or {}), "dtype": "bf16"}
    new = tmp_path / "new.json"
    new.write_text(json.dumps(content))
    capsys.readouterr()
    assert compare.main([str(old), str(new)]) == 0
    assert "x: not the same dtype: None in OLD, bf16 in NEW" in capsys.readouterr().out
    assert compare.main([str(old), str(old)]) == 0
    assert "not the same" not in capsys.readouterr().out


def test_rows_of_one_side_only(tmp_path, capsys):
    old = result(tmp_path, "old", NOISY)
    content = json.loads(old.read_text())
    content["rows"][0]["method"] = "theirs"
    new = tmp_path / "new.json"
    new.write_text(json.dumps(content))
    assert compare.main([str(old), str(new)]) == 0
    said = capsys.readouterr().out
    assert "only in OLD" in said
    assert "only in NEW" in said
