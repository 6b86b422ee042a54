"""How wide trees are at which batch size: `python -m tests.engine.v2_width width`.

Rows cost nothing up to 15, so widths go from 8 nodes for one request to none for 8. Measured steps
are real ones, whose times in the interpreter mean nothing: a core is told these costs instead, also
a spawned one, which imports this module first. Seen to fail: given costs left unused, the captured
schedule left in place, no ancestor masks, a drafter's chain as long as ever where trees are narrow.
"""

from __future__ import annotations

import tests.engine.interpreter  # noqa: F401  (before vLLM)

# isort: split
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

from vllm import LLM, envs
from vllm.v1.engine.core_client import InprocClient

from tests.engine import v2, v2_drafters, v2_processes
from tests.engine.engines import DEFAULTS, Engine, Request, model_path
from tests.engine.features import assert_equal, params, prompts
from tests.engine.proposers import truth
from vllm_specplus.core.cost import CostModel
from vllm_specplus.startup import executor, host, patches

COSTS = {1: 5.0, 15: 5.0, 16: 50.0}
SCHEDULE = [(1, 1, 8), (2, 3, 4), (4, 5, 2), (6, 7, 1), (8, 10, 0)]
WIDTHS = [nodes for _, _, nodes in SCHEDULE]
NUM_REQS = SCHEDULE[-1][1]
GIVEN: dict[str, Any] = dict(
    speculative_step_costs=",".join(f"{rows}:{ms}" for rows, ms in COSTS.items()),
    max_num_seqs=NUM_REQS,
)


def told(step_ms: dict[int, float], spec_ms: float) -> CostModel:
    """Instead of what was measured."""
    assert sorted(step_ms) == [1, 2, 4, 8, 9, 18, 36, 72], step_ms
    assert min(step_ms.values()) > 0 and spec_ms >= 0
    return CostModel(COSTS)


executor.CostModel = told  # type: ignore[assignment,misc]


def watch(worker: Any) -> None:
    """Runs on a worker: records each step's requests, their drafts, and the width asked for."""
    worker.worker.steps = []
    runner = worker.worker.model_runner
    execute = runner.execute_model

    def recorded(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if num_reqs := len(scheduler_output.num_scheduled_tokens):
            drafts = scheduler_output.scheduled_spec_decode_tokens.values()
            asked = scheduler_output.num_spec_tokens_to_schedule
            worker.worker.steps.append((num_reqs, sorted(map(len, drafts)), asked))
        return execute(scheduler_output, *args, **kwargs)

    runner.execute_model = recorded


def follows(llm: LLM) -> None:
    """Asserts that every step asked for the width of its batch size, and that all were drafted."""
    steps = llm.collective_rpc(lambda worker: worker.worker.steps)[0]
    for num_reqs, _, asked in steps:
        (wanted,) = [nodes for first, last, nodes in SCHEDULE if first <= num_reqs <= last]
        assert asked == wanted, (num_reqs, asked)
    before = {asked for _, _, asked in steps[:-1]}
    drafted = {max(drafts, default=0) for _, drafts, _ in steps[1:]}
    assert before >= set(WIDTHS) and drafted == set(WIDTHS), drafted


ALONE = 4


def requests(one_by_one: bool) -> list[Request]:
    """They come and go one after the other, up to ten at a time, the first one after it was alone
    for some steps even where these overlap; or they come at once."""
    names = ["seed", "json", "penalties_seed", "greedy", "greedy"] * 2
    return [
        Request(
            prompt,
            params(name, i, max_tokens=24 if one_by_one else 2 + 2**i // 6, ignore_eos=True),
            arrival=(i and i + ALONE) * one_by_one,
        )
        for i, (name, prompt) in enumerate(zip(names, prompts(len(names)), strict=True))
    ]


def in_one_process(trees: Engine) -> None:
    wanted = requests(one_by_one=True)
    plain = v2.plain_run("llama", wanted)
    # In vLLM's own thread grammars come some steps late, and steps would hang on timing.
    trees.scheduler.structured_output_manager._use_async_grammar_compilation = False
    trees.llm.collective_rpc(watch)
    moved = v2.MOVED.moved
    assert_equal(trees.run(wanted), plain)
    assert v2.MOVED.moved > moved, "no accepted node had to move"
    follows(trees.llm)


def given() -> None:
    in_one_process(v2.engine("llama", "oracle", tuple(GIVEN.items())))


def ahead() -> None:
    with v2.asynchronous():
        trees = v2.engine("llama", "oracle", tuple((GIVEN | dict(seed=1)).items()))
    assert trees.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    in_one_process(trees)


def around(name: str) -> None:
    """Trunks of vLLM's drafter, which is told the width as well."""
    wanted = [replace(r, arrival=i) for i, r in enumerate(v2_drafters.requests(name, NUM_REQS))]
    plain = v2_drafters.texts(v2_drafters.engine(v2_drafters.DRAFTERS[name][1]), wanted)
    trees = v2_drafters.drafting(name, v2.NUM_NODES, **GIVEN)
    trees.llm.collective_rpc(watch)
    assert v2_drafters.texts(trees, wanted) == plain
    assert trees.extra_tokens > 0
    follows(trees.llm)


def in_processes(environment: dict[str, str], **options: Any) -> None:
    """Costs are measured, which otherwise happens on GPUs only."""
    wanted = requests(one_by_one=False)
    plain = v2.plain_run("llama", wanted)
    settings = DEFAULTS | v2.TREE | dict(max_num_seqs=NUM_REQS) | options
    with (
        mock.patch.object(patches, "V2_ENGINE", host.V2_CPU_ENGINE),
        mock.patch.dict(os.environ, environment),
    ):
        envs.disable_envs_cache()  # which the engine for the plain text has filled
        llm = LLM(str(model_path("llama")), **settings)
        core_is_apart = not isinstance(llm.llm_engine.engine_core, InprocClient)
        assert core_is_apart == (environment == v2_processes.CORE)
        llm.collective_rpc(watch)
        assert_equal(v2_processes.run(llm, wanted, truth()), plain)
        follows(llm)


SCENARIOS: dict[str, Callable[[], None]] = {
    "width: given": given,
    "width: given, async": ahead,
    "width: given, draft": lambda: around("draft"),
    "width: measured, two workers": lambda: in_processes({}, **v2_processes.TWO_WORKERS),
}

if __name__ == "__main__":
    v2.main(SCENARIOS)
