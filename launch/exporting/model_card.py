"""README.md beside an export: what the model is, how it was made, how good it is, how to load it.

Through huggingface_hub's own card, so that the hub and its tools read it. What stands in the metadata is what is known:
names on the hub, not folders of the machine that trained; the base's licence where the base's own card says one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdpissa.engine.files import atomic
from hdpissa.engine.sharding.base_files import local_folder
from hdpissa.launch.common.metrics import RunFiles, counted
from hdpissa.launch.common.prompts import PLACEHOLDER

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
# Not a row of the data: a card is made to be published, and data may not be.
QUESTION = "Write here an instruction of the kind that it was trained on."
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What a reader of a card wants to know of a run; the rest is in run.json.
HYPER_PARAMETERS = (
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "num_train_epochs", "max_steps", "max_length",
    "packing", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "seed", "bf16",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a card tells of a run.

    Attributes:
        base: folder or hub name. arguments: of train.py. section: `hd_pissa` of the config, as far as it is known.
        slices, world_size, step: S, processes, optimizer steps done.
        template: how an instruction becomes the prompt: a text with {instruction}, or the tokenizer's chat template
            (any other text); None where it is not known.
        figures: name → value, for people. versions: of packages.
        local: those of its names that were paths where it was trained, and so are nobody else's.
        resumed: after which `step` it went on with other arguments, and what `changed`; `arguments` are the last ones.
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

    @property
    def hub_base(self) -> str | None:
        """The base's name on the hub, if it has one."""
        return hub_name(self.base, self.local)


def from_record(record: RunFiles, *, step: int, template: str | None) -> Trained:
    """What an output folder says."""
    run, args = record.run, record.arguments
    config = run.get("ds_config") if isinstance(run.get("ds_config"), dict) else {}
    return Trained(
        base=str(args.get("model_name_or_path", "")),
        arguments=args,
        section=config.get("hd_pissa", {}),  # type: ignore[union-attr]
        slices=int(run.get("slices", 1)),
        world_size=int(run.get("world_size", 1)),
        step=step,
        template=template,
        figures=figures(record, step),
        versions={k: str(v) for k, v in run.get("versions", {}).items()},
        local=run.get("local", ()),
        resumed=run.get("resumed", ()),
    )


def figures(record: RunFiles, step: int) -> dict[str, str]:
    """Losses, tokens and time up to a step, for people."""
    found = {}
    evaluations = [row for row in record.having("eval_loss") if row["step"] <= step and row["eval_loss"] is not None]
    for row in evaluations[:1] if len(evaluations) < 2 else (evaluations[0], evaluations[-1]):
        when = "before training" if row["step"] == 0 else f"after step {row['step']}"
        value = f"{row['eval_loss']:.4f}"
        if row.get("perplexity") is not None:
            value += f" (perplexity {row['perplexity']:.2f})"
        found[f"validation loss {when}"] = value
    rows = [row for row in record.having("loss") if row["step"] <= step]
    if rows and rows[-1]["loss"] is not None:
        found[f"training loss of step {rows[-1]['step']}"] = f"{rows[-1]['loss']:.4f}"
    tokens = [row["tokens"] for row in rows if row.get("tokens")]
    if tokens and len(rows) == rows[-1]["step"]:
        found["tokens trained on"] = f"{sum(tokens):,.0f}"
    seconds = [row["step_time_s"] for row in rows if row.get("step_time_s")]
    if seconds:
        found["time in optimizer steps"] = duration(sum(seconds) / len(seconds) * rows[-1]["step"])
    if record.run.get("device"):
        found["device"] = f"{record.run.get('world_size', 1)} × {record.run['device']}"
    return found


def write_card(folder: Path, trained: Trained, report: Mapping[str, Any]) -> Path:
    """Writes README.md into an export's folder.

    Args:
        report: the export's, as `hdpissa_export.json` has it.
    """
    from huggingface_hub import ModelCard

    shown = content(trained, report)
    card = ModelCard.from_template(metadata(trained, report), template_str=TEMPLATE.read_text(), **shown)
    target = folder / CARD
    atomic.write_text(target, re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n")
    return target


def metadata(trained: Trained, report: Mapping[str, Any]) -> Any:
    """The YAML block: only what is known."""
    from huggingface_hub import ModelCardData

    adapter = report.get("format") == "peft"
    base = trained.hub_base
    known: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": ("adapter" if adapter else "finetune") if base else None,
        "datasets": dataset_names(trained.arguments, trained.local) or None,
        **_licence(trained.base),
    }
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["hd-pissa", "hdpissa", *(["lora"] if adapter else [])],
        **{k: v for k, v in known.items() if v is not None},
    )


def hub_name(name: str, local: Collection[str] = ()) -> str | None:
    """A hub name, also of a folder in the hub's cache; None for any other folder.

    Args:
        local: names that are known to be paths, be they here or not.
    """
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if not name or name in local or os.path.exists(os.path.expanduser(name)) or not _HUB_NAME.fullmatch(name):
        return None
    return name


FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz")  # no name on the hub ends so


def dataset_names(arguments: Mapping[str, Any], local: Collection[str] = ()) -> list[str]:
    """The hub names among the training data; files and folders are nobody else's."""
    given = arguments.get("dataset_name") or ""
    words = given if isinstance(given, list) else re.split(r"[\s,]+", str(given))
    names = [str(word).rsplit(":", 1)[0] if re.search(r":[\d.]+%?$", str(word)) else str(word) for word in words]
    return [n for n in names if hub_name(n, local) and not n.endswith(FILES)]


def _licence(base: str) -> dict[str, Any]:
    """What the base's own card says of its licence."""
    from huggingface_hub import ModelCard

    folder = local_folder(base)
    if folder is None or not (folder / CARD).is_file():
        return {}
    data = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()
    return {k: data[k] for k in ("license", "license_name", "license_link") if data.get(k)}


# --- the text -------------------------------------------------------------------------------------


def content(trained: Trained, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    args, section = trained.arguments, trained.section
    r = section.get("r")
    batch = [args.get("per_device_train_batch_size"), args.get("gradient_accumulation_steps"), trained.world_size]
    return {
        "title": f"{short_name(trained.base) or 'A model'} fine-tuned with HD-PiSSA",
        "adapter": report.get("format") == "peft",
        "base": trained.hub_base or short_name(trained.base),
        "base_is_local": trained.hub_base is None,
        "data": ", ".join(short_name(n) for n in str(args.get("dataset_name", "")).split()),
        "r": r,
        "slices": counted(trained.slices, "slice"),
        "step_rank": 2 * r * trained.slices if isinstance(r, int) else None,
        "hyper": hyper_parameters(trained, batch),
        "figures": dict(trained.figures),
        "versions": dict(trained.versions),
        "export": export_figures(report),
        "step": trained.step,
        "chat": trained.template is not None and PLACEHOLDER not in trained.template,
        "prompt_lines": prompt_lines(trained.template),
        "question": QUESTION,
    }


def hyper_parameters(trained: Trained, batch: list[Any]) -> dict[str, str]:
    """Name → value."""
    args, section = trained.arguments, trained.section
    found = {f"hd_pissa.{k}": text(v) for k, v in section.items() if k in SECTION and v not in (None, [], {})}
    found["slices"] = str(trained.slices)
    found |= {k: text(args[k]) for k in HYPER_PARAMETERS if args.get(k) is not None}
    if found.get("max_steps") in ("-1", "0"):
        del found["max_steps"]
    elif "max_steps" in found:
        found.pop("num_train_epochs", None)
    if "warmup_steps" in found:
        found.pop("warmup_ratio", None)
    found |= {f"changed after step {went_on['step']}": ", ".join(went_on["changed"]) for went_on in trained.resumed}
    if all(isinstance(n, int) for n in batch):
        unit = "packed samples" if args.get("packing") else "rows"
        found[f"{unit} of an optimizer step"] = (
            f"{batch[0]} × {batch[1]} × {batch[2]} = {batch[0] * batch[1] * batch[2]}"
        )
    return found


SECTION = ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "modules_to_save")


def export_figures(report: Mapping[str, Any]) -> dict[str, str]:
    """What the export says of itself."""
    found = {"dtype of the files": str(report.get("dtype"))}
    if report.get("format") == "peft":
        found["rank of the adapter"] = text(report.get("r"))
        residual = report.get("residual") or {}
        if residual.get("overall") is not None:
            words = f"{residual['overall']:.1e} of the change of the weights"
            found["difference to the trained model, measured"] = words
        elif report.get("unknown"):
            found["difference to the trained model"] = f"unknown: {report['unknown']}"
        if report.get("truncation") is not None:
            found["left out by cutting the rank"] = f"{report['truncation']:.1e} of the adapter"
    return found


def prompt_lines(template: str | None) -> list[str] | None:
    """The template as lines of Python source, one literal per line of text; None for no template."""
    if template is None or template == PLACEHOLDER or PLACEHOLDER not in template:
        return None
    return [json.dumps(line, ensure_ascii=False) for line in template.splitlines(keepends=True)]


def short_name(name: Any) -> str:
    """A folder's own name, a hub's full one."""
    words = str(name or "")
    return Path(words).name if words.startswith((".", "~")) or words.count("/") > 1 or "/" in words[:1] else words


def text(value: Any) -> str:
    """A value for people."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 2:
        return f"{seconds:.1f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
