"""Environment of all tests, set before torch, vLLM and Triton load.

One thread, in-process engines, quiet logs; Triton kernels run in its interpreter where no GPU is.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest

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

# isort: split
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if not torch.cuda.is_available() and find_spec("vllm"):
    import wrapt

    @wrapt.when_imported("vllm.model_executor.models.registry")
    def _inspect_here(registry: Any) -> None:
        """vLLM asks a process of its own, which imports all again, what each class of models can
        do, so that this one does not initialize CUDA. The test of benchmarks/gpu/run.sh, in
        processes without this file, sees that vLLM's own way works too."""
        registry._run_in_subprocess = lambda ask: ask()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The V2 engine's scenarios, which take longest, start first."""
    items.sort(key=lambda item: item.path.name != "test_v2.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """In runs in several processes (`make test`) a file's tests, which share engines, stay in one;
    but for the V2 engine's, which have processes of their own."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith("test_v2.py") else file

    return ByFile(config, log)
