"""Executors that ask their workers what steps cost; the widths follow, before a scheduler is built.

vLLM hands the executor's class, and nothing else that runs there before its scheduler, from the
process that reads the options to the one that schedules.
"""

from __future__ import annotations

from math import inf

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.cost import CostModel
from vllm_specplus.core.width import describe, plan
from vllm_specplus.engine.compat import init_logger
from vllm_specplus.engine.compat_v2 import Executor, MultiprocExecutor, UniProcExecutor

logger = init_logger("vllm.specplus")


class MeasuringExecutor(Executor):
    """Replaces the schedule that had graphs of all widths captured by the one that pays."""

    def compile_or_warm_up_model(self) -> None:
        super().compile_or_warm_up_model()
        step_ms, spec_ms = self.collective_rpc("measure_step_costs")[0]
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
