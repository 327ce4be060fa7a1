"""Output folders as runs leave them, short and long, and what the ranks of the spectra's tests do."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ARGUMENTS = {
    "model_name_or_path": "meta-llama/Llama-2-7b-hf",
    "dataset_name": "meta-math/MetaMathQA",
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "max_length": 512,
    "export_format": "both",
}
REFUSAL = "rank 1: <script>alert(1)</script> & a loss that is not finite"


def write_run(folder: Path, *, steps: int, slices: int) -> Path:
    """A folder with everything in it that a page shows; the step in the middle was skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(steps, slices)))
    (folder / "run_state.json").write_text(json.dumps({"state": "finished", "step": steps, "message": ""}))
    run = {
        "arguments": {**ARGUMENTS, "output_dir": str(folder)},
        "ds_config": {"zero_optimization": {"stage": 3}, "hd_pissa": {"r": 16, "slices": "auto"}},
        "world_size": slices,
        "slices": slices,
        "total_steps": steps,
        "device": "NVIDIA H100 80GB HBM3",
        "versions": {"hdpissa": "0.1.0", "torch": "2.11"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    weights = [_weight(f"model.layers.{layer}.{kind}", slices) for kind in kinds for layer in (16, 31, 0)]
    (folder / "spectra.json").write_text(json.dumps({"weights": weights, "left_out": [], "problem": ""}))
    return folder


def _rows(steps: int, slices: int):
    chance = random.Random(steps)
    yield {"step": 0, "eval_loss": 2.9, "perplexity": math.exp(2.9)}
    for step in range(1, steps + 1):
        skipped = step == steps // 2
        yield {
            "step": step,
            "applied": not skipped,
            "refusal": REFUSAL if skipped else "",
            "loss": None if skipped else 1 + 2 * math.exp(-6 * step / steps) + chance.gauss(0, 0.15),
            "tokens": 65_536,
            "step_time_s": chance.uniform(1.4, 1.8),
        }
        if step % max(1, steps // 20) == 0:
            norms = [1e-3 * math.exp(-5 * step / steps) * chance.uniform(0.8, 1.2) for _ in range(slices)]
            yield {"step": step, "slice_grad_norms": [n * 300 for n in norms], "slice_delta_norms": norms}
        if step % max(1, steps // 4) == 0:
            loss = 1.05 + 1.9 * math.exp(-6 * step / steps)
            yield {"step": step, "eval_loss": loss, "perplexity": math.exp(loss)}


def _weight(name: str, slices: int) -> dict[str, Any]:
    values = [math.exp(-5 * i / (32 * slices)) for i in range(32 * slices)]
    return {"name": name, "rows": 4096, "cols": 4096, "r": 16, "slices": slices, "values": values}


# --- in forks: functions that run inside `ranks.run_ranks` -----------------------------------------


def spectra_here(engine) -> dict[str, Any]:
    """What `spectra.measure` finds in an engine: all weights, without limit of time, with no time, and damaged."""
    from hdpissa.engine.export import spectra

    store = engine.optimizer.store
    found = spectra.measure(engine.module, store, most=99, most_seconds=1e9)
    none = spectra.measure(engine.module, store, most=99, most_seconds=0.0)
    for _, sum_A, _ in store.state_views("delta_sum", 0):
        sum_A.fill_(float("nan"))
    damaged = spectra.measure(engine.module, store, most=99, most_seconds=1e9)
    return {"found": found, "none": none, "damaged": damaged, "kinds": {t.kind for t in engine.targets}}


def spectra_with_faults(engine, faults_in_turn: list[str]) -> list[dict[str, Any]]:
    """For each planted fault: what is found here, and whether the ranks can still talk to each other."""
    from hdpissa.engine.distributed import faults, heartbeat
    from hdpissa.engine.export import spectra

    told = []
    for number, text in enumerate(faults_in_turn, 1):
        faults._fault = faults.Fault.parse(text) if text else None
        heartbeat.at_step(number)
        found = spectra.measure(engine.module, engine.optimizer.store, most=99)
        beats = torch.tensor([float(heartbeat.report().count)])
        dist.all_reduce(beats)
        told.append({"found": found, "same_place": beats.item() == 2 * heartbeat.report().count})
    return told


def spectra_without_a_peer(engine) -> str:
    """Rank 1 leaves; what that is for rank 0: "loss", or the name of something else."""
    from hdpissa.engine.distributed import rank_status
    from hdpissa.engine.export import spectra

    if dist.get_rank():
        dist.destroy_process_group()
        return ""
    try:
        spectra.measure(engine.module, engine.optimizer.store, most=99)
    except RuntimeError as error:
        return "loss" if rank_status.is_loss(error) else type(error).__name__
    return "nothing"
