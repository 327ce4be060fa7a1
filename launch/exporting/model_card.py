"""README.md beside an export: what the model is, how it was made, how good it is, how to load it.

By huggingface_hub's own card, so that the hub and its tools read it. The metadata has only what is known: names on the
hub, not folders of the machine that trained; the base's licence where the base's own card names one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdpissa.engine.checkpoint.reader import CheckpointReader
from hdpissa.engine.files import atomic
from hdpissa.engine.sharding.base_files import local_folder
from hdpissa.launch.common.metrics import RunFiles, counted
from hdpissa.launch.common.prompts import PLACEHOLDER

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
# Not a row of the data: a card is made to be published, and data may not be.
QUESTION = "Write here an instruction of the kind that it was trained on."
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What a reader of a card wants to know of a run; the rest is in run.json.
HYPER_PARAMETERS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "max_length", "packing",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "seed", "bf16",
)  # fmt: skip
SECTION = ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "modules_to_save")


@dataclass(frozen=True)
class Trained:
    """What a card says about a run.

    Attributes:
        base: folder or hub name. arguments: of train.py. section: `hd_pissa` of the config, as far as it is known.
        slices, world_size, step: S, processes, optimizer steps done.
        template: how an instruction becomes the prompt: text with {instruction}, or the tokenizer's chat template (any
            other text); None where it is not known.
        figures: name → value, for people. versions: of packages.
        local: names that were paths on the machine that trained, so that they are not on the hub.
        resumed: after which `step` the run went on with other arguments, and what `changed`; `arguments` are the last.
    """

    base: str
    arguments: Mapping[str, Any]
    section: Mapping[str, Any]
    slices: int
    world_size: int
    step: int
    template: str | None = None
    figures: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    local: Collection[str] = ()
    resumed: Sequence[Mapping[str, Any]] = ()


def from_record(record: RunFiles, *, step: int, template: str | None) -> Trained:
    """By the files of a run's output folder."""
    run, args = record.run, record.arguments
    return Trained(
        base=str(args.get("model_name_or_path", "")),
        arguments=args,
        section=_section(record),
        slices=int(run.get("slices", 1)),
        world_size=int(run.get("world_size", 1)),
        step=step,
        template=template,
        figures=figures(record, step),
        versions={k: str(v) for k, v in run.get("versions", {}).items()},
        local=run.get("local", ()),
        resumed=run.get("resumed", ()),
    )


def from_checkpoint(reader: CheckpointReader, base_model: str | None = None) -> Trained:
    """By a checkpoint, and the run's folder around it as far as it is there.

    Args:
        base_model: where the base is now, if it has moved.
    """
    manifest, record = reader.manifest, RunFiles.read(reader.folder.absolute().parent)
    state, ranks = manifest.client_state, [t.r for t in manifest.targets]
    kinds = dict.fromkeys(t.name.rsplit(".", 1)[-1] for t in manifest.targets)
    return Trained(
        base=base_model or manifest.base.name_or_path,
        arguments=state.get("arguments", {}),
        section=_section(record) or {"r": max(set(ranks), key=ranks.count), "target_modules": list(kinds)},
        slices=manifest.slices,
        world_size=manifest.world_size,
        step=manifest.step,
        template=state.get("template"),
        figures=figures(record, manifest.step),
        versions=manifest.versions,
        local=state.get("local", ()),
        resumed=state.get("resumed", ()),
    )


def _section(record: RunFiles) -> Mapping[str, Any]:
    return (record.run.get("ds_config") or {}).get("hd_pissa", {})


def figures(record: RunFiles, step: int) -> dict[str, str]:
    """Losses up to a step, and the devices."""
    found = {}
    evaluations = [row for row in record.having("eval_loss") if row["step"] <= step and row["eval_loss"] is not None]
    for row in evaluations[:1] + evaluations[1:][-1:]:
        when = "before training" if row["step"] == 0 else f"after step {row['step']}"
        found[f"validation loss {when}"] = f"{row['eval_loss']:.4f}"
    rows = [row for row in record.having("loss") if row["step"] <= step]
    if rows and rows[-1]["loss"] is not None:
        found[f"training loss of step {rows[-1]['step']}"] = f"{rows[-1]['loss']:.4f}"
    if record.run.get("device"):
        found["device"] = f"{record.run.get('world_size', 1)} × {record.run['device']}"
    return found


def write_card(folder: Path, trained: Trained, report: Mapping[str, Any]) -> None:
    """Writes README.md into an export's folder.

    Args:
        report: the export's, as `hdpissa_export.json` has it.
    """
    from huggingface_hub import ModelCard

    shown = content(trained, report)
    card = ModelCard.from_template(metadata(trained, report), template_str=TEMPLATE.read_text(), **shown)
    atomic.write_text(folder / CARD, re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n")


def metadata(trained: Trained, report: Mapping[str, Any]) -> Any:
    """The YAML block: only what is known."""
    from huggingface_hub import ModelCardData

    adapter, base = report["format"] == "peft", hub_name(trained.base, trained.local)
    known: dict[str, Any] = _licence(trained.base)
    if base:
        known["base_model_relation"] = "adapter" if adapter else "finetune"
    names = str(trained.arguments.get("dataset_name") or "").split()
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["hd-pissa", "hdpissa", *(["lora"] if adapter else [])],
        base_model=base,
        datasets=[name for name in names if hub_name(name, trained.local)] or None,
        **known,
    )


def hub_name(name: str, local: Collection[str] = ()) -> str | None:
    """A hub name, also of a folder in the hub's cache; None for any other folder.

    Args:
        local: names that are known to be paths, whether or not they are on this machine.
    """
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if name in local or os.path.exists(os.path.expanduser(name)) or not HUB_NAME.fullmatch(name):
        return None
    return name


def _licence(base: str) -> dict[str, Any]:
    """By the base's own card."""
    from huggingface_hub import ModelCard

    folder = local_folder(base)
    if folder is None or not (folder / CARD).is_file():
        return {}
    data = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()
    return {k: data[k] for k in ("license", "license_name", "license_link") if data.get(k)}


# --- the text -------------------------------------------------------------------------------------


def content(trained: Trained, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    base, template, r = hub_name(trained.base, trained.local), trained.template, trained.section.get("r")
    plain = template is not None and PLACEHOLDER in template
    return {
        "title": f"{base or Path(trained.base).name or 'A model'} fine-tuned with HD-PiSSA",
        "adapter": report["format"] == "peft",
        "base": base or Path(trained.base).name,
        "base_is_local": base is None,
        "r": r,
        "slices": counted(trained.slices, "slice"),
        "step_rank": 2 * r * trained.slices if isinstance(r, int) else None,
        "training": hyper_parameters(trained),
        "figures": {**trained.figures, **export_figures(report)},
        "versions": ", ".join(f"{name} {version}" for name, version in trained.versions.items()),
        "chat": template is not None and not plain,
        # one literal of Python source for each line of text
        "prompt_lines": [json.dumps(line, ensure_ascii=False) for line in template.splitlines(True)]  # type: ignore[union-attr]
        if plain and template != PLACEHOLDER
        else None,
        "question": QUESTION,
    }


def hyper_parameters(trained: Trained) -> dict[str, str]:
    """Name → value."""
    args, section = trained.arguments, trained.section
    names = str(args.get("dataset_name") or "unknown").split()
    found = {"data": ", ".join(n if hub_name(n, trained.local) else Path(n).name for n in names)}
    found |= {f"hd_pissa.{k}": _text(section[k]) for k in SECTION if section.get(k) not in (None, [], {})}
    found |= {"slices": str(trained.slices), "processes": str(trained.world_size), "optimizer steps": str(trained.step)}
    unused = "num_train_epochs" if (args.get("max_steps") or -1) > 0 else "max_steps"
    found |= {k: _text(args[k]) for k in HYPER_PARAMETERS if args.get(k) is not None and k != unused}
    return found | {
        f"changed after step {went_on['step']}": ", ".join(went_on["changed"]) for went_on in trained.resumed
    }


def export_figures(report: Mapping[str, Any]) -> dict[str, str]:
    """What the export reports about itself."""
    found = {"dtype of the files": str(report["dtype"])}
    if report["format"] == "peft":
        found["rank of the adapter"] = _text(report["r"])
        if (report.get("residual") or {}).get("overall") is not None:
            words = f"{report['residual']['overall']:.1e} of the change of the weights"
            found["difference to the trained model, measured"] = words
        elif report.get("unknown"):
            found["difference to the trained model"] = f"unknown: {report['unknown']}"
        if report.get("truncation") is not None:
            found["left out by cutting the rank"] = f"{report['truncation']:.1e} of the adapter"
    return found


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
