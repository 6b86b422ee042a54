"""Proposers that draft on the host, on V2: `python -m tests.engine.v2_host host`."""

from __future__ import annotations

import tests.engine.interpreter  # noqa: F401  (before vLLM)

# isort: split
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine import lookahead, proposers, v2
from tests.engine.engines import Engine, Request
from tests.engine.features import assert_equal, params
from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.proposers.registry import register

AHEAD: dict[str, Any] = dict(
    speculative_model="[lookahead]", num_speculative_tokens=None, speculative_tree=None
)
RANDOM: dict[str, Any] = dict(speculative_model="[random]")


@register("random")
class Random(proposers.Oracle):
    """The oracle as a method of its own."""

    def __init__(self, config: SpecPlusConfig) -> None:
        super().__init__(config, proposers.truth())


def some_features() -> list[Request]:
    """In one batch: those that are drafted a tree and those that get a chain."""
    names = ("greedy", "seed", "json", "penalties_seed", "n")
    return [request for name in names for request in v2.asked(name, 2)]


def asynchronous(**method: Any) -> None:
    wanted = [*v2.asked("greedy", 3, max_tokens=40), *v2.asked("seed", 3)]
    plain, accepted = v2.plain_run("llama", wanted), v2.MOVED.accepted
    with v2.asynchronous():
        trees = v2.engine("llama", "ngram", (("max_num_seqs", 6), *method.items()))
    assert trees.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    assert_equal(trees.run(wanted), plain)
    assert v2.MOVED.accepted > accepted


def ahead(**options: Any) -> Engine:
    return v2.engine("llama", "ngram", tuple((AHEAD | options).items()))


def held(trees: Engine) -> int:
    """Requests that the proposer still knows."""
    runner = trees.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return len(runner.speculator.drafts.round.proposer._requests)


def text_of_lookahead(method: str) -> None:
    options = AHEAD | dict(speculative_model=f"[{method}]")
    for feature in ("greedy", "seed"):
        v2.equal(v2.asked(feature, 4, max_tokens=40), kind="ngram", moves=False, **options)
    # The runner tells of a finished request with the next step.
    (last,) = wanted = v2.asked("greedy", 1)
    assert_equal(ahead(**options).run(wanted), v2.plain_run("llama", [last]))
    assert held(ahead(**options)) == 1


def paths(sabotage: Callable[[pytest.MonkeyPatch], None] | None = None) -> None:
    """The proposer is told what the target says after each path, accepted or not."""
    trees = ahead(lookahead_prompt_tokens=0)
    with pytest.MonkeyPatch.context() as patch:
        seen = lookahead.watch_rows(patch)
        if sabotage is not None:
            sabotage(patch)
        trees.run(v2.asked("greedy", 2, max_tokens=12))
    some = seen[:: len(seen) // 40]
    settings = params("greedy", max_tokens=1, ignore_eos=True)
    plain = v2.plain_run("llama", [Request(tokens, settings) for tokens, _ in some])
    said = [output.outputs[0].token_ids[0] for output in plain]
    assert (said == [token for _, token in some]) is (sabotage is None)


SCENARIOS: dict[str, Callable[[], None]] = {
    "host: random trees": lambda: v2.equal(some_features(), kind="ngram", **RANDOM),
    "host: random trees, async": lambda: asynchronous(**RANDOM),
    "host: random trees, preemption": lambda: v2.preemption(kind="ngram", **RANDOM),
    "host: lookahead": lambda: text_of_lookahead("lookahead"),
    "host: lookahead beside n-grams": lambda: text_of_lookahead("lookahead+ngram"),
    "host: lookahead, async": lambda: asynchronous(**AHEAD),
    "host: what follows each path": paths,
    "host: what follows each path, rows of the batch": lambda: paths(lookahead.rows_of_the_batch),
}

if __name__ == "__main__":
    v2.main(SCENARIOS)
