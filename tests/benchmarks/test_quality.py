"""The campaign of benchmarks/quality: which run is next, what a kill leaves, and what all arms have in common."""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import launch_runs
import pytest
import torch

from hdpissa.benchmarks.quality import report, run
from hdpissa.benchmarks.quality.campaign import finalists, missing, outward, runs_of
from hdpissa.benchmarks.quality.rungs import RUNGS, Arm, Point, Rung

RUNG = Rung("tiny", "", (Point(Arm("lora", "lora", r=2), 4, 20),), (1e-3, 3e-3, 1e-2, 3e-2), 3, 5, 64, 8, 2)

# --- which run is next --------------------------------------------------------------------------------------------


def complete(rung: Rung, loss) -> dict[str, float]:
    """Record → loss of a campaign carried out to its end, one run at a time."""
    losses: dict[str, float] = {}
    while todo := missing(rung, losses):
        losses[todo[0].name] = loss(todo[0])
    return losses


def by_name(rung: Rung) -> dict:
    losses = complete(rung, lambda r: r.rate)
    return {r.name: r for point in rung.points for r in runs_of(rung, point, losses)}


def test_the_better_half_of_the_rates_goes_on_and_the_best_gets_all_seeds():
    """The best of the full runs is not the best of the short ones here."""
    [point] = RUNG.points

    def loss(r):
        return abs(math.log(r.rate / (3e-3 if r.last else 8e-3))) + 1

    losses = complete(RUNG, loss)
    found = list(runs_of(RUNG, point, losses))
    assert len(losses) == len(found) == 4 + 2 + 2
    assert [r.rate for r in found if not r.last] == [1e-3, 3e-3, 1e-2, 3e-2]
    assert {r.rate for r in found if r.last} == {1e-2, 3e-3}
    assert [(r.rate, r.seed) for r in finalists(RUNG, point, losses)] == [(3e-3, 0), (3e-3, 1), (3e-3, 2)]
    left = [r.name for r in found if r.last and r.seed == 0][:1]  # the sweep is not complete: no rate is the best
    assert finalists(RUNG, point, {name: x for name, x in losses.items() if name not in left}) == []


@pytest.mark.parametrize(("best", "tried"), [(1e-1, 6), (1e-5, 7), (1e3, 7)])
def test_a_sweep_goes_on_outward_while_its_end_is_the_best(best, tried):
    """Until the best rate has one beyond it, or three have joined."""
    losses = complete(RUNG, lambda r: abs(math.log(r.rate / best)))
    rates = sorted(r.rate for r in runs_of(RUNG, RUNG.points[0], losses) if not r.last)
    assert len(rates) == tried
    for low, high in itertools.pairwise(rates):
        assert outward([low], up=True) == high
        assert outward([high], up=False) == low


def test_runs_that_diverged_are_the_worst():
    losses = complete(RUNG, lambda r: math.inf if r.rate > 2e-3 else abs(math.log(r.rate / 1e-3)))
    assert {r.rate for r in finalists(RUNG, RUNG.points[0], losses)} == {1e-3}
    assert complete(RUNG, lambda _: math.inf)  # and a campaign of nothing else has an end


def test_all_arms_of_a_batch_are_tuned_before_further_seeds():
    arms = [replace(RUNG.points[0], arm=Arm(name, "lora", r=2)) for name in "ab"]
    rung = replace(RUNG, points=(*arms, replace(arms[0], batch=8)))
    runs = [(r.batch, r.seed) for r in map(by_name(rung).get, complete(rung, lambda r: r.rate))]
    assert runs == sorted(runs)
    assert {seed for _, seed in runs} == {0, 1, 2}


def test_the_good_region_of_rates():
    """Ends between the rates by straight lines, at a rate before one that diverged, or with the sweep."""
    losses = {1e-3: 1.04, 1e-2: 1.0, 1e-1: math.inf}
    assert report.good_region(losses) == pytest.approx((10**-2.5, 1e-2))
    assert report.good_region({1e-3: 1.0, 1e-2: 1.01, 1e-1: 1.03}) == pytest.approx((1e-3, 10**-1.5))


# --- real runs ----------------------------------------------------------------------------------------------------

ARMS = (
    Arm("own", "hd_pissa", r=2, slices=2), Arm("whitened", "hd_pissa", 4, 1, 0.0), Arm("pissa", "pissa", r=2),
    Arm("full", "full"),
)  # fmt: skip
DRIVER = """
import sys
from pathlib import Path
from test_quality import carry_out
carry_out(Path(sys.argv[1]))
"""
# What PEFT's comparison (method_comparison/processing.py) takes from a record, and the type of it.
PEFT_KEYS = {
    ("run_info", "experiment_name"): str, ("run_info", "train_config", "model_id"): str,
    ("run_info", "total_time"): float, ("run_info", "peft_branch"): str, ("run_info", "created_at"): str,
    ("train_info", "accelerator_memory_reserved_avg"): int, ("train_info", "accelerator_memory_max"): int,
    ("train_info", "accelerator_memory_reserved_99th"): int, ("train_info", "train_time"): float,
    ("train_info", "file_size"): int, ("train_info", "metrics", -1, "test accuracy"): float,
    ("train_info", "metrics", -1, "train loss"): float, ("train_info", "metrics", -1, "train samples"): int,
    ("train_info", "metrics", -1, "train total tokens"): int, ("meta_info", "system_info"): dict,
    ("meta_info", "package_info", "peft-version"): str, ("meta_info", "package_info", "transformers-version"): str,
    ("meta_info", "package_info", "datasets-version"): str, ("meta_info", "package_info", "torch-version"): str,
    ("meta_info", "package_info", "bitsandbytes-version"): str,
}  # fmt: skip


def carry_out(folder: Path) -> int:
    points = tuple(Point(arm, 4, 2) for arm in ARMS)
    rung = replace(RUNGS["peft"], name="tiny", model=str(folder / "model"), points=points, rates=(1e-3,))
    rung = replace(rung, exact_match=1, new_tokens=4)
    rows = str(folder / "rows.jsonl")
    return run.carry_out(rung, folder / "records", rows, rows, jobs=1, hours=1)


def start(folder: Path) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", DRIVER, folder], env=environment, start_new_session=True)


def until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """PEFT's protocol, killed twice: its driver alone during the first run, then with its worker in the third."""
    folder = tmp_path_factory.mktemp("campaign")
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}.\n#### {2 * n}"} for n in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    launch_runs.save_model(folder / "model", [text for row in rows for text in row.values()])
    records = folder / "records"
    names = [f"tiny-{arm.name}-batch4-steps2-lr1e-03-seed0" for arm in ARMS]
    first = start(folder)
    until((records / f".{names[0]}.lock").exists, first)
    first.kill()
    first.wait()
    second = start(folder)
    until((records / f".{names[2]}.lock").exists, second)
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    there = {path.name: path.stat() for path in records.glob("*.json")}
    third = start(folder)
    assert third.wait(600) == 0
    return records, names, there


def test_a_killed_campaign_repeats_nothing_and_loses_nothing(campaign):
    records, names, there = campaign
    assert sorted(there) == sorted(f"{name}.json" for name in names[:2])
    assert sorted(path.stem for path in records.glob("*.json")) == sorted(names)
    for name, was in there.items():
        assert ((records / name).stat().st_ino, (records / name).stat().st_mtime_ns) == (was.st_ino, was.st_mtime_ns)
    assert {path.name for path in records.glob(".*")} == {".tiny.lock"}


def read(campaign) -> dict[str, dict]:
    records, names, _ = campaign
    return {arm.name: json.loads((records / f"{name}.json").read_text()) for arm, name in zip(ARMS, names, strict=True)}


def test_all_arms_begin_alike_and_see_the_same_rows(campaign):
    """They learn something, and each something else."""
    own = [record["hdpissa"] for record in read(campaign).values()]
    assert len({record["rows"] for record in own}) == 1
    assert len({record["before"]["test loss"] for record in own}) == 1
    last = [record["train_info"]["metrics"][-1]["test loss"] for record in read(campaign).values()]
    assert len(set(last)) == len(ARMS)
    assert all(loss < own[0]["before"]["test loss"] for loss in last)


def test_records_have_what_pefts_comparison_reads(campaign):
    for record in read(campaign).values():
        assert record["train_info"]["status"] == "success"
        assert record["train_info"]["metrics"][-1]["test accuracy"] is not None
        for path, kind in PEFT_KEYS.items():
            value = functools.reduce(operator.getitem, path, record)
            assert value is None or isinstance(value, kind), path
        assert record["train_info"]["file_size"] == 4 * record["train_info"]["num_trainable_params"] > 0


def test_rows_of_a_step_are_told_apart():
    """Their order and their micro-batches are not; another row is."""
    from hdpissa.benchmarks.quality.train_arm import Collator, Seen

    rows = [{"input_ids": [n], "labels": [n], "attention_mask": [1]} for n in range(6)]

    def digest(*batches: list[int]) -> str:
        seen = Seen(Collator(0), 2)
        for batch in batches:
            seen([rows[n] for n in batch])
        return seen.digest(2)

    assert digest([0, 1], [2, 3]) == digest([1], [0], [3, 2], [4])
    assert len({digest([0, 1], [2, 3]), digest([0, 2], [1, 3]), digest([0, 1], [2, 4])}) == 3


def test_whitened_factors_are_orthonormal():
    """Of slice i: A_i A_iᵀ = B_iᵀ B_i = 1 at power 0, diag(σ_i) as published."""
    from hdpissa.benchmarks.quality.train_arm import powered_factors
    from hdpissa.engine.directions import svd

    U, sigma, Vt = torch.linalg.svd(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    triplets = svd.Triplets(U[:, :4], sigma[:4], Vt[:4], 0.0, "full")
    for power, expected in ((0.0, torch.ones(2, 2)), (0.25, sigma[:4].view(2, 2).sqrt()), (0.5, sigma[:4].view(2, 2))):
        A, B = powered_factors(svd.slice_factors, power, triplets, 2)
        torch.testing.assert_close(A @ A.mT, torch.diag_embed(expected), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(B.mT @ B, torch.diag_embed(expected), rtol=1e-5, atol=1e-6)
