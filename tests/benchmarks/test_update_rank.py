"""How the rank of an update is counted, and that the methods' updates have the ranks that their algebra allows."""

from __future__ import annotations

import json
import math
import sys

import launch_runs
import pytest
import torch
from ranks import run_ranks
from tensors import randn

from hdpissa.benchmarks import apart, task, update_rank
from hdpissa.benchmarks.update_rank import Variant, choose_weights, count_above, effective_rank, noise_level
from hdpissa.engine.errors import ConfigError


def test_effective_rank():
    """k equal singular values count as k; unequal ones as exp of the entropy, worked out by hand."""
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)  # p = ½, ¼, ¼: entropy 1.5 ln 2
    assert effective_rank(torch.tensor([20.0, 10.0, 10.0])) == pytest.approx(2**1.5)


def test_threshold_is_relative_to_the_largest():
    sigma = torch.tensor([50.0, 0.06, 0.04, 0.0])
    assert count_above(sigma, 1e-3) == 2
    assert count_above(sigma / 50, 1e-3) == 2


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_noise_is_that_of_rounding(scale):
    """The level is twice the largest singular value of a real rounding error; twice as many roundings: √2."""
    W = scale * randn(300, 200)
    error = torch.linalg.matrix_norm(W.float().double() - W, ord=2).item()
    assert noise_level(W, 1) == pytest.approx(2 * error, rel=0.1)
    assert noise_level(W, 2) == pytest.approx(math.sqrt(2) * noise_level(W, 1))


def test_a_planted_rank_is_found_again():
    """An update of rank 5 that reaches down to 1/500 of its largest, taken off weights that are held in fp32."""
    W = randn(120, 80).float()
    left, right = (torch.linalg.qr(randn(n, 5, seed=n))[0] for n in (120, 80))
    sigma = torch.tensor([1.0, 0.5, 0.1, 0.01, 0.002], dtype=torch.float64)
    after = (W.double() - 0.1 * (left * sigma) @ right.T).float()
    found, spectrum = update_rank.describe(after.double() - W.double(), W.double(), bound=5, roundings=1)
    assert found["above 1e-3"] == found["numerical rank"] == 5
    assert found["by the eps of float64"] == 80
    assert found["past"] < found["floor"] < 0.002
    assert torch.allclose(spectrum[:5], 0.1 * sigma, rtol=1e-2)
    assert found["effective rank"] == pytest.approx(effective_rank(sigma), rel=0.02)


def test_no_change_is_an_error():
    with pytest.raises(RuntimeError, match="not changed"):
        update_rank.describe(torch.zeros(4, 3), torch.ones(4, 3), bound=1, roundings=1)


def test_bounds():
    assert Variant("lora", 16, 0).bound(576, 1536) == 16
    assert Variant("pissa", 16, 0).bound(576, 1536) == 32
    assert Variant("hd_pissa", 16, 8).bound(576, 1536) == 256
    assert Variant("hd_pissa", 16, 8).bound(192, 576) == 192
    assert Variant("full", 16, 0).bound(1536, 576) == 576


def test_first_middle_and_last_layer():
    names = [f"model.layers.{i}.mlp.{w}.weight" for i in range(9) for w in ("up_proj", "other")]
    assert choose_weights(names, []) == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 4, 8)]
    assert choose_weights(names, [3]) == ["model.layers.3.mlp.up_proj.weight"]
    with pytest.raises(ConfigError, match="--layers 9: the model has layers 0 to 8"):
        choose_weights(names, [9])


def test_ratios_are_of_equal_matrices_after_equal_steps():
    def matrix(rank):
        counts = dict.fromkeys((*update_rank.RANKS, "bound", "by the eps of float64"), rank)
        return counts | {"past": None, "floor": 1e-6, "weight": "w", "shape": [9, 9]}

    lora, sliced = Variant("lora", 2, 0), Variant("hd_pissa", 2, 4)
    rows = update_rank.rows_of(
        {(lora, 1, 9): [matrix(2)], (lora, 3, 9): [matrix(4)], (sliced, 1, 9): [matrix(n) for n in (6, 8, 9)]}
    )
    assert [row["/ LoRA"] for row in rows] == [1, 1, 4]
    assert rows[2]["samples"]["above 1e-3"] == [6, 8, 9]
    assert "4 times LoRA's 2" in update_rank.claim(rows)
    assert "the bound of one step is" in update_rank.claim(rows)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--slices", "3", "--accumulation", "8"], "multiple"),
        (["--methods", "dora"], "--methods dora"),
        (["--steps", "0"], "positive"),
        (["--slice", "3"], "did you mean --slices"),
    ],
)
def test_bad_input_is_one_line(arguments, rule, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["update_rank.py", "--model", "nowhere/nothing", *arguments])
    assert task.run(update_rank.main) == 2
    told = capsys.readouterr().err
    assert rule in told
    assert len(told.splitlines()) == 1


def test_measured_ranks_reach_their_bounds(tmp_path, monkeypatch):
    """The real methods on a tiny model: after one step every update has exactly the rank that its method allows."""
    model = launch_runs.make_inputs(tmp_path)["model_name_or_path"]
    command = ["update_rank.py", "--model", model, "--r", "2", "--slices", "4", "--methods", "lora", "hd_pissa"]
    command += ["--steps", "1", "2", "--accumulation", "4", "--train_rows", "64"]
    monkeypatch.setattr(sys, "argv", [*command, "--folder", str(tmp_path)])
    monkeypatch.setattr(apart, "call", lambda function, *args: run_ranks(1, function, *args)[0])  # a fork that is there
    assert task.run(update_rank.main) == 0
    stored = json.loads((tmp_path / "update_rank.json").read_text())
    first = [row for row in stored["rows"] if row["steps"] == 1]
    assert {(row["method"], row["S"]) for row in first} == {
        ("lora", ""),
        ("hd_pissa", 4),
    }
    for row in first:
        bound = {"lora": 2, "pissa": 4, "hd_pissa": 4 * (row["S"] or 1), "full": 99}[row["method"]]
        assert row["bound"] == min(bound, row["min(m, n)"])
        if row["method"] != "full":  # whose least singular value may be as small as it likes
            assert row["numerical rank"] == row["above 1e-3"] == row["bound"]
    assert stored["configuration"]["lr"] == 2e-4
    assert stored["identity"] == list(update_rank.IDENTITY)
    assert (tmp_path / "update_rank.png").stat().st_size > 10_000
