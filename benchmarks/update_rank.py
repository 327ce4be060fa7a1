"""Of which rank is what training changes in the weights? LoRA, PiSSA, HD-PiSSA and full fine-tuning, measured.

    python benchmarks/update_rank.py [--model M] [--dataset_name F] [--slices 1 2 4 8] [--steps 1 3] [--methods ...]

Every method takes the same optimizer steps on the same micro-batches in the same order, each in one process. Then
ΔW = W_after − W_before of seven Linears in the first, the middle and the last decoder layer is decomposed in float64.
W is the weight in effect, adapters merged. Three ranks are counted:

    above 1e-3      singular values above a thousandth of the largest
    numerical rank  those above NumPy's max(m, n) · eps · σ_1, eps of fp32, and above what the rounding of W to fp32
                    leaves in ΔW (`noise_level`)
    effective rank  exp of the entropy of σ / Σσ (Roy and Vetterli, EUSIPCO 2007): how many directions share the change

and beside them the bound that each method's algebra sets: r for LoRA (ΔW = B A), 2·r for PiSSA (ΔW = B A − B_0 A_0),
min(m, n) for full fine-tuning. HD-PiSSA's 2·r·S is that of one step, ΔB A + B ΔA + ΔB ΔA. Of several steps it bounds
the first-order part, in which A and B stay what they were; each step's ΔB ΔA may add to the rank.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdpissa.benchmarks import apart, methods, plots, task, timing
from hdpissa.engine.config.section import DEFAULT_TARGETS
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.sharding import zero3
from hdpissa.launch.command_line import option

NAMES = ("lora", "pissa", "hd_pissa", "full")
RANKS = ("above 1e-3", "numerical rank", "effective rank")
IDENTITY = ("method", "r", "S", "steps", "min(m, n)")
COLUMNS = (*IDENTITY, "matrices", "bound", *RANKS, "σ past the bound / σ_1", "floor / σ_1", "/ LoRA", "/ PiSSA")
THRESHOLD = 1e-3
MERGES = 2  # times that a weight is rounded beside once per step: merging adapters, before and after


@dataclass
class Arguments(task.TaskArguments):
    """Measures the rank of the change that each method makes to the weights."""

    methods: list[str] = field(default_factory=lambda: list(NAMES), metadata={"help": f"of {', '.join(NAMES)}"})
    slices: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "HD-PiSSA's numbers of slices"})
    r: int = option(16, "rank of an adapter, and of a slice")
    steps: list[int] = field(
        default_factory=lambda: [1, 3], metadata={"help": "optimizer steps after which ΔW is measured"}
    )
    lr: float = option(2e-4, "learning rate of all methods, constant: ΔW has to stand out of the rounding of W")
    layers: list[int] = field(
        default_factory=list, metadata={"help": "decoder layers; default the first, the middle and the last one"}
    )
    seed: int = option(0, "of the order of the data, and of LoRA's A")
    name: str = option("update_rank", "name of the result files")
    folder: str = option(str(timing.RESULTS), "where the results go")
    force: bool = option(False, "replace a result of another configuration")


@dataclass(frozen=True)
class Variant:
    """A method with its number of slices (0: it has none)."""

    method: str
    r: int
    slices: int

    @property
    def label(self) -> str:
        """Its name in pictures."""
        name = plots.LABELS[self.method]
        return {"hd_pissa": f"{name} S = {self.slices}, r = {self.r}", "full": name}.get(
            self.method, f"{name} r = {self.r}"
        )

    def bound(self, rows: int, cols: int) -> int:
        """The rank that ΔW of an m × n matrix cannot exceed by the method's algebra.

        HD-PiSSA's is that of one step, and after several that of their first-order terms: the second-order ones are
        not within it.
        """
        most = {"lora": self.r, "pissa": 2 * self.r, "hd_pissa": 2 * self.r * self.slices}
        return min(rows, cols, most.get(self.method, min(rows, cols)))


Group = tuple[Variant, int, int]  # with the steps and min(m, n)


# --- the three ranks --------------------------------------------------------------------------------------------------


def count_above(sigma: Tensor, threshold: float) -> int:
    """Singular values (descending, at least one, not all 0) above `threshold` times the largest."""
    return int((sigma > threshold * sigma[0]).sum())


def floor_of(sigma: Tensor, W: Tensor, roundings: int) -> float:
    """What a singular value of ΔW has to exceed to count in the numerical rank, relative to the largest (not 0).

    The larger of max(m, n) · eps (`numpy.linalg.matrix_rank`), eps of fp32, and of what rounding W leaves.
    """
    return max(max(W.shape) * torch.finfo(torch.float32).eps, noise_level(W, roundings) / float(sigma[0]))


def noise_level(W: Tensor, roundings: int) -> float:
    """Twice the largest singular value to expect of what is left after rounding an m × n matrix to fp32 that often.

    A rounding moves an entry by a number that is uniform between ± half the distance of neighbouring fp32 numbers, so
    by distance / √12 in the quadratic mean; independent entries of mean square s² make a matrix whose largest singular
    value is close to s · (√m + √n) (Davidson and Szarek 2001, theorem II.13).
    """
    size = W.float().abs()
    distance = torch.nextafter(size, torch.full_like(size, torch.inf)).double() - size.double()
    entry = math.sqrt(float(distance.square().mean()) * roundings / 12)
    return 2 * entry * (math.sqrt(W.shape[0]) + math.sqrt(W.shape[1]))


def effective_rank(sigma: Tensor) -> float:
    """exp(−Σ p ln p) with p = σ / Σσ: k for k equal singular values."""
    return float(torch.exp(torch.special.entr(sigma / sigma.sum()).sum()))


def describe(delta: Tensor, W: Tensor, *, bound: int, roundings: int) -> tuple[dict[str, Any], Tensor]:
    """(the ranks of a change of W, both of shape (m, n), its singular values in float64).

    Raises:
        RuntimeError: nothing has changed.
    """
    sigma = torch.linalg.svdvals(delta.double())
    largest = float(sigma[0])
    if not largest > 0:
        raise RuntimeError("training has not changed a weight: is the learning rate too small for fp32?")
    floor = floor_of(sigma, W, roundings)
    figures = {
        "above 1e-3": count_above(sigma, THRESHOLD),
        "numerical rank": count_above(sigma, floor),
        "effective rank": effective_rank(sigma),
        "bound": bound,
        "past": float(sigma[bound]) / largest if bound < len(sigma) else None,
        "floor": floor,
        "by the eps of float64": count_above(sigma, max(delta.shape) * torch.finfo(torch.float64).eps),
    }
    return figures, sigma


# --- measuring --------------------------------------------------------------------------------------------------------


def variants(args: Arguments) -> list[Variant]:
    """In the order of --methods."""
    found = []
    for name in args.methods:
        found += [Variant(name, args.r, s) for s in (args.slices if name == "hd_pissa" else [0])]
    return found


def choose_weights(names: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Those of the seven Linears in some decoder layers; default the first, the middle and the last.

    Raises:
        ConfigError: a layer that is not there.
    """
    numbered: dict[int, list[str]] = {}
    for name in names:
        parts = name.split(".")
        if name.endswith(".weight") and parts[-2] in DEFAULT_TARGETS:
            numbered.setdefault(next(int(part) for part in parts if part.isdigit()), []).append(name)
    last = max(numbered)
    chosen = list(layers) or sorted({0, last // 2, last})
    for layer in chosen:
        if layer not in numbered:
            raise ConfigError(f"--layers {layer}: the model has layers 0 to {last}; give some of them")
    return [name for layer in chosen for name in numbered[layer]]


def measure(variant: Variant, args: Arguments) -> dict[Group, list[tuple[dict[str, Any], Tensor]]]:
    """Trains a variant and describes its ΔW after each of --steps: (figures, σ / σ_1) of every chosen weight."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    data = task.make_task(args).micro_batches(args, slices=max(args.slices), seed=args.seed)
    setting = methods.Setting(
        model=args.model_name_or_path,
        r=args.r,
        slices=variant.slices or None,
        lr=args.lr,
        micro_batch=args.micro_batch,
        accumulation=args.accumulation,
        seed=args.seed,
    )
    method = methods.build(variant.method, setting)
    before = {name: w.double() for name, w in method.weights()}
    before = {name: before[name] for name in choose_weights(list(before), args.layers)}
    found: dict[Group, list[tuple[dict[str, Any], Tensor]]] = {}
    micro_batches = itertools.chain.from_iterable(itertools.repeat(data))
    for step in range(max(args.steps)):
        for batch in itertools.islice(micro_batches, args.accumulation):
            method.micro_step(batch)
        method.step(args.lr)
        for name, after in method.weights() if step + 1 in args.steps else ():
            if name in before:
                W, delta = before[name], after.double() - before[name]
                figures, sigma = describe(delta, W, bound=variant.bound(*W.shape), roundings=step + 1 + MERGES)
                row = {"weight": name, "shape": list(W.shape), **figures}
                found.setdefault((variant, step + 1, min(W.shape)), []).append((row, sigma / sigma[0]))
    zero3.shut_down()
    return found


# --- telling ----------------------------------------------------------------------------------------------------------


def rows_of(figures: Mapping[Group, list[dict]]) -> list[dict[str, Any]]:
    """A row per group: the median over its matrices of each rank, and its ratio to LoRA's and PiSSA's."""
    rows = []
    for (variant, steps, narrow), matrices in figures.items():
        row: dict[str, Any] = {"method": variant.method, "r": variant.r, "S": variant.slices or ""}
        row |= {"steps": steps, "min(m, n)": narrow, "matrices": len(matrices), "bound": matrices[0]["bound"]}
        if variant.method == "full":
            row["r"] = ""
        for name in RANKS:
            row[name] = statistics.median(m[name] for m in matrices)
        for name, column in (("past", "σ past the bound / σ_1"), ("floor", "floor / σ_1")):
            row[column] = max((m[name] for m in matrices if m[name] is not None), default="")
        row["samples"] = {name: [m[name] for m in matrices] for name in RANKS}
        row["weights"] = [f"{m['weight']} {m['shape']}" for m in matrices]
        row["of full rank by the eps of float64"] = sum(m["by the eps of float64"] == narrow for m in matrices)
        rows.append(row)
    for row in rows:
        for other, column in (("lora", "/ LoRA"), ("pissa", "/ PiSSA")):
            base = _like(rows, other, row)
            if base:
                row[column] = row["above 1e-3"] / base["above 1e-3"]
    return rows


def _like(rows: Sequence[Mapping[str, Any]], method: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The method's row for the same matrices after the same steps; empty where there is none."""
    place = ("steps", "min(m, n)")
    return next((b for b in rows if b["method"] == method and all(b[name] == row[name] for name in place)), {})


def claim(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is left of "16 times the rank" in these measurements, on the widest matrices after the fewest steps."""
    slices = [row for row in rows if row["method"] == "hd_pissa"]
    if not slices:
        return ""
    few = min(row["steps"] for row in slices)
    wide = max(row["min(m, n)"] for row in slices)
    most = max((r for r in slices if r["steps"] == few and r["min(m, n)"] == wide), key=lambda row: row["S"])
    S, r = most["S"], most["r"]
    words = [
        f"HD-PiSSA with S = {S} and r = {r} changes matrices with min(m, n) = {wide} by a numerical rank of "
        f"{most['numerical rank']:g} in {few} step(s), {most['above 1e-3']:g} singular values above 1e-3 of the "
        f"largest; the bound of one step is {most['bound']}"
    ]
    if "/ LoRA" in most:
        words.append(
            f"that is {most['/ LoRA']:.3g} times LoRA's {most['above 1e-3'] / most['/ LoRA']:g} (the bounds say "
            f"{2 * S}; the paper's 16 is this ratio at S = 8), by the effective rank "
            f"{most['effective rank'] / _like(rows, 'lora', most)['effective rank']:.3g} times"
        )
    if "/ PiSSA" in most:
        words.append(
            f"but {most['/ PiSSA']:.3g} times PiSSA's {most['above 1e-3'] / most['/ PiSSA']:g}, which changes both of "
            f"its factors, too (the bounds say {S})"
        )
    return "; ".join(words) + "."


def note_of(args: Arguments, rows: Sequence[Mapping[str, Any]]) -> str:
    """How to read the table."""
    data = args.dataset_name or "generated arithmetic problems"
    tokens = args.micro_batch * args.accumulation
    full = sum(row["of full rank by the eps of float64"] for row in rows)
    return (
        f"{Path(args.model_name_or_path).name}, fp32, {tokens} rows of {Path(data).name} per step in "
        f"{args.accumulation} micro-batches, learning rate {args.lr:g} for all: the rank of ΔW, medians over the "
        f"matrices of a group. {claim(rows)} LoRA's first step changes only B, because B is 0; later ones A, too, and "
        f"ΔW = B A keeps rank r. W is held in fp32, so each entry of ΔW carries W's own rounding (by the eps of "
        f"float64 {full} of the {sum(row['matrices'] for row in rows)} changes have full rank): "
        f"what counts in the numerical rank exceeds 'floor', and 'σ past the bound' is the largest singular value that "
        f"the bound does not allow, both the group's largest. HD-PiSSA's bound is that of one step, and of the "
        f"first-order part of several: what its later steps have past it are second-order terms, elsewhere it is "
        f"rounding. Ratios are of the counts above 1e-3."
    )


def draw(spectra: Mapping[Group, list[Tensor]], target: Path, *, r: int) -> None:
    """σ_i / σ_1 over i, median of the widest matrices, a panel for each number of steps; the bounds marked."""
    wide = max(narrow for _, _, narrow in spectra)
    counts = sorted({steps for _, steps, _ in spectra})
    dashes = ("-", "--", "-.", ":")
    with plots.picture(target, columns=len(counts), width=6) as axes:
        for ax, steps in zip([axes] if len(counts) == 1 else axes, counts, strict=True):
            chosen = {v: torch.stack(s).median(0).values for (v, n, m), s in spectra.items() if (n, m) == (steps, wide)}
            sliced = sorted({v.slices for v in chosen if v.slices}, reverse=True)
            for variant, sigma in chosen.items():
                style = {**plots.line(variant.method), "label": variant.label, "markevery": max(1, wide // 9)}
                if variant.slices:
                    style["linestyle"] = dashes[sliced.index(variant.slices) % len(dashes)]
                ax.semilogy(range(1, wide + 1), sigma.clamp(min=1e-12), **style)
            for number, bound in enumerate(sorted({v.bound(wide, wide) for v in chosen if v.method != "full"})):
                ax.axvline(bound, color="#999999", linewidth=0.8, linestyle=":")
                height = (1.3, 2.6)[number % 2]  # neighbours would touch
                ax.text(bound, height, f"{bound}", fontsize=7, ha="center", color="#555555")
            ax.axhline(THRESHOLD, color="#999999", linewidth=0.8)
            ax.set(xlabel="index i of the singular value", ylabel="σ_i / σ_1 of ΔW", ylim=(1e-8, 6))
            ax.set_title(f"after {steps} step{'s' if steps > 1 else ''}, min(m, n) = {wide}", fontsize=10)
            ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4)


def check(args: Arguments) -> None:
    """Refuses what would fail after minutes."""
    for name in args.methods:
        if name not in NAMES:
            raise ConfigError(f"--methods {name}: must be of {', '.join(NAMES)}; give some of these")
    for name in ("slices", "steps", "methods"):
        if not getattr(args, name):
            raise ConfigError(f"--{name} is empty: needs at least one value; leave it out for the default")
    if min(args.steps) < 1 or args.r < 1 or args.lr <= 0:
        raise ConfigError(f"--steps {args.steps}, --r {args.r}, --lr {args.lr}: all must be positive; raise them")
    task.refuse_slices(args.slices, args.accumulation)


def configuration_of(args: Arguments) -> dict[str, Any]:
    """The full arguments; of paths their last part."""
    found = timing.configuration_of(Namespace(**asdict(args)))
    return found | ({"dataset_name": Path(args.dataset_name).name} if args.dataset_name else {})


def main() -> int:
    args = task.parse(Arguments)
    check(args)
    configuration = configuration_of(args)
    timing.refuse_other(args.name, configuration, folder=Path(args.folder), force=args.force)
    task.make_task(args).micro_batches(
        args, slices=max(args.slices), seed=args.seed
    )  # refuses before anything is trained
    found: dict[Group, list[tuple[dict[str, Any], Tensor]]] = {}
    for variant in variants(args):
        found |= apart.call(measure, variant, args)
        print(f"measured: {variant.label}", flush=True)
    rows = rows_of({group: [figures for figures, _ in matrices] for group, matrices in found.items()})
    spectra = {group: [sigma for _, sigma in matrices] for group, matrices in found.items()}
    folder, picture = Path(args.folder), f"{args.name}.png"
    draw(spectra, folder / picture, r=args.r)
    timing.write(
        args.name,
        rows,
        COLUMNS,
        note_of(args, rows),
        folder=folder,
        identity=IDENTITY,
        configuration=configuration,
        pictures=[picture],
        headline=claim(rows),
    )
    print(claim(rows))
    return 0


if __name__ == "__main__":
    sys.exit(task.run(main))
