"""The plan in words and tables, or as one JSON object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from hdpissa.launch.common.metrics import counted
from hdpissa.launch.planning import hardware as plan_hardware
from hdpissa.launch.planning import memory as plan_memory
from hdpissa.launch.planning import step as plan_step
from hdpissa.launch.planning.hardware import GIB
from hdpissa.launch.planning.memory import Memory
from hdpissa.launch.planning.run import Run
from hdpissa.launch.planning.step import Step

NOTE = "Modelled from closed forms, not measured. --explain prints formulas and assumptions."


MOMENTS = {"computing": "in a micro-batch", "updating": "in an update", "generating": "in generation"}


@dataclass(frozen=True)
class Plan:
    """A run and what was found of it."""

    run: Run
    memory: Memory
    step: Step

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.run.cluster.gpu.memory


def make_plan(run: Run) -> Plan:
    """Raises ConfigError where the run cannot be."""
    return Plan(run, plan_memory.memory(run), plan_step.step(run))


# --- for machines ----------------------------------------------------------------------------------


def as_dict(plan: Plan, advice: str | None) -> dict[str, Any]:
    """Bytes, seconds and FLOP/s; everything modelled."""
    run, memory, step = plan.run, plan.memory, plan.step
    return {
        "modelled": True,
        "model": _model(run),
        "gpu": plan_hardware.figures(run.cluster.gpu),
        "run": _run(run),
        "fits": plan.fits,
        "advice": advice,
        "memory_per_gpu": {
            "available": int(run.cluster.gpu.memory),
            "peak": memory.peak,
            "peak_when": memory.busiest,
            "persistent": memory.persistent,
            "computing": memory.computing,
            "updating": memory.updating,
            "generating": memory.generating,
            "reserve": memory.reserve,
        },
        "host_memory": {"per_process": memory.host, "per_node": plan_memory.host_per_node(run, memory)},
        "bytes_per_step": {"sent_per_gpu": step.wire, "host_link_per_gpu": step.host_bytes},
        "seconds_per_step": _seconds(step),
        "tokens_per_step_per_gpu": step.tokens,
        "tokens_per_second_per_gpu": step.tokens_per_second,
        "tokens_per_second": step.tokens_per_second * run.cluster.gpus,
        "mfu_4n": step.mfu,
        "binds": step.binds,
    }


def _model(run: Run) -> dict[str, Any]:
    return {
        "family": run.model.family,
        "parameters": run.model.parameters,
        "targets": len(run.targets),
        "target_parameters": sum(t.rows * t.cols for t in run.targets),
        "traced": run.trace is not None,
    }


def _run(run: Run) -> dict[str, Any]:
    batch, placement = run.batch, run.placement
    return {
        "trainer": run.objective.trainer,
        "cross_entropy": "chunked" if run.objective.chunked else "model",
        "reference": run.objective.reference,
        "gpus": run.cluster.gpus,
        "nodes": run.cluster.nodes,
        "slices": run.plan.slices,
        "r": run.section.r,
        "max_length": batch.length,
        "per_device_train_batch_size": batch.rows,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_checkpointing": batch.checkpointing,
        "compute_dtype": "bf16" if placement.width == 2 else "fp32",
        "offload_param": placement.offload,
        "master_format": placement.master_format,
        "zero_hpz_partition_size": placement.hpz,
    }


def _seconds(step: Step) -> dict[str, float]:
    return {
        "floor_compute": step.products,
        "floor_memory": step.elementwise,
        "low_rank": step.low_rank,
        "gathers": step.link,
        "host_link": step.host,
        "kernel_launches": step.launches,
        "exchange": step.exchange,
        "apply": step.apply,
        "adam": step.adam,
        "staging": step.staging,
        "gathered_again": step.again,
        "bound": step.bound,
        "predicted": step.predicted,
    }


def row_dict(plan: Plan, note: str) -> dict[str, Any]:
    """One line of the table of GPU counts."""
    run, step = plan.run, plan.step
    return {
        "gpus": run.cluster.gpus,
        "slices": run.plan.slices,
        "gradient_accumulation_steps": run.batch.accumulation,
        "fits": plan.fits,
        "memory_peak": plan.memory.peak,
        "host_memory_per_node": plan_memory.host_per_node(run, plan.memory),
        "bytes_sent_per_gpu": step.wire,
        "step_s": step.predicted,
        "tokens_per_second_per_gpu": step.tokens_per_second,
        "tokens_per_second": step.tokens_per_second * run.cluster.gpus,
        "mfu_4n": step.mfu,
        "binds": step.binds,
        "note": note,
    }


# --- for people ------------------------------------------------------------------------------------


def size(nbytes: float) -> str:
    """1.5 GiB; 0 as a dash."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes:.0f} B" if nbytes else "-"


def seconds(value: float) -> str:
    """1.24 s, 3.5 ms."""
    if not value:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def show(plan: Plan, advice: str | None, console: Console) -> None:
    """Tables for one run."""
    run = plan.run
    facts, here = _model(run), _run(run)
    console.print(
        f"[bold]{facts['family']}[/], {facts['parameters'] / 1e9:.2f} G parameters, {facts['targets']} targets with "
        f"{facts['target_parameters'] / 1e9:.2f} G, on {here['gpus']} × {run.cluster.gpu.name} ({here['nodes']} "
        f"{'node' if here['nodes'] == 1 else 'nodes'}): r {here['r']}, {counted(here['slices'], 'slice')}, micro-batch "
        f"{here['per_device_train_batch_size']} × {'2 × ' if run.batch.sequences == 2 else ''}{here['max_length']} "
        f"tokens, accumulation "
        f"{here['gradient_accumulation_steps']}, checkpointing {'on' if here['gradient_checkpointing'] else 'off'}, "
        f"{here['compute_dtype']}, {here['trainer']}{' with a reference model' if here['reference'] else ''}"
    )
    console.print(_memory_table(plan))
    console.print(_bytes_table(plan))
    console.print(_time_table(plan))
    verdict = "[bold green]It fits[/]" if plan.fits else "[bold red]It does not fit[/]"
    used = f"{size(plan.memory.peak)} of {size(run.cluster.gpu.memory)} per GPU"
    console.print(f"{verdict}: {used}." + (f" Cheapest change: {advice}" if advice else ""))
    console.print(NOTE, style="dim")


def _memory_table(plan: Plan) -> Table:
    memory = plan.memory
    table = Table("memory per GPU", "", title_justify="left")
    table.columns[1].justify = "right"
    for name, nbytes in memory.persistent.items():
        table.add_row(name, size(nbytes))
    table.add_section()
    for name, nbytes in memory.computing.items():
        table.add_row(f"forward and backward: {name}", size(nbytes))
    for name, nbytes in memory.updating.items():
        table.add_row(f"update: {name}", size(nbytes))
    for name, nbytes in memory.generating.items():
        table.add_row(f"generation: {name}", size(nbytes))
    table.add_row("context, libraries, fragmentation", size(memory.reserve))
    table.add_section()
    table.add_row(f"peak, {MOMENTS[memory.busiest]}", size(memory.peak))
    table.add_row("host memory per node", size(plan_memory.host_per_node(plan.run, memory)))
    return table


def _bytes_table(plan: Plan) -> Table:
    table = Table("sent per GPU and step", "")
    table.columns[1].justify = "right"
    for name, nbytes in plan.step.wire.items():
        table.add_row(name, size(nbytes))
    if plan.step.host_bytes:
        table.add_row("host link, both directions", size(plan.step.host_bytes))
    return table


def _time_table(plan: Plan) -> Table:
    step = plan.step
    table = Table("time per step", "")
    table.columns[1].justify = "right"
    table.add_row("compute floor (products)", seconds(step.products))
    table.add_row("memory floor (element-wise)", seconds(step.elementwise))
    table.add_row("low-rank products", seconds(step.low_rank))
    table.add_row("gathers, beside compute", seconds(step.link + step.host))
    table.add_row("kernel launches, beside compute", seconds(step.launches))
    table.add_row("update: exchange", seconds(step.exchange))
    table.add_row("update: apply, Adam", seconds(step.apply + step.adam))
    if step.again:
        table.add_row("update: gathering what stays gathered", seconds(step.again))
    if step.staging:
        table.add_row("update: weights from the host and back", seconds(step.staging))
    table.add_section()
    table.add_row("bound", seconds(step.bound))
    table.add_row("[bold]forecast[/]", f"[bold]{seconds(step.predicted)}[/]")
    table.add_row("tokens/s per GPU", f"{step.tokens_per_second:,.0f}")
    table.add_row("tokens/s in all", f"{step.tokens_per_second * plan.run.cluster.gpus:,.0f}")
    table.add_row("MFU(4N)", f"{100 * step.mfu:.0f} %")
    table.add_row("binds", step.binds)
    return table


def show_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """One line per number of GPUs."""
    heads = ("GPUs", "slices", "accum.", "peak / GPU", "fits", "host / node", "sent / step", "step", "tokens/s/GPU")
    table = Table(*heads, "tokens/s", "MFU", "binds")
    for row in rows:
        if "step_s" not in row:
            table.add_row(str(row["gpus"]), row["note"], *[""] * 10)
            continue
        table.add_row(
            str(row["gpus"]),
            str(row["slices"]) + ("*" if row["note"] else ""),
            str(row["gradient_accumulation_steps"]),
            size(row["memory_peak"]),
            "[green]yes[/]" if row["fits"] else "[red]no[/]",
            size(row["host_memory_per_node"]),
            size(sum(row["bytes_sent_per_gpu"].values())),
            seconds(row["step_s"]),
            f"{row['tokens_per_second_per_gpu']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{100 * row['mfu_4n']:.0f} %",
            row["binds"],
        )
    console.print(table)
    for note in dict.fromkeys(row["note"] for row in rows if row["note"] and "step_s" in row):
        console.print(f"* {note}", style="dim")
    console.print(NOTE, style="dim")
