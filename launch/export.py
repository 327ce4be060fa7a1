"""Makes a Hugging Face folder or a PEFT adapter out of a checkpoint: one process, no GPU, bounded memory.

    python launch/export.py --checkpoint outputs/run1/checkpoint-500 --format hf --output_dir model
    python launch/export.py --checkpoint outputs/run1 --format peft --output_dir adapter [--rank 64] [--dtype bf16]

Tensors are streamed, a piece of a few ten MB at a time, whatever the size of the model. Weights that were not trained
come from the base model's safetensors files; the checkpoint's checksums prove that it is the right one. A model card is
written beside them. No code of a model is run and no pickle is read.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from hdpissa.engine.errors import ConfigError, one_line
from hdpissa.launch.common import command_line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises ConfigError for what does not fit together."""
    parser = command_line.PlainParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint-N folder, or a run's folder: its latest one")
    formats = "hf: a Hugging Face folder (default); peft: a LoRA adapter"
    add("--format", default="hf", choices=("hf", "peft"), help=formats)
    add("--output_dir", required=True, help="folder to write; an earlier export in it is replaced")
    dtypes = "auto: the run's compute dtype; peft: fp32"
    add("--dtype", default="auto", choices=("auto", "bf16", "fp32"), help=dtypes)
    add("--rank", type=int, help="cuts an adapter to this rank; default all of it, 2·r·S")
    add("--base_model", help="folder or hub name of the base; default the checkpoint's")
    args = parser.parse_args(argv)
    command_line.check_paths(args, "checkpoint", "output_dir", "base_model")
    if args.rank is not None and args.format != "peft":
        raise ConfigError(
            f"--rank is {args.rank} with --format {args.format}: only an adapter has a rank; leave it out"
        )
    if args.rank is not None and args.rank < 1:
        raise ConfigError(f"--rank is {args.rank}: must be at least 1; leave it out for the whole adapter")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ConfigError(f"--output_dir {args.output_dir}: is a file; give a folder")
    if (Path(args.output_dir) / "run.json").exists():
        raise ConfigError(
            f"--output_dir {args.output_dir}: is a run's own; give a folder of its own, as {args.output_dir}/best"
        )
    return args


def open_checkpoint(path: str) -> Any:
    """Reader of a checkpoint, or of the latest one in a folder of several, every file compared with its SHA-256.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    from hdpissa.engine.checkpoint import directory
    from hdpissa.engine.checkpoint.manifest import MANIFEST
    from hdpissa.engine.checkpoint.reader import CheckpointReader

    folder = Path(path)
    found = [folder] if (folder / MANIFEST).is_file() else directory.candidates(folder) if folder.is_dir() else []
    if not found:
        exports = [f"{folder / name}/" for name in ("model", "adapter") if (folder / name).is_dir()]
        own = f", only its own export ({' and '.join(exports)})" if exports else ""
        raise ConfigError(
            f"--checkpoint {path}: holds no checkpoint{own}; give a folder checkpoint-N, or its parent, of a run with "
            f"--save_steps"
        )
    reader = CheckpointReader(found[0])
    reader.check()
    return reader


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)

    from hdpissa.engine.export.from_checkpoint import export_checkpoint
    from hdpissa.engine.sharding.base_files import local_folder
    from hdpissa.launch.exporting import model_card
    from hdpissa.launch.exporting.prompt_files import write_prompt_files
    from hdpissa.launch.training.model_checks import check_export

    reader = open_checkpoint(args.checkpoint)
    folder, base = Path(args.output_dir), local_folder(args.base_model or reader.manifest.base.name_or_path)
    check_export(folder, f"--output_dir {folder}", checkpoint=reader.folder, base=base)
    options = {name: getattr(args, name) for name in ("format", "dtype", "rank", "base_model")}
    finish = functools.partial(write_prompt_files, reader.manifest.client_state, format=args.format)
    report = export_checkpoint(reader, folder, **options, finish=finish)
    print(report)
    try:
        model_card.write_card(folder, model_card.from_checkpoint(reader, args.base_model), report.as_dict())
    except Exception as error:  # the export is complete
        print(f"warning: no model card: {one_line(error)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
