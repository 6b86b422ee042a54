"""The CPU worker: builds our model runner where vLLM builds its own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vllm_specplus.engine.compat import scoped
from vllm_specplus.engine.compat_cpu import CPUWorker, cpu_worker
from vllm_specplus.engine.metrics import CountingWorker
from vllm_specplus.engine.v1 import SpecPlusCPUModelRunner, fallback


class SpecPlusCPUWorker(CountingWorker, CPUWorker):
    """vLLM's CPU worker around `SpecPlusCPUModelRunner`."""

    def init_device(self) -> None:
        with scoped(cpu_worker, "CPUModelRunner", SpecPlusCPUModelRunner):
            super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        runner = self.model_runner
        if runner.round.budget.cost is None:
            runner.round.budget.measured(runner.measure_step_costs())
        runner.measure_level_costs()
        self.count_rounds(runner.round.stats, fallback, (runner, "propose_draft_token_ids"))
        return times

    def specplus_count_ranks(self) -> None:
        """Has `specplus_measured` tell which ranks are accepted from now on."""
        self.model_runner.round.count_ranks()

    def specplus_measured(self) -> dict[str, Any]:
        """Which ranks were accepted, and what steps cost; through `collective_rpc`."""
        runner = self.model_runner
        return asdict(runner.round.ranks) | {"step_ms": [*runner.measure_step_costs().items()]}
