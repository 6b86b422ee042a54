"""The workers of the V2 engine: they build our model runners where vLLM builds its own."""

from __future__ import annotations

from typing import Any

from vllm_specplus.core.stats import SpecStats
from vllm_specplus.engine.compat import Worker
from vllm_specplus.engine.drafters.modules_v2 import ModulesRunner
from vllm_specplus.engine.metrics import CountingWorker
from vllm_specplus.engine.v2 import TreeRunner


class ModulesWorker(Worker):
    """vLLM's GPU worker around `ModulesRunner`."""

    def _make_model_runner(self) -> ModulesRunner:
        return ModulesRunner(self.vllm_config, self.device)


class TreeWorker(CountingWorker):
    """vLLM's GPU worker around `TreeRunner`."""

    def _make_model_runner(self) -> TreeRunner:
        return TreeRunner(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        state, drafter = self.model_runner.model_state, (self.model_runner.speculator, "propose")
        self.count_rounds(SpecStats(state.max_depth), state.fallback, drafter)
        return times
