"""What train.py adds at the ends of a run: answers to sample prompts, the last evaluation, exports and their cards."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hdpissa.engine.checkpoint import directory
from hdpissa.engine.distributed import heartbeat
from hdpissa.engine.files import atomic
from hdpissa.engine.sharding import zero3
from hdpissa.launch.common.generation import add_stops, generate
from hdpissa.launch.common.metrics import RunFiles
from hdpissa.launch.exporting import model_card
from hdpissa.launch.training.alpaca import prompt_ids
from hdpissa.launch.training.rows import Rows
from hdpissa.launch.training.script_arguments import Arguments

logger = logging.getLogger(__name__)
EXPORTS = {"hf": "model", "peft": "adapter"}  # format → folder in the output folder
SENTINEL = "\ue000"  # of the private use area: no template looks at it


def wanted_exports(export_format: str) -> dict[str, str]:
    """Format → folder, of those that --export_format says."""
    return {kind: name for kind, name in EXPORTS.items() if export_format in (kind, "both")}


class RunEnds(TrainerCallback):
    """Given to the trainer's constructor, so that a run is only recorded as finished after its exports.

    Attributes:
        trainer: set once it is made.
    """

    trainer: Any = None

    def __init__(self, arguments: Arguments, rows: Rows, tokenizer: Any) -> None:
        self._arguments, self._rows, self._tokenizer = arguments, rows, tokenizer
        self._folder = Path(str(arguments.training.output_dir))

    def description(self) -> dict[str, Any]:
        """For run.json, checkpoints and cards: what was trained from what, and how a prompt is put."""
        script, rows, chat = self._arguments.script, self._rows, self._tokenizer.chat_template
        datasets = [asdict(part) for part in self._arguments.mixture.datasets]
        paths = [part["path"] for part in datasets]
        names = [script.model_name_or_path, script.dataset_name, script.eval_dataset_name, *paths]
        mixed = {"dataset_name": " ".join(paths), "datasets": datasets} if datasets else {}
        return {
            "arguments": asdict(script) | self._arguments.training.to_dict() | mixed,
            "local": sorted({name for name in names if name and os.path.exists(os.path.expanduser(name))}),
            "template": rows.template.text if rows.template else chat,
            "chat_template": chat if rows.chat else None,
            "stop_token_ids": end_of_turn(self._tokenizer) if rows.chat else None,
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0 and args.process_index == 0 and self._arguments.script.overwrite_output_dir:
            with heartbeat.single_rank("folder"):
                directory.discard(self._folder)
        if self._rows.chat:  # answers end there, too, in samples and in what is exported
            add_stops(model, self._tokenizer, end_of_turn(self._tokenizer))
        if state.global_step == 0:
            self._sample("before")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and self.trainer.eval_dataset is not None:
            control.should_evaluate = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.preempted:
            self._sample("after")
            self._export(state.global_step)

    def _sample(self, when: str) -> None:
        """The greedy answers to --sample_prompt; collective."""
        script, args = self._arguments.script, self._arguments.training
        texts = [self._prompt(text) for text in script.sample_prompt or ()]
        if not texts:
            return
        engine = self.trainer.engine
        engine.eval()
        heartbeat.beat("eval.answers", slow=True)
        answers = generate(
            engine,
            self._tokenizer,
            [prompt_ids(self._tokenizer, text) for text in texts],
            batch_size=args.per_device_eval_batch_size,
            max_new_tokens=script.max_new_tokens,
            device=zero3.device(),
            rank=args.process_index,
            world_size=args.world_size,
        )
        engine.train()
        if args.process_index == 0:
            with heartbeat.single_rank("samples"):
                atomic.write_json(
                    self._folder / f"sample_{when}_training.json", {"prompt": texts[0], "answer": answers[0]}
                )
                print(f"answer {when} training: {answers[0].strip()}", flush=True)

    def _prompt(self, text: str) -> str:
        if self._rows.template:
            return self._rows.template.render(text)
        if not self._rows.chat:
            return text
        messages = [{"role": "user", "content": text}]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _export(self, step: int) -> None:
        """Writes what --export_format says, the tokenizer and a card beside it; collective."""
        script = self._arguments.script
        for kind, name in wanted_exports(script.export_format).items():
            cut = {"rank": script.export_rank} if kind == "peft" else {}
            heartbeat.beat("export", slow=True)
            report = self.trainer.engine.export(self._folder / name, format=kind, dtype=script.export_dtype, **cut)
            if self._arguments.training.process_index == 0:
                with heartbeat.single_rank("card"):
                    self._tokenizer.save_pretrained(self._folder / name)
                    self._write_card(self._folder / name, report.as_dict(), step)
                    print(f"exported {self._folder / name}", flush=True)

    def _write_card(self, folder: Path, report: dict[str, Any], step: int) -> None:
        """README.md; what goes wrong with it is a warning, the model is complete."""
        try:
            template = self.description()["template"]
            trained = model_card.from_record(RunFiles.read(self._folder), step=step, template=template)
            model_card.write_card(folder, trained, report)
        except Exception as error:
            logger.warning("no model card: %s: %s", type(error).__name__, " ".join(str(error).split())[:200])


def end_of_turn(tokenizer: Any) -> list[int]:
    """The special token with which the chat template ends an assistant's words; none where it has none."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
    rest = tokenizer.apply_chat_template(messages, tokenize=False).partition(SENTINEL)[2]
    found = [
        token for token in tokenizer(rest, add_special_tokens=False)["input_ids"] if token in tokenizer.all_special_ids
    ]
    return found[:1]
