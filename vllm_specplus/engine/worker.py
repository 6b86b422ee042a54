"""The CPU worker: builds our model runner where vLLM builds its own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vllm_specplus.engine.compat import CPUWorker, cpu_worker, scoped
from vllm_specplus.engine.v1 import SpecPlusCPUModelRunner


class SpecPlusCPUWorker(CPUWorker):
    """vLLM's CPU worker around `SpecPlusCPUModelRunner`."""

    def init_device(self) -> None:
        with scoped(cpu_worker, "CPUModelRunner", SpecPlusCPUModelRunner):
            super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.model_runner.measure_step_costs()
        return times

    def specplus_stats(self) -> dict[str, Any]:
        """Counters of the speculative rounds so far; call through `collective_rpc`."""
        return asdict(self.model_runner.round.stats)
