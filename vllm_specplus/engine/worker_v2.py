"""The workers of the V2 engine: they build our model runners where vLLM builds its own."""

from __future__ import annotations

import timeit
from dataclasses import asdict
from typing import Any

import torch

from vllm_specplus.core.rank_counts import RankCounts
from vllm_specplus.core.stats import SpecStats
from vllm_specplus.engine.compat import Worker, scoped
from vllm_specplus.engine.drafters.modules_v2 import ModulesRunner
from vllm_specplus.engine.metrics import CountingWorker
from vllm_specplus.engine.v2 import TreeRunner

_MOST_ROWS_TIMED = 512
"""vLLM's largest graph on most GPUs; beyond it the cost goes on as the last two points say."""


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

    @torch.inference_mode()
    def measure_step_costs(self) -> tuple[dict[int, float], float]:
        """ms of the target's forward pass and logits by total rows, plain and with whole trees; and
        ms of drafting. Sampling, the commit and the host's work are left out.

        To be asked once graphs are captured; an interpreter's times mean nothing.
        """
        runner, tree = self.model_runner, 1 + self.model_runner.num_speculative_steps
        most = min(_MOST_ROWS_TIMED, runner.max_num_tokens)
        counts = [1 << i for i in range(runner.max_num_reqs.bit_length())]
        shapes = [(n, rows) for n in counts for rows in (1, tree) if n * rows <= most]
        with scoped(runner, "speculator", None):
            step_ms = {n * rows: self._step_ms(n, rows) for n, rows in shapes}
        return step_ms, max(self._step_ms(1, tree) - step_ms[tree], 0.0)

    def _step_ms(self, num_reqs: int, rows_per_req: int) -> float:
        runner, num_rows = self.model_runner, num_reqs * rows_per_req

        def step() -> None:
            hidden_states, _ = runner._dummy_run(num_rows, uniform_decode=True)
            runner.model.compute_logits(hidden_states[:num_rows])
            self.synchronize_device()

        with scoped(runner, "decode_query_len", rows_per_req):
            return 1e3 * min(timeit.repeat(step, number=1, repeat=3))

    def specplus_count_ranks(self) -> None:
        """Has `specplus_measured` tell which ranks are accepted from now on, for
        which steps wait."""
        self.model_runner.model_state.ranks = RankCounts()

    def specplus_measured(self) -> dict[str, Any]:
        """Which ranks were accepted, and what steps cost; through `collective_rpc`."""
        step_ms, _ = self.measure_step_costs()
        return asdict(self.model_runner.model_state.ranks) | {"step_ms": [*step_ms.items()]}
