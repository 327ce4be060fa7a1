"""README.md beside an export: what it says, that the hub can read it, and that its code runs as it stands."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from launch_runs import make_inputs
from report_runs import ARGUMENTS, write_run

from hdpissa.launch.common.metrics import RunFiles
from hdpissa.launch.common.prompts import ALPACA
from hdpissa.launch.exporting import model_card

HF = {"format": "hf", "dtype": "bf16", "step": 12}
PEFT = {"format": "peft", "dtype": "fp32", "step": 12, "r": 64, "residual": {"overall": 4e-4}, "truncation": None}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return RunFiles.read(write_run(tmp_path_factory.mktemp("card") / "run", steps=12, slices=2))


def card(record, folder, report, *, step=12, template=ALPACA, **changes) -> ModelCard:
    """The written card, read back by the hub's own reader."""
    record.run["arguments"] = {**ARGUMENTS, **changes}
    model_card.write_card(folder, model_card.from_record(record, step=step, template=template), report)
    return ModelCard.load(folder / "README.md")


def test_metadata_of_a_model(record, tmp_path):
    assert card(record, tmp_path, HF).data.to_dict() == {
        "base_model": "meta-llama/Llama-2-7b-hf",
        "base_model_relation": "finetune",
        "datasets": ["meta-math/MetaMathQA"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hd-pissa", "hdpissa"],
    }


def test_metadata_of_an_adapter(record, tmp_path):
    data = card(record, tmp_path, PEFT).data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")
    assert "lora" in data["tags"]


def test_what_the_card_says(record, tmp_path):
    text = card(record, tmp_path, PEFT).text
    for words in (
        "2 slices of rank 16, one step changes a weight by a matrix of rank up to 64",
        "| learning_rate | 2e-05 |",
        "| processes | 2 |",
        "| hd_pissa.r | 16 |",
        "| optimizer steps | 12 |",
        "| validation loss before training | 2.9000 |",
        "| validation loss after step 12 | 1.0547 |",
        "| device | 2 × NVIDIA H100 80GB HBM3 |",
        "| rank of the adapter | 64 |",
        "| difference to the trained model, measured | 4.0e-04 of the change of the weights |",
        "hdpissa 0.1.0, torch 2.11",
        "meta-math/MetaMathQA",
    ):
        assert words in text, words
    assert not re.search(r"\n{3}", text)
    assert "{{" not in text


def test_figures_are_those_of_the_step(record, tmp_path):
    """An export from a checkpoint in the middle."""
    text = card(record, tmp_path, {**HF, "step": 6}, step=6).text
    assert "validation loss after step 6" in text
    assert "validation loss after step 12" not in text
    assert "training loss of step" not in text  # of step 6 it is not finite


def test_a_mix_of_data_and_a_local_base(record, tmp_path):
    """Folders and files are not told to the hub."""
    base, data = tmp_path / "base", tmp_path / "own.jsonl"
    base.mkdir()
    data.touch()
    (base / "README.md").write_text("---\nlicense: llama2\nlicense_link: LICENSE.txt\n---\n")
    mix = f"meta-math/MetaMathQA gsm8k {data}"
    found = card(record, tmp_path, HF, model_name_or_path=str(base), dataset_name=mix)
    assert found.data.datasets == ["meta-math/MetaMathQA", "gsm8k"]
    assert found.data.to_dict()["license"] == "llama2"
    assert found.data.to_dict()["license_link"] == "LICENSE.txt"
    assert found.data.base_model is None
    assert "| base model | `base` (a folder on the machine that trained it) |" in found.text
    assert str(tmp_path) not in found.content
    assert "own.jsonl" in found.text


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert model_card.hub_name("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert model_card.hub_name("/data/hub/models--org--some-name/snapshots/0f1e") == "org/some-name"
    for local in ("gpt2", "./x", "/a/b", "~/models/x", "a/b/c", ""):
        assert model_card.hub_name(local) is None, local


def test_an_earlier_card_is_replaced(record, tmp_path):
    (tmp_path / "README.md").write_text("of another run")
    assert "another run" not in card(record, tmp_path, HF).content
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


# --- its code --------------------------------------------------------------------------------------


def code_of(folder: Path) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    return found


def run_code(folder: Path, monkeypatch, capsys) -> dict:
    """The card's code, run in the export's folder; what it has defined."""
    import torch

    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code_of(folder).replace("max_new_tokens=128", "max_new_tokens=4"), "README.md", "exec"), names)
    assert capsys.readouterr().out
    return names


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with its tokenizer."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))["model_name_or_path"]


def copied(base: str, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder / "export"))


def prompt_of(names: dict) -> str:
    """What the model was given."""
    return names["tokenizer"].decode(names["inputs"]["input_ids"][0])


def test_the_code_of_a_model_runs(record, base, tmp_path, monkeypatch, capsys):
    export = copied(base, tmp_path)
    card(record, export, HF)
    names = run_code(export, monkeypatch, capsys)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
    assert prompt_of(names) == ALPACA.replace("{instruction}", model_card.QUESTION)


def test_the_code_of_a_chat_runs(record, base, tmp_path, monkeypatch, capsys):
    """A template without the placeholder is the tokenizer's own chat template."""
    from transformers import AutoTokenizer

    export = copied(base, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(export)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(export)
    card(record, export, HF, template=tokenizer.chat_template)
    assert prompt_of(run_code(export, monkeypatch, capsys)) == f"<user>{model_card.QUESTION}<assistant>"


def test_the_code_of_an_adapter_runs(record, base, tmp_path, monkeypatch, capsys):
    """With the base that it names; without a template."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = tmp_path / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(export)
    AutoTokenizer.from_pretrained(base).save_pretrained(export)
    card(record, export, PEFT, template="{instruction}")
    names = run_code(export, monkeypatch, capsys)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"
    assert prompt_of(names) == model_card.QUESTION


# --- from a checkpoint -----------------------------------------------------------------------------


def card_of_a_checkpoint(tmp_path, **state) -> ModelCard:
    from types import SimpleNamespace

    targets = [SimpleNamespace(name=f"model.layers.{i}.q_proj", r=2) for i in range(2)]
    arguments = {"learning_rate": 1e-4, "prompt_template": "alpaca", "dataset_name": "org/data data/mine"}
    manifest = SimpleNamespace(
        base=SimpleNamespace(name_or_path="org/base"),
        client_state={"arguments": arguments} | state,
        targets=targets,
        slices=4,
        world_size=2,
        step=7,
        versions={"torch": "2.11"},
    )
    reader = SimpleNamespace(manifest=manifest, folder=tmp_path / "run" / "checkpoint-7")
    model_card.write_card(tmp_path, model_card.from_checkpoint(reader), HF)
    return ModelCard.load(tmp_path / "README.md")


def test_a_checkpoint_alone(tmp_path):
    """Without the run's folder around it, launch/export.py says what the checkpoint knows."""
    found = card_of_a_checkpoint(tmp_path, local=["data/mine"], template=ALPACA)
    assert (found.data.base_model, found.data.datasets) == ("org/base", ["org/data"])
    assert "4 slices of rank 2" in found.text
    assert "| optimizer steps | 7 |" in found.text
    assert json.dumps(["q_proj"]) in found.text
    assert "### Response:" in found.text


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"template": "Q: {instruction} A:"}, "Q: "),
        ({"template": "{{ messages }}", "stop_token_ids": [7]}, "apply_chat_template"),
    ],
)
def test_a_checkpoint_s_card_asks_as_the_run_did(tmp_path, state, words):
    found = card_of_a_checkpoint(tmp_path, **state).text
    assert words in found
    assert "### Response:" not in found


def test_paths_of_the_machine_that_trained_are_no_names_on_the_hub(tmp_path):
    """Though they are not there any more, and look like some."""
    found = card_of_a_checkpoint(tmp_path, local=["org/base", "data/mine", "org/data"])
    assert (found.data.base_model, found.data.datasets) == (None, None)


def test_what_changed_on_the_way_is_told(record, tmp_path):
    """The arguments are those that it ended with."""
    went_on = {"step": 4, "changed": ["learning_rate 0.0003 → 1e-05", "max_steps 4 → 5"]}
    text = card_of_a_checkpoint(tmp_path, resumed=[went_on]).text
    assert "| changed after step 4 | learning_rate 0.0003 → 1e-05, max_steps 4 → 5 |" in text
