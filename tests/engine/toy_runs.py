"""Steps of our layers and optimizer on the toy device and on the CPU: `python toy_runs.py OUT`.

Writes what came of them as JSON. For test_host_waits.py, in a process of its own: the device stays known to torch.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import toy_device
from tiny import tiny_batch, tiny_llama
from triton.runtime.interpreter import GridExecutor

from hdpissa.benchmarks.step import plain_engine
from hdpissa.engine.method import layer
from hdpissa.engine.optim import factors

ROOT = Path(plain_engine.__file__).parents[2]
OURS = tuple(str(ROOT / folder) for folder in ("engine", "kernels"))
STEPS, SLICES = 3, 2

# Compiled as if it stood in the layer's file: what waits there is ours.
PLANTED = """
def wrong(dy, *args, **kwargs):
    dx, q_TR = right(dy, *args, **kwargs)
    {line}
    return dx, q_TR
"""


def planted(line: str):
    """A line more at the end of what the layer's backward pass does for dx and q."""
    names = {"right": layer._products_backward}
    exec(compile(PLANTED.format(line=line), layer.__file__, "exec"), names)
    return mock.patch.object(layer, "_products_backward", names["wrong"])


def our_waits() -> list[str]:
    """Operations that the host waited for since the last call because of our code."""
    found = [operation for file, operation in toy_device.waits if file.startswith(OURS)]
    toy_device.waits.clear()
    return found


def train(device: torch.device, dtype: torch.dtype, **section) -> dict:
    """Losses, what became of the weights, and our waits per micro-batch and per optimizer step."""
    model = tiny_llama(dtype=dtype, hidden=32)
    start = {name: w.detach().float().clone() for name, w in model.named_parameters()}
    model = model.to(device)
    model.enable_input_require_grads()
    torch.manual_seed(5)
    optimizer = plain_engine.attach(model, r=4, slices=SLICES, **section)
    optimizer.param_groups[0]["lr"] = 1e-2
    losses, micro, steps = [], [], []
    our_waits()
    for step in range(STEPS):
        for index in range(SLICES):
            optimizer.store.active.index = index
            batch = {name: values.to(device) for name, values in tiny_batch(step, index, 0).items()}
            loss = model(**batch).loss
            loss.backward()
            optimizer.store.end_of_backward()
            losses.append(loss.detach())
            micro.append(our_waits())
        optimizer.reduce()
        assert not optimizer.vote(torch.zeros(4, dtype=torch.float64, device=device)).refusal
        optimizer.step()
        optimizer.zero_grad()
        steps.append(our_waits())
    change = torch.cat([(w.detach().float().cpu() - start[name]).flatten() for name, w in model.named_parameters()])
    return {"losses": [loss.item() for loss in losses], "change": change.tolist(), "micro": micro, "steps": steps}


def outcome(device: torch.device, line: str = "", **section) -> dict:
    """What `train` returns, or the type of what it raises; groups of Linears that share x are used, as on a GPU."""
    grouped = mock.patch.object(factors, "uses_triton", return_value=True)
    try:
        with grouped, planted(line) if line else nullcontext():
            return train(device, torch.float32, **section)
    except toy_device.DeviceMixError as error:
        return {"error": type(error).__name__}


def launchers() -> dict:
    """The host's side of the Triton kernels: nothing is run by them, so that only the waits say something."""
    with mock.patch.object(GridExecutor, "__call__", return_value=None) as launch:
        found = train(toy_device.DEVICE, torch.bfloat16, kernels={"impl": "triton", "linear": "separate"})
    return {"micro": found["micro"], "steps": found["steps"], "launches": launch.call_count}


def main() -> dict:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    toy, cpu = toy_device.DEVICE, torch.device("cpu")
    dense = {"delta": {"exchange": "dense"}}
    on_cpu = {"factor": outcome(cpu), "dense": outcome(cpu, **dense)}
    with toy_device.ToyMode():
        return {
            "cpu": on_cpu,
            "toy": {"factor": outcome(toy), "dense": outcome(toy, **dense)},
            "launchers": launchers(),
            "item": outcome(toy, line="dy.sum().item()"),
            "mixed": outcome(toy, line="q_TR = q_TR + dy.new_zeros(q_TR.shape, device='cpu')"),
        }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(main()))
