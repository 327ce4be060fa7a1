"""From the options of the section "data" to tokenised rows and batches, before the process group exists.

Own file because reading is the same on every rank and all of it can be wrong in ways that only a person can mend:
names, columns, formats, templates, lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hdpissa.engine import data, data_sources
from hdpissa.engine.batches import Batches, SliceBatches
from hdpissa.engine.chat_template import OR_EVERYTHING, ChatTemplate, resolve_chat_template
from hdpissa.engine.data_encode import LOSS_ON, Encoding, Learn, choose_learn
from hdpissa.engine.data_formats import Fields, RowFormat
from hdpissa.engine.data_packing import PackedRows
from hdpissa.engine.data_sources import Source
from hdpissa.engine.data_stream import StreamBatches, encode_stream
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.metrics import counted
from hdpissa.engine.prompts import PromptTemplate, resolve_template
from hdpissa.launch.options_data import EVAL, DataOptions
from hdpissa.launch.train_sets import FIELDS, EvalSet, eval_sets, overlaps, spread_options

# Options that rows of one kind alone are read by → that kind.
OF_ONE_KIND = {
    "prompt_template": "alpaca rows",
    "chat_template": "conversations and alpaca rows",
    "dataset_text_field": "rows of text",
    **dict.fromkeys(("prompt_field", "response_field", "eval_prompt_field", "eval_response_field"), "alpaca rows"),
}

LOSS_OF = ("completion_only_loss", "assistant_only_loss")  # of rows with a completion, or with turns


@dataclass
class Rows:
    """What was read.

    Attributes:
        train: tokenised rows, or a stream of them. held_out: rows to evaluate on, or None.
        template: `render(instruction)` is what the model sees of a single question.
        sources: for run.json and people: name, format and counts of each set.
        warnings: what a person should know of them.
        stops: tokens that end a turn of the assistant, where rows are chats; an answer ends there, too.
        ask: rows by their use ("train", "evaluation"), each of which shows where its answer begins.
    """

    train: Any
    held_out: Any
    template: Any
    sources: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    ask: Callable[[str], Any] | None = None


def read_rows(
    args: Any, given: frozenset[str], tokenizer: Any, options: Sequence[dict[str, str | None]] | None = None
) -> Rows:
    """Training and evaluation rows, tokenised. No process group exists yet, so nobody waits in one.

    Args:
        options: for each training set those of PER_SOURCE, where they are not what `args` says.
    """
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs as an error it raises, too
    return _Reader(args, given, tokenizer, options).read()


class _Reader:
    """Reads the sets of a run one after another; what it has found out about them is in `sources`."""

    def __init__(
        self, args: Any, given: frozenset[str], tokenizer: Any, options: Sequence[dict[str, str | None]] | None
    ) -> None:
        self.args, self.tokenizer, self.sources = args, tokenizer, list[dict[str, Any]]()
        self.template = resolve_template(args.prompt_template)
        self.chat_template = resolve_chat_template(args.chat_template, tokenizer)
        if args.chat_template is not None:
            tokenizer.chat_template = self.chat_template  # so that the exported one has it, too
        self.train_sources = data_sources.parse_sources(args.dataset_name)
        if options is None:
            said = bool(given & set(FIELDS))
            options = spread_options(vars(args), len(self.train_sources), fields_given=said)
        self.options, self.given = options, given
        self.first: RowFormat | None = None
        self.used: set[str] = set()  # those of OF_ONE_KIND that some set is read by
        self.encoded: list[tuple[str, Source, Any, Encoding, Any]] = []  # use, what was read, how, and the result

    def read(self) -> Rows:
        asked = self.args.eval_dataset_name or self.args.eval_split
        sets = eval_sets(vars(self.args), self.train_sources, self.options) if asked else []
        train, others = list(self._train_parts()), list(self._eval_parts(sets))
        self._refuse_unread(*([encoding.format for _, _, encoding in parts] for parts in (train, others)))
        joined = self._stream(train) if self.args.streaming else data.join([self._encode(*part) for part in train])
        assert self.first is not None
        template: Any = self.template if self.first.name == "alpaca" else PromptTemplate("{instruction}")
        if self.first.chat:
            template = ChatTemplate(self.chat_template or "", self.tokenizer)
        held_out = data.join([self._encode(*part, use="evaluation") for part in others]) if others else None
        chats = any(encoding.format.chat for _, _, encoding in (*train, *others))
        return Rows(
            joined,
            held_out,
            template,
            self.sources,
            warnings=overlaps(self.train_sources, self.options, sets),
            stops=ChatTemplate(self.chat_template or "", self.tokenizer).stops() if chats else [],
            ask=self.to_ask,
        )

    def to_ask(self, use: str) -> Any:
        """See `Rows.ask`. Where everything carries loss the rows are encoded once more, as if answers alone did."""
        parts = []
        for used, source, rows, encoding, found in self.encoded:
            if used == use and encoding.learn == "everything":
                shown = replace(encoding, learn=choose_learn(encoding.format))
                try:
                    parts.append(self._tokens(rows, source, shown))
                except ConfigError as error:
                    text = str(error).removesuffix(OR_EVERYTHING)
                    raise ConfigError(f"questions of {text}; or ask no rows") from None
            elif used == use:
                parts.append(found)
        return data.join(parts)

    # --- sets ----------------------------------------------------------------------------------------

    def _train_parts(self) -> Iterator[tuple[Any, Source, Encoding]]:
        """(rows, set, how they become tokens); of all sets before any is tokenised, which may take long."""
        streaming = self.args.streaming
        for source, options in zip(self.train_sources, self.options, strict=True):
            rows = self._load(source, options, streaming=streaming)
            rows = rows if streaming else data_sources.take(rows, source, self.args.seed)
            yield rows, source, self._encoding(rows, source, options, use="train")

    def _eval_parts(self, sets: Sequence[EvalSet]) -> Iterator[tuple[Any, Source, Encoding]]:
        for source, options in sets:
            rows = data_sources.take(self._load(source, options), source, self.args.seed, "--eval_dataset_name")
            yield rows, source, self._encoding(rows, source, options, use="evaluation")

    def _stream(self, parts: Sequence[tuple[Any, Source, Encoding]]) -> Any:
        streams = []
        for rows, source, encoding in parts:
            data.check_encoding(self.tokenizer, encoding)
            settings = {"seed": self.args.seed, "buffer_size": self.args.shuffle_buffer_size}
            columns = list(next(iter(rows)))
            streams.append(encode_stream(rows, self.tokenizer, encoding, columns=columns, **settings))
            self.sources.append(self._describe(source, encoding, use="train"))
        return data_sources.mix_streams(streams, self.train_sources, self.args.seed)

    def _load(self, source: Source, options: dict[str, str | None], *, streaming: bool = False) -> Any:
        return data_sources.load_rows(
            source.name,
            split=options["dataset_split"] or "train",
            config_name=options["dataset_config"],
            revision=options["dataset_revision"],
            streaming=streaming,
        )

    def _encode(self, rows: Any, source: Source, encoding: Encoding, *, use: str = "train") -> Any:
        found = self._tokens(rows, source, encoding)
        self.encoded.append((use, source, rows, encoding, found))
        counts = {
            "rows": len(rows),
            "used": len(found.dataset),
            "dropped_without_labels": found.dropped_without_labels,
            "dropped_too_long": found.dropped_too_long,
            "truncated": found.truncated,
        }
        self.sources.append(self._describe(source, encoding, use=use) | counts)
        return found

    def _tokens(self, rows: Any, source: Source, encoding: Encoding) -> Any:
        try:
            return data.encode_rows(rows, self.tokenizer, encoding, num_proc=self.args.preprocessing_num_workers)
        except ConfigError as error:
            raise self._named(source, error) from None

    # --- formats -------------------------------------------------------------------------------------

    def _encoding(self, rows: Any, source: Source, options: dict[str, str | None], *, use: str) -> Encoding:
        try:
            return self._choose(rows, options, EVAL if use == "evaluation" else "")
        except ConfigError as error:
            raise self._named(source, error) from None

    def _choose(self, rows: Any, options: dict[str, str | None], prefix: str) -> Encoding:
        args = self.args
        prompt, response = (options[name] for name in FIELDS)
        fields = Fields(
            prompt or Fields.prompt,
            response or Fields.response,
            args.dataset_text_field,
            given=bool(prompt and response),
            prefix=prefix,
        )
        format = data.find_format(rows, fields, options["dataset_format"])
        if format.name == "alpaca" and args.chat_template is not None:
            if args.prompt_template != "alpaca":
                raise ConfigError(
                    f"--chat_template and --prompt_template {args.prompt_template!r}: a prompt can have only one of "
                    f"them; leave one out"
                )
            format = replace(format, chat=True)
        elif format.name == "alpaca":
            format = format.without("history", "--chat_template")
        self.first = self.first or format
        self.used |= _read_by(format, prefix)
        return Encoding(
            format=format,
            template=self.template.text,
            chat_template=self.chat_template if format.chat else None,
            learn=self._learn(format),
            max_length=args.max_length,
            truncation=args.truncation,
        )

    def _learn(self, format: RowFormat) -> Learn:
        """Which part carries loss: of a mix, or for rows that a run did not have, by what is said of such rows."""
        args = self.args
        fits = {name for name in LOSS_OF if getattr(args, name) is False or name in _read_by(format)}
        return choose_learn(
            format,
            train_on_prompt=args.train_on_prompt,
            **{name: getattr(args, name) for name in fits},
        )

    def _refuse_unread(self, trained: Sequence[RowFormat], held_out: Sequence[RowFormat]) -> None:
        """Refuses what was said of rows that no set has. Of a mix one set is enough; loss is of what is trained on."""
        for name in LOSS_OF:
            fits = any(name in _read_by(format) for format in trained)
            if name in self.given and getattr(self.args, name) and not fits:
                choose_learn(trained[0], **{name: True})  # says what such rows lack
        for name, kind in OF_ONE_KIND.items():
            value, usual = getattr(self.args, name), getattr(DataOptions, name)
            if name in self.given and value not in (None, usual) and name not in self.used:
                prefix = EVAL if name.startswith(EVAL) else ""
                there = ", ".join(dict.fromkeys(map(str, held_out if prefix else (*trained, *held_out))))
                raise ConfigError(
                    f"--{name} {value[:60]!r} is for {kind}, and there are none ({there}); leave it out, or say with "
                    f"--{prefix}dataset_format what the rows are"
                )

    def _describe(self, source: Source, encoding: Encoding, *, use: str) -> dict[str, Any]:
        return {
            "name": str(source),
            "use": use,
            "format": str(encoding.format),
            "prompts": self._chat() if encoding.format.chat else self._prompts(encoding.format),
            "loss_on": LOSS_ON[encoding.learn],
        }

    def _chat(self) -> str:
        dated = ChatTemplate(self.chat_template or "", self.tokenizer).dated
        return f"chat template (today is {dated})" if dated else "chat template"

    def _prompts(self, format: RowFormat) -> str:
        return f"template {self.args.prompt_template}" if format.name == "alpaca" else "as they are"

    def _named(self, source: Source, error: ConfigError) -> ConfigError:
        """Which set is meant: there may be several, and those to evaluate on."""
        return ConfigError(f"dataset {source}: {error}")


def _read_by(format: RowFormat, prefix: str = "") -> set[str]:
    """Those of OF_ONE_KIND and LOSS_OF by which rows of this format are read.

    Args:
        prefix: "eval_" for evaluation rows, which may have the training set's columns, too.
    """
    used = {"chat_template", "assistant_only_loss"} if format.chat else set()
    if format.name in ("alpaca", "prompt_completion"):
        used.add("completion_only_loss")
    if format.name == "alpaca":
        used |= {*FIELDS, *(prefix + name for name in FIELDS)} | (set() if format.chat else {"prompt_template"})
    return used | ({"dataset_text_field"} if format.name == "text" else set())


# --- batches -----------------------------------------------------------------------------------------


def make_batches(args: Any, rows: Rows, tokenizer: Any, *, slices: int, micro_batches: int, size: int) -> Batches:
    """Training batches by slice, step and micro-batch; packed, grouped or streamed as the options say."""
    flat = "flash" in (args.attn_implementation or "")
    sizes = {"slices": slices, "micro_batches_per_slice": micro_batches, "micro_batch_size": size}
    sizes["pad_token_id"] = tokenizer.pad_token_id
    if args.streaming:
        return StreamBatches(
            rows.train,
            sizes=sizes,
            steps=args.max_steps,
            seed=args.seed,
            capacity=args.max_length if args.packing else None,
            flat=flat,
            max_length_is_law=args.truncation == "error",
        )
    dataset = PackedRows.of(rows.train.dataset, args.max_length) if args.packing else rows.train.dataset
    return SliceBatches(dataset, **sizes, seed=args.seed, group_by_length=args.group_by_length, flat=flat)


def describe_rows(rows: Rows, batches: Batches) -> dict[str, Any]:
    """What run.json tells of the data."""
    if isinstance(batches, StreamBatches):
        return {"streamed": True, "sources": rows.sources}
    train = rows.train
    told = {
        "used": len(train.dataset),
        "dropped_without_labels": train.dropped_without_labels,
        "dropped_too_long": train.dropped_too_long,
        "truncated": train.truncated,
        "dropped_at_the_end_of_an_epoch": batches.dropped_samples,
        "sources": rows.sources,
    }
    return told | (
        {"packed_into": len(batches.dataset)} if isinstance(batches, SliceBatches) and batches.packed else {}
    )


def tell_rows(rows: Rows, batches: Batches) -> list[str]:
    """What a run says of its data at its start: a line for each set and each warning, one for packing, one for what is
    left over."""
    lines = [_tell(source) for source in rows.sources] + [f"warning: {text}" for text in rows.warnings]
    if isinstance(batches, SliceBatches) and batches.packed:
        lines.append(f"packing: {len(rows.train.dataset)} rows in {len(batches.dataset)} samples")
    elif batches.packed:
        lines.append("packing: rows as they come, in samples of up to --max_length tokens")
    if batches.dropped_samples:
        lines.append(
            f"an epoch: {counted(batches.steps_per_epoch, 'step')} of {counted(batches.global_batch, 'sample')}; "
            f"{batches.dropped_samples} more fill no whole step and are left out, the same ones in every epoch"
        )
    return lines


def record_stream(batches: Batches, described: dict[str, Any], recorder: Any) -> None:
    """At the end of a streamed run: what became of the rows so far, for people and in run.json.

    Args:
        described: what run.json says.
    """
    if not isinstance(batches, StreamBatches):
        return
    found = batches.read_so_far()
    recorder.save_json("run.json", described | {"rows": described["rows"] | found})
    times = f" ({counted(found['passes'], 'time')} to its end)" if found["passes"] else ""
    recorder.say(f"stream: {counted(found['read'], 'row')} read{times}, {found['kept']} kept{_losses(found)}")


def refuse_leaks(engine: Any, job: Any) -> None:
    """Raises StopError on all ranks where packed rows see each other in this model; collective."""
    from hdpissa.engine import data_packing, zero3

    vocabulary = engine.module.get_input_embeddings().num_embeddings
    data_packing.refuse_leaks(engine, zero3.to_device, vocab_size=vocabulary, flat=job.data.flat)


def tell_sources(sources: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each set: what it was taken for, and what became of its rows."""
    return [_tell(source) for source in sources]


def _tell(source: dict[str, Any]) -> str:
    text = f"{source['use']} data {source['name']}: {source['format']}; prompts {source['prompts']}, loss on "
    text += source["loss_on"]
    if "rows" in source:
        text += f"; {source['used']} of {source['rows']} rows"
        text += _losses(source)
    return text


def _losses(counts: Mapping[str, int]) -> str:
    """What was dropped and truncated, after a comma; nothing where all of it is there."""
    dropped = {"without labels": counts["dropped_without_labels"], "too long": counts["dropped_too_long"]}
    text = "".join(f", {count} dropped {why}" for why, count in dropped.items() if count)
    return text + (f", {counts['truncated']} truncated" if counts["truncated"] else "")
