"""Files on this machine that hold rows: which of a folder's a split has, and how `datasets` has to be asked for them.

Own file because all of it is about names and columns of files; where else rows come from is data_sources.py.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesDict, get_data_patterns

from .errors import ConfigError

READERS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"
}  # fmt: skip
ZIPPED = (".jsonl", ".json", ".csv", ".tsv")  # those that may have .gz behind
OTHERS = (
    ".txt", ".xlsx", ".xls", ".gz", ".zip", ".zst", ".bz2", ".xz", ".tar", ".tgz", ".7z", ".feather", ".orc", ".pkl",
    ".ndjson", ".yaml", ".yml", ".xml", ".md",
)  # fmt: skip
PART = re.compile(r"\s*(?P<name>\w[\w.-]*)(?P<slice>\[.*\])?[^+]*")  # of "train[:50%]+test"
DECLARED = re.compile(r"^(configs|dataset_info):", re.MULTILINE)


def suffix_of(name: str | Path) -> str:
    """ ".jsonl" of a.jsonl, ".jsonl.gz" of a.jsonl.gz, ".gz" of a.gz."""
    path = Path(name)
    before = Path(path.stem).suffix
    return before + path.suffix if path.suffix == ".gz" and before in ZIPPED else path.suffix


def reader_of(path: Path) -> str | None:
    """Which of the readers of `datasets` reads such a file; None: none of them does."""
    return READERS.get(suffix_of(path).removesuffix(".gz")) if path.suffix else None


def suffixes() -> str:
    return f"{', '.join(READERS)} ({', '.join(suffix + '.gz' for suffix in ZIPPED)})"


def is_file_name(name: str) -> bool:
    """Whether a name that has no folder can only have meant a file: the hub has none that end so."""
    return Path(name).suffix in (*READERS, *OTHERS)


def split_parts(split: str) -> list[tuple[str, str | None]]:
    """Of "train[:50%]+test" the splits' names, and the part that is meant of each; None: all of it."""
    found = [PART.match(part) for part in split.split("+")]
    return [(part["name"], part["slice"]) for part in found if part]


# ---------------------------------------------------------------- for datasets.load_dataset


def ask_for_file(path: Path) -> dict[str, Any]:
    """The arguments that read one file, which is the split "train". Raises ConfigError for one of no known kind."""
    return _ask(check_kind(path), {"train": [path]})


def check_kind(path: Path) -> str:
    """The reader of a file; ConfigError for one of no known kind."""
    reader = reader_of(path)
    if reader is None:
        raise ConfigError(f"dataset file {str(path)!r} is none of {suffixes()}; convert it to one of these")
    return reader


def ask_for_folder(path: Path, split: str, config_name: str | None) -> dict[str, Any]:
    """The arguments that read those files of a folder that a split has: others may have other columns.

    What a folder's own README says of configurations and columns is left to `datasets`.
    """
    if not any(reader_of(child) for child in path.rglob("*")):
        raise ConfigError(f"dataset folder {str(path)!r} holds no {suffixes()} file; put one there")
    if config_name is not None or _is_declared(path):
        return {"path": str(path), "name": config_name}
    base = glob.escape(str(path.absolute()))
    patterns = get_data_patterns(base)
    found = {str(name): files for name, files in DataFilesDict.from_patterns(patterns, base_path=base).items()}
    wanted = [name for name, _ in split_parts(split)]
    unknown = next((name for name in wanted if name not in found), None)
    if unknown is not None:
        raise ValueError(f"Unknown split {unknown!r}, it has {', '.join(found)}")
    files = {name: [Path(file) for file in found[name] if reader_of(Path(file))] for name in wanted}
    kinds = {reader_of(file): file for each in files.values() for file in each}
    if len(kinds) > 1:
        names = " and ".join(sorted(file.name for file in kinds.values()))
        raise ConfigError(
            f"dataset folder {str(path)!r}, split {split!r}, holds files of more than one kind ({names}); move the "
            f"others away, or name the files themselves"
        )
    if not kinds:
        raise ConfigError(f"dataset folder {str(path)!r}, split {split!r}, holds no {suffixes()} file; put one there")
    return _ask(str(*kinds), files)


def _is_declared(path: Path) -> bool:
    if (path / ".huggingface.yaml").is_file() or (path / "dataset_infos.json").is_file():
        return True
    readme = path / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    return text.startswith("---") and DECLARED.search(text.split("\n---", 1)[0]) is not None


def _ask(reader: str, files: dict[str, list[Path]]) -> dict[str, Any]:
    # escaped, because `datasets` takes a file's name for a pattern, and reads what that matches
    named = {name: [glob.escape(str(file.absolute())) for file in each] for name, each in files.items()}
    asked: dict[str, Any] = {"path": reader, "data_files": named}
    if reader == "csv":
        asked |= _as_text([file for each in files.values() for file in each])
    return asked


def _as_text(files: Sequence[Path]) -> dict[str, Any]:
    """Reads all cells of CSV files as the texts that they are: 007, 1.50 and None are answers. An empty one is None."""
    separators = {"\t" if suffix_of(file).startswith(".tsv") else "," for file in files}
    if len(separators) > 1:
        raise ConfigError(f"{files[0].name} and others: .csv and .tsv files cannot be one split; name the files")
    options = {"sep": separators.pop(), "keep_default_na": False, "na_values": [""]}
    columns = [_columns(file, options) for file in files]
    for file, found in zip(files, columns, strict=True):
        if set(found) != set(columns[0]):
            raise ConfigError(
                f"dataset file {str(file)!r} has the columns {', '.join(found)}, and {files[0].name} beside it has "
                f"{', '.join(columns[0])}; give files of a split the same ones, or name the files themselves"
            )
    return options | {"features": datasets.Features(dict.fromkeys(columns[0], datasets.Value("string")))}


def _columns(file: Path, options: dict[str, Any]) -> list[str]:
    import pandas

    table = pandas.read_csv(file, nrows=1, dtype=object, **options)
    if not isinstance(table.index, pandas.RangeIndex):
        raise ConfigError(
            f"dataset file {str(file)!r} has more cells in its first row than in its header; put cells with commas "
            f"in quotes"
        )
    return [str(name) for name in table.columns]
