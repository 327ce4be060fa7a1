"""launch/export.py: from a checkpoint's files and the base's, the same bits as the running engine exports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from engine_runs import flip_byte
from peft_runs import train_and_save
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import ds_settings, tiny_batch, tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hdpissa.engine.distributed import faults
from hdpissa.engine.export import from_checkpoint, hf_folder, lora_format, writer
from hdpissa.engine.files import disk
from hdpissa.launch import export
from hdpissa.launch.common import command_line

EXPORTS = [
    ("hf-fp32", {"format": "hf", "dtype": "fp32"}),
    ("hf-bf16", {"format": "hf", "dtype": "bf16"}),
    ("peft", {"format": "peft"}),
]


def write_base(folder: Path) -> str:
    from tokenizers import Tokenizer, models

    tiny_llama(tie=True).save_pretrained(folder, max_shard_size="8KB")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Runs on 2 ranks with 4 slices, fp32 and bf16 compute: checkpoints of both kinds, and the engine's own exports."""
    folder = tmp_path_factory.mktemp("saved")
    base = write_base(folder / "base")
    runs = {}
    for name in ("fp32", "bf16"):
        settings = ds_settings(bf16=name == "bf16", slices=4, accumulation=2, delta={"second_order": False})
        run = run_ranks(2, train_and_save, settings, base, str(folder / name), exports=EXPORTS)[0]
        runs[name] = {**run, "folder": folder / name, "base": base}
    return runs


def run_export(checkpoint, output, *arguments):
    """Exit code of the command, in this process."""
    return command_line.exit_code(
        export.main, ["--checkpoint", str(checkpoint), "--output_dir", str(output), *map(str, arguments)]
    )


def whole_folder(folder):
    """All tensors of an export's files."""
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}


def logits_of(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(**tiny_batch(999, 0, 0)).logits.float()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("run", ["fp32", "bf16"])
def test_a_full_checkpoint_gives_what_the_engine_exports(tmp_path, saved, run, dtype, monkeypatch):
    """Bit for bit, in one file or several; what was not trained is the base's."""
    if dtype == "fp32":
        monkeypatch.setattr(hf_folder, "MAX_FILE_BYTES", 6_000)
    checkpoint = saved[run]["folder"] / "full" / "checkpoint-4"
    assert run_export(checkpoint, tmp_path, "--format", "hf", "--dtype", dtype) == 0
    theirs, ours = whole_folder(saved[run]["folder"] / f"hf-{dtype}"), whole_folder(tmp_path)
    assert theirs.keys() == ours.keys()
    trained = saved[run]["weights"].keys()
    for name, values in theirs.items():
        # a run under bf16 compute has rounded what it does not train; the base's files have not
        rounded = run == "bf16" and name not in trained
        assert torch.equal(ours[name].bfloat16().to(values.dtype) if rounded else ours[name], values), name
    assert (tmp_path / "tokenizer.json").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    if run == dtype == "fp32":
        assert torch.allclose(logits_of(tmp_path), saved[run]["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", ["fp32", "bf16"])
def test_a_small_checkpoint_gives_the_weights_to_rounding(tmp_path, saved, run, monkeypatch):
    """W_0 and the sums, without the second-order term; blocks that begin and end within rows."""
    monkeypatch.setattr(writer, "PIECE_BYTES", 300)
    monkeypatch.setattr(from_checkpoint, "BLOCK_ELEMENTS", 50)
    folder = saved[run]["folder"] / "small"  # the run's folder: its latest checkpoint
    assert run_export(folder, tmp_path, "--format", "hf", "--dtype", "fp32") == 0
    found, start = whole_folder(tmp_path), whole_folder(saved[run]["base"])
    for name, W in saved[run]["weights"].items():
        assert (found[name] - W).norm() <= 1e-6 * (W - start[name]).norm()


@pytest.mark.parametrize("kind", ["full", "small"])
def test_an_adapter_from_either_kind_is_the_engines(tmp_path, saved, kind, capsys):
    """Bit for bit; the full kind measures the same residual, the small one says that it cannot."""
    run = saved["fp32"]
    assert run_export(run["folder"] / kind / "checkpoint-4", tmp_path, "--format", "peft") == 0
    said = capsys.readouterr().out
    theirs, ours = (load_file(f / lora_format.WEIGHTS) for f in (run["folder"] / "peft", tmp_path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    reports = [json.loads((f / "hdpissa_export.json").read_text()) for f in (run["folder"] / "peft", tmp_path)]
    assert [report["step"] for report in reports] == [4, 4]
    assert (tmp_path / "tokenizer.json").exists()
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "config.json").exists()  # of the model: transformers would take the folder for one
    configs = [json.loads((f / lora_format.CONFIG).read_text()) for f in (run["folder"] / "peft", tmp_path)]
    assert configs[0] == configs[1]
    report = json.loads((tmp_path / writer.REPORT).read_text())
    if kind == "full":
        expected = run["reports"]["peft"].residual
        assert report["residual"]["overall"] == pytest.approx(expected.overall, rel=1e-3)
        assert report["residual"]["overall"] <= 1e-6
        assert f"residual {report['residual']['overall']:.1e}" in said
    else:
        assert report["residual"] is None
        assert "residual unknown: a small checkpoint" in said


def test_a_cut_adapter_in_bf16(tmp_path, saved):
    checkpoint = saved["fp32"]["folder"] / "full"
    assert run_export(checkpoint, tmp_path, "--format", "peft", "--rank", 5, "--dtype", "bf16") == 0
    weights = load_file(tmp_path / lora_format.WEIGHTS)
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert {min(t.shape) for t in weights.values()} == {5}
    report = json.loads((tmp_path / writer.REPORT).read_text())
    assert 0 < report["truncation"] <= report["residual"]["overall"] < 1


def test_nothing_but_an_export_is_replaced(tmp_path, saved, capsys):
    """Neither the base nor the checkpoint, without which the run is lost, nor somebody's model; an export is."""
    run = saved["fp32"]
    checkpoint = run["folder"] / "full" / "checkpoint-4"
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"theirs")
    for folder, said in ((run["base"], "is the base itself"), (checkpoint, "itself"), (tmp_path, "no export wrote")):
        before = whole_folder(run["base"])
        assert run_export(checkpoint, folder) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1
        assert f"--output_dir {folder}" in told[0]
        assert said in told[0]
        assert all(torch.equal(before[name], value) for name, value in whole_folder(run["base"]).items())
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model-00001-of-00002.bin"]
    assert run_export(run["folder"] / "full", run["folder"] / "small" / "checkpoint-4") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_neither_deepspeed_nor_transformers_is_imported(tmp_path, saved):
    """They would cost more memory than the export; and no process group, so no launcher."""
    script = Path(export.__file__)
    code = f"""
import runpy, sys
sys.argv = [{str(script)!r}, "--checkpoint", {str(saved["fp32"]["folder"] / "full")!r}, "--format", "hf",
            "--output_dir", {str(tmp_path)!r}]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
assert "deepspeed" not in sys.modules and "transformers" not in sys.modules and "peft" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "hf export in fp32" in done.stdout


# --- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path, saved):
    """A checkpoint of each kind, and a base, to be spoilt."""
    run = saved["fp32"]
    for kind in ("full", "small"):
        shutil.copytree(run["folder"] / kind / "checkpoint-4", tmp_path / kind)
    shutil.copytree(run["base"], tmp_path / "base")
    return tmp_path


def refused(capsys, copy, *arguments, kind="full", format="hf", words):
    """One line that says so, exit code 2, and not even an empty folder."""
    capsys.readouterr()
    code = run_export(copy / kind, copy / "out", "--format", format, *arguments)
    said = capsys.readouterr()
    assert code == 2, said
    assert len(said.err.splitlines()) == 1, said.err
    for word in words:
        assert word in said.err
    assert not (copy / "out").exists()


@pytest.mark.parametrize("name", ["weights-00001-of-00002", "slice-00003", "factors-00000", "rng-00000"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damaged_checkpoints(copy, capsys, name, how):
    path = copy / "full" / f"{name}.safetensors"
    if how == "flipped":
        flip_byte(path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.unlink()
    refused(capsys, copy, words=[path.name, "give another checkpoint"])


CHAT = {"template": "{{ 'of the run' }}", "chat_template": "{{ 'of the run' }}", "stop_token_ids": [7]}
PLAIN = {"template": "{instruction}", "chat_template": None, "stop_token_ids": None}


@pytest.mark.parametrize("format", ["hf", "peft"])
@pytest.mark.parametrize(("state", "whose"), [(CHAT, "run"), (PLAIN, "base"), ({}, "base")])
def test_the_tokenizer_has_the_template_that_was_trained_with(copy, monkeypatch, format, state, whose):
    """Where the base has one, too."""
    (copy / "base" / "chat_template.jinja").write_text("{{ 'of the base' }}")
    open_checkpoint = export.open_checkpoint

    def opened(path):
        reader = open_checkpoint(path)
        reader.manifest.client_state.update(state)
        return reader

    monkeypatch.setattr(export, "open_checkpoint", opened)
    words = ("--format", format, "--base_model", copy / "base")
    assert run_export(copy / "full", copy / "out", *words) == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(copy / "out")
    assert tokenizer.chat_template == f"{{{{ 'of the {whose}' }}}}"
    if format == "hf":
        ends = json.loads((copy / "out" / "generation_config.json").read_text()).get("eos_token_id")
        assert ends == ([2, 7] if state is CHAT else 2)  # the base's, and the end of a turn
    assert ("apply_chat_template" in (copy / "out" / "README.md").read_text()) is (state is CHAT)


@pytest.mark.parametrize("format", ["hf", "peft"])
@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_foreign_base(copy, capsys, tensor, format):
    """One number differs: told from the checksums that the checkpoint has, by the first kind that reads the tensor."""
    index = json.loads((copy / "base" / hf_folder.INDEX).read_text())["weight_map"]
    path = copy / "base" / index[tensor]
    tensors = load_file(path)
    tensors[tensor].view(-1)[3] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    base = ("--base_model", copy / "base")
    if format == "peft" and "norm" in tensor:  # an adapter has nothing to do with it
        assert run_export(copy / "full", copy / "out", "--format", "peft", *base) == 0
        return
    kind = "full" if format == "peft" else "small"
    refused(capsys, copy, *base, kind=kind, format=format, words=[tensor])


def test_a_base_of_other_shapes(copy, capsys):
    tiny_llama(hidden=24).save_pretrained(copy / "other")
    refused(capsys, copy, "--base_model", copy / "other", words=["20 x 20"])


@pytest.mark.parametrize("how", ["escaping index", "index that is none", "truncated", "empty folder", "no folder"])
def test_bases_that_cannot_be_read(copy, capsys, how):
    base = copy / "base"
    index = base / hf_folder.INDEX
    words = ["base"]
    if how == "escaping index":
        content = json.loads(index.read_text())
        content["weight_map"]["model.norm.weight"] = "../full/slice-00000.safetensors"
        index.write_text(json.dumps(content))
        words = ["must be a file beside it"]
    elif how == "index that is none":
        index.write_text("[]")
        words = ["weight_map"]
    elif how == "truncated":
        path = next(base.glob("model-00001-*"))
        path.write_bytes(path.read_bytes()[:-4])
        words = [path.name, "safetensors"]
    else:
        shutil.rmtree(base)
        if how == "empty folder":
            base.mkdir()
        words = [str(base)]
    refused(capsys, copy, "--base_model", base, words=words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "gguf"], ["gguf", "--help"]),
        (["--format", "hf", "--rank", "4"], ["--rank is 4", "only an adapter"]),
        (["--format", "peft", "--rank", "0"], ["--rank is 0", "at least 1"]),
        (["--format", "peft", "--rank", "4000"], ["4000", "16"]),
        (["--format", "hf", "--dtype", "fp16"], ["fp16"]),
        (["--checkpoint", "x" * 300], ["--checkpoint xxx", "give a shorter one"]),
        (["--output_dir", "x" * 300], ["--output_dir xxx", "the name is too long"]),
        (["--base_model", "x" * 300], ["--base_model xxx", "the name is too long"]),
        (["--format", "hf", "--checkpoint", "/nowhere"], ["--checkpoint /nowhere"]),
    ],
)
def test_arguments(copy, capsys, arguments, words):
    assert run_export(copy / "full", copy / "out", *arguments) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert all(word in said for word in words)
    assert not (copy / "out").exists()


def test_an_export_among_the_files_of_a_run(copy, capsys):
    """Others would take the run's folder for a model then."""
    (copy / "run.json").touch()
    assert run_export(copy / "full", copy) == 2
    assert f"--output_dir {copy}" in capsys.readouterr().err


def test_a_run_that_kept_no_checkpoint(tmp_path, capsys):
    """Its own export is named, if there is one."""
    (tmp_path / "run.json").touch()
    for found in (False, True):
        assert run_export(tmp_path, tmp_path / "out") == 2
        assert (f"{tmp_path}/model/" in capsys.readouterr().err) is found
        (tmp_path / "model").mkdir(exist_ok=True)


def test_an_export_replaces_one_of_the_other_format(copy):
    """Weights beside an adapter's configuration would be loaded as its base."""
    weights = {"hf": {hf_folder.SINGLE}, "peft": {lora_format.CONFIG, lora_format.WEIGHTS}}
    for format, other in (("hf", "peft"), ("peft", "hf"), ("hf", "peft")):
        assert run_export(copy / "full", copy / "kept", "--format", format) == 0
        names = {path.name for path in (copy / "kept").iterdir()}
        assert names >= weights[format]
        assert not names & weights[other]


def test_a_full_disk_leaves_the_earlier_export(copy, capsys, monkeypatch):
    assert run_export(copy / "full", copy / "kept", "--format", "hf") == 0
    before = {p.name: p.read_bytes() for p in (copy / "kept").iterdir()}
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 100)
    assert run_export(copy / "full", copy / "kept", "--format", "hf") == 2
    assert "GB are free" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (copy / "kept").iterdir()} == before


@pytest.mark.parametrize("nth", range(1, 100, 9))
def test_a_failure_between_two_renames_is_taken_back(copy, capsys, monkeypatch, nth):
    """The earlier export, several files with an index, is there as it was, whichever rename fails."""
    assert run_export(copy / "full", copy / "kept", "--format", "hf") == 0
    monkeypatch.setattr(hf_folder, "MAX_FILE_BYTES", 6_000)
    assert run_export(copy / "full", copy / "kept", "--format", "hf", "--dtype", "bf16") == 0
    before = {p.name: p.read_bytes() for p in (copy / "kept").iterdir()}
    monkeypatch.setattr(faults, "_passages", Counter())
    monkeypatch.setattr(faults, "_fault", faults.Fault("export.publish.before_rename", None, None, "EIO", nth))
    monkeypatch.setattr(hf_folder, "MAX_FILE_BYTES", 4_000)
    code = run_export(copy / "full", copy / "kept", "--format", "hf")
    after = {p.name: p.read_bytes() for p in (copy / "kept").iterdir()}
    if code:
        assert "Input/output error" in capsys.readouterr().err
        assert after == before
    else:
        assert nth > len(before)
        assert hf_folder.INDEX in after
        assert not [name for name in after if name.startswith(".")]


def test_a_kill_between_two_renames_never_leaves_a_mix(copy, saved, monkeypatch):
    """Stopped after any number of renames, with nothing taken back: a whole export, or none that loads."""

    def weights(folder):
        return {p.name: p.read_bytes() for p in folder.glob("*.safetensors*")}

    first, second = copy / "first", copy / "second"
    monkeypatch.setattr(hf_folder, "MAX_FILE_BYTES", 6_000)
    for folder, dtype in ((first, "bf16"), (second, "fp32")):
        assert run_export(copy / "full", folder, "--format", "hf", "--dtype", dtype) == 0
    seen, moves = [], []

    rename = disk.rename

    def record(source, target, point="save"):
        moves.append((source, target)) if point == "export.publish" else rename(source, target, point)

    shutil.copytree(first, copy / "kept")
    monkeypatch.setattr(disk, "rename", record)
    monkeypatch.setattr(Path, "rmdir", lambda self: None)
    assert run_export(copy / "full", copy / "kept", "--format", "hf", "--dtype", "fp32") == 0
    (copy / "kept" / writer.REPLACED).mkdir()  # the export has cleaned it up
    for source, target in [(None, None), *moves]:
        if source:
            source.rename(target)
        loadable = (copy / "kept" / hf_folder.INDEX).exists()
        whole = [loadable and weights(copy / "kept") == weights(folder) for folder in (first, second)]
        seen.append("old" if whole[0] else "new" if whole[1] else "none")
        assert seen[-1] != "none" or not loadable
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert "none" in seen
