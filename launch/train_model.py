"""The model of a run: read in shards, and made ready for training as the command line says."""

from __future__ import annotations

import functools
from typing import Any

from hdpissa.engine.errors import ConfigError

TORCH_COMPILE = (
    "--torch_compile: must be off, because ZeRO-3's hooks, which gather each module's weights, are not compiled and "
    "cut every layer into small pieces: the same numbers, slower (docs/training.md); leave it out, or take "
    "--use_liger_kernel for fused operators"
)


def model_options(args: Any) -> dict[str, Any]:
    """What the command line says about the model's code."""
    attention = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    return {"trust_remote_code": args.trust_remote_code, **attention}


def check_model(args: Any, model: Any) -> None:
    """Refuses what this model, or this machine, cannot do.

    Args:
        model: with empty (meta) weights.
    """
    if args.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
        raise ConfigError(f"--gradient_checkpointing: {type(model).__name__} does not support it; leave it out")
    if args.use_liger_kernel:
        _check_liger(model)
    if args.torch_compile:
        raise ConfigError(TORCH_COMPILE)
    if args.neftune_noise_alpha is not None and model.get_input_embeddings() is None:
        raise ConfigError(f"--neftune_noise_alpha: {type(model).__name__} has no input embeddings; leave it out")


def _check_liger(model: Any) -> None:
    from transformers.utils import is_liger_kernel_available

    if not is_liger_kernel_available():
        raise ConfigError(
            "--use_liger_kernel: liger-kernel is not installed; pip install liger-kernel, or leave it out"
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(
            f"--use_liger_kernel: Liger has no kernels for model type {model.config.model_type}; leave it out"
        )


def load_model(args: Any, ds: dict) -> Any:
    """The model with sharded weights; collective."""
    from hdpissa.engine import load_pretrained

    model = load_pretrained(args.model_name_or_path, ds, **model_options(args))
    if args.use_liger_kernel:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, None)
    if args.gradient_checkpointing:
        # renamed in transformers 5; the old name warns
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if args.neftune_noise_alpha is not None:
        from transformers.integrations.neftune import activate_neftune

        activate_neftune(model, args.neftune_noise_alpha)
    if args.activation_offloading:
        offload_activations(model)
    return model


def offload_activations(model: Any) -> None:
    """From now on what the model's backward needs waits for it in host memory, pinned where there is a GPU.

    With gradient checkpointing that is the input of each checkpointed layer. Without it, it is everything that the
    operators keep, also the gathered weights of Linears that are no targets.
    """
    import torch

    forward, pin = model.forward, torch.cuda.is_available()

    @functools.wraps(forward)  # generate() asks for the signature
    def offloading(*args: Any, **kwargs: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        with torch.autograd.graph.save_on_cpu(pin_memory=pin):
            return forward(*args, **kwargs)

    model.forward = offloading
