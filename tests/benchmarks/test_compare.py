"""compare.py tells what broke, and what moved from noise."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from hdpissa.benchmarks import compare, noise, timing


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
    generator = np.random.default_rng(1)
    draw = lambda scale: (scale * generator.lognormal(0, 0.05, 15)).tolist()  # noqa: E731
    holds = 0
    for _ in range(100):
        low, high = noise.interval(draw(1.0), draw(1.2))
        holds += low <= 1.2 <= high
    assert holds >= 90


@pytest.mark.parametrize("statistic", [np.median, np.mean])
@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_false_alarms_are_rare_with_few_samples(count, statistic):
    """Of two sides of one distribution at most one in twenty moves; of a real change with enough samples, most do."""
    generator = np.random.default_rng(2)
    moved = {1.0: 0, 1.5: 0}
    for scale, tries in ((1.0, 100), (1.5, 20)):
        for _ in range(tries):
            old, new = generator.lognormal(0, 0.05, count).tolist(), (scale * generator.lognormal(0, 0.05, count))
            found = noise.compared((statistic(old), statistic(new)), (old, new.tolist()))
            moved[scale] += not isinstance(found, str) and found.moved
    assert moved[1.0] <= 9  # 5 expected at most
    assert moved[1.5] == (0 if count == 3 else 20)


def test_the_interval_is_of_the_figure_that_is_shown():
    """A mean that one outlier carries is no median; what is neither has no known noise."""
    old, new = [1.0, 1.1, 0.9, 1.0, 9.0], [1.2, 1.3, 1.1, 1.2, 1.2]
    assert noise.statistic_of([np.median(old), np.median(new)], [old, new]) is np.median
    assert noise.statistic_of([np.mean(old), np.mean(new)], [old, new]) is np.mean
    median = noise.compared((np.median(old), np.median(new)), (old, new))
    mean = noise.compared((np.mean(old), np.mean(new)), (old, new))
    assert median.low <= 1.2 <= median.high
    assert mean.low < 0.5  # the outlier is in the noise of means
    assert noise.compared((min(old), min(new)), (old, new)) == ": neither median nor mean of its samples"


def test_zeros_are_compared_by_difference(tmp_path, capsys):
    """Exact match over seeds: a ratio to 0 has no interval."""
    old = result(tmp_path, "old", [0.0, 0.0, 0.0, 0.0, 1 / 32])
    for values, verdict in (([0.0, 1 / 32, 0.0, 0.0, 0.0], "within noise"), ([0.5, 0.4, 0.6, 0.5, 0.55], "moved")):
        new = result(tmp_path, "new", values)
        capsys.readouterr()
        assert compare.main([str(old), str(new), "--all"]) == 0
        said = capsys.readouterr().out
        assert "nan" not in said
        assert f"{verdict} |" in said
    assert "(new − old) | moved |" in said
    found = noise.compared((1 / 96, 2 / 96), ([0.0, 1 / 32, 0.0], [1 / 32, 0.0, 1 / 32]))
    assert found == ": 3 and 3 samples are too few"
    assert "not finite" in noise.compared((1.0, 1.0), ([1.0, float("nan")], [1.0, 1.0]))


def test_rounds_are_what_is_drawn_again():
    """Steps of one run share its luck: four lucky runs of ten steps are four samples, and three are too few."""
    generator = np.random.default_rng(3)
    old = [x for luck in (1.0, 1.2, 0.9, 1.1) for x in luck * generator.lognormal(0, 0.01, 10)]
    new = [x for luck in (1.15, 1.0, 1.25, 1.05) for x in luck * generator.lognormal(0, 0.01, 10)]
    medians = (float(np.median(old)), float(np.median(new)))
    alone, together = noise.compared(medians, (old, new)), noise.compared(medians, (old, new), rounds=(4, 4))
    assert not together.moved
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    fewer = (float(np.median(old[:30])), float(np.median(new[:30])))
    assert noise.compared(fewer, (old[:30], new[:30]), rounds=(3, 3)) == ": 3 and 3 rounds are too few"


def test_a_row_tells_its_rounds():
    """One that failed part-way has fewer than its result: two rounds of ten steps are no four of five."""
    asked = {"configuration": {"rounds": 4}}
    assert noise.rounds_of(asked, {}) == 4
    assert noise.rounds_of(asked, {"rounds": 2}) == 2
    assert noise.rounds_of({"configuration": {}}, {}) is noise.rounds_of({}, {}) is None
    steps = list(range(20))
    assert noise.units_of(steps, noise.rounds_of(asked, {"rounds": 2})) == [steps[:10], steps[10:]]
    assert noise.units_of([1.0, 2.0], 3) == [[1.0], [2.0]]  # ratios of two rounds of three


def in_rounds(folder, name, values, asked, **row):
    rows = [{"method": "ours", "time": float(np.median(values)), "samples": {"time": values}, **row}]
    where = {"identity": ("method",), "configuration": {"rounds": asked}, "folder": folder / name}
    timing.write("x", rows, ["time"], **where)
    return str(folder / name / "x.json")


def test_one_run_a_side_moves_nothing(tmp_path, capsys):
    """Five steps each of two runs of the same code, on a machine that was 20 % slower the second time."""
    old, new = in_rounds(tmp_path, "old", NOISY, 1), in_rounds(tmp_path, "new", [1.2 * value for value in NOISY], 1)
    near = in_rounds(tmp_path, "near", [1.01 * value for value in NOISY], 1)
    few = in_rounds(tmp_path, "few", [2 * value for value in NOISY[:3]], 1)
    capsys.readouterr()
    assert compare.main([old, new]) == 0
    said = capsys.readouterr().out
    assert f"| {compare.ONE_RUN} |" in said
    assert "1 figures compared, 0 moved beyond noise" in said
    assert compare.main([old, near, "--all"]) == 0
    assert "| within noise |" in capsys.readouterr().out
    assert compare.main([few, in_rounds(tmp_path, "more", NOISY[:3], 1)]) == 0
    assert "| differs; noise unknown: one run each |" in capsys.readouterr().out
    assert compare.main([old, in_rounds(tmp_path, "rounds", 4 * [1.5 * value for value in NOISY], 4)]) == 0
    assert "1 and 4 rounds are too few" in capsys.readouterr().out


def test_rounds_of_a_row_are_no_figure(tmp_path, capsys):
    old, new = in_rounds(tmp_path, "old", NOISY, 4, rounds=4), in_rounds(tmp_path, "new", NOISY, 4, rounds=2)
    capsys.readouterr()
    assert compare.main([old, new, "--all"]) == 0
    assert "1 figures compared" in capsys.readouterr().out


def ranks_of(folder, name, values, weights):
    row = {"method": "ours", "rank": float(np.median(values)), "samples": {"rank": values}, "weights": weights}
    timing.write("x", [row], ["rank"], identity=("method",), folder=folder / name)
    return str(folder / name / "x.json")


def test_weights_are_compared_one_by_one(tmp_path, capsys):
    """Matrices are no repetitions: each that loses 5 % is a change, however much they differ among themselves."""
    names = [f"layers.{n}" for n in range(8)]
    values = [10.0, 250.0, 40.0, 90.0, 33.0, 170.0, 15.0, 61.0]
    old = ranks_of(tmp_path, "old", values, names)
    new = ranks_of(tmp_path, "new", [0.95 * v for v in reversed(values)], names[::-1])
    capsys.readouterr()
    assert compare.main([old, new]) == 0
    assert "| 0.95 | 0.950 … 0.950 | moved |" in capsys.readouterr().out
    mixed = ranks_of(tmp_path, "mixed", [v * (1.05 if n % 2 else 0.95) for n, v in enumerate(values)], names)
    few = ranks_of(tmp_path, "few", values[:3], [f"other.{n}" for n in range(3)])
    capsys.readouterr()
    assert compare.main([old, mixed, "--all"]) == 0
    assert "| within noise |" in capsys.readouterr().out
    assert compare.main([old, few]) == 0
    assert "0 weights on both sides are too few" in capsys.readouterr().out


# --- what broke -------------------------------------------------------------------------------------------------------


def rows_of(folder, name, *rows):
    timing.write("x", rows, [], identity=("method", "ranks"), folder=folder / name)
    return str(folder / name / "x.json")


FINE = {"method": "lora", "ranks": 2, "time": 1.0, "memory": 5}


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ({"method": "lora", "ranks": 2, "remark": "out of memory"}, "failed in NEW: out of memory"),
        ({"method": "lora", "ranks": 2}, "failed in NEW: it has no figures"),
        ({"method": "lora", "ranks": 2, "memory": 5}, "gone in NEW"),
        ({**FINE, "time": "did not converge"}, "gone in NEW: did not converge"),
        ({**FINE, "time": None, "remark": "diverged"}, "gone in NEW: diverged"),
        ({**FINE, "time": float("nan")}, "not finite in NEW"),
        ({**FINE, "ranks": 4}, "only in OLD"),
    ],
)
def test_what_breaks_is_told(tmp_path, capsys, new, verdict):
    """And the other way round it is not counted as a loss."""
    old, new = rows_of(tmp_path, "old", FINE), rows_of(tmp_path, "new", new)
    capsys.readouterr()
    assert compare.main([old, new]) == 1
    said = capsys.readouterr().out
    assert f"| {verdict} |" in said
    assert ", 1 failed or gone in NEW" in said
    assert compare.main([new, old]) == (1 if verdict == "only in OLD" else 0)
    back = capsys.readouterr().out
    assert any(words in back for words in ("in OLD", "only in NEW"))


def test_a_remark_beside_figures_is_told(tmp_path, capsys):
    old, new = rows_of(tmp_path, "old", FINE), rows_of(tmp_path, "new", {**FINE, "remark": "failed after 2 rounds"})
    capsys.readouterr()
    assert compare.main([old, new]) == 0
    assert "| remark in NEW: failed after 2 rounds |" in capsys.readouterr().out
    assert compare.main([new, new]) == 0
    assert "remark" not in capsys.readouterr().out


def test_results_of_one_side_are_told(tmp_path, capsys):
    result(tmp_path, "old", NOISY), result(tmp_path, "new", NOISY)
    timing.write("y", [{"a": 1}], ["a"], folder=tmp_path / "old")
    timing.write("z", [{"a": 1}], ["a"], folder=tmp_path / "new")
    capsys.readouterr()
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    said = capsys.readouterr().out
    assert re.search(r"\| y \|.*\| only in OLD \|", said)
    assert re.search(r"\| z \|.*\| only in NEW \|", said)


def test_rows_are_matched_where_only_one_side_names_identity_columns(tmp_path, capsys):
    old = rows_of(tmp_path, "old", FINE, {**FINE, "ranks": 4})
    content = json.loads((tmp_path / "old" / "x.json").read_text())
    (tmp_path / "older.json").write_text(json.dumps({**content, "identity": []}))
    capsys.readouterr()
    assert compare.main([str(tmp_path / "older.json"), old, "--all"]) == 0
    assert "4 figures compared, 0 moved" in capsys.readouterr().out


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
    assert "x: OLD does not tell its configuration\n" in capsys.readouterr().out
    content["configuration"] = {"dtype": "fp32", "seed": 1}
    old.write_text(json.dumps(content))
    assert compare.main([str(old), str(new)]) == 0
    said = capsys.readouterr().out
    assert "x: not the same dtype: fp32 in OLD, bf16 in NEW\n" in said
    assert "x: not the same seed: 1 in OLD, not told in NEW\n" in said
    assert compare.main([str(old), str(old)]) == 0
    assert "not the same" not in capsys.readouterr().out


def test_rows_of_one_side_only(tmp_path, capsys):
    old = result(tmp_path, "old", NOISY)
    content = json.loads(old.read_text())
    content["rows"][0]["method"] = "theirs"
    new = tmp_path / "new.json"
    new.write_text(json.dumps(content))
    assert compare.main([str(old), str(new)]) == 1
    said = capsys.readouterr().out
    assert "only in OLD" in said
    assert "only in NEW" in said
