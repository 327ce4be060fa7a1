"""Tiny Llama models and batches that tests share; small enough for float64 and for odd shard sizes."""

from __future__ import annotations

import torch

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama(*, dtype=torch.float32, tie=False, hidden=20, layers=2, seed=0, half=False, **overrides):
    """A Llama whose sizes divide by nothing in particular, so that ZeRO-3 cuts rows in the middle."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 61, "hidden_size": hidden, "intermediate_size": 27, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "tie_word_embeddings": tie, "attn_implementation": "eager", "use_cache": False,
    }  # fmt: skip
    config = LlamaConfig(**{**settings, **overrides})
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        for p in model.parameters():  # the default initialisation is so small that nothing is learned
            if p.dim() == 2:
                p.mul_(8.0)
    if half:  # values that fp16 can hold
        model = model.half()
    return model.to(dtype)


def tiny_batch(step: int, slice_id: int, micro: int, vocab: int = 61, length: int = 9):
    """The same batch for the same (step, slice, micro-batch), whatever rank asks."""
    generator = torch.Generator().manual_seed(1000 * step + 50 * slice_id + micro)
    ids = torch.randint(0, vocab, (2, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def target_names(model, suffixes=tuple(SEVEN)):
    """Parameter names of the weights whose module name ends in one of the suffixes."""
    return [n for n, _ in model.named_parameters() if n.removesuffix(".weight").rsplit(".", 1)[-1] in suffixes]


def ds_settings(*, bf16=False, accumulation=1, zero=None, clip=0.0, **hd_pissa):
    """A DeepSpeed config with the `hd_pissa` section given as keywords."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **(zero or {})},
        "bf16": {"enabled": bf16},
        "hd_pissa": {"r": 2, **hd_pissa},
    }
    if clip:
        config["gradient_clipping"] = clip
    return config


class Narrow(torch.nn.Module):
    """Matrices so small that on four ranks a shard owns nothing, with biases and a plain loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = torch.nn.Embedding(61, 3)
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 2)
        self.head = torch.nn.Linear(2, 61)

    def forward(self, input_ids, labels, attention_mask=None):
        from types import SimpleNamespace

        logits = self.head(torch.tanh(self.second(torch.tanh(self.first(self.embed(input_ids))))))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def build(model=None, *, dtype=torch.float32):
    """A tiny Llama with the given settings, or `Narrow` for the word "narrow"."""
    return Narrow().to(dtype) if model == "narrow" else tiny_llama(dtype=dtype, **(model or {}))
