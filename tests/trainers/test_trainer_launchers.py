"""One user's script under every launcher: the same run, on as many ranks as were started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch_runs import BIN, free_port, save_model
from trainer_runs import config, pairs, trl_data

SCRIPT = str(Path(__file__).with_name("user_script.py"))
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    save_model(folder / "model", [text for row in pairs() for text in row.values()])
    trl_data("sft").to_json(folder / "data.jsonl")
    (folder / "ds.json").write_text(json.dumps(config(slices=2)))
    return folder


def launch(words: list[str], inputs: Path, output: Path, ds: str | None = None) -> tuple[float, int, int]:
    """(last loss, ranks that the trainer sees, ranks that the engine sees)."""
    files = [str(inputs / "model"), str(inputs / "data.jsonl"), ds or str(inputs / "ds.json"), str(output)]
    environment = {**os.environ, **ENVIRONMENT, "PATH": f"{BIN}:{os.environ['PATH']}"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run(
        [*words, SCRIPT, *files], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    told = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(told) == 1, done.stdout[-2000:] + done.stderr[-4000:]
    return float(told[0][1]), int(told[0][2]), int(told[0][3])


def test_plain_python(inputs, tmp_path):
    loss, seen, used = launch([sys.executable], inputs, tmp_path)
    assert (seen, used) == (1, 1)
    assert loss > 0


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "accelerate"])
def test_launchers(launcher, inputs, tmp_path):
    port = str(free_port())
    words = {
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", port],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", port],
        "accelerate": [
            *("accelerate", "launch", "--use_deepspeed", "--deepspeed_config_file", str(inputs / "ds.json")),
            *("--num_processes", "2", "--num_machines", "1", "--main_process_port", port, "--zero3_init_flag", "true"),
        ],
    }[launcher]
    words[0] = str(BIN / words[0])
    _, seen, used = launch(words, inputs, tmp_path, "launched" if launcher == "accelerate" else None)
    assert (seen, used) == (2, 2)
