"""What train.py leaves for people when it ends: the report of the run, and a model card beside each export.

None of it can fail the run: what goes wrong here is one warning.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any


def write(args: Any, engine: Any, recorder: Any, *, spectra: bool) -> list[str]:
    """The report, after run_state.json says how the run ended; returns the files' names. Collective with `spectra`.

    Args:
        spectra: whether there is time for them; a run that was asked to stop may be killed at any moment.
    """
    if not args.report:
        return []
    found = measure_spectra(args, engine, recorder) if spectra and args.report_spectra else None
    if engine.plan.rank:
        return []

    def draw() -> list[str]:
        from hdpissa.engine import report

        folder = Path(args.output_dir)
        report.add_extra(folder, warnings=recorder.warnings, spectra=found)
        return report.write_report(folder, defaults=defaults(args))

    return _try("report", recorder, draw) or []


def measure_spectra(args: Any, engine: Any, recorder: Any) -> dict[str, Any] | None:
    """For report.json; collective. What goes wrong, be it on one rank alone, is a warning; a lost peer is not."""
    from hdpissa.engine import spectra
    from hdpissa.engine.run_record import counted

    found = spectra.measure(engine.module, engine.optimizer.store, most=args.report_spectra)
    problem = found.pop("problem")
    if problem:
        done = counted(len(found["weights"]), "weight")
        recorder.say(f"warning: spectra of {done}, then {problem}; the run itself is complete")
        if not found["weights"]:
            return None
    if found["left_out"]:
        recorder.say(f"spectra of {counted(len(found['left_out']), 'weight')} left out to save time or memory")
    return {"step": engine.global_steps, **found}


def write_card(args: Any, job: Any, recorder: Any, folder: Path, exported: Any) -> None:
    """README.md beside an export; on rank 0 only."""

    def card() -> None:
        from hdpissa.engine import model_card
        from hdpissa.engine.run_record import RunRecord

        record = RunRecord.read(Path(args.output_dir))
        trained = model_card.from_record(record, step=exported.step, template=job.rows.template.text)
        model_card.write_card(folder, trained, exported.as_dict())

    _try("model card", recorder, card)


def defaults(args: Any) -> dict[str, Any]:
    """Of all arguments."""
    return asdict(type(args)())


def _try(what: str, recorder: Any, work: Any) -> Any:
    """Runs it on this rank alone; an exception becomes a warning."""
    from hdpissa.engine import pulse

    try:
        with pulse.alone(what):
            return work()
    except Exception as error:
        recorder.say(f"warning: no {what}: {_words(error)}; the run itself is complete")
        return None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
