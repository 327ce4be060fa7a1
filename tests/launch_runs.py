"""A tiny model folder with data for launch/train.py, and ways to start it: in forks, or by the real launchers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).parents[1] / "launch" / "train.py"
CLI = TRAIN.with_name("cli.py")
BIN = Path(sys.executable).parent  # of deepspeed and torchrun
VOCABULARY = 320


# --- what a run reads ------------------------------------------------------------------------------


def make_inputs(folder: Path, *, train: int = 64, evaluate: int = 15) -> dict[str, Any]:
    """Model, data and DeepSpeed JSON; returns the four required arguments, and the evaluation file.

    15 evaluation rows, so that two ranks have not equally many.
    """
    from hdpissa.launch.demo_data import generate, write

    folder.mkdir(parents=True, exist_ok=True)
    rows = generate(train + evaluate, seed=3)
    write(folder / "train.jsonl", rows[:train])
    write(folder / "eval.jsonl", rows[train:])
    save_model(folder / "model", [text for row in rows for text in row.values()])
    return {
        "ds_config": str(write_ds_config(folder / "ds.json")),
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "train.jsonl"),
        "eval_dataset_name": str(folder / "eval.jsonl"),
    }


def save_model(folder: Path, texts: list[str]) -> None:
    """A Llama of 50,000 weights, fp32, and a byte-level BPE tokenizer with EOS and pad token."""
    from tiny import tiny_llama
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)
    ids = {"bos_token_id": None, "eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    ids["max_position_embeddings"] = 512  # no row is longer, which would be told
    tiny_llama(vocab_size=len(fast), hidden=32, attn_implementation="sdpa", **ids).save_pretrained(folder)


def write_ds_config(path: Path, **changes: Any) -> Path:
    """The JSON that the Trainer's users know, everything "auto"; `changes` replaces top-level keys."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3},
        "hd_pissa": {"r": 4},
    }
    path.write_text(json.dumps(config | changes))
    return path


def small_run(inputs: dict[str, Any], output: Path | str, **changes: Any) -> dict[str, Any]:
    """The arguments of a run on `make_inputs`: rows as they are, two to a micro-batch."""
    chosen = {"per_device_train_batch_size": 2, "max_length": 128, "prompt_template": "none"}
    return {**inputs, "output_dir": str(output), **chosen, **changes}


def flags(arguments: dict[str, Any]) -> list[str]:
    """{"max_steps": 3, "bf16": True, "report_to": ["wandb", "tensorboard"]} as a command line."""
    words: list[str] = []
    for name, value in arguments.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


# --- in forks: functions that run inside `ranks.run_ranks` -----------------------------------------


def train_here(argv: list[str], cache: str, *, draw: bool = False) -> dict[str, Any]:
    """launch/train.py's `run` on this rank: exit code, standard error, and the exception if one came out.

    Args:
        draw: with the report at the end, which takes longer than a tiny run.
    """
    from hdpissa.launch import train

    prepare_process(cache, draw=draw)
    code, error = None, None
    with captured_stderr() as told:
        try:
            code = train.run(argv)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return {"code": code, "stderr": "".join(told), "error": error}


def listing(folder: str) -> list[tuple[str, float]]:
    """Every path under a folder with the time of its last change, itself included; empty when there is none."""
    root = Path(folder)
    paths = [root, *sorted(root.rglob("*"))] if folder and os.path.exists(folder) else []
    return [(str(path), path.stat().st_mtime) for path in paths]


def forbid_weights(message: str) -> None:
    """Any attempt to read weights or to start a process group for them raises."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    from hdpissa.engine.sharding import zero3

    def refuse(*args, **kwargs):
        raise RuntimeError(message)

    AutoModelForCausalLM.from_pretrained = PreTrainedModel.from_pretrained = zero3.load_pretrained = refuse


def prepare_process(cache: str, *, draw: bool = False) -> None:
    """What HF_HOME and the like would do in a process that has not imported its libraries yet; `draw` as above."""
    import datasets

    from hdpissa.launch import train
    from hdpissa.launch.reporting import page as report

    train.PATIENCE_S = 0.5  # no launcher ends the other ranks, which have nothing to add
    if not draw:
        report.write_report = lambda *args, **kwargs: []
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    datasets.disable_progress_bars()


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Standard error by its file descriptor, because loggers keep the stream that they found at import.

    The text is in the list once the block is left.
    """
    told: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield told
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            told.append(file.read().decode())


# --- such forks, started ---------------------------------------------------------------------------


def train_ranks(ranks: int, arguments: dict[str, Any], cache: Path | str, **how: Any) -> list[dict[str, Any]]:
    """`train_here` on so many ranks, every one of which has to succeed; `how` is for `run_ranks`."""
    from ranks import run_ranks

    results = run_ranks(ranks, train_here, flags(arguments), str(cache), draw=True, **how)
    assert_success(results, ranks)
    return results


def assert_success(results: list[dict[str, Any]], ranks: int) -> None:
    """Of so many ranks each ended with exit code 0, and nothing came out of `run`."""
    assert [(result["code"], result["error"]) for result in results] == [(0, None)] * ranks, results


# --- by the real launchers -------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(launcher: str, arguments: dict[str, Any], *, ranks: int = 2) -> list[str]:
    """The command line as a user types it, for "deepspeed", "torchrun", "python" or "hdpissa" (and so torchrun)."""
    port = str(free_port())
    head = {
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port],
        "python": [sys.executable],
        "hdpissa": [sys.executable, str(CLI), "train", "--nproc_per_node", str(ranks), "--master_port", port],
    }[launcher]
    return [*head, *([] if launcher == "hdpissa" else [str(TRAIN)]), *flags(arguments)]


def start(command: list[str], cache: Path, log: Path) -> subprocess.Popen:
    """Starts a command in an environment without any launcher's variables; its output goes to `log`."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    dropped = (*launchers, "DS_ACCELERATOR")
    environment = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("SLURM_")}
    environment |= {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "DEEPSPEED_TIMEOUT": "2"}
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen, timeout: float = 180) -> int:
    """Exit code; when it hangs, its whole session is ended and TimeoutExpired raised."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def wait_for(condition: Callable[[], Any], process: subprocess.Popen, timeout: float = 120) -> Any:
    """The condition's first true value; gives up when the process ends or time is over."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited in vain; exit code {process.poll()}")


# --- what a run leaves -----------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Strictly: no NaN, no Infinity."""
    return json.loads(path.read_text(), parse_constant=_refuse_constant)


def read_metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """(rows of steps, rows of evaluations) of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=_refuse_constant) for line in lines]
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
