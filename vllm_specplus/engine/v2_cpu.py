"""The V2 engine on a CPU, under Triton's interpreter: how it is tested without a GPU."""

from __future__ import annotations

import sys

from vllm_specplus.engine.attention import gpu_backends
from vllm_specplus.engine.attention_cpu import TreeCPUAttentionBackend
from vllm_specplus.engine.compat import AttentionBackendEnum, scoped
from vllm_specplus.engine.compat_cpu import CPUWorker
from vllm_specplus.engine.compat_v2 import CPUModelRunner
from vllm_specplus.engine.drafters.modules_v2 import ModulesRunner
from vllm_specplus.engine.v2 import TreeRunner
from vllm_specplus.engine.worker_v2 import ModulesWorker, TreeWorker


class TreeCPURunner(TreeRunner, CPUModelRunner):
    """vLLM's V2 runner for CPUs with trees."""

    @staticmethod
    def backends() -> dict[AttentionBackendEnum, type]:
        return gpu_backends() | {AttentionBackendEnum.CPU_ATTN: TreeCPUAttentionBackend}


class ModulesCPURunner(ModulesRunner, CPUModelRunner):
    """vLLM's V2 runner for CPUs with all modules."""


class _CPUWorker(CPUWorker):
    """vLLM's CPU worker around another runner."""

    runner_cls: type[CPUModelRunner]

    def init_device(self) -> None:
        module = sys.modules[CPUModelRunner.__module__]
        with scoped(module, "CPUModelRunner", self.runner_cls):
            super().init_device()


class TreeCPUWorker(TreeWorker, _CPUWorker):
    """`TreeWorker` on a CPU."""

    runner_cls = TreeCPURunner


class ModulesCPUWorker(ModulesWorker, _CPUWorker):
    """`ModulesWorker` on a CPU."""

    runner_cls = ModulesCPURunner
