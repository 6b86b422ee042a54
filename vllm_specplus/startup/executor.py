"""Executors that ask their workers what steps cost; the widths follow, before a scheduler is built.

vLLM hands the executor's class, and nothing else that runs there before its scheduler, from the
process that reads the options to the one that schedules.
"""

from __future__ import annotations

import timeit
from math import inf
from typing import Any

import torch

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.cost import CostModel
from vllm_specplus.core.width import describe, plan
from vllm_specplus.engine.compat import init_logger, scoped
from vllm_specplus.engine.compat_v2 import Executor, MultiprocExecutor, UniProcExecutor

logger = init_logger("vllm.specplus")

_MOST_ROWS_TIMED = 512
"""vLLM's largest graph on most GPUs; beyond it the cost goes on as the last two points say."""


class MeasuringExecutor(Executor):
    """Replaces the schedule that had graphs of all widths captured by the one that pays."""

    def compile_or_warm_up_model(self) -> None:
        super().compile_or_warm_up_model()
        step_ms, spec_ms = self.collective_rpc(measure_step_costs)[0]
        config = SpecPlusConfig.model_validate(self.vllm_config.additional_config["specplus"])
        most = self.scheduler_config.max_num_seqs
        captured = self.speculative_config.num_speculative_tokens_per_batch_size
        chosen = plan(
            config,
            CostModel(step_ms, spec_ms),
            [width for first, _, width in captured if first <= most],
            most,
            self.vllm_config.compilation_config.max_cudagraph_capture_size or inf,
        )
        self.speculative_config.num_speculative_tokens_per_batch_size = chosen
        logger.info("speculative_tree: %s", describe(chosen))


class MeasuringUniProcExecutor(MeasuringExecutor, UniProcExecutor):
    """One worker, in the process of the scheduler."""


class MeasuringMultiprocExecutor(MeasuringExecutor, MultiprocExecutor):
    """A process for each worker: their steps run in lockstep, and the first one's time counts."""


MEASURING: dict[type, type] = {
    UniProcExecutor: MeasuringUniProcExecutor,
    MultiprocExecutor: MeasuringMultiprocExecutor,
}
"""vLLM's executor -> ours."""


@torch.inference_mode()
def measure_step_costs(worker: Any) -> tuple[dict[int, float], float]:
    """ms of the target's forward pass and logits by total rows, plain and with whole trees; and ms
    of drafting. Sampling, the commit and the host's work are left out.

    Run by the workers of GPUs, once their graphs are captured: an interpreter's times mean nothing.
    """
    runner, tree = worker.model_runner, 1 + worker.model_runner.num_speculative_steps
    most = min(_MOST_ROWS_TIMED, runner.max_num_tokens)
    counts = [1 << i for i in range(runner.max_num_reqs.bit_length())]
    shapes = [(n, rows) for n in counts for rows in (1, tree) if n * rows <= most]
    with scoped(runner, "speculator", None):
        step_ms = {n * rows: _step_ms(worker, n, rows) for n, rows in shapes}
    return step_ms, max(_step_ms(worker, 1, tree) - step_ms[tree], 0.0)


def _step_ms(worker: Any, num_reqs: int, rows_per_req: int) -> float:
    runner, num_rows = worker.model_runner, num_reqs * rows_per_req

    def step() -> None:
        hidden_states, _ = runner._dummy_run(num_rows, uniform_decode=True)
        runner.model.compute_logits(hidden_states[:num_rows])
        worker.synchronize_device()

    with scoped(runner, "decode_query_len", rows_per_req):
        return 1e3 * min(timeit.repeat(step, number=1, repeat=3))
