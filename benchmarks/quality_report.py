"""What the runs of `quality.py` show: a row per arm with mean and spread over seeds, a row per learning rate, pictures.

An arm's best learning rate is the one of least validation loss with the sweep's seed; loss and answers of the test are
of other rows than those it was chosen by.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hdpissa.benchmarks import figure_words, plots, timing
from hdpissa.benchmarks.quality_record import Plan

IDENTITY = ("arm",)
FIGURES = {
    "valid loss": "valid loss",
    "test loss": "test loss",
    "exact match": "test accuracy",
}
COLUMNS = (
    *("arm", "learning rate", "seeds", "valid loss", "± valid", "test loss", "± test", "exact match", "± match"),
    *(
        "HD-PiSSA − it",
        "± paired",
        "train s",
        "whole run s",
        "CPU s",
        "peak memory GB",
        "of building GB",
        "of training GB",
        "trained numbers",
        "remark",
    ),
)
SPREADS = {"valid loss": "± valid", "test loss": "± test", "exact match": "± match"}
SWEEP_COLUMNS = ("arm", "learning rate", "valid loss", "test loss", "exact match", "train s", "remark")
PEAKS = {"of building GB": "build", "of training GB": "train"}


def last(record: Mapping[str, Any], key: str) -> float:
    """A metric at the end of a run; NaN where it has none, as a run that diverged."""
    value = record["train_info"]["metrics"][-1].get(key)
    return math.nan if value is None else float(value)


def by_arm(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The records of each arm, arms in the order of the comparison."""
    order = ("base", "lora", "pissa", "hd_pissa", "full")
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda r: (order.index(r["hdpissa"]["method"] or "base"), r["hdpissa"]["r"])):
        found.setdefault(record["hdpissa"]["arm"], []).append(record)
    return found


def best_of(records: Sequence[Mapping[str, Any]], seed: int) -> list[Mapping[str, Any]]:
    """The runs with the best learning rate of the sweep, in the order of their seeds; none if all diverged."""
    losses = {r["hdpissa"]["lr"]: last(r, "valid loss") for r in records if r["hdpissa"]["seed"] == seed}
    finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        return []
    best = min(finite, key=lambda lr: finite[lr])
    return sorted((r for r in records if r["hdpissa"]["lr"] == best), key=lambda r: r["hdpissa"]["seed"])


def finite_of(runs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that have not diverged."""
    return [run for run in runs if math.isfinite(last(run, "valid loss"))]


def summary(arm: str, records: Sequence[Mapping[str, Any]], plan: Plan) -> dict[str, Any]:
    """An arm's row: means over the seeds that have not diverged, sample standard deviations where there are two."""
    runs = finite_of(best_of(records, plan.seeds[0]))
    if not runs:
        return {"arm": arm, "remark": "; ".join(["no learning rate gave a finite loss", *gaps(arm, records, plan)])}
    values = {column: [last(run, key) for run in runs] for column, key in FIGURES.items()}
    values["train s"] = [run["train_info"]["train_time"] for run in runs]
    values["whole run s"] = [run["run_info"]["total_time"] for run in runs]
    values["peak memory GB"] = [run["train_info"]["accelerator_memory_max"] / 1e9 for run in runs]
    times = [run["hdpissa"].get("cpu_time") for run in runs]
    values["CPU s"] = [sum(time.values()) for time in times if time]
    for column, phase in PEAKS.items():
        peaks = [run["hdpissa"].get("memory", {}) for run in runs]
        values[column] = [(peak[phase] - peak["start"]) / 1e9 for peak in peaks if phase in peak]
    values = {
        column: numbers for column, found in values.items() if (numbers := [n for n in found if math.isfinite(n)])
    }
    rate = runs[0]["hdpissa"]["lr"]
    row: dict[str, Any] = {"arm": arm, "learning rate": rate if rate else "", "seeds": len(runs)}
    row |= {column: statistics.fmean(found) for column, found in values.items()}
    for column, spread in SPREADS.items():
        if len(values.get(column, ())) > 1:
            row[spread] = statistics.stdev(values[column])
    row["trained numbers"] = runs[0]["train_info"]["num_trainable_params"]
    row["remark"] = remark(arm, records, rate, plan)
    row["of seeds"] = [run["hdpissa"]["seed"] for run in runs if math.isfinite(last(run, "test loss"))]
    return row | {"samples": values}


def add_differences(rows: Sequence[dict[str, Any]]) -> None:
    """HD-PiSSA's test loss minus the row's: mean and standard deviation over the seeds that both have."""
    for arm, differences in figure_words.behind(rows).items():
        row = figure_words.one(rows, arm=arm)
        row["HD-PiSSA − it"] = statistics.fmean(differences)
        row["samples"]["HD-PiSSA − it"] = differences
        if len(differences) > 1:
            row["± paired"] = statistics.stdev(differences)


def remark(arm: str, records: Sequence[Mapping[str, Any]], best: float, plan: Plan) -> str:
    """Where the best rate is the least or the largest that was tried, a better one may lie beyond it."""
    if not best:
        return "untrained"
    tried = sorted({r["hdpissa"]["lr"] for r in records if r["hdpissa"]["seed"] == plan.seeds[0]})
    words = "only one learning rate tried" if len(tried) == 1 else f"best of {len(tried)} rates"
    if len(tried) > 1 and best in (tried[0], tried[-1]):
        words += f" is the {'largest' if best == tried[-1] else 'least'}"
    runs = best_of(records, plan.seeds[0])
    diverged = len(runs) - len(finite_of(runs))
    told = [words, f"{diverged} of {len(runs)} seeds diverged"] if diverged else [words]
    if len(runs) < len(plan.seeds):
        told.append(f"incomplete: {len(runs)} of {len(plan.seeds)} seeds")
    return "; ".join(told + gaps(arm, records, plan))


def gaps(arm: str, records: Sequence[Mapping[str, Any]], plan: Plan) -> list[str]:
    """What the sweep of an arm lacks of its plan, and what there is beside it."""
    tried = {r["hdpissa"]["lr"] for r in records if r["hdpissa"]["seed"] == plan.seeds[0]}
    planned = plan.rates.get(arm, ())
    told = []
    if planned and len(tried) < len(planned):
        told.append(f"incomplete: {len(tried)} of {len(planned)} rates")
    if arm in plan.guessed:
        told.append("planned rates not recorded: those that are there")
    if count := plan.set_aside.get(arm, 0):
        told.append(f"{count} run(s) at other rates or seeds left out")
    return told


def sweep_rows(records: Mapping[str, Sequence[Mapping[str, Any]]], seed: int) -> list[dict[str, Any]]:
    """Every run of the sweeps; one that diverged has no losses but a remark."""
    rows = []
    for arm, runs in records.items():
        for run in sorted(runs, key=lambda r: r["hdpissa"]["lr"]):
            if run["hdpissa"]["seed"] == seed and run["hdpissa"]["lr"]:
                row = {"arm": arm, "learning rate": run["hdpissa"]["lr"], "train s": run["train_info"]["train_time"]}
                figures = {column: last(run, key) for column, key in FIGURES.items()}
                row |= {column: figure for column, figure in figures.items() if math.isfinite(figure)}
                ended = run["run_info"].get("error_msg") or "diverged"
                rows.append(row | {"remark": "" if "valid loss" in row else ended})
    return rows


def curve(runs: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float], list[float]]:
    """(steps, mean validation loss over the runs, its standard deviation or 0) of runs with the same steps."""
    points: dict[int, list[float]] = {}
    for run in runs:
        for row in run["train_info"]["metrics"]:
            if row.get("valid loss") is not None and "test accuracy" not in row:
                points.setdefault(row["step"], []).append(row["valid loss"])
    steps = sorted(points)
    spread = [statistics.stdev(points[s]) if len(points[s]) > 1 else 0.0 for s in steps]
    return steps, [statistics.fmean(points[s]) for s in steps], spread


def training_curve(runs: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    """(steps done before, mean over the runs of the training loss of the next one's rows); the seeds' rows differ."""
    losses = [statistics.fmean(found) for found in zip(*(run["hdpissa"]["losses"] for run in runs), strict=False)]
    return list(range(len(losses))), losses


def draw(records: Mapping[str, Sequence[Mapping[str, Any]]], seed: int, target: Path) -> None:
    """Learning curves at each arm's best rate, with the standard deviation over seeds, and the sweeps beside them."""
    untrained = 0.0
    with plots.picture(target, columns=2, width=6) as (curves, sweeps):
        for arm, runs in records.items():
            if arm == "base":
                continue
            style = look(runs[0]["hdpissa"], arm, records)
            if best := finite_of(best_of(runs, seed)):
                steps, mean, spread = curve(best)
                curves.plot(steps, mean, **style)
                untrained = max(untrained, mean[0])
                low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
                curves.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
                thin = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 0.7, "alpha": 0.7}
                curves.plot(*training_curve(best), **thin)
            tried = sweep_rows({arm: runs}, seed)
            if finite := [(row["learning rate"], row["valid loss"]) for row in tried if "valid loss" in row]:
                sweeps.semilogx(*zip(*finite, strict=True), **style)
        curves.set(xlabel="optimizer step", ylabel="loss (nats / answer token)")
        title = "at each arm's best learning rate: validation (marked; band: ± standard deviation over seeds)"
        curves.set_title(f"{title}\nand training (thin; the rows of each step, before it)", fontsize=8)
        sweeps.set(xlabel="learning rate", ylabel="validation loss at the end (nats / token)")
        sweeps.set_title("the sweeps", fontsize=9)
        cut(sweeps, untrained)
        for ax in (curves, sweeps):
            if ax.lines:
                ax.legend(fontsize=8)


def cut(ax: Any, top: float) -> None:
    """What ended worse than it began is a number at the edge: drawn to scale it would press all else flat."""
    above = [(*point, line.get_color()) for line in ax.lines for point in line.get_xydata() if point[1] > top > 0]
    if above:
        ax.set_ylim(top=top)
    for rate, loss, color in above:
        at = {"textcoords": "offset points", "xytext": (0, -12), "ha": "center", "fontsize": 8}
        ax.annotate(f"{loss:.3g} ↑", (rate, top), color=color, **at)


def look(run: Mapping[str, Any], arm: str, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The style of a method; its wider arm is dashed."""
    least = min(r["hdpissa"]["r"] for runs in records.values() for r in runs if r["hdpissa"]["method"] == run["method"])
    name = plots.LABELS[run["method"]]
    rank = f" r = {run['r']}" if run["r"] else ""
    slices = f" S = {run['slices']}," if run["slices"] else ""
    return {
        **plots.line(run["method"]),
        "label": f"{name}{slices}{rank}",
        "linestyle": "-" if run["r"] == least else "--",
    }


def note_of(records: Iterable[Mapping[str, Any]], missing: Sequence[str]) -> str:
    """How to read the table, from what the runs' records say of themselves."""
    some = next(iter(records))
    how, rows = some["hdpissa"]["configuration"], some["hdpissa"]["rows"]
    batch = how["micro_batch"] * how["accumulation"]
    length = f"{how['steps']} steps" if how["steps"] else f"{how['num_train_epochs']:g} epoch(s)"
    words = (
        f"{how['model_name_or_path']}, {how['dtype']}, {length} of {batch} rows of "
        f"{how['dataset_name'] or 'generated arithmetic problems'} ({rows['train']} rows to train on, at most "
        f"{how['max_length']} tokens, {rows['truncated']} of them cut), cosine schedule: the same micro-batches in the "
        f"same order for all. The learning rate is each arm's best of its own sweep by the validation loss "
        f"({how['eval_rows']} rows); loss per answer token and exact match of the test are of {how['test_rows']} other "
        f"rows. ± is the standard deviation over seeds, which vary order and initialisation. HD-PiSSA − it: its test "
        f"loss minus that of the row, by seed; below 0 it is ahead. CPU s: of the whole run, all threads. Exact match: "
        f"the number after #### of the greedy answer, at most {how['max_new_tokens']} tokens; with so many problems "
        f"its own sampling error is up to {0.5 / math.sqrt(how['test_rows']):.2g}. Memory: peak of a run beyond its "
        f"start, and of these where the record tells them apart: building the method; training steps, no validation."
    )
    if missing:
        words += f" Incomplete: {len(missing)} run(s) missing, {missing[0]} the first."
    return words


def report(
    records: Mapping[str, Mapping[str, Any]], plan: Plan, missing: Sequence[str], *, name: str, folder: Path
) -> list[dict[str, Any]]:
    """Writes <name> and <name>_rates (JSON, Markdown) and <name>.png; returns the rows."""
    arms, seed = by_arm(records.values()), plan.seeds[0]
    rows = [summary(arm, runs, plan) for arm, runs in arms.items()]
    add_differences(rows)
    some = next(iter(records.values()))["hdpissa"]["configuration"] | plan.as_record()
    pictures = []
    if any(arm != "base" for arm in arms):
        draw(arms, seed, folder / f"{name}.png")
        pictures = [f"{name}.png"]
    note = note_of(records.values(), missing)
    details = sweep_rows(arms, seed)
    sweeps = f"All learning rates of the comparison in {name}.md, with the first seed, {seed}."
    timing.write(
        f"{name}_rates",
        details,
        SWEEP_COLUMNS,
        sweeps,
        folder=folder,
        identity=("arm", "learning rate"),
        configuration=some,
    )
    headline = f"test loss: {figure_words.tell_quality(rows)}; {len(records)} runs, {len(missing)} missing"
    kept: dict[str, Any] = {"identity": IDENTITY, "configuration": some, "pictures": pictures, "headline": headline}
    timing.write(name, rows, COLUMNS, note, folder=folder, **kept)
    return rows
