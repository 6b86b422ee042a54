"""The worker of the V2 engine: builds our model runner where vLLM builds its own."""

from __future__ import annotations

from typing import Any

from vllm_specplus.core.stats import SpecStats
from vllm_specplus.engine.metrics import CountingWorker
from vllm_specplus.engine.v2 import TreeRunner


class TreeWorker(CountingWorker):
    """vLLM's GPU worker around `TreeRunner`."""

    def _make_model_runner(self) -> TreeRunner:
        return TreeRunner(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        state, drafter = self.model_runner.model_state, (self.model_runner.speculator, "propose")
        self.count_rounds(SpecStats(state.max_depth), state.fallback, drafter)
        return times
