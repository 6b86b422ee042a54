"""Statistics of the rounds, taken where a worker is asked for a step and where it answers.

Both engines and every proposer are counted alike there, and nothing waits for a device: how many
tokens a request emitted is known once vLLM has copied them to the host for the scheduler. What was
counted travels with them, in the answer's place for the statistics of an encoder-cache connector, a
dict that the scheduler hands to the front-end as it is (startup/metrics.py takes it out). Where
such a connector has that place, or the front-end keeps no statistics (`disable_log_stats`, the
default of `LLM`), the counters stay with the worker: in its log at the end and in
`collective_rpc("specplus_stats")`.

Seconds are of the clock of the device that works, on a GPU by events that are read steps later.
`verify_seconds`: the steps that verify drafts, from their first launch to the end of sampling and
commit, with all that is in the batch and the gaps between launches. `draft_seconds`: the proposer,
in all steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from vllm_specplus.core.phase_clock import PhaseClock
from vllm_specplus.core.stats import STATS_KEY, SpecStats, summary
from vllm_specplus.engine.compat import (
    AsyncModelRunnerOutput,
    ECConnectorOutput,
    ECConnectorStats,
    ModelRunnerOutput,
    SamplingParams,
    SchedulerOutput,
    Worker,
    init_logger,
)

logger = init_logger("vllm.specplus")


class CountingWorker(Worker):
    """A worker that counts its rounds, from `count_rounds` on, and logs them at shutdown if the
    front-end does not."""

    _rounds: RoundCounter | None = None

    def count_rounds(
        self,
        stats: SpecStats,
        fallback: Callable[[SamplingParams], str | None],
        drafter: tuple[Any, str],
    ) -> None:
        """Starts, when vLLM's warm-up is over.

        stats: where to. fallback: why a request is not drafted a tree (`FALLBACKS`), or None.
        drafter: object and name of the method that drafts.
        """
        counts_there = getattr(self.speculative_config, "specplus_log_stats", False)
        tells = counts_there and self.vllm_config.ec_transfer_config is None
        self._rounds = RoundCounter(stats, PhaseClock(stats, self.device), fallback, tells)
        self._rounds.clock.watch(*drafter)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        if self._rounds is not None:
            self._rounds.asked(scheduler_output)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        if self._rounds is None or output is None:
            return output
        answered = partial(self._rounds.answered, self._rounds.step)
        if isinstance(output, AsyncModelRunnerOutput):
            return _CountedOutput(output, answered)
        return answered(output)

    def specplus_stats(self) -> dict[str, Any]:
        """Counters of the rounds so far; call through `collective_rpc`. Of the workers of a tensor
        parallel group, the first one's count."""
        assert self._rounds is not None, "the engine has not started"
        self._rounds.clock.read()
        return asdict(self._rounds.stats)

    def shutdown(self) -> None:
        rounds, self._rounds = self._rounds, None
        if rounds is not None and self.is_driver_worker and not rounds.tells:
            rounds.clock.read()
            logger.info(summary(rounds.stats.counts()))
        super().shutdown()


class _CountedOutput(AsyncModelRunnerOutput):
    """vLLM's output, counted when it has reached the host."""

    def __init__(
        self,
        output: AsyncModelRunnerOutput,
        answered: Callable[[ModelRunnerOutput], ModelRunnerOutput],
    ) -> None:
        self._output, self._answered = output, answered

    def get_output(self) -> ModelRunnerOutput:
        return self._answered(self._output.get_output())


class RoundCounter:
    """Counts rounds from what the scheduler asks for and what it is answered.

    step: of the step that was asked for last, how many drafts each request has, and whether the
    next step is to have some. tells: whether the answers take what is counted along.
    """

    def __init__(
        self,
        stats: SpecStats,
        clock: PhaseClock,
        fallback: Callable[[SamplingParams], str | None],
        tells: bool,
    ) -> None:
        self.stats, self.clock = stats, clock
        self.step: tuple[dict[str, int], bool] = ({}, True)
        self._fallback, self.tells = fallback, tells
        self._seen: set[str] = set()
        self._sent: Counter[str] = Counter()

    def asked(self, scheduler_output: SchedulerOutput) -> None:
        """A step begins."""
        drafts = scheduler_output.scheduled_spec_decode_tokens
        num_drafts = {req_id: len(tokens) for req_id, tokens in drafts.items()}
        self.step = num_drafts, scheduler_output.num_spec_tokens_to_schedule > 0
        self.clock.read()
        self.clock.start(verifies=bool(drafts))
        self._seen -= scheduler_output.finished_req_ids
        for request in scheduler_output.scheduled_new_reqs:
            if request.req_id not in self._seen:  # it is new again after a preemption
                self._seen.add(request.req_id)
                if (reason := self._fallback(request.sampling_params)) is not None:
                    self.stats.fallbacks[reason] += 1

    def answered(
        self, step: tuple[dict[str, int], bool], output: ModelRunnerOutput
    ) -> ModelRunnerOutput:
        """Counts the step, and adds what the front-end has not been told yet."""
        num_drafts, drafts_next = step
        emitted = zip(output.req_ids, output.sampled_token_ids, strict=True)
        for req_id, tokens in emitted:
            if tokens:  # none after a part of a prompt
                self.stats.observe(num_drafts.get(req_id, 0), len(tokens) - 1)
                self.stats.fallbacks["does_not_pay"] += not drafts_next
        self.clock.read()
        if self.tells and output.req_ids:
            counted = Counter(self.stats.counts())
            news, self._sent = dict(counted - self._sent), counted
            output.ec_connector_output = ECConnectorOutput(
                ec_connector_stats=ECConnectorStats({STATS_KEY: news})
            )
        return output
