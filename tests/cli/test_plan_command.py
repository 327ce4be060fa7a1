"""launch/plan.py as a person calls it: output, JSON, configs, and one line for every mistake."""

from __future__ import annotations

import json

import pytest
from plan_runs import write_configs

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import plan
from hdpissa.launch.common import command_line
from hdpissa.launch.planning import hardware as plan_hardware
from hdpissa.launch.planning.hardware import GPUS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of config.json files, by name of the model."""
    return write_configs(tmp_path_factory.mktemp("configs"))


def call(capsys, *words: str) -> tuple[int, str, str]:
    code = command_line.exit_code(plan.main, [str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_70b_plan(capsys, folder):
    code, out, _ = call(
        capsys, "--model", folder / "Llama-3-70B.json", "--gpus", "8", "--gpu", "h100-80gb", "--explain"
    )
    assert code == 0
    assert "It fits" in out
    assert "not measured" in out
    for words in (
        "bf16 shards",
        "fp32 remainder",
        "gathered weights",
        "factor exchange",
        "MFU(4N)",
        "log-probabilities",
    ):
        assert words in out


def test_json(capsys, folder):
    code, out, _ = call(capsys, "--model", folder / "SmolLM2-135M.json", "--gpus", "2", "--gpu", "A100-40", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["modelled"] is True
    assert {k: set(v) if isinstance(v, dict) else type(v) for k, v in found.items()} == {
        "modelled": bool,
        "model": {"family", "parameters", "targets", "target_parameters", "traced"},
        "gpu": set(plan_hardware.figures(GPUS["H100"])),
        "run": {
            "trainer", "cross_entropy", "reference", "gpus", "nodes", "slices", "r", "max_length",
            "per_device_train_batch_size",
            "gradient_accumulation_steps", "gradient_checkpointing", "compute_dtype", "offload_param", "master_format",
            "zero_hpz_partition_size",
        },
        "fits": bool,
        "advice": type(None),
        "memory_per_gpu": {
            *("available", "peak", "peak_when", "persistent", "computing", "updating", "generating", "reserve")
        },
        "host_memory": {"per_process", "per_node"},
        "bytes_per_step": {"sent_per_gpu", "host_link_per_gpu"},
        "seconds_per_step": {
            "floor_compute", "floor_memory", "low_rank", "gathers", "host_link", "kernel_launches", "exchange",
            "apply", "adam", "staging", "gathered_again", "bound", "predicted",
        },
        "tokens_per_step_per_gpu": int,
        "tokens_per_second_per_gpu": float,
        "tokens_per_second": float,
        "mfu_4n": float,
        "binds": str,
    }  # fmt: skip
    memory = found["memory_per_gpu"]
    assert memory["peak"] < memory["available"]
    assert (found["model"]["parameters"], found["run"]["gpus"]) == (134_515_008, 2)


def test_table(capsys, folder):
    """SmolLM2's k_proj has 192 singular vectors: 12 slices of rank 16, of which 8 divide the number of GPUs."""
    words = ("--model", folder / "SmolLM2-135M.json", "--table")
    code, out, _ = call(capsys, *words)
    assert code == 0
    assert "8*" in out
    rows = json.loads(call(capsys, *words, "--json")[1])["rows"]
    assert [row["gpus"] for row in rows] == [2**n for n in range(11)]
    assert [row["slices"] for row in rows] == [1, 2, 4, *[8] * 8]
    fixed = json.loads(call(capsys, *words, "--json", "--slices", "6")[1])["rows"]
    assert [row.get("gradient_accumulation_steps") for row in fixed[:3]] == [6, 3, None]
    assert fixed[2]["note"]


def test_ds_config(capsys, folder, tmp_path):
    """Its values count, "auto" and absent ones come from the command line, and both may say the same."""
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": "auto",
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
                "hd_pissa": {"slices": 4, "master": {"format": "fp32"}},
            }
        )
    )
    words = ["--model", folder / "SmolLM2-135M.json", "--ds_config", file, "--json", "--r", "8"]
    words += ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4"]
    found = json.loads(call(capsys, *words)[1])["run"]
    assert found["per_device_train_batch_size"] == 4
    assert (found["r"], found["slices"], found["gradient_accumulation_steps"]) == (8, 4, 2)
    assert (found["offload_param"], found["master_format"]) == (True, "fp32")
    words += ["--slices", "8", "--master_format", "split", "--offload_param", "false"]
    code, _, err = call(capsys, *words)
    assert code == 2
    for named in ("hd_pissa.slices", "--slices", "hd_pissa.master.format", "zero_optimization.offload_param"):
        assert named in err


@pytest.mark.parametrize(
    ("trainer", "words", "changed"),
    [
        ("sft", ["--cross_entropy", "chunked"], {"cross_entropy": "chunked"}),
        ("sft", ["--r", "8"], {"r": 8}),
        ("sft", ["--max_length", "256"], {"max_length": 256}),
        ("sft", ["--gradient_checkpointing"], {"gradient_checkpointing": True}),
        ("sft", ["--bf16", "false", "--ds_config", "zero3_cpu"], {"compute_dtype": "fp32"}),
        ("dpo", ["--precompute_ref_log_probs"], {"reference": False}),
        ("kto", ["--precompute_ref_log_probs"], {"reference": False}),
        ("grpo", ["--beta", "0.1"], {"reference": True}),
        ("grpo", ["--ds3_gather_for_generation", "false"], {}),
    ],
)
def test_what_an_option_changes(capsys, folder, trainer, words, changed):
    base = ["--model", folder / "SmolLM2-135M.json", "--gpus", "2", "--json", "--trainer", trainer]
    plain, other = (json.loads(call(capsys, *base, *more)[1]) for more in ([], words))
    assert plain["run"]["trainer"] == trainer
    assert {name for name in plain["run"] if plain["run"][name] != other["run"][name]} == set(changed)
    assert {name: other["run"][name] for name in changed} == changed
    assert plain["memory_per_gpu"] != other["memory_per_gpu"]


def test_own_gpu(capsys, folder, tmp_path):
    file = tmp_path / "mine.json"
    numbers = {"memory_gib": 6, "bf16_tflops": 50, "hbm_tb_s": 0.5, "link_gb_s": 10, "network_gb_s": 1}
    file.write_text(json.dumps(numbers))
    words = ("--model", folder / "SmolLM2-135M.json", "--gpu", file, "--gpus", "1")
    found = json.loads(call(capsys, *words, "--json")[1])
    assert found["gpu"] == {"name": "mine", **numbers, "host_gb_s": 25, "peak_tflops": 50}
    file.write_text(json.dumps({**numbers, "hbm_gb_s": 3}))
    assert "hbm_gb_s" in call(capsys, *words)[2]
    file.write_text(json.dumps({**numbers, "memory_gib": True}))
    assert "memory_gib" in call(capsys, *words)[2]
    file.write_text("{")
    assert "line 1" in call(capsys, *words)[2]


BAD = {  # the words, and what the line has to name
    "no model": ([], "--model_name_or_path"),
    "no such file": (["--model", "/nowhere/config.json"], "/nowhere/config.json"),
    "not a config": (["--model", "EMPTY"], "config.json"),
    "too long": (["--model", "x" * 300], "--model_name_or_path"),
    "GPU too long": (["--gpu", "x" * 300], "--gpu"),
    "GPU": (["--gpu", "H10"], "H100"),
    "older GPU": (["--gpu", "V100"], "A100-40"),
    "GPU file": (["--gpu", "none.json"], "none.json"),
    "no GPUs": (["--gpus", "0"], "--gpus"),
    "half a node": (["--gpus", "12"], "use 8"),
    "slices": (["--slices", "many"], "hd_pissa.slices"),
    "slices and GPUs": (["--slices", "3"], "slices"),
    "accumulation": (["--slices", "8", "--gpus", "2", "--gradient_accumulation_steps", "6"], "use 8"),
    "master": (["--master_format", "bf16"], "hd_pissa.master.format"),
    "train's": (["--learning_rate", "2e-5"], "--learning_rate"),
    "no such trainer": (["--trainer", "ppo"], "--trainer"),
    "reference with hpZ": (["--trainer", "dpo", "--ds_config", "zero3_hpz"], "--precompute_ref_log_probs"),
    "the launcher's": (["--num_accelerators", "8"], "--gpus"),
    "misspelt": (["--gpu_count", "8"], "--gpu_count"),
    "too many slices": (["--gpus", "16"], "192"),
    "ds_config": (["--ds_config", "none.json"], "none.json"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input(capsys, folder, tmp_path, mistake):
    """One line that says what to change, and exit code 2."""
    words, named = BAD[mistake]
    (tmp_path / "config.json").write_text("{}")
    words = [str(tmp_path) if word == "EMPTY" else word for word in words]
    if "--model" not in words and mistake != "no model":
        words = ["--model", str(folder / "SmolLM2-135M.json"), *words]
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert named in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_gpu_names():
    for name in ("h100-80gb", "NVIDIA H100 80GB HBM3", "H100_80GB", "h100"):
        assert plan_hardware.read_gpu(name) is GPUS["H100"]
    assert plan_hardware.read_gpu("4090") is GPUS["RTX-4090"]
    assert plan_hardware.read_gpu("a100-40gb") is GPUS["A100-40"]
    with pytest.raises(ConfigError, match="A100-40"):
        plan_hardware.read_gpu("abacus")
