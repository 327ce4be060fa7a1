"""Does the plan of `launch/plan.py` agree with what a step really sends and computes?

    python benchmarks/step/plan_counted.py [--num_accelerators 1 2 4]

A tiny model takes real steps with the engine on each number of processes, through the real launcher. Bytes are counted
at torch.distributed (wire.py), FLOP by torch's flop_counter, and both are compared with the plan of the very same run:
they must agree exactly, or plus just what the plan leaves out (the half of attention that the causal mask cuts off and
eager attention computes). Exit code 1 says that they do not. Neither depends on the machine.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdpissa.benchmarks.common import ranks, timing
from hdpissa.benchmarks.step import method_models, throughput_table, throughput_worker
from hdpissa.benchmarks.step.methods import Setting
from hdpissa.engine.errors import ConfigError
from hdpissa.launch.planning import arguments as plan_arguments
from hdpissa.launch.planning import step as plan_step
from hdpissa.launch.planning.run import Run

# Eager attention, because the counter knows no CPU kernel of the fused one; nothing is kept gathered between steps.
SETTING = Setting(
    "tiny", r=4, accumulation=2, random_slices=True, attention="eager", zero={"stage3_param_persistence_threshold": 0}
)
LENGTH = 32
WARMUP = 3  # DeepSpeed records the order of modules in the first steps
CHECKED = ("ranks", "what", "counted", "planned", "outside the plan", "agrees", "remark")


def planned_run(setting: Setting, count: int) -> Run:
    """The plan's view of a run of hd_pissa, from the same config."""
    from hdpissa.benchmarks.step.method_zero3 import zero_config

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        method_models.config_of(setting.model).save_pretrained(folder)
        file = folder / "ds.json"
        file.write_text(json.dumps(zero_config(setting) | {"hd_pissa": {"r": setting.r}}))
        words = ["--model", name, "--gpus", str(count), "--max_length", str(LENGTH), "--ds_config", str(file)]
        return plan_arguments.resolve(*plan_arguments.parse(words))


def job_of(setting: Setting) -> dict[str, Any]:
    """What a rank measures (`throughput_worker.measure`)."""
    job = {"method": "hd_pissa", "setting": dataclasses.asdict(setting), "max_length": LENGTH}
    return job | {"steps": 1, "warmup": WARMUP, "count_flops": True}


def compare(found: Mapping[str, Any], run: Run, setting: Setting) -> list[dict[str, Any]]:
    """Rows of counted and planned numbers of one rank's step, and what is outside the plan, and why."""
    names = ("what", "counted", "planned", "outside the plan", "remark")
    rows = [dict(zip(names, row, strict=True)) for row in (*_bytes(found, run), *_flops(found, run, setting))]
    for row in rows:
        row["agrees"] = row["counted"] == row["planned"] + row["outside the plan"]
    return [{"ranks": run.plan.world_size, **row} for row in rows]


def _bytes(found: Mapping[str, Any], run: Run) -> list[tuple]:
    """Sent by the rank in a step."""
    count, planned = run.plan.world_size, dict(plan_step.step(run).wire)
    norm = planned.pop(plan_step.NORM)
    gathers = planned.pop(plan_step.GATHERS) + planned.pop(plan_step.AGAIN, 0)
    exchanged = found["exchange_bytes"] or 0
    summed = found["sent_by_name"].get("allreduce", 0)
    voted = summed - planned["vote"] - planned["shared slices"] if count > 1 else 0
    why = "a float64 that it all-reduces, the gradient norm of the one element that it trains"
    return [
        ("bytes of the update", exchanged, sum(planned.values()), 0, ""),
        ("bytes of ZeRO-3's gathers", found["steps"][-1]["sent"] - exchanged - voted, gathers, 0, ""),
        ("bytes of DeepSpeed's vote", voted, norm, 0, why),
    ]


def _flops(found: Mapping[str, Any], run: Run, setting: Setting) -> list[tuple]:
    """Computed by the rank in a step."""
    lengths, passes, update = found["lengths"], found["flops"]["passes"], found["flops"]["update"]
    work = throughput_table.model_work(setting.model, setting.layers)
    without = dataclasses.replace(work, attention=0.0)
    weights = round(throughput_table.useful_flops(without, "hd_pissa", lengths))
    attention = round(throughput_table.useful_flops(work, "hd_pissa", lengths)) - weights
    products = passes.get("aten.mm", 0) + passes.get("aten.addmm", 0)
    thin = round(run.work.low_rank_flops) * sum(lengths)
    why = "4 per weight and token, and 4 r (I + O) per target and token of the slices' thin products"
    half = "planned: the half that the causal mask leaves; outside: the other one, which eager attention computes, too"
    applied = round(plan_step.apply_seconds(run, 1.0))  # at 1 FLOP/s nothing but products takes time
    return [
        ("FLOP of forward and backward, but for attention", products, weights + thin, 0, why),
        ("FLOP of attention", passes.get("aten.bmm", 0), attention, attention, half),
        ("FLOP of the update", sum(update.values()), applied, 0, "4 r S per element of the shard"),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = timing.Parser(__doc__)
    parser.add_argument("--num_accelerators", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args(argv)
    for count in args.num_accelerators:
        if count < 1:
            raise ConfigError(f"--num_accelerators {count}: must be at least 1")
        _ = planned_run(SETTING, count).targets  # refuses what the tiny model has no slices for
    rows: list[dict[str, Any]] = []
    for count in args.num_accelerators:
        found = ranks.launch(throughput_worker.measure, count, timeout=600, threads=0, **job_of(SETTING))[0]
        rows += compare(found, planned_run(SETTING, count), SETTING)
    agree = sum(row["agrees"] for row in rows)
    note = (
        f"What rank 0 of hd_pissa on a tiny model sent and computed in a step, after {WARMUP} others, and what "
        f"launch/plan.py says of the same run."
    )
    headline = f"{agree} of {len(rows)} figures agree"
    how: dict[str, Any] = {"identity": ("ranks", "what"), "headline": headline} | dataclasses.asdict(SETTING)
    timing.write("plan_counted", args, rows, CHECKED, note, **how)
    return 0 if agree == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
