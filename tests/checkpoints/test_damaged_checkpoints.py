"""Damaged, forged and foreign checkpoints: none loads, each ends in one line that names the file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_ranks
from save_runs import TARGET, job, read_all, start_alone

from hdpissa.engine.checkpoint import manifest as manifests
from hdpissa.engine.checkpoint.directory import candidates, check_tag, latest
from hdpissa.engine.checkpoint.manifest import CheckpointError, Manifest
from hdpissa.engine.checkpoint.reader import CheckpointReader
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.files.disk import read_record

SEED = 11
CLASSES = {
    "manifest": "checkpoint.json",
    "weights": "weights-00001-of-00002.safetensors",
    "slice": "slice-00000.safetensors",
    "factors": "factors-00001.safetensors",
    "rng": "rng-00001.safetensors",
}


def save_two(root: str) -> None:
    saver = start_alone()
    for step in (1, 2):
        saver.save(job(Path(root), step), background=False)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    run_ranks(1, save_two, str(folder))
    assert read_all(folder / "checkpoint-2") == 2
    return folder


# --- accidents: a file is not what was written -----------------------------------------------------


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.unlink()  # it may be a second name of another checkpoint's file
    path.write_bytes(data)


def cut(share: float) -> Callable[[Path, random.Random], None]:
    def damage(path: Path, rng: random.Random) -> None:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[: min(len(data) - 1, int(share * len(data)))])

    return damage


def lose(path: Path, rng: random.Random) -> None:
    path.unlink()


def another_step(path: Path, rng: random.Random) -> None:
    data = (path.parent.parent / "checkpoint-1" / path.name).read_bytes()
    path.unlink()
    path.write_bytes(data)


def other_rank(path: Path, rng: random.Random) -> None:
    """A neighbour's file of the same class."""
    names = sorted(p.name for p in path.parent.iterdir() if p.name.split("-")[0] == path.name.split("-")[0])
    data = (path.parent / next(n for n in names if n != path.name)).read_bytes()
    path.unlink()
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    **{f"bit {n}": flip for n in range(6)},
    "empty": cut(0),
    "half": cut(0.5),
    "last byte": cut(1),
    "gone": lose,
    "of another step": another_step,
    "of another rank": other_rank,
}
# what is the same in both steps or has no neighbour is no damage
HARMLESS = {("factors", "of another step"), ("manifest", "of another rank")}
CASES = [(c, d) for c in CLASSES for d in DAMAGES if (c, d) not in HARMLESS]


@pytest.mark.parametrize(("kind", "damage"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_what_is_damaged_is_noticed_before_anything_is_read(sound, tmp_path, kind, damage):
    shutil.copytree(sound, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2" / CLASSES[kind]
    DAMAGES[damage](path, random.Random(f"{SEED} {kind} {damage}"))
    with pytest.raises(CheckpointError) as told:
        CheckpointReader(path.parent).check()
    message = str(told.value)
    assert str(path.parent) in message
    assert "\n" not in message
    if not (kind == "manifest" and damage == "of another step"):
        assert CLASSES[kind] in message
    assert read_all(tmp_path / "run" / "checkpoint-1") == 1  # the one before is as it was


# --- forgeries: the manifest agrees with what is there ---------------------------------------------


def sign(folder: Path, name: str | None = None, **changes) -> None:
    """Writes a manifest that fits the files as they are now, with these changes in its content."""
    content = json.loads((folder / manifests.MANIFEST).read_text())["content"]
    if name:
        record = read_record(folder / name)
        content["files"][name] = {"bytes": record.bytes, "sha256": record.sha256}
    content |= changes
    text = {"format": manifests.FORMAT, "sha256": manifests._digest(content), "content": content}
    (folder / manifests.MANIFEST).write_text(json.dumps(text, indent=1) + "\n")


def safetensors_bytes(header: dict, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


WHOLE = TARGET.rows * TARGET.cols // 2
KEY = manifests.range_key(TARGET.name, WHOLE, 2 * WHOLE)
TENSOR = {"dtype": "F32", "shape": [WHOLE], "data_offsets": [0, 4 * WHOLE]}
FORGED_WEIGHTS = {
    "not safetensors": b"PK\x03\x04" + bytes(100),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR." + bytes(100),
    "a header of 2**60 bytes": safetensors_bytes({KEY: TENSOR}, bytes(4 * WHOLE), 2**60),
    "a header longer than the file": safetensors_bytes({KEY: TENSOR}, b"", 10**6),
    "a tensor beyond the file": safetensors_bytes({KEY: TENSOR}, bytes(4)),
    "half precision": safetensors_bytes(
        {KEY: {**TENSOR, "dtype": "F16", "data_offsets": [0, 2 * WHOLE]}}, bytes(2 * WHOLE)
    ),
    "another shape": safetensors_bytes({KEY: {**TENSOR, "shape": [WHOLE // 2, 2]}}, bytes(4 * WHOLE)),
    "another name": safetensors_bytes({"layer.other[0:1]": TENSOR}, bytes(4 * WHOLE)),
    "no tensors": safetensors_bytes({}, b""),
    "an unknown dtype": safetensors_bytes({KEY: {**TENSOR, "dtype": "F31"}}, bytes(4 * WHOLE)),
    "overlapping tensors": safetensors_bytes({KEY: TENSOR, "other": TENSOR}, bytes(4 * WHOLE)),
}


@pytest.mark.parametrize("what", FORGED_WEIGHTS)
def test_a_forged_file_is_refused_when_it_is_read(sound, tmp_path, what):
    folder = shutil.copytree(sound / "checkpoint-2", tmp_path / "checkpoint-2")
    path = folder / CLASSES["weights"]
    path.write_bytes(FORGED_WEIGHTS[what])
    sign(folder, path.name)
    with pytest.raises(CheckpointError) as told:
        read_all(folder)
    assert "\n" not in str(told.value)


def files_with(name: str) -> Callable[[dict], dict]:
    def change(content: dict) -> dict:
        record = content["files"].pop(CLASSES["slice"])
        return {"files": {**content["files"], name: record}}

    return change


FORGED_MANIFESTS: dict[str, Callable[[dict], dict]] = {
    "a path out of the folder": files_with("../../../etc/passwd"),
    "an absolute path": files_with("/etc/passwd"),
    "a file too many": lambda c: {"files": {**c["files"], "extra.safetensors": c["files"][CLASSES["rng"]]}},
    "a file too few": lambda c: {"files": {k: v for k, v in c["files"].items() if k != CLASSES["rng"]}},
    "a checksum that is none": lambda c: {"files": {**c["files"], CLASSES["rng"]: {"bytes": 1, "sha256": "x"}}},
    "a negative size": lambda c: {"files": {**c["files"], CLASSES["rng"]: {"bytes": -1, "sha256": "0" * 64}}},
    "a negative step": lambda c: {"step": -1},
    "a step that is text": lambda c: {"step": "2"},
    "another kind": lambda c: {"kind": "tiny"},
    "no ranks": lambda c: {"world_size": 0},
    "a key too many": lambda c: {"secret": 1},
    "targets that are a number": lambda c: {"targets": 3},
}


@pytest.mark.parametrize("what", FORGED_MANIFESTS)
def test_a_forged_manifest_is_refused(sound, tmp_path, what):
    folder = shutil.copytree(sound / "checkpoint-2", tmp_path / "checkpoint-2")
    content = json.loads((folder / manifests.MANIFEST).read_text())["content"]
    sign(folder, **FORGED_MANIFESTS[what](content))
    with pytest.raises(CheckpointError) as told:
        CheckpointReader(folder)
    assert manifests.MANIFEST in str(told.value)
    assert "\n" not in str(told.value)


TEXTS = {
    "nothing": "",
    "not JSON": "{",
    "a list": "[]",
    "another format": '{"format": 99, "sha256": "", "content": {}}',
    "no content": '{"format": 1, "sha256": "", "content": null}',
    "brackets without end": "[" * 200_000,
    "not UTF-8": b"\xff\xfe\x00",
    "a huge number": '{"format": 1' + "0" * 5000 + "}",
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_manifest_that_is_none_is_refused(tmp_path, what):
    text = TEXTS[what]
    (tmp_path / manifests.MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as told:
        CheckpointReader(tmp_path)
    assert "\n" not in str(told.value)


def test_manifests_survive_their_own_text(sound):
    text = (sound / "checkpoint-2" / manifests.MANIFEST).read_text()
    content = json.loads(text)["content"]
    assert Manifest.model_validate_json(json.dumps(content)).render() == text


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["../x", "a/b", "", ".", "..", ".hidden", "latest", "a\nb", "x" * 300])
def test_a_tag_is_a_plain_name(tag):
    with pytest.raises(ConfigError, match="checkpoint tag"):
        check_tag(tag)


@pytest.mark.parametrize("text", ["../checkpoint-1", "/etc", "", "checkpoint-9", "\xff"])
def test_latest_never_leads_out_of_the_folder(sound, tmp_path, text):
    """What it names is taken only if it is a checkpoint of this folder; else the newest one there is."""
    folder = shutil.copytree(sound, tmp_path / "run")
    (folder / "latest").write_bytes(text.encode("latin-1"))
    assert candidates(folder)[0] == folder / "checkpoint-2"
    assert latest(folder) in (None, "checkpoint-9")
