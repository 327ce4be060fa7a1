"""More of what a person can get wrong: base models that cannot be trained, damaged files, values that nobody thinks of.

The cases of test_bad_input.py and these stand in one table (`python tests/test_refusals.py` prints it as Markdown);
what counts for each is the same: one line with value, rule and remedy, exit code 2, before any weight is read.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import test_bad_input
from family_runs import make_family
from launch_runs import command, finish, flags, make_inputs, start, write_ds_config
from mistakes import Case, argument, assert_told, collect, deepspeed, print_table, section, zero

ROW = '{"instruction": "1 + 1", "response": "2"}\n'
HUGE = 10**30

MODEL = [
    argument("an adapter for a model", ("adapter_config.json", "merge_and_unload"), model_name_or_path="DIR/adapter"),
    argument(
        "a folder without weights", ("holds no weights", "model.safetensors"), model_name_or_path="DIR/weightless"
    ),
    argument("GGUF for weights", ("holds no weights (m.gguf)", "get the model again"), model_name_or_path="DIR/gguf"),
    argument("a shard that is missing", ("model-00002", "get the file again"), model_name_or_path="DIR/lost_shard"),
    argument("a truncated shard", ("no sound safetensors file", "get it again"), model_name_or_path="DIR/cut"),
    argument("a pointer of Git LFS", ("no sound safetensors file", "get it again"), model_name_or_path="DIR/lfs"),
    argument(
        "a damaged index", ("must be JSON with a weight_map", "get the file again"), model_name_or_path="DIR/index"
    ),
    argument("an index that leads away", ("must be a file beside it",), model_name_or_path="DIR/away"),
    argument("GPTQ", ("quantised (gptq)", "give the model that it was made from"), model_name_or_path="DIR/gptq"),
    argument("bitsandbytes", ("quantised (bitsandbytes)", "must be bf16"), model_name_or_path="DIR/bnb"),
    argument("MXFP4", ("quantised (mxfp4)", "must be bf16"), model_name_or_path="DIR/mxfp4"),
    argument("an encoder", ("BertLMHeadModel", "sees the whole text", "causal"), model_name_or_path="DIR/bert"),
    argument("a classifier", ("LlamaForSequenceClassification", "next token"), model_name_or_path="DIR/classifier"),
    argument("an unknown architecture", ("no usable model", "nosuch"), model_name_or_path="DIR/nosuch"),
    argument("no model_type", ("no usable model", "model_type"), model_name_or_path="DIR/typeless"),
    argument("config.json that is a list", ("no usable model",), model_name_or_path="DIR/list"),
    argument("config.json with a word for a size", ("hidden_size",), model_name_or_path="DIR/word"),
    argument("config.json with a size of 0", ("no usable model", "give a"), model_name_or_path="DIR/zero"),
    argument("heads that do not divide", ("no usable model", "(3)"), model_name_or_path="DIR/heads"),
    argument("a damaged tokenizer", ("no usable tokenizer", "beside it"), model_name_or_path="DIR/bad_tokenizer"),
    argument("another model's tokenizer", ("the model has 61 embeddings", "belongs"), model_name_or_path="DIR/small"),
    argument("code of the model", ("give --trust_remote_code",), model_name_or_path="DIR/remote"),
    argument("a file for a model", ("DIR/notes.txt", "give a"), model_name_or_path="DIR/notes.txt"),
    argument("a model's name of blanks", ("--model_name_or_path", "give a"), model_name_or_path="  "),
]
FAMILIES = [
    Case(
        "packed experts by name",
        ('"gate_up_proj" matches', "4 experts packed into one parameter", "q_proj"),
        arguments={"model_name_or_path": "DIR/mixtral"},
        ds={"hd_pissa": {"r": 2, "target_modules": ["gate_up_proj"]}},
    ),
    Case(
        "the router of a mixture of experts",
        ("a MixtralTopKRouter: only torch.nn.Linear", "exclude_modules"),
        arguments={"model_name_or_path": "DIR/mixtral"},
        ds={"hd_pissa": {"r": 2, "target_modules": ["gate"]}},
    ),
    Case(
        "Llama's names for Phi-3",
        ('"q_proj" matches no module of Phi3ForCausalLM', "gate_up_proj", "qkv_proj"),
        arguments={"model_name_or_path": "DIR/phi3"},
        ds={"hd_pissa": {"r": 2, "target_modules": ["q_proj", "o_proj"]}},
    ),
    Case(
        "an adapter of the tied output layer",
        ("lm_head shares its weight with", "no LoRA pair", "export as 'hf'"),
        arguments={"model_name_or_path": "DIR/gemma2", "export_format": "peft"},
        ds={"hd_pissa": {"r": 2, "target_modules": ["q_proj", "lm_head"]}},
    ),
]
JSON_FILES = [
    argument("NaN in the JSON", ("nan.json", "NaN", "not JSON"), ds_config="DIR/nan.json"),
    argument("a JSON in UTF-16", ("utf16.json", "not UTF-8 text"), ds_config="DIR/utf16.json"),
    argument("an empty JSON file", ("blank.json", "not valid JSON", "mend it"), ds_config="DIR/blank.json"),
    argument("a folder for the JSON", ("DIR/bare", "Is a directory", "give the path"), ds_config="DIR/bare"),
    argument("a JSON that is a number", ("holds 3", "must be a JSON object"), ds_config="DIR/three.json"),
    argument("JSON nested without end", ("deep.json",), ds_config="DIR/deep.json"),
    argument("an Accelerate file for FSDP", ("no `deepspeed_config` section",), ds_config="DIR/fsdp.yaml"),
    argument("a sequence cut in two", ("cp_size is 2: must be 1",), ds_config="DIR/split.yaml"),
    argument("YAML that makes objects", ("not valid YAML", "mend it"), ds_config="DIR/object.yaml"),
    deepspeed(
        "a misspelt key that DeepSpeed would pass over",
        ('gradient_acumulation_steps: unknown key; did you mean "gradient_accumulation_steps"?',),
        gradient_acumulation_steps=4,
    ),
    deepspeed(
        "a ZeRO section that is a list", ("zero_optimization is [3]", "must be an object"), zero_optimization=[3]
    ),
    deepspeed("a section that is a string", ('hd_pissa is "r=16"', "must be an object"), hd_pissa="r=16"),
    deepspeed("a negative clipping", ("gradient_clipping is -1", "at least 0"), gradient_clipping=-1),
    deepspeed("a batch of text", ('is "2"', "must be an integer"), train_micro_batch_size_per_gpu="2"),
    deepspeed("fp8", ("fp8.enabled is true", "use bf16"), fp8={"enabled": True}),
    deepspeed("pieces of a sequence", ("sequence_parallel_size is 2", "must be 1"), sequence_parallel_size=2),
    zero("a stage in words", ('stage is "three"', "must be 3", "set it"), stage="three"),
    zero("a negative bucket", ("stage3_prefetch_bucket_size", "see DeepSpeed's keys"), stage3_prefetch_bucket_size=-1),
    zero("offload to a disk", ('"nvme"', 'must be "cpu"'), offload_param={"device": "nvme"}),
    zero("offload to nowhere", ("offload_param.device", "see DeepSpeed's keys"), offload_param={"device": "moon"}),
]
SECTION = [
    section("a huge rank", (f"1 slice of rank {HUGE}", "use a smaller hd_pissa.r"), r=HUGE),
    section("slices that are a float", ("hd_pissa.slices is 2.0", "must be an integer"), slices=2.0),
    section("negative slices", ("hd_pissa.slices is -1", "at least 1"), slices=-1),
    section("no targets at all", ("target_modules is []", "non-empty list"), target_modules=[]),
    section("an empty name among the targets", ("target_modules is", "non-empty list"), target_modules=["q_proj", ""]),
    section("a whole layer excluded", ('"mlp" matches', "no weight of its own", "down_proj"), exclude_modules=["mlp"]),
    section("a rank of 0 for a module", ("rank_pattern.q_proj is 0", "at least 1"), rank_pattern={"q_proj": 0}),
    section("betas that do not decay", ("adam.betas.0 is 1", "less than 1"), adam={"betas": [1, 0.999]}),
    section("an epsilon of 0", ("adam.eps is 0", "greater than 0"), adam={"eps": 0}),
    section("a tolerance in words", ('init.tol is "small"', "must be a number"), init={"tol": "small"}),
    section("a cache without a name", ("init.cache_dir", "must not be empty"), init={"cache_dir": ""}),
    section("weight decay for slices", ("adam.weight_decay: unknown key",), adam={"weight_decay": 0.1}),
    section("a bucket of 0 bytes", ("delta.bucket_bytes is 0", "at least 1"), delta={"bucket_bytes": 0}),
    section("an unknown master", ('master.device is "disk"', '"auto", "cpu"'), master={"device": "disk"}),
]
FLAGS = [
    argument("learning rate not a number", ("--learning_rate is nan", "must not be negative"), learning_rate="nan"),
    argument("epochs without end", ("--num_train_epochs inf", "positive"), max_steps=-1, num_train_epochs="inf"),
    argument("epochs beyond counting", ("--num_train_epochs is 1e+308",), max_steps=-1, num_train_epochs=1e308),
    argument("a huge seed", (f"--seed is {HUGE}", "at most"), seed=HUGE),
    argument("a huge length", (f"--max_length is {HUGE}", "at most"), max_length=HUGE),
    argument("no option's value", ("--config has no value", "see --help"), config="--bf16"),
    argument("an output folder without a name", ("missing --output_dir",), output_dir=""),
    argument("negative evaluation steps", ("--eval_steps is -1", "must not be negative"), eval_steps=-1),
    argument("no logging", ("--logging_steps is 0", "at least 1"), logging_steps=0),
    argument("no checkpoints to keep", ("--save_total_limit is 0", "at least 1"), save_total_limit=0),
    argument(
        "a hang longer than the time-out", ("--hang_timeout is 60", "--ddp_timeout"), hang_timeout=60, ddp_timeout=9
    ),
    argument("half a split", ("train[:", "check its name, split"), dataset_split="train[:"),
    argument("a split of nothing", ("corresponds to no data", "check its name, split"), dataset_split="train[:0]"),
    argument("an unknown checkpoint kind", ("--checkpoint_kind is tiny", "full, small"), checkpoint_kind="tiny"),
    argument("a model's name too long", ("--model_name_or_path xxx", "give a shorter"), model_name_or_path="x" * 300),
    argument("a folder's name too long", ("--output_dir /", "at most 255 bytes"), output_dir="DIR/none/" + "x" * 300),
    argument("a checkpoint's name too long", ("--resume_from_checkpoint x",), resume_from_checkpoint="x" * 300),
    argument("a logging folder's name too long", ("--logging_dir a/a/", "4095 in all"), logging_dir="a/" * 3000),
    argument("a date where a number belongs", ("rank_pattern is {'q_proj': ", "must be"), config="DIR/date.yaml"),
    argument("a YAML key twice", ("twice_key.yaml", '"seed" stands twice'), config="DIR/twice_key.yaml"),
    argument("null for a name", ("dataset_name is None, must be a text",), config="DIR/null.yaml", dataset_name=None),
    argument(
        "a list where a number belongs",
        ("max_steps is [1, 2], must be a whole number",),
        config="DIR/many.yaml",
        max_steps=None,
    ),
    argument("a YAML file in Latin-1", ("latin.yaml", "not UTF-8 text"), config="DIR/latin.yaml"),
    argument("a folder for the YAML", ("DIR/bare", "Is a directory"), config="DIR/bare"),
]
CASES = [*MODEL, *FAMILIES, *JSON_FILES, *SECTION, *FLAGS]
# By the real command: one that needs no library, one that needs torch, one that needs the model built.
BY_COMMAND = ["a YAML key twice", "GPTQ", "an encoder"]


# --- the files that are wrong ----------------------------------------------------------------------


def make_wrong_files(folder: Path) -> None:
    """Everything that a case calls "DIR/…"."""
    texts = {
        "notes.txt": "Nothing to see here.\n",
        "bare/readme.md": "",
        "nan.json": '{"zero_optimization": {"stage": 3}, "gradient_clipping": NaN}',
        "blank.json": "",
        "three.json": "3",
        "deep.json": "[" * 100_000,
        "fsdp.yaml": "distributed_type: FSDP\nfsdp_config: {}\n",
        "split.yaml": "deepspeed_config: {zero_stage: 3}\nparallelism_config: {parallelism_config_cp_size: 2}\n",
        "object.yaml": "deepspeed_config: !!python/object:os.system {}\n",
        "twice_key.yaml": "seed: 1\nlearning_rate: 1e-4\nseed: 2\n",
        "null.yaml": "dataset_name: null\n",
        "many.yaml": "max_steps: [1, 2]\n",
        "date.yaml": "rank_pattern: {q_proj: 2024-01-01}\n",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "utf16.json").write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-16")
    (folder / "latin.yaml").write_bytes("prompt_template: Größe {instruction}\n".encode("latin-1"))
    _make_wrong_models(folder)


def _make_wrong_models(folder: Path) -> None:
    for name in ("mixtral", "phi3", "gemma2"):
        make_family(name).save_pretrained(folder / name)
    make_family("llama").save_pretrained(folder / "lost_shard", max_shard_size="20KB")
    (folder / "lost_shard").joinpath("model-00002-of-00002.safetensors").unlink()
    model = make_family("llama")
    for name in ("adapter", "weightless", "gguf", "cut", "lfs", "index", "away", "bad_tokenizer", "small"):
        shutil.copytree(folder / "model", folder / name)
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in ("weightless", "gguf", "index", "away"):
        (folder / name / "model.safetensors").unlink()
    (folder / "gguf" / "m.gguf").write_bytes(b"GGUF")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "lfs" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    (folder / "index" / "model.safetensors.index.json").write_text('{"weight_map": [')
    (folder / "away" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    (folder / "bad_tokenizer" / "tokenizer.json").write_text('{"model": {}}')
    model.save_pretrained(folder / "small")  # 61 embeddings, the tokenizer of 320
    right = json.loads((folder / "model" / "config.json").read_text())
    changes = {
        "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "bnb": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
        "classifier": {"architectures": ["LlamaForSequenceClassification"]},
        "nosuch": {"model_type": "nosuch"},
        "word": {"hidden_size": "large"},
        "zero": {"num_attention_heads": 0},
        "heads": {"num_attention_heads": 3},
        "remote": {"model_type": "mine", "auto_map": {"AutoConfig": "code.MyConfig"}},
    }
    for name, change in changes.items():
        shutil.copytree(folder / "model", folder / name)
        (folder / name / "config.json").write_text(json.dumps(right | change))
    for name, content in {"typeless": {}, "list": [], "bert": {"model_type": "bert", "num_hidden_layers": 1}}.items():
        shutil.copytree(folder / "model", folder / name)
        (folder / name / "config.json").write_text(json.dumps(content))


def collect_here(folder: Path) -> dict[str, dict[str, Any]]:
    """All cases of this file, run; the files are made first."""
    inputs = make_inputs(folder, train=16, evaluate=4)
    make_wrong_files(folder)
    return collect(CASES, folder, inputs)


# --- tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("refused") / "inputs"


@pytest.fixture(scope="module")
def results(folder):
    return collect_here(folder)


def test_sixty_mistakes_and_more():
    """What test_damaged_checkpoints.py, test_export_command.py and test_plan_command.py refuse is not counted."""
    mistakes = [case.mistake for case in (*test_bad_input.CASES, *CASES)]
    assert len(set(mistakes)) == len(mistakes) >= 150


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.mistake)
def test_one_line_and_exit_code_2(results, case):
    assert_told(case, results[case.mistake])


def test_by_the_real_command(results, folder, tmp_path):
    """A user's own command line: exit code 2, one line on standard error, no traceback, nothing written."""
    assert results  # the files are there
    inputs = {"ds_config": folder / "ds.json", "dataset_name": folder / "train.jsonl"}
    inputs |= {"model_name_or_path": folder / "model", "output_dir": tmp_path / "out"}
    running = {}
    for mistake in BY_COMMAND:
        case = next(case for case in CASES if case.mistake == mistake)
        arguments = {k: str(v).replace("DIR", str(folder)) for k, v in (inputs | case.arguments).items()}
        log = tmp_path / mistake
        running[mistake] = (start(command("python", arguments), tmp_path / "cache", log), log, case)
    for process, log, case in running.values():
        assert finish(process) == 2, log.read_text()
        (said,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        assert [word for word in case.words if word not in said] == [], said
        assert "Traceback" not in log.read_text()
    assert not (tmp_path / "out").exists()


def test_a_bom_is_no_mistake(tmp_path):
    """Windows' editors write one; YAML and JSON are read all the same."""
    from hdpissa.engine.config import read_ds_config
    from hdpissa.launch.train_arguments import parse

    path = write_ds_config(tmp_path / "ds.json")
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_ds_config(path)["hd_pissa"] == {"r": 4}
    (tmp_path / "run.yaml").write_text("seed: 5\nprompt_template: 'Größe {instruction}'\n", encoding="utf-8-sig")
    required = {"ds_config": path, "model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    args, _ = parse(flags({"config": tmp_path / "run.yaml", **required}))
    assert (args.seed, args.prompt_template) == (5, "Größe {instruction}")


def main() -> None:
    """Prints the table of this file's cases and of those of test_bad_input.py."""
    with tempfile.TemporaryDirectory() as scratch:
        modules = (test_bad_input, sys.modules[__name__])
        results = [module.collect_here(Path(scratch) / module.__name__) for module in modules]
    print_table([*test_bad_input.CASES, *CASES], results[0] | results[1])


if __name__ == "__main__":
    sys.exit(main())
