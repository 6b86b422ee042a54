"""Environment of all tests, set before vLLM and Triton load.

One thread, in-process engines, quiet logs; Triton kernels run in its interpreter where no GPU is.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "OMP_NUM_THREADS": "1",
    # vLLM's own n-gram drafts with numba, whose OpenMP layer would reset torch's thread count.
    "NUMBA_NUM_THREADS": "1",
    "NUMBA_THREADING_LAYER": "workqueue",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the V2 engine come last: their scenarios run beside others."""
    items.sort(key=lambda item: "test_v2.py" in item.nodeid)


_BEGIN = pytest.StashKey[list[Callable[[], None]]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Modules with a function `begin` have work that others need not wait for."""
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    session.stash[_BEGIN] = [module.begin for module in modules if hasattr(module, "begin")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """It begins with the engine's tests, which use one core of two; benchmarks came before."""
    if item.nodeid.startswith("tests/engine/"):
        while item.session.stash[_BEGIN]:
            item.session.stash[_BEGIN].pop()()
