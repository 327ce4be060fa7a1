"""compare.py: what moved, what is noise, what was lost, and its exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hdpissa.benchmarks import compare


def result(folder, rows, *, rounds=None, name="bench"):
    content = {"name": name, "identity": ["case"], "rows": rows, "environment": {"device": "CPU"}}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**content, "configuration": {"rounds": rounds}}))
    return folder


def row(samples, case="a", **more):
    return {"case": case, "ms": float(np.median(samples)), "samples": {"ms": list(samples)}, **more}


def outcomes(old, new):
    found, other = (next(iter(compare.read(folder).values())) for folder in (old, new))
    return {(line["row"], line["figure"]): line["outcome"] for line in compare.changes("bench", found, other)}


NOISE = np.random.default_rng(1).normal(1.0, 0.02, 40)


@pytest.mark.parametrize(
    ("factor", "rounds", "expected"),
    [
        (1.0, None, "equal"),
        (1.001, None, "within noise"),
        (1.2, None, "moved"),
        (1.2, 8, "moved"),
        (1.2, 2, "differs; too few rounds to tell"),
        (1.2, 1, "differs; too few rounds to tell"),
    ],
)
def test_a_figure_moves_beyond_its_noise_alone(tmp_path, factor, rounds, expected):
    old = result(tmp_path / "old", [row(NOISE)], rounds=rounds)
    new = result(tmp_path / "new", [row(factor * NOISE)], rounds=rounds)
    assert outcomes(old, new) == {("a", "ms"): expected}


def test_the_interval_holds_the_true_ratio_as_often_as_it_says():
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(100):
        old, new = generator.normal(1.0, 0.1, (30, 1)), generator.normal(1.3, 0.1, (30, 1))
        low, high = compare.interval(old, new)
        hits += low <= 1.3 <= high
    assert hits >= 88  # 95 expected; below 88 has a chance of 0.4 %


def test_rounds_are_drawn_whole():
    """Ten equal steps a round are ten times one sample, not ten samples: the interval is not narrower for them."""
    one = np.random.default_rng(3).normal(1.0, 0.1, (6, 1))
    assert compare.interval(np.repeat(one, 10, axis=1), 2 * one) == pytest.approx(compare.interval(one, 2 * one))


def test_what_is_lost_is_the_exit_code(tmp_path, capsys):
    old = result(tmp_path / "old", [row(NOISE), row(NOISE, "b")])
    assert compare.main([str(old), str(old)]) == 0
    failed = result(tmp_path / "failed", [row(NOISE), {"case": "b", "remark": "out of memory"}])
    assert compare.main([str(old), str(failed)]) == 1
    assert outcomes(old, failed)["b", "ms"] == f"{compare.LOST}: out of memory"
    assert compare.main([str(old), str(result(tmp_path / "gone", [row(NOISE)]))]) == 1
    assert compare.main([str(failed), str(old)]) == 0  # what is new is no loss
    not_finite = result(tmp_path / "nan", [{**row(NOISE), "ms": float("nan")}, row(NOISE, "b")])
    assert compare.main([str(old), str(not_finite)]) == 1
    result(old, [row(NOISE)], name="other")
    assert compare.main([str(old), str(failed)]) == 1


@pytest.mark.parametrize("content", [None, "no JSON", "[]", '{"name": "x", "rows": 3}'])
def test_what_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "bad").mkdir()
    if content is not None:
        (tmp_path / "bad" / "x.json").write_text(content)
    with pytest.raises(compare.ConfigError):
        compare.read(tmp_path / "bad")
