"""A dataset, by evaluate.py: its loss, and the answers to its rows. Results go to stdout, how far it is to stderr.

Heavy imports stay inside the functions, for what a person got wrong is told in a moment.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.options_data import DataOptions

if TYPE_CHECKING:
    from hdpissa.engine.generation import Question
    from hdpissa.engine.progress import Work


def read(args: Any, request: Any, tokenizer: Any, *, seed: int) -> Any:
    """What was read (`Rows`): the datasets, tokenised, as a run without evaluation rows would read them.

    Args:
        seed: draws rows, where a share of a set is asked for.
    """
    from hdpissa.launch.train_data import read_rows

    alone = SimpleNamespace(**asdict(DataOptions()) | vars(args), seed=seed)
    rows = read_rows(alone, request.given, tokenizer, request.sets)
    return replace(rows, sources=[source | {"use": "evaluation"} for source in rows.sources])


@dataclass(frozen=True)
class Ready:
    """What is evaluated: a model in eval mode, its tokenizer, the rows, and those of them that are asked."""

    model: Any
    tokenizer: Any
    rows: Any
    asked: list[Question]


def evaluate(
    args: Any, request: Any, folder: str, base: str | None, *, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures of a model on a dataset, under the names of a run's evaluation rows; answers, graded).

    Each figure is printed as soon as it is known: answers take minutes where the loss takes seconds.
    """
    from hdpissa.engine.evaluate import graded_rows, match_figures

    ready = prepare(args, request, folder, base, seed=seed)
    how = {"dtype": str(ready.model.dtype).removeprefix("torch."), "device": str(ready.model.device)}
    print(f"computes in {how['dtype']} on {how['device']}", flush=True)
    figures = how | _told(_loss(ready, int(args.batch_size)))
    if not ready.asked:
        return figures, []
    answers = _answers(ready, int(args.batch_size), args.max_new_tokens)
    figures |= {"max_new_tokens": args.max_new_tokens} | _told(match_figures(answers, ready.asked))
    return figures, graded_rows(answers, ready.asked)


def prepare(args: Any, request: Any, folder: str, base: str | None, *, seed: int) -> Ready:
    """Reads all; what does not fit is refused before the weights are read, where that can be known."""
    from hdpissa.launch import evaluate_model
    from hdpissa.launch.position_checks import check_positions
    from hdpissa.launch.train_checks import check_vocabulary
    from hdpissa.launch.train_data import tell_sources
    from hdpissa.launch.train_questions import stop_at_turns

    config = evaluate_model.read_config(args.model, base or folder, args.trust_remote_code)
    if base:
        evaluate_model.check_adapter(args.model, folder)
    tokenizer = evaluate_model.read_tokenizer(folder, args.trust_remote_code)
    found = read(args, request, tokenizer, seed=seed)
    print("\n".join(tell_sources(found.sources)), flush=True)
    if config is not None:
        check_vocabulary(found, None, config)
    asked = _questions(args, found, tokenizer) if args.eval_exact_match else []
    model = evaluate_model.load(args.model, folder, base, device=args.device, trust_remote_code=args.trust_remote_code)
    if config is None:
        check_vocabulary(found, None, model.config)
    for line in stop_at_turns(model, tokenizer, found):
        print(line)
    if note := check_positions(args, model, found, asked):
        print(f"note: {note}", file=sys.stderr)
    return Ready(model, tokenizer, found.train.dataset, asked)


def _questions(args: Any, found: Any, tokenizer: Any) -> list[Question]:
    """The rows that have a prompt and a whole answer. ConfigError where none has."""
    from hdpissa.engine.generation import questions

    shown = found.ask("train").dataset
    there = questions(shown, tokenizer, limit=args.eval_max_samples, max_length=args.max_length)
    asked = [question for question in there if question.reference]
    if not asked:
        raise ConfigError("--eval_exact_match: no row has a prompt and a whole answer; leave it out")
    return asked


def _loss(ready: Ready, batch_size: int) -> dict[str, Any]:
    import torch

    from hdpissa.engine.batches import EvalBatches
    from hdpissa.engine.evaluate import loss_figures, mean_loss

    pad = ready.tokenizer.pad_token_id
    batches = EvalBatches(ready.rows, rank=0, world_size=1, batch_size=batch_size, pad_token_id=pad)
    with _progress("batches") as progress:
        return loss_figures(*mean_loss(ready.model, batches, torch.device(ready.model.device), progress))


def _answers(ready: Ready, batch_size: int, max_new_tokens: int) -> list[str]:
    import torch

    from hdpissa.engine.generation import generate

    with torch.no_grad(), _progress("answers") as progress:
        return generate(
            ready.model,
            ready.tokenizer,
            [question.ids for question in ready.asked],
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            device=torch.device(ready.model.device),
            progress=progress,
        )


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Work]:
    """On stderr, that stdout has results alone; whatever ends the work, the terminal has its cursor again."""
    from rich.console import Console

    from hdpissa.engine.progress import Work, make_bars

    console = Console(stderr=True)
    work = Work(title, console, make_bars(console, off=not console.is_terminal))
    try:
        yield work
    finally:
        work.stop()


def _told(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures, which are printed."""
    print("  ".join(f"{name.removeprefix('eval_')} {value:.6g}" for name, value in figures.items()), flush=True)
    return figures
