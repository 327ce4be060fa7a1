"""launch/train.py with the cross entropy summed as on a CPU of another vector width; see golden.py.

torch's fp32 log-softmax on CPU adds up one partial sum per vector lane, one after another. With a vocabulary of
49,152 that is 6,144 additions per lane on AVX2 and 3,072 on AVX-512, and terms below half a unit in the last
place of the partial sum vanish: the loss comes out too small by 1.8e-5 on AVX2 and by half of that on AVX-512
(measured against float64). A comparison at 1e-5 between the two has to use one of them.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor


class LaneCrossEntropy(torch.autograd.Function):
    """Mean cross entropy with an fp32 softmax denominator of `lanes` sequential partial sums."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, lanes: int):
        largest = logits.max(-1, keepdim=True).values
        terms = (logits - largest).exp().view(len(logits), -1, lanes)
        partial = terms[:, 0].clone()
        for k in range(1, terms.shape[1]):
            partial += terms[:, k]
        log_probs = logits - (largest + partial.sum(-1, keepdim=True).log())
        ctx.save_for_backward(log_probs, labels)
        return -log_probs.gather(1, labels[:, None]).mean()

    @staticmethod
    def backward(ctx, grad):
        log_probs, labels = ctx.saved_tensors
        probs = log_probs.exp()
        probs[torch.arange(len(labels)), labels] -= 1
        return probs * (grad / len(labels)), None, None


def install(lanes: int) -> None:
    """Replaces torch.nn.functional.cross_entropy, which transformers' loss calls, in this process."""

    def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "mean", **_: object):
        assert reduction == "mean", reduction
        counted = labels != ignore_index
        return LaneCrossEntropy.apply(logits[counted], labels[counted], lanes)

    torch.nn.functional.cross_entropy = cross_entropy


if __name__ == "__main__":
    from hdpissa.launch import train

    install(int(os.environ["GOLDEN_LANES"]))
    sys.exit(train.run())
