"""Imported once by the fork server (see ranks.py). Imports only: no torch operation may run here.

Beside the obvious, what DeepSpeed and transformers import late, at first use (2,000 modules, ten seconds).
"""

import deepspeed.runtime.zero.muon.muon_optimizer
import torch._inductor.compile_fx
import transformers.conversion_mapping
import transformers.integrations.deepspeed
import transformers.modeling_utils
import transformers.models.llama.modeling_llama

import hdpissa.engine
