"""What the ranks of test_spectra_together.py do, inside `ranks.run_ranks`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


def spectra_with_faults(engine, faults_in_turn: list[str], folder: str) -> list[dict[str, Any]]:
    """For each planted fault: what is found and said here, and whether the ranks can still talk to each other."""
    from hdpissa.engine import faults, pulse
    from hdpissa.engine.recorder import Recorder
    from hdpissa.launch import train_report

    told = []
    args = SimpleNamespace(report_spectra=99)
    for number, text in enumerate(faults_in_turn, 1):
        Path(folder, str(number)).mkdir(exist_ok=True)
        recorder = Recorder(
            Path(folder, str(number)), total_steps=1, weights=1, device_name="cpu", devices=2, rank=dist.get_rank()
        )
        faults._fault = faults.Fault.parse(text) if text else None
        pulse.at_step(number)
        found = train_report.measure_spectra(args, engine, recorder)
        beats = torch.tensor([float(pulse.report().count)])
        dist.all_reduce(beats)
        same_place = beats.item() == 2 * pulse.report().count
        told.append({"found": found, "warnings": recorder.warnings, "same_place": same_place})
        recorder.close()
    return told


def spectra_without_a_peer(engine) -> str:
    """Rank 1 leaves; what that is for rank 0: "loss", or the name of something else."""
    from hdpissa.engine import peers
    from hdpissa.launch import train_report

    if dist.get_rank():
        dist.destroy_process_group()
        return ""
    try:
        train_report.measure_spectra(SimpleNamespace(report_spectra=99), engine, None)
    except RuntimeError as error:
        return "loss" if peers.is_loss(error) else type(error).__name__
    return "nothing"
