"""What a person can get wrong: one line with value, rule and remedy, exit code 2, before any weight is read.

    python tests/test_bad_input.py

prints the table of inputs and messages as Markdown.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from launch_runs import command, finish, flags, make_inputs, speak_alone, start
from mistakes import (
    Case,
    argument,
    assert_told,
    collect,
    deepspeed,
    make_broken_files,
    print_table,
    section,
    without_gpu,
    zero,
)
from ranks import run_ranks

COMMAND_LINE = [
    argument("misspelt argument", ("--learning_rte", "did you mean --learning_rate?"), learning_rte="1e-4"),
    argument("unknown argument", ("--frobnicate", "see --help"), frobnicate="1"),
    argument("required arguments left out", ("--ds_config, --dataset_name",), ds_config=None, dataset_name=None),
    argument("a word where a number belongs", ("--max_steps is many", "must be a whole number"), max_steps="many"),
    argument("a word where a switch belongs", ("--bf16", "maybe"), bf16="maybe"),
    argument("no steps", ("--max_steps is 0", "make one of them positive"), max_steps=0),
    argument("no epochs", ("--num_train_epochs 0.0", "make one of them positive"), max_steps=-1, num_train_epochs=0),
    argument("less than one step", ("0.001", "8 steps", "--max_steps"), max_steps=-1, num_train_epochs=0.001),
    argument("unknown schedule", ("is cosin:", "must be one of cosine, linear"), lr_scheduler_type="cosin"),
    argument("unknown export format", ("is gguf:", "must be one of hf, peft, both, none"), export_format="gguf"),
    argument("a rank without an adapter", ("--export_rank is 8", "--export_format peft or both"), export_rank=8),
    argument("unknown export dtype", ("is fp8:", "must be one of auto, bf16, fp32"), export_dtype="fp8"),
    argument("micro-batch of 0", ("is 0:", "at least 1"), per_device_train_batch_size=0),
    argument("negative learning rate", ("--learning_rate is -0.1", "must not be negative"), learning_rate=-0.1),
    argument(
        "learning rate not finite", ("--learning_rate is Infinity", "must be a finite number"), learning_rate="inf"
    ),
    argument("a warm-up ratio that is a number of steps", ("is 100.0", "--warmup_steps"), warmup_ratio=100),
    argument("negative warm-up", ("--warmup_steps is -1", "must not be negative"), warmup_steps=-1),
    argument("a step and a half of warm-up", ("--warmup_steps is 1.5", "or a share", "below 1"), warmup_steps=1.5),
    argument("negative seed", ("--seed is -1", "must not be negative"), seed=-1),
    argument(
        "unknown attention",
        ("--attn_implementation flash_attention_9", "eager"),
        attn_implementation="flash_attention_9",
    ),
]
YAML = [
    argument("misspelt key in the YAML file", ("learning_rat", "did you mean learning_rate?"), config="DIR/key.yaml"),
    argument("wrong type in the YAML file", ("max_steps is 'many'", "must be a whole number"), config="DIR/type.yaml"),
    argument("YAML file that is not there", ("DIR/none.yaml", "give a YAML file"), config="DIR/none.yaml"),
    argument("YAML file that is a list", ("DIR/list.yaml", "must hold keys and values"), config="DIR/list.yaml"),
    argument("broken YAML file", ("DIR/broken.yaml is not YAML", "line 2"), config="DIR/broken.yaml"),
    argument("one setting under two names", ("ds_config and deepspeed", "keep one"), config="DIR/twice.yaml"),
]
DEEPSPEED = [
    argument("DeepSpeed JSON that is not there", ("DIR/none.json", "give the path"), ds_config="DIR/none.json"),
    argument("broken DeepSpeed JSON", ("DIR/broken.json, line 2", "not valid JSON"), ds_config="DIR/broken.json"),
    argument("a key twice", ('"stage" stands twice', "keep one of them"), ds_config="DIR/twice.json"),
    deepspeed("no ZeRO section", ("zero_optimization.stage is missing", "must be 3", "set it"), zero_optimization={}),
    zero("ZeRO stage 2", ("zero_optimization.stage is 2", "must be 3", "set it"), stage=2),
    zero("parameters on NVMe", ('"nvme"', 'must be "cpu"'), offload_param={"device": "nvme", "nvme_path": "/n"}),
    Case(
        "hpZ groups that do not fit the ranks",
        ("zero_hpz_partition_size is 2 with 3 ranks", "number of ranks on a host"),
        ds={"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        environment={"WORLD_SIZE": "3"},
    ),
    Case("an environment half set", ("environment: LOCAL_RANK is 'x'", "correct"), environment={"LOCAL_RANK": "x"}),
    argument("a time-out of 0", ("--ddp_timeout is 0", "at least 1"), ddp_timeout=0),
    zero("quantised weights", ("zero_quantized_weights", "must be off", "remove it"), zero_quantized_weights=True),
    deepspeed("fp16", ("fp16.enabled is true", "must be off", "use bf16"), fp16={"enabled": True}),
    deepspeed("torch autocast", ("torch_autocast.enabled", "use bf16"), torch_autocast={"enabled": True}),
    deepspeed(
        "a schedule of DeepSpeed's",
        ("scheduler sets warmup_num_steps", "--lr_scheduler_type"),
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
    ),
    deepspeed(
        "weight decay",
        ("optimizer.params.weight_decay is 0.01", "must be left out"),
        optimizer={"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.01}},
    ),
    deepspeed("another optimizer", ('"Lion"', 'must be "AdamW"'), optimizer={"type": "Lion", "params": {}}),
    Case(
        "JSON and command line disagree, twice",
        ("is 4 but --per_device_train_batch_size is 1", "is 0.5 but --max_grad_norm is 1.0", '"auto"'),
        arguments={"per_device_train_batch_size": 1, "max_grad_norm": 1.0},
        ds={"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5},
    ),
    deepspeed(
        "misspelt key of DeepSpeed's",
        ("zero_optimization", "stage3_prefetch", "see DeepSpeed's keys"),
        zero_optimization={"stage": 3, "stage3_prefetch": 5},
    ),
    deepspeed("a batch size that does not come out", ("train_batch_size is 7", "is 8"), train_batch_size=7),
]
HD_PISSA = [
    section("misspelt key", ("hd_pissa.target_module", 'did you mean "target_modules"?'), target_module=["q_proj"]),
    section("key in the wrong place", ("hd_pissa.method", "move it to hd_pissa.init"), method="gram"),
    deepspeed("misspelt section", ("hdpissa", 'did you mean "hd_pissa"?'), hdpissa={"r": 4}),
    section("rank in quotes", ('hd_pissa.r is "16"', "must be an integer"), r="16"),
    section("alpha of 0", ("hd_pissa.lora_alpha is 0", "must be greater than 0"), lora_alpha=0),
    section("two mistakes", ("hd_pissa.r is 0", "hd_pissa.init.tol is -1"), r=0, init={"tol": -1}),
    section("broken regular expression", ('"(q_proj"', "not a valid regular expression"), target_modules="(q_proj"),
    section("targets that are not there", ("['query']", "q_proj, up_proj, v_proj"), target_modules=["query"]),
    section("LLaMA-Factory's word for all Linears", ("['all'] matches", '"all-linear"'), target_modules=["all"]),
    section(
        "a misspelt target among right ones",
        ('"qproj" matches no module', "q_proj"),
        target_modules=["v_proj", "qproj"],
    ),
    section("an exclusion that matches nothing", ("exclude_modules", '"w_proj"'), exclude_modules=["w_proj"]),
    section("a rank for nothing", ("rank_pattern", '"w_proj" matches no module'), rank_pattern={"w_proj": 2}),
    section(
        "a target that is no Linear", ("embed_tokens, a Embedding", "exclude_modules"), target_modules=["embed_tokens"]
    ),
    section(
        "more singular vectors than there are",
        ("layers.0.self_attn.k_proj is 16 x 32", "4 slices of rank 5 need 20", "rank_pattern", "exclude_modules"),
        r=5,
        slices=4,
    ),
    Case(
        "slices that do not fit the ranks",
        ("hd_pissa.slices is 3 with 2 ranks", "use slices = 1 or 2 or 4"),
        ds={"hd_pissa": {"r": 2, "slices": 3}},
        environment={"WORLD_SIZE": "2"},
    ),
    section("unknown exchange", ('delta.exchange is "thin"', '"auto", "factor", "dense"'), delta={"exchange": "thin"}),
    section(
        "a key of kernels in delta", ("hd_pissa.delta.impl", "move it to hd_pissa.kernels"), delta={"impl": "torch"}
    ),
    section("TF32 without a GPU", ('precision is "tf32"', "on cpu", 'set it to "fp32"'), delta={"precision": "tf32"}),
    without_gpu("Triton without a GPU", ('kernels.impl is "triton"', "needs a GPU", '"auto"'), impl="triton"),
    without_gpu("fused products without a GPU", ('kernels.linear is "fused"', "needs a GPU", '"auto"'), linear="fused"),
    section(
        "fused products in torch",
        ('kernels.linear is "fused" and impl "torch"', "Triton kernel", 'set one to "auto"'),
        kernels={"linear": "fused", "impl": "torch"},
    ),
    section("accumulation that does not fit the slices", ("steps is 4 with 3 slices", "use 6"), r=2, slices=3),
]
MODEL = [
    argument("model folder that is not there", ("DIR/none", "no such folder"), model_name_or_path="DIR/none"),
    argument(
        "model folder without config.json", ("DIR/bare", "it holds no config.json"), model_name_or_path="DIR/bare"
    ),
    argument("broken config.json", ("DIR/broken_model", "no usable model"), model_name_or_path="DIR/broken_model"),
    argument("no causal language model", ("DIR/t5", "cannot be built", "T5Config"), model_name_or_path="DIR/t5"),
    argument("model without tokenizer", ("DIR/mute", "no usable tokenizer"), model_name_or_path="DIR/mute"),
    argument("tokenizer without EOS", ("no EOS token", "set tokenizer.eos_token"), model_name_or_path="DIR/no_eos"),
]
DATA = [
    argument("data file that is not there", ("DIR/none.jsonl", "check the path"), dataset_name="DIR/none.jsonl"),
    argument(
        "data of another kind", ("DIR/notes.txt", ".jsonl, .json, .csv, .tsv, .parquet"), dataset_name="DIR/notes.txt"
    ),
    argument("folder without data", ("DIR/bare", "holds no .jsonl"), dataset_name="DIR/bare"),
    argument("broken data file", ("DIR/broken.jsonl", "cannot be read"), dataset_name="DIR/broken.jsonl"),
    argument("empty data file", ("DIR/empty.jsonl", "empty"), dataset_name="DIR/empty.jsonl"),
    argument(
        "wrong column", ("'prompt'", "its columns are response, instruction", "--prompt_field"), prompt_field="prompt"
    ),
    argument("a row without answer", ("row 1", "'response'", "drop the row"), dataset_name="DIR/hole.jsonl"),
    argument("no room for an answer", ("max_length 2 leaves no answer", "raise it"), max_length=2),
    argument("no room for anything", ("max_length is 1", "at least 2"), max_length=1),
    argument("less data than one batch", ("is 128 samples", "only 64"), gradient_accumulation_steps=64),
    argument("unknown split", ("'valid'", "check its name, split"), dataset_split="valid"),
    argument("no rows to evaluate on", ("DIR/empty.jsonl", "empty"), eval_dataset_name="DIR/empty.jsonl"),
    argument("template without placeholder", ("0 times", "{instruction}"), prompt_template="DIR/notes.txt"),
    argument("empty sample prompt", ("--sample_prompt", "empty"), sample_prompt=" ", prompt_template="none"),
    argument("template that is not there", ("'alpacca'", "alpaca, none"), prompt_template="alpacca"),
]
EVALUATION = [
    argument(
        "unknown strategy", ("--eval_strategy is often", "must be one of steps, epoch, no"), eval_strategy="often"
    ),
    argument(
        "evaluations of nothing",
        ("--eval_steps needs evaluation rows", "--eval_split"),
        eval_steps=2,
        eval_dataset_name=None,
    ),
    argument(
        "a bound for questions that nobody asks", ("--eval_max_samples is 2", "--eval_exact_match"), eval_max_samples=2
    ),
    argument("steps without their number", ("--eval_steps 0", "give --eval_steps"), eval_strategy="steps"),
    argument(
        "answers without evaluation rows",
        ("--eval_exact_match needs evaluation rows", "give --eval_dataset_name"),
        eval_exact_match=True,
        eval_dataset_name=None,
    ),
    argument("the best of nothing", ("--load_best_model_at_end", "give --eval_steps"), load_best_model_at_end=True),
    argument(
        "what is evaluated is not saved",
        ("--save_steps 3", "--eval_steps 2", "multiple", "--save_strategy best"),
        load_best_model_at_end=True,
        eval_steps=2,
        save_steps=3,
    ),
    argument("unknown metric", ("is bleu:", "one of loss, perplexity, exact_match"), metric_for_best_model="bleu"),
    argument("a metric that is not measured", ("give --eval_exact_match",), metric_for_best_model="exact_match"),
    argument("negative patience", ("early_stopping_patience is -1", "negative"), early_stopping_patience=-1),
    argument("unknown reporter", ("--report_to is mlflow", "none, all, tensorboard, wandb"), report_to="mlflow"),
    argument("negative slice steps", ("--slice_metrics_steps is -1", "negative"), slice_metrics_steps=-1),
]
OUTPUT = [
    argument("output folder of another run", ("DIR/used", "--overwrite_output_dir"), output_dir="DIR/used"),
    argument("output folder that is a file", ("DIR/notes.txt is a file", "give a folder"), output_dir="DIR/notes.txt"),
    argument("output folder below a file", ("DIR/notes.txt is a file",), output_dir="DIR/notes.txt/run"),
    argument("an export that would replace the base", ("DIR/model is the base itself", "another"), output_dir="DIR"),
]
CASES = [*COMMAND_LINE, *YAML, *DEEPSPEED, *HD_PISSA, *MODEL, *DATA, *EVALUATION, *OUTPUT]


# --- tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad") / "inputs"


@pytest.fixture(scope="module")
def results(folder):
    return collect_here(folder)


def collect_here(folder: Path) -> dict[str, dict[str, Any]]:
    """All cases of this file, run; the files are made first."""
    inputs = make_inputs(folder)
    make_broken_files(folder)
    return collect(CASES, folder, inputs)


def test_mistakes_have_different_names():
    assert len({case.mistake for case in CASES}) == len(CASES) >= 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.mistake)
def test_one_line_and_exit_code_2(results, case):
    assert_told(case, results[case.mistake])


@pytest.mark.slow
def test_two_ranks_under_deepspeed_say_it_once(results, folder, tmp_path):
    """Rank 0 speaks; the launcher, which ends all ranks when one exits, returns 2."""
    assert results  # the files are there
    arguments = {"ds_config": folder / "broken.json", "model_name_or_path": folder / "model"}
    arguments |= {"dataset_name": folder / "train.jsonl", "output_dir": tmp_path / "out"}
    log = tmp_path / "log"
    code = finish(start(command("deepspeed", arguments), tmp_path / "cache", log))
    said = [line for line in log.read_text().splitlines() if "error:" in line]
    assert code == 2, log.read_text()
    assert len(said) == 1, said
    assert said[0].startswith("error: "), said
    assert "broken.json, line 2" in said[0]
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "out").exists()


def test_a_mistake_of_one_rank_is_told(folder, results):
    """A file that one node lacks: rank 0 says nothing of it, so the rank itself does."""
    assert results
    (result,) = run_ranks(1, speak_alone, flags({"config": folder / "none.yaml"}), str(folder / "cache"))
    assert result["code"] == 2
    assert result["stderr"].splitlines()[0].startswith("error: --config ")
    assert result["stderr"].endswith("give a YAML file (rank 1)\n")


def main() -> None:
    """Prints the table; what the libraries print on standard output goes elsewhere."""
    with tempfile.TemporaryDirectory() as scratch:
        results = collect_here(Path(scratch) / "inputs")
    print_table(CASES, results)


if __name__ == "__main__":
    sys.exit(main())
