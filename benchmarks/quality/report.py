"""Tables and pictures of a campaign's records: at their best rates, how far apart, what they cost."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from hdpissa.benchmarks.common import plots

from .campaign import Run, finalists, runs_of
from .rungs import Arm, Point, Rung

GOOD = 0.02  # a rate is good where the short run's loss is within this share of the best one's


class Records:
    """The records of a rung by name."""

    def __init__(self, rung: Rung, folder: Path) -> None:
        self._all = {path.stem: json.loads(path.read_text()) for path in folder.glob(f"{rung.name}-*.json")}
        self.losses = {name: self.last(name, "test loss") for name in self._all}

    def __len__(self) -> int:
        return len(self._all)

    def last(self, name: str, key: str) -> float:
        """A figure of the trained model; infinite where there is none, because the run failed."""
        value = self._all[name]["train_info"]["metrics"][-1].get(key)
        return math.inf if value is None else value

    def cost(self, name: str, key: str) -> float:
        return self._all[name]["hdpissa"]["cost"][key]

    def curve(self, name: str, key: str) -> list[tuple[int, float]]:
        rows = self._all[name]["train_info"]["metrics"]
        return list({row["step"]: row[key] for row in rows if key in row}.items())  # the last step has two rows


def spread(values: list[float], digits: int = 4) -> str:
    """Mean ± standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]) + "\n"


def final_runs(rung: Rung, point: Point, records: Records) -> list[Run]:
    """The runs at the point's best rate, without those that diverged."""
    return [run for run in finalists(rung, point, records.losses) if math.isfinite(records.losses[run.name])]


def results(rung: Rung, records: Records) -> str:
    """Each point at its best rate; differences by pairs of seeds from the first arm of the batch."""
    heads = ["batch", "steps", "arm", "rate", "seeds", "test loss", "minus the first arm's", "forgetting"]
    heads += ["exact match"] * bool(rung.exact_match)
    rows, first = [], dict[int, dict[int, float]]()
    for point in rung.points:
        runs = final_runs(rung, point, records)
        if not runs:
            continue
        found = {run.seed: records.losses[run.name] for run in runs}
        base = first.setdefault(point.batch, found)
        pairs = [found[seed] - base[seed] for seed in found if seed in base]
        forgotten = [records.last(run.name, "forgetting") for run in runs]
        diverged = len(finalists(rung, point, records.losses)) - len(runs)
        seeds = f"{len(runs)}, {diverged} diverged" if diverged else f"{len(runs)}"
        what = [str(point.batch), str(point.steps), point.arm.name, f"{runs[0].rate:g}", seeds]
        beyond = "" if base is found or not pairs else spread(pairs)
        rows.append([*what, spread(list(found.values())), beyond, spread(forgotten)])
        if rung.exact_match:
            rows[-1].append(spread([records.last(run.name, "test accuracy") for run in runs], 3))
    return table(heads, rows)


def short_runs(rung: Rung, point: Point, records: Records) -> dict[float, float]:
    runs = [run for run in runs_of(rung, point, records.losses) if not run.last and run.name in records.losses]
    return {run.rate: records.losses[run.name] for run in sorted(runs, key=lambda run: run.rate)}


def good_region(losses: dict[float, float]) -> tuple[float, float]:
    """Where the loss stays within GOOD of the best one: lines between the rates, whose logarithm is the abscissa.

    It ends with the sweep, and at the last good rate before one that diverged.
    """
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    limit = losses[best] * (1 + GOOD)

    def end(outward: list[float]) -> float:
        inner = best
        for rate in outward:
            if not math.isfinite(losses[rate]):
                break
            if losses[rate] > limit:
                share = (limit - losses[inner]) / (losses[rate] - losses[inner])
                return inner * (rate / inner) ** share
            inner = rate
        return inner

    at = rates.index(best)
    return end(rates[:at][::-1]), end(rates[at + 1 :])


def rates(rung: Rung, records: Records) -> str:
    """The losses of the short runs by rate, and how wide the good region is."""
    every = sorted({rate for point in rung.points for rate in short_runs(rung, point, records)})
    rows = []
    for point in rung.points:
        found = short_runs(rung, point, records)
        if any(map(math.isfinite, found.values())):
            low, high = good_region(found)
            cells = [_loss(found[rate]) if rate in found else "" for rate in every]
            rows.append([str(point.batch), point.arm.name, *cells, f"{low:.1e} to {high:.1e}", f"{high / low:.1f}"])
    return table(["batch", "arm", *(f"{rate:g}" for rate in every), "good rates", "×"], rows)


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def costs(rung: Rung, records: Records) -> str:
    rows = []
    for point in rung.points:
        runs = final_runs(rung, point, records)
        if runs:
            seconds = [records.cost(run.name, "cpu seconds of a step") for run in runs]
            counts = [int(records.cost(runs[0].name, key)) for key in ("trained numbers", "state bytes")]
            rows.append([str(point.batch), point.arm.name, *(f"{n:,}" for n in counts), spread(seconds, 2)])
    return table(["batch", "arm", "trained numbers", "bytes of moments", "CPU s of a step"], rows)


def style(arm: Arm, number: int) -> dict[str, Any]:
    colour = [plots.BLUE, plots.ORANGE, plots.GREEN, plots.RED, plots.PINK, plots.GREY, "black"][number % 7]
    return {"color": colour, "marker": "osD^vxP*<>"[number % 10], "markersize": 5, "label": arm.name}


def draw(rung: Rung, records: Records, folder: Path) -> None:
    if not any(final_runs(rung, point, records) for point in rung.points):
        return
    batches = sorted({point.batch for point in rung.points if final_runs(rung, point, records)})
    groups = {batch: [point for point in rung.points if point.batch == batch] for batch in batches}
    with plots.picture(folder / f"quality_{rung.name}_rates.png", columns=len(batches)) as axes:
        for axis, (batch, points) in zip([axes] if len(batches) == 1 else axes, groups.items(), strict=True):
            for number, point in enumerate(points):
                found = {r: x for r, x in short_runs(rung, point, records).items() if math.isfinite(x)}
                if found:
                    axis.plot(list(found), list(found.values()), **style(point.arm, number))
            lowest = min(records.losses.values())
            axis.set(xscale="log", xlabel="learning rate", ylabel=f"test loss after {rung.short_steps} steps")
            axis.set(title=f"batch {batch}", ylim=(lowest * 0.98, lowest * 1.8))
            axis.legend(fontsize=8)
    with plots.picture(folder / f"quality_{rung.name}_curves.png", columns=len(batches)) as axes:
        for axis, (batch, points) in zip([axes] if len(batches) == 1 else axes, groups.items(), strict=True):
            for number, point in enumerate(points):
                runs = final_runs(rung, point, records)
                curves = [records.curve(run.name, "train loss") for run in runs]
                if curves:
                    mean = [
                        statistics.mean(values) for values in zip(*([y for _, y in c] for c in curves), strict=True)
                    ]
                    axis.plot([x for x, _ in curves[0]], mean, **style(point.arm, number))
            axis.set(xlabel="step", ylabel="training loss, mean over seeds", title=f"batch {batch}")
            axis.legend(fontsize=8)
    with plots.picture(folder / f"quality_{rung.name}_cost.png") as axis:
        for number, point in enumerate(groups[batches[0]]):
            runs = final_runs(rung, point, records)
            if runs:
                x = records.cost(runs[0].name, "state bytes") / 1e6
                values = [records.losses[run.name] for run in runs]
                error = statistics.stdev(values) if len(values) > 1 else 0.0
                axis.errorbar([x], [statistics.mean(values)], yerr=[error], linestyle="", **style(point.arm, number))
        axis.set(xscale="log", xlabel="MB of Adam's moments", ylabel="test loss", title=f"batch {batches[0]}")
        axis.legend(fontsize=8)


def write(rung: Rung, folder: Path) -> None:
    """`<rung>.md` and its pictures beside the records' folder."""
    records = Records(rung, folder)
    about = (
        f"{len(records)} runs of the rung `{rung.name}`, one record each. Best rate of each arm by successive halving; "
        f"mean ± standard deviation over seeds; forgetting: what the loss on plain text has grown by. Differences are "
        f"by pairs of seeds.\n"
    )
    text = f"# Quality: {rung.name}\n\n{about}\n{results(rung, records)}\n"
    if rung.short_steps:
        text += f"""## Rates

Test loss of the short runs ({rung.short_steps} steps, seed 0) by rate; good: within {GOOD:.0%} of the best, by straight
lines over the logarithm of the rate.

{rates(rung, records)}
"""
    text += f"## Cost\n\n{costs(rung, records)}"
    target = folder.parent / f"quality_{rung.name}.md"
    target.write_text(text, encoding="utf-8")
    draw(rung, records, folder.parent)
    print(target)
