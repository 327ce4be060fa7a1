"""What train.py asks the model on the way: evaluation rows whose answers are graded, prompts whose answers are kept."""

from __future__ import annotations

from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.options_evaluation import strategy


def read_questions(args: Any, tokenizer: Any, rows: Any) -> tuple[list[Any], list[Any]]:
    """(questions for --eval_exact_match, those whose answers are kept); ConfigError where there are no rows to ask.

    Args:
        rows: of the run: `held_out` (or None), what it has to `ask`, and the `template` that a prompt is put in.
    """
    from hdpissa.engine.data_encode import prompt_ids
    from hdpissa.engine.generation import Question, questions

    wanted = [name for name, needed in rows_needed(args).items() if needed]
    if wanted and rows.held_out is None:
        raise ConfigError(f"--{wanted[0]} needs evaluation rows: give --eval_dataset_name or --eval_split")
    graded: list[Any] = []
    asks = args.eval_exact_match or (args.sample_steps and args.sample_prompt is None)
    shown = rows.ask("evaluation").dataset if asks else None
    if args.eval_exact_match:
        found = questions(shown, tokenizer, limit=args.eval_max_samples, max_length=args.max_length)
        graded = [question for question in found if question.reference]
        if not graded:
            raise ConfigError("--eval_exact_match: no evaluation row has a prompt and a whole answer; leave it out")
    if args.sample_prompt is not None:
        texts = [rows.template.render(text) for text in args.sample_prompt]
        return graded, [Question(prompt_ids(tokenizer, text), text) for text in texts]
    if not args.sample_steps:
        return graded, []
    asked = questions(shown, tokenizer, limit=args.num_samples)
    if not asked:
        raise ConfigError("--sample_steps: no evaluation row has a prompt; give --sample_prompt")
    return graded, asked


def stop_at_turns(model: Any, tokenizer: Any, rows: Any) -> list[str]:
    """Has answers end where the chat template of the rows ends a turn; the line that tells it, none if they did before.

    Args:
        model: whose generation_config, and so its export's, gets the token.
    """
    from hdpissa.engine.generation import add_stops

    new = tokenizer.convert_ids_to_tokens(add_stops(model, tokenizer, rows.stops))
    return [f"answers end at {token}, too: the chat template's end of turn" for token in new]


def rows_needed(args: Any) -> dict[str, bool]:
    """Options → whether they need evaluation rows."""
    return {
        "eval_exact_match": args.eval_exact_match,
        "load_best_model_at_end": args.load_best_model_at_end,
        "early_stopping_patience": args.early_stopping_patience > 0,
        "save_strategy best": args.save_strategy == "best",
        "eval_strategy": args.eval_strategy in ("steps", "epoch"),
        "eval_steps": strategy(args) == "steps",
        "sample_steps": args.sample_steps > 0 and args.sample_prompt is None,
    }
