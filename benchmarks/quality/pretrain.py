"""The small model of the fast rung: a Llama of a million parameters, pre-trained here on what packages document.

    python benchmarks/quality/pretrain.py

Four layers of width 128, a vocabulary of 2,048; the text is the docstrings of the installed transformers, torch and
numpy. Some minutes on one core; kept in ~/.cache/hdpissa.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path("~/.cache/hdpissa/quality-llama-1m").expanduser()
PACKAGES = ("transformers", "torch", "numpy")
VOCABULARY, LENGTH, BATCH, STEPS, RATE = 2048, 128, 16, 1000, 2e-3
HELD_OUT_FILE = "held_out.safetensors"
HELD_OUT = 128  # blocks of LENGTH tokens on which forgetting is measured


def docstrings(packages: Sequence[str] = PACKAGES) -> Iterator[str]:
    """Those of at least 200 characters, in the order of the files' names."""
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node) or ""
                    if len(text) >= 200:
                        yield text


def tokenizer_of(texts: list[str]):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="<eos>", pad_token="<eos>")


def ensure() -> Path:
    """The model's folder, made if it is not there yet; HELD_OUT_FILE in it has blocks of text not trained on."""
    if (FOLDER / HELD_OUT_FILE).exists():
        return FOLDER
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    torch.manual_seed(0)
    texts = sorted(set(docstrings()))
    random.Random(0).shuffle(texts)
    tokenizer = tokenizer_of(texts[:5000])
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    held_out, blocks = blocks[:HELD_OUT], blocks[HELD_OUT:]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, use_cache=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, STEPS)
    begun = time.perf_counter()
    for step in range(STEPS):
        rows = blocks[torch.randint(len(blocks), (BATCH,))]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
    model.save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    save_file({"input_ids": held_out.contiguous()}, FOLDER / HELD_OUT_FILE)  # last: the folder is whole by then
    return FOLDER


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(ensure())
    sys.exit(0)
