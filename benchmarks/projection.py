"""Is the plan of `launch/plan.py` true where it can be counted, and what does it say of 8 to 1024 GPUs?

    python benchmarks/projection.py [--num_accelerators 1 2 4] [--gpu H100] [--models llama-2-7b llama-3-70b]

First a tiny model takes real steps with the engine at each number of processes, through the real launcher. Bytes are
counted at torch.distributed (wire.py), FLOP by torch's flop_counter, and both are compared with the plan of the very
same run: they must agree exactly, or plus just what the plan leaves out (the half of attention that the causal mask
cuts off and eager attention computes), and exit code 1 says that they do not. Then the plan is drawn for clusters that
nobody has measured: a projection.

Bytes do not depend on the machine, so this part is as true on a laptop as on a cluster. Seconds are modelled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hdpissa.benchmarks import figure_words, method_models, plots, throughput, throughput_work, timing
from hdpissa.benchmarks.methods import Setting
from hdpissa.engine.errors import ConfigError
from hdpissa.launch.planning import arguments as plan_arguments
from hdpissa.launch.planning import report as plan_report
from hdpissa.launch.planning import step as plan_step
from hdpissa.launch.planning.run import Run, largest_slices

# Eager attention, because the counter knows no CPU kernel of the fused one; nothing is kept gathered between steps.
SETTING = Setting(
    "tiny", r=4, accumulation=2, random_slices=True, attention="eager", zero={"stage3_param_persistence_threshold": 0}
)
LENGTH = 32
WARMUP = 3  # DeepSpeed records the order of modules in the first steps
CHECKED = ("ranks", "what", "counted", "planned", "beside the plan", "agrees", "remark")
PROJECTED = (
    "model", "GPUs", "slices", "step s", "bound s", "compute s", "gathers s", "exchange s", "apply s", "tokens/s/GPU",
    "tokens/s", "efficiency", "MFU", "binds", "fits", "note",
)  # fmt: skip
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


# --- what is counted ------------------------------------------------------------------------------------------------


def planned_run(setting: Setting, ranks: int) -> Run:
    """The plan's view of a run of hd_pissa, from the same config."""
    from hdpissa.benchmarks.method_zero3 import zero_config

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        method_models.shape_config(setting.model).save_pretrained(folder)
        file = folder / "ds.json"
        file.write_text(json.dumps(zero_config(setting) | {"hd_pissa": {"r": setting.r}}))
        words = ["--model", name, "--gpus", str(ranks), "--max_length", str(LENGTH), "--ds_config", str(file)]
        return plan_arguments.resolve(*plan_arguments.parse(words))


def count(setting: Setting, ranks: int, timeout: int) -> dict[str, Any]:
    """What rank 0 of real processes sent and computed in a step.

    Raises:
        RuntimeError: the run failed.
    """
    job = {"setting": dataclasses.asdict(setting), "max_length": LENGTH, "steps": 1, "warmup": WARMUP}
    found = throughput.run("hd_pissa", ranks, job | {"count_flops": True}, timeout)
    if isinstance(found, str):
        raise RuntimeError(f"hd_pissa on {ranks} processes: {found}")
    return found["ranks"][0]


def compare(found: Mapping[str, Any], run: Run, setting: Setting) -> list[dict[str, Any]]:
    """Rows of counted and planned numbers of one rank's step, and what is beside the plan, and why."""
    names = ("what", "counted", "planned", "beside the plan", "remark")
    rows = [dict(zip(names, row, strict=True)) for row in (*_bytes(found, run), *_flops(found, run, setting))]
    for row in rows:
        row["agrees"] = row["counted"] == row["planned"] + row["beside the plan"]
    return [{"ranks": run.plan.world_size, **row} for row in rows]


def _bytes(found: Mapping[str, Any], run: Run) -> list[tuple]:
    """Sent by the rank in a step."""
    ranks, planned = run.plan.world_size, dict(plan_step.step(run).wire)
    norm = planned.pop(plan_step.NORM)
    gathers = planned.pop(plan_step.GATHERS) + planned.pop(plan_step.AGAIN, 0)
    exchanged = found["exchange_bytes"] or 0
    summed = found["sent_by_name"].get("allreduce", 0)
    voted = summed - planned["vote"] - planned["shared slices"] if ranks > 1 else 0
    why = "a float64 that it all-reduces, the gradient norm of the one element that it trains"
    return [
        ("bytes of the update", exchanged, sum(planned.values()), 0, ""),
        ("bytes of ZeRO-3's gathers", found["steps"][-1]["sent"] - exchanged - voted, gathers, 0, ""),
        ("bytes of DeepSpeed's vote", voted, norm, 0, why),
    ]


def _flops(found: Mapping[str, Any], run: Run, setting: Setting) -> list[tuple]:
    """Computed by the rank in a step."""
    lengths, passes, update = found["lengths"], found["flops"]["passes"], found["flops"]["update"]
    work = throughput_work.model_work(setting.model, setting.layers)
    without = dataclasses.replace(work, attention=0.0)
    weights = round(throughput_work.useful_flops(without, "hd_pissa", lengths))
    attention = round(throughput_work.useful_flops(work, "hd_pissa", lengths)) - weights
    products = passes.get("aten.mm", 0) + passes.get("aten.addmm", 0)
    thin = round(run.work.low_rank_flops) * sum(lengths)
    why = "4 per weight and token, and 4 r (I + O) per target and token of the slices' thin products"
    half = "planned: the half that the causal mask leaves; beside: the other one, which eager attention computes, too"
    applied = round(plan_step.apply_seconds(run, 1.0))  # at 1 FLOP/s nothing but products takes time
    return [
        ("FLOP of forward and backward, but for attention", products, weights + thin, 0, why),
        ("FLOP of attention", passes.get("aten.bmm", 0), attention, attention, half),
        ("FLOP of the update", sum(update.values()), applied, 0, "4 r S per element of the shard"),
    ]


# --- what is projected ----------------------------------------------------------------------------------------------


def clusters(model: str, args: argparse.Namespace) -> Run:
    """The run that is projected, on 8 GPUs."""
    with tempfile.TemporaryDirectory() as name:
        method_models.config_of(model).save_pretrained(name)
        words = ["--model", name, "--gpu", args.gpu, "--gpus", "8", "--max_length", str(args.max_length)]
        words += ["--r", str(args.r), "--per_device_train_batch_size", str(args.micro_batch)]
        words += ["--gradient_accumulation_steps", str(args.accumulation), "--gradient_checkpointing"]
        return plan_arguments.resolve(*plan_arguments.parse(words))


def project(model: str, run: Run, counts: Sequence[int] = GPUS) -> list[dict[str, Any]]:
    """A row for each number of GPUs; each GPU's work stays the same. Slices are as many as GPUs while W has them."""
    rows: list[dict[str, Any]] = []
    for gpus in counts:
        slices = largest_slices(run.model, run.section, gpus)
        plan = plan_report.make_plan(run.with_gpus(gpus, slices))
        step = plan.step
        per_gpu = step.tokens_per_second
        few = f"the smallest target has singular vectors for {slices} slices" if slices < gpus else ""
        rows.append(
            {
                "model": model,
                "GPUs": gpus,
                "slices": slices,
                "step s": step.predicted,
                "bound s": step.bound,
                "compute s": step.compute,
                "gathers s": step.link + step.host,
                "exchange s": step.exchange,
                "apply s": step.apply + step.adam + step.staging + step.again,
                "tokens/s/GPU": per_gpu,
                "tokens/s": per_gpu * gpus,
                "efficiency": per_gpu / (rows[0]["tokens/s/GPU"] if rows else per_gpu),
                "MFU": step.mfu,
                "binds": step.binds,
                "fits": "yes" if plan.fits else "no",
                "note": few,
            }
        )
    return rows


LINES = {
    "step s": ("forecast of the step", "black", "-o"),
    "compute s": ("compute (floor)", "#0072B2", "--s"),
    "gathers s": ("ZeRO-3's gathers, beside compute (floor)", "#E69F00", "--^"),
    "exchange s": ("exchange of the update", "#D55E00", ":D"),
    "apply s": ("applying the update", "#009E73", ":v"),
}


def draw(rows: Sequence[Mapping[str, Any]], models: Sequence[str], target: Path) -> str:
    """One panel per model: the parts of a step over the number of GPUs, and under each count what binds."""
    with plots.picture(target, columns=len(models), width=6.5, height=4.8) as axes:
        for panel, model in zip([axes] if len(models) == 1 else axes, models, strict=True):
            mine = [row for row in rows if row["model"] == model]
            counts = [row["GPUs"] for row in mine]
            for column, (label, colour, style) in LINES.items():
                panel.plot(counts, [row[column] for row in mine], style, color=colour, label=label, ms=5)
            panel.set(xscale="log", yscale="log", xlabel="GPUs, and what binds", ylabel="seconds of an optimizer step")
            panel.set_xticks(counts, [f"{row['GPUs']}\n{row['binds'].replace(' ', chr(10))}" for row in mine], size=7)
            panel.minorticks_off()
            panel.set_title(f"{model}: projection, nothing measured")
        panel.legend(fontsize=8)
    return target.name


# --- both -----------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Raises ConfigError."""
    parser = throughput.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--num_accelerators", type=int, nargs="*", default=[1, 2, 4], help="counted; none: skip it")
    parser.add_argument("--models", nargs="+", default=["llama-2-7b", "llama-3-70b"], help="shapes, folders or names")
    parser.add_argument("--gpu", default="H100", help="as of launch/plan.py")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--micro_batch", type=int, default=1, help="rows")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches of a GPU per step")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that a counted run may take")
    parser.add_argument("--folder", type=Path, default=timing.RESULTS, help="where the results go")
    args = parser.parse_args(argv)
    for ranks in args.num_accelerators:
        if ranks < 1:
            raise ConfigError(f"--num_accelerators {ranks}: must be at least 1")
        _ = planned_run(SETTING, ranks).targets  # refuses what the tiny model has no slices for
    return args


def count_all(args: argparse.Namespace) -> bool:
    """Counts and compares; whether all agree."""
    rows: list[dict[str, Any]] = []
    for ranks in args.num_accelerators:
        rows += compare(count(SETTING, ranks, args.timeout), planned_run(SETTING, ranks), SETTING)
    note = (
        f"Rank 0 of hd_pissa on a model of {method_models.SHAPES[SETTING.model][2]} tiny layers, r = {SETTING.r}, one "
        f"slice per process, {SETTING.accumulation} micro-batches, after {WARMUP} steps: what a step sent and "
        f"computed, counted, and what launch/plan.py says of the same run. Counted must be planned plus what is beside "
        f"the plan."
    )
    kept: dict[str, Any] = {"identity": ("ranks", "what"), "headline": figure_words.tell_counted(rows)}
    kept["configuration"] = counted_configuration(args)
    timing.write("plan_counted", rows, CHECKED, note, folder=args.folder, **kept)
    return all(row["agrees"] for row in rows)


def counted_configuration(args: argparse.Namespace) -> dict[str, Any]:
    """What is counted: the numbers of processes, and what does not change."""
    fixed = {"max_length": LENGTH, "warmup": WARMUP, "steps": 1}
    return {"num_accelerators": args.num_accelerators, **dataclasses.asdict(SETTING), **fixed}


def project_all(args: argparse.Namespace) -> None:
    """Projects and draws."""
    rows = [row for model in args.models for row in project(model, clusters(model, args))]
    picture = draw(rows, args.models, args.folder / "projection.png")
    note = (
        f"A projection by launch/plan.py, nothing here is measured. {args.gpu}, 8 in a node, r = {args.r}, bf16, "
        f"rows of {args.max_length} tokens, {args.micro_batch} × {args.accumulation} per GPU and step, activations "
        f"recomputed; each GPU's work stays the same. bound s = max(compute, gathers) + update; step s, the forecast, "
        f"is the bound over {plan_step.EFFICIENCY}. binds: what would have to be faster. MFU: 4 per weight and token."
    )
    configuration = {key: value for key, value in vars(args).items() if key != "folder"}
    timing.write(
        "projection",
        rows,
        PROJECTED,
        note,
        folder=args.folder,
        identity=("model", "GPUs"),
        configuration=configuration,
        pictures=[picture],
    )


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        args.folder.mkdir(parents=True, exist_ok=True)
        agree = count_all(args) if args.num_accelerators else True
        project_all(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
