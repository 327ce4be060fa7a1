"""Trains exactly as a recording of the published reference did and prints the largest deviations.

    python tests/golden.py --golden reference_2ranks.json --data gsm8k_train.jsonl [--model FOLDER] [--method reference]

The recording holds the losses of ten optimizer steps and the total change of some layers' W. The run is the
ordinary one: the deepspeed launcher, two processes, ZeRO-3, fp32. Exit code 1 when a loss deviates by more
than 1e-5 or a ‖ΔW‖ by more than 1e-4, relative; or when the PEFT adapter of the run, loaded by stock peft on the
untouched base, is further than 1e-3 of ‖ΔW‖ from the trained model, or moves its logits accordingly.

The recording was made on a CPU with AVX-512, and torch's fp32 cross entropy depends on the vector width by
more than the tolerance (golden_train.py says why). On another CPU the denominator of the softmax is therefore
summed as AVX-512 does, in 16 lanes; `--lanes 0` leaves it to this CPU.

`--slices 4` has no recording: the transcription of the published algorithm, with a process for each slice, makes one.

`--method reference` runs, in place of the engine, the transcription of the published algorithm that benchmarks
compare it with (golden_reference.py): losses and ‖ΔW‖ at the same tolerances.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
LOSS_TOLERANCE, DELTA_TOLERANCE, ADAPTER_TOLERANCE = 1e-5, 1e-4, 1e-3

TARGETS = ["q_proj", "o_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def train(model: str, data: str, folder: Path, *, ranks: int, slices: int, lanes: int) -> None:
    """The recorded run: S = 2 (or more), r = 16, 80 rows, micro-batch 2 x accumulation 2 per slice, lr 2e-4 cosine."""
    config = folder / "ds.json"
    hd_pissa = {"r": 16, "lora_alpha": 16, "slices": slices, "target_modules": TARGETS}
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}, "hd_pissa": hd_pissa}))
    command = [
        Path(sys.executable).parent / "deepspeed",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        "29617",
    ]
    command += [
        ROOT / ("tests/golden_train.py" if lanes else "launch/train.py"),
        "--ds_config",
        config,
        "--model_name_or_path",
        model,
    ]
    command += ["--dataset_name", data, "--dataset_split", "train[:80]", "--prompt_field", "question"]
    command += ["--response_field", "answer", "--max_length", 256, "--per_device_train_batch_size", 2]
    command += ["--gradient_accumulation_steps", 2 * slices // ranks, "--learning_rate", 2e-4, "--warmup_ratio", 0.03]
    command += ["--export_format", "both", "--seed", 42, "--num_train_epochs", 1, "--output_dir", folder / "run"]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GOLDEN_LANES": str(lanes),
    }
    subprocess.run([str(part) for part in command], check=True, env=environment)


def train_reference(model: str, data: str, folder: Path, *, ranks: int, slices: int, lanes: int) -> None:
    """The same run by the benchmarks' transcription of the published algorithm."""
    script = ["--num_accelerators", ranks, "--master_port", 29617, ROOT / "tests/golden_reference.py"]
    command = [Path(sys.executable).parent / "deepspeed", *script, "--model", model, "--data", data]
    command += ["--lanes", lanes, "--slices", slices, "--output_dir", folder / "run"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run([str(part) for part in command], check=True, env=environment)


def record(model: str, data: str, folder: Path, *, slices: int, lanes: int) -> dict:
    """A recording of the transcription, in the form of the published reference's."""
    train_reference(model, data, folder, ranks=slices, slices=slices, lanes=lanes)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    with safe_open(folder / "run" / "model" / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    deltas = {
        name: read(folder / "run" / "model", name) - read(Path(model), name) for name in names[:: len(names) // 12]
    }
    return {
        "loss": [row["loss"] for row in rows],
        "delta_W": {name: {"delta_fro": delta.norm().item()} for name, delta in deltas.items()},
    }


def read(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a single-file Hugging Face folder, in float64."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.get_tensor(name).double()


def compare(golden: dict, model: Path, folder: Path) -> bool:
    """Prints the table and says whether both tolerances hold."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    deviations = [abs(a / b - 1) for a, b in zip(losses, golden["loss"], strict=True)]
    for step, (ours, theirs, d) in enumerate(zip(losses, golden["loss"], deviations, strict=True)):
        print(f"step {step}  loss {ours:.7f}  recorded {theirs:.7f}  relative deviation {d:.2e}")
    norms = []
    for name, recorded in golden["delta_W"].items():
        delta = read(folder / "model", name) - read(model, name)
        norms.append(abs(delta.norm().item() / recorded["delta_fro"] - 1))
        print(
            f"{name}  ‖ΔW‖ {delta.norm().item():.7f}  recorded {recorded['delta_fro']:.7f}  deviation {norms[-1]:.2e}"
        )
    print(f"largest loss deviation {max(deviations):.2e} (limit {LOSS_TOLERANCE:.0e})")
    print(f"largest ‖ΔW‖ deviation {max(norms):.2e} (limit {DELTA_TOLERANCE:.0e})")
    return max(deviations) <= LOSS_TOLERANCE and max(norms) <= DELTA_TOLERANCE


def compare_adapter(base: Path, folder: Path) -> bool:
    """Prints how far the adapter is from the trained model, in weights (its own report) and in logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = json.loads((folder / "adapter" / "hdpissa_export.json").read_text())
    found = report["residual"]
    print(
        f"adapter of rank {report['r']}: residual {found['overall']:.2e} of ‖ΔW‖ (limit {ADAPTER_TOLERANCE:.0e}), worst"
    )
    print(f"  {found['worst']:.2e} ({found['worst_target']}); rounding alone is estimated at {found['floor']:.1e}")
    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    ids = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")["input_ids"]

    def logits(path: Path, adapter: Path | None = None) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapter) if adapter else model
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    before, trained, adapted = logits(base), logits(folder / "model"), logits(base, folder / "adapter")
    moved = ((adapted - trained).norm() / (trained - before).norm()).item()
    largest = (adapted - trained).abs().max().item()
    print(f"  its logits are {moved:.2e} of what training changed from the trained model's, at most {largest:.1e}")
    return found["overall"] <= ADAPTER_TOLERANCE and moved <= 10 * ADAPTER_TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", help="the recording, JSON; of two slices")
    parser.add_argument("--data", required=True, help="the jsonl file whose first 80 rows were used")
    parser.add_argument("--model", help="SmolLM2-135M-Instruct in fp32; default: made by launch/demo_model.py")
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2, 4))
    parser.add_argument("--slices", type=int, default=2, choices=(2, 4))
    parser.add_argument("--method", choices=("hd_pissa", "reference"), default="hd_pissa")
    native = 0 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16
    parser.add_argument("--lanes", type=int, default=native, help="partial sums of the softmax; 0: this CPU's own")
    args = parser.parse_args()
    print(f"this CPU: {torch.backends.cpu.get_cpu_capability()}, softmax summed in {args.lanes or 'its own'} lanes")
    if (args.golden is None) == (args.slices == 2):
        parser.error("give --golden, or --slices 4, which has no recording")
    if args.method == "reference" and args.ranks > 2:
        parser.error(f"--ranks {args.ranks} --method reference: its two slices take at most 2 processes; give 1 or 2")
    model = args.model
    if model is None:
        from hdpissa.launch.demo_model import ensure_demo_model

        model = ensure_demo_model()
    with tempfile.TemporaryDirectory() as temporary:
        how = {"slices": args.slices, "lanes": args.lanes}
        if args.golden:
            golden = json.loads(Path(args.golden).read_text())
        else:
            golden = record(model, args.data, Path(temporary) / "recorded", **how)
        runs = {"hd_pissa": train, "reference": train_reference}
        runs[args.method](model, args.data, Path(temporary), ranks=args.ranks, **how)
        holds = compare(golden, Path(model), Path(temporary) / "run")
        if args.method == "hd_pissa":
            holds &= compare_adapter(Path(model), Path(temporary) / "run")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
