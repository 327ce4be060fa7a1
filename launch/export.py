"""Makes a Hugging Face folder or a PEFT adapter out of a checkpoint: one process, no GPU, bounded memory.

    python launch/export.py --checkpoint outputs/run1/checkpoint-500 --format hf --output_dir model
    python launch/export.py --checkpoint outputs/run1 --format peft --output_dir adapter [--rank 64] [--dtype bf16]

Tensors are streamed, a piece of a few ten MB at a time, whatever the size of the model. Weights that were not trained
come from the base model's safetensors files; the checkpoint's checksums prove that it is the one. A model card goes
beside them. No code of a model is run, no pickle is read. What a person can get wrong: one line, exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common import command_line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises ConfigError for what does not fit together."""
    parser = command_line.PlainParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint-N folder, or a run's folder: its latest one")
    parser.add_argument(
        "--format",
        default="hf",
        choices=("hf", "peft"),
        help="hf: a Hugging Face folder (default); peft: a LoRA adapter",
    )
    parser.add_argument("--output_dir", required=True, help="folder to write; an earlier export in it is replaced")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bf16", "fp32"), help="auto: the run's compute dtype; peft: fp32"
    )
    parser.add_argument("--rank", type=int, help="cuts an adapter to this rank; default all of it, 2·r·S")
    parser.add_argument("--base_model", help="folder or hub name of the base; default the checkpoint's")
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


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)

    from hdpissa.engine.sharding.base_files import local_folder
    from hdpissa.launch.exporting.card import write_card
    from hdpissa.launch.exporting.checkpoint import export, open_checkpoint
    from hdpissa.launch.exporting.template import lost_template
    from hdpissa.launch.training.model_checks import check_export

    reader = open_checkpoint(args.checkpoint)
    folder, base = Path(args.output_dir), local_folder(args.base_model or reader.manifest.base.name_or_path)
    check_export(folder, f"--output_dir {folder}", checkpoint=reader.folder, base=base)
    report = export(reader, folder, format=args.format, dtype=args.dtype, rank=args.rank, base_model=args.base_model)
    print(report)
    if lost := lost_template(reader.manifest.client_state):
        print(f"warning: {lost}", file=sys.stderr)
    try:
        write_card(reader, folder, report, args.base_model)
    except Exception as error:  # the export is complete
        said = " ".join(str(error).split())[:200]
        print(f"warning: no model card: {type(error).__name__}: {said}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
