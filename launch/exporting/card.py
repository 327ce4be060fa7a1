"""The model card of an export from a checkpoint: what the run's folder says, or the checkpoint alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hdpissa.engine.checkpoint.manifest import Manifest
from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common.metrics import RunFiles
from hdpissa.launch.common.prompts import resolve_template
from hdpissa.launch.exporting import model_card
from hdpissa.launch.exporting.template import TEMPLATE, lost_template


def write_card(reader: Any, folder: Path, report: Any, base_model: str | None) -> Path:
    """Writes README.md beside the export.

    Args:
        reader: of the checkpoint. report: of the export. base_model: where the base is now, if it has moved.
    """
    manifest = reader.manifest
    record = RunFiles.read(reader.folder.absolute().parent)
    arguments = _arguments(manifest)
    template = _template(manifest.client_state if arguments else {"arguments": record.arguments}, record.run, folder)
    if record.run:
        trained = model_card.from_record(record, step=manifest.step, template=template)
        if "local" in manifest.client_state:  # what the run had been until then; it may have gone on otherwise
            trained = replace(trained, arguments=arguments, world_size=manifest.world_size, **_kept(manifest))
    else:
        trained = model_card.Trained(
            base=manifest.base.name_or_path,
            arguments=arguments,
            section=_section(manifest),
            slices=manifest.slices,
            world_size=manifest.world_size,
            step=manifest.step,
            template=template,
            versions=manifest.versions,
            **_kept(manifest),
        )
    return model_card.write_card(folder, replace(trained, base=base_model or trained.base), report.as_dict())


def _arguments(manifest: Manifest) -> dict[str, Any]:
    found = manifest.client_state.get("arguments")
    return found if isinstance(found, dict) else {}


def _kept(manifest: Manifest) -> dict[str, Any]:
    return {name: manifest.client_state.get(name, ()) for name in ("local", "resumed")}


def _section(manifest: Manifest) -> dict[str, Any]:
    """The part of `hd_pissa` that shows in the targets."""
    ranks = [t.r for t in manifest.targets]
    kinds = dict.fromkeys(t.name.rsplit(".", 1)[-1] for t in manifest.targets)
    return {"r": max(set(ranks), key=ranks.count), "target_modules": list(kinds)} if ranks else {}


def _template(state: dict[str, Any], run: dict[str, Any], folder: Path) -> str | None:
    """How a question was put to the model; None where a checkpoint of 0.1, and the run.json beside it, leave that open.

    Such a checkpoint has the option alone, and that may be a default which rows of another kind did not read.
    """
    if isinstance(state.get("template"), str):
        return str(state["template"])
    arguments = state["arguments"] if isinstance(state.get("arguments"), dict) else {}
    if arguments.get("chat_template"):
        file = folder / TEMPLATE
        return None if lost_template(state) or not file.is_file() else file.read_text(encoding="utf-8")
    try:
        prompts = run["rows"]["sources"][0]["prompts"]
        if not prompts.startswith("template "):
            return None
        return resolve_template(arguments["prompt_template"]).text
    except (ConfigError, LookupError, TypeError, AttributeError):
        return None
