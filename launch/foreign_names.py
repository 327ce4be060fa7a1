"""Options that Trainer, TRL, PEFT, LLaMA-Factory or axolotl have and train.py has not: what to do instead.

Without this table a typo's nearest neighbour would be suggested, which for `--lora_r` is `--lora_alpha`: another run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_RANK = "the rank of a slice is --r"
_ADAM = "slices are trained by Adam (--adam_beta1, --adam_beta2, --adam_epsilon); leave it out"
_DTYPE = "use --bf16, or leave it out for fp32"
_QUANTISED = "the base itself is trained, so it cannot be quantised; leave it out"
_LORA_ONLY = "it is LoRA's, slices have none; leave it out"
_WHOLE = "it is what this command does; leave it out"

INSTEAD = {
    "lora_r": _RANK,
    "lora_rank": _RANK,
    "rank": _RANK,
    "lora_dropout": "slices have no dropout; leave it out",
    "lora_target_modules": "use --target_modules",
    "lora_target": "use --target_modules; 'all' is all-linear here",
    "lora_target_linear": "use --target_modules all-linear",
    "additional_target": "use --modules_to_save",
    "lora_modules_to_save": "use --modules_to_save",
    "use_peft": "there is no adapter in training, W itself learns (--export_format peft writes one); leave it out",
    "do_train": _WHOLE,
    **dict.fromkeys(("stage", "finetuning_type", "init_lora_weights", "pissa_init", "pissa_iter"), _WHOLE),
    **dict.fromkeys(("model", "base_model"), "use --model_name_or_path"),
    **dict.fromkeys(("dataset", "datasets", "train_file"), "use --dataset_name"),
    "validation_file": "use --eval_dataset_name",
    **dict.fromkeys(
        ("val_size", "val_set_size"), "split the rows: --dataset_split train[:95%] --eval_split train[95%:]"
    ),
    "dataset_dir": "give --dataset_name with its path",
    "dataset_train_split": "use --dataset_split",
    "dataset_test_split": "use --eval_split",
    "dataset_streaming": "use --streaming",
    "mix_strategy": "give shares or numbers of rows: --dataset_name 'a.jsonl:1000 b.jsonl:0.5'",
    "max_samples": "give a number of rows: --dataset_name a.jsonl:1000",
    "template": "use --chat_template, or --prompt_template",
    "chat_template_path": "use --chat_template",
    **dict.fromkeys(("sample_packing", "neat_packing"), "use --packing, in which no row sees another"),
    "train_on_inputs": "use --train_on_prompt",
    "mask_history": "all of the assistant's turns carry loss; for the last alone mark it in --chat_template "
    "({% generation %})",
    "disable_gradient_checkpointing": "it is off unless --gradient_checkpointing turns it on; leave it out",
    "num_epochs": "use --num_train_epochs",
    "padding_free": "use --packing, whose rows have no padding between them",
    "flash_attn": "use --attn_implementation flash_attention_2",
    "flash_attention": "use --attn_implementation flash_attention_2",
    "num_processes": "use --num_accelerators, or torchrun's --nproc_per_node",
    "gradient_clipping": "use --max_grad_norm",
    "logging_strategy": "use --logging_steps",
    "overwrite_cache": "tokenised rows are cached by their content; leave it out",
    "auto_find_batch_size": "hdpissa plan finds it before the run",
    **dict.fromkeys(("wandb_project", "project"), "set WANDB_PROJECT in the environment"),
    "plot_loss": "training_loss.png is always there; leave it out",
    "do_eval": "give --eval_dataset_name or --eval_split",
    "use_dora": _LORA_ONLY,
    "use_rslora": _LORA_ONLY,
    "optim": _ADAM,
    "optimizer": _ADAM,
    "weight_decay": "the method has none; leave it out",
    "fp16": "slice gradients would carry its loss scale; use --bf16",
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "quantization_bit": _QUANTISED,
    "data_seed": "--seed is that of the data, too",
    "dataset_num_proc": "use --preprocessing_num_workers",
    "dataloader_num_workers": "rows are tokenised before training (--preprocessing_num_workers); leave it out",
    "dataloader_drop_last": "every step has whole micro-batches; leave it out",
    "packing_strategy": "--packing is best-fit decreasing (bfd) always; leave it out",
    "eval_accumulation_steps": "predictions are not kept, so there is nothing to move; leave it out",
    "eval_max_length": "evaluation rows have --max_length, too",
    "tokenizer_name_or_path": "the tokenizer is the one beside --model_name_or_path",
    "tokenizer_name": "the tokenizer is the one beside --model_name_or_path",
    "eos_token": "an answer ends with the tokenizer's own; set it there",
    "evaluation_strategy": "use --eval_strategy",
    **dict.fromkeys(("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len"), "use --max_length"),
    "micro_batch_size": "use --per_device_train_batch_size",
    "gradient_checkpointing_kwargs": "it is the non-reentrant form always; leave it out",
    "save_only_model": "the export is there whatever is saved: --save_strategy no",
    "push_to_hub": "upload the export afterwards (hf upload); leave it out",
    "hub_model_id": "upload the export afterwards (hf upload); leave it out",
}

NEGATIONS = ("no_", "disable_")  # a name that begins so means the opposite of what is called the rest of it
LAUNCHERS = ("num_accelerators", "nproc_per_node", "num_gpus", "num_nodes", "hostfile", "nnodes")  # handed on


def hint(name: str, valid: Iterable[str]) -> str:
    """What to say after an unknown option's name, which has no dashes here, as those of `valid` have none."""
    valid = list(valid)
    if advice := instead(name, valid):
        return advice
    alike = [tuple(map(known.startswith, NEGATIONS)) for known in (name, *valid)]
    shown = [known for known, negated in zip(valid, alike[1:], strict=True) if negated == alike[0]]
    if name.startswith("eval_"):  # which is of other rows than what is called the rest of it
        shown = [known for known in shown if "eval" in known]
    near = difflib.get_close_matches(name, shown, n=1, cutoff=0.75)
    return f"did you mean {near[0]}?" if near else "see --help"


def instead(name: str, valid: Iterable[str]) -> str | None:
    """The advice for a name that others use; None where there is none, or this command has not what it advises."""
    there = {*valid, *LAUNCHERS}
    advice = INSTEAD.get(name)
    return advice if advice and there.issuperset(re.findall(r"--(\w+)", advice)) else None
