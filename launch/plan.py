"""Shows before a run whether it fits and how fast it will be. Needs no GPU and no weights.

    python launch/plan.py --model_name_or_path M --gpu H100 --gpus 8 --gradient_checkpointing
    python launch/plan.py --model_name_or_path M --gpu H100 --table

Reads only the model's config.json. Everything it prints is modelled (see --explain), nothing measured.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common import command_line
from hdpissa.launch.planning import arguments as plan_arguments

MOST_GPUS = 1024


def plan_table(run: Any, *, capped: bool) -> list[dict[str, Any]]:
    """A row for each power of two up to 1024 GPUs; a run that cannot be has only a note.

    Args:
        capped: slices follow the number of GPUs as far as the matrices allow.
    """
    from hdpissa.launch.planning.report import make_plan, row_dict
    from hdpissa.launch.planning.run import largest_slices

    rows: list[dict[str, Any]] = []
    gpus = 1
    while gpus <= MOST_GPUS:
        note, slices = "", run.section.slices
        if capped:
            slices = largest_slices(run.model, run.section, gpus)
            note = f"the smallest target has no singular vectors for more than {slices} slices" if slices < gpus else ""
        steps, share = run.batch.accumulation, max(1, slices // gpus)
        steps = -(-steps // share) * share
        try:
            rows.append(row_dict(make_plan(run.with_gpus(gpus, slices).with_batch(accumulation=steps)), note))
        except ConfigError as error:
            rows.append({"gpus": gpus, "note": str(error)})
        gpus *= 2
    return rows


def main(argv: list[str] | None = None) -> None:
    """Reads, plans, prints."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    args, flags, given = plan_arguments.parse(argv)
    run = plan_arguments.resolve(args, flags, given)

    from rich.console import Console

    from hdpissa.launch.planning import advice as plan_advice
    from hdpissa.launch.planning import explain as plan_explain
    from hdpissa.launch.planning import report as plan_report

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if args.table:
        rows = plan_table(run, capped=run.section.slices == "auto")
        if args.json:
            print(json.dumps({"modelled": True, "rows": rows}, indent=2))
        else:
            plan_report.show_rows(rows, console)
    else:
        plan = plan_report.make_plan(run)
        advice = None if plan.fits else plan_advice.cheapest_change(run, file=args.ds_config)
        if args.json:
            print(json.dumps(plan_report.as_dict(plan, advice), indent=2))
        else:
            plan_report.show(plan, advice, console)
    if args.explain and not args.json:
        console.print(plan_explain.explain(run), markup=False)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
