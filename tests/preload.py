"""Imported once by the fork server (see ranks.py). Imports only: no torch operation may run here."""

import transformers.models.llama.modeling_llama

import hdpissa.engine  # noqa: F401
