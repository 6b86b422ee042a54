"""V2 engines whose core and workers are processes of their own.

`python -m tests.engine.v2_processes processes`. vLLM spawns them, so each imports this module, and
with it the interpreter, before anything else. Seen to fail: the second worker drafts another tree.
"""

from __future__ import annotations

import tests.engine.interpreter  # noqa: F401  (before vLLM)

# isort: split
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
from vllm import LLM, RequestOutput, envs
from vllm.v1.engine.core_client import InprocClient

from tests.engine import v2, v2_drafters
from tests.engine.drafters import drafter_path
from tests.engine.engines import DEFAULTS, Request, model_path
from tests.engine.features import assert_equal, params, prompts, requests
from tests.engine.metrics import check, gather
from tests.engine.proposers import Truth, truth
from tests.engine.streaming import ABORTED, assert_streamed
from vllm_specplus.startup.derived import WIDTHS, Recommended
from vllm_specplus.startup.tune import TuneOptions, tune

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM compiles one function where there are two workers
CORE = dict(VLLM_ENABLE_V1_MULTIPROCESSING="1")
TWO_WORKERS: dict[str, Any] = dict(tensor_parallel_size=2, distributed_executor_backend="mp")
FEATURES = (
    "greedy",
    "seed",
    "penalties_seed",
    "json",
    "logprobs_seed",
    "n",
    "stop_string",
    "top_p",
)

_STARTED: list[LLM] = []
"""vLLM tears the process' distributed state down, for all engines, when one is collected."""


def watch(worker: Any, known: Truth | None) -> None:
    """Runs on a worker: records its trees, which are the oracle's if the truth is told."""
    speculator = worker.worker.model_runner.speculator
    if known is not None:
        truth().update(known)
        speculator.__class__ = v2.Oracle
    propose, speculator.trees = speculator.propose, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        codes = propose(*args, **kwargs)
        speculator.trees.append(codes.tolist())
        return codes

    speculator.propose = recorded


def seen(worker: Any) -> tuple[list[list[list[int]]], int, int]:
    """Per step and request the codes of the nodes; nodes accepted; nodes moved."""
    trees = worker.worker.model_runner.speculator.trees
    return trees, v2.MOVED.accepted, v2.MOVED.moved


def run(llm: LLM, wanted: Sequence[Request], known: Truth | None) -> list[RequestOutput]:
    """The outputs; asserts that all workers drafted and accepted the same, and moved some of it."""
    llm.collective_rpc(watch, args=(known,))
    outputs = llm.generate(
        [{"prompt_token_ids": list(request.prompt)} for request in wanted],
        [request.params for request in wanted],
        use_tqdm=False,
    )
    first, *others = llm.collective_rpc(seen)
    assert all(other == first for other in others), "the workers' rounds differ"
    trees, accepted, moved = first
    assert accepted > 0 and moved > 0
    assert any(len(set(tree)) > 1 for step in trees for tree in step)
    return outputs


def features(environment: dict[str, str], **options: Any) -> None:
    """One request of each feature, in one batch, of random trees; and what the engine counted."""
    wanted = [
        Request(prompt, params(name, index, max_tokens=v2.MAX_TOKENS))
        for index, (name, prompt) in enumerate(zip(FEATURES, prompts(len(FEATURES)), strict=True))
    ]
    plain = v2.plain_run("llama", wanted)
    settings = DEFAULTS | v2.TREE | dict(max_num_seqs=8, disable_log_stats=False) | options
    with mock.patch.dict(os.environ, environment):
        envs.disable_envs_cache()  # which the engine for the plain text has filled
        llm = LLM(str(model_path("llama")), **settings)
        _STARTED.append(llm)
        assert isinstance(llm.llm_engine.engine_core, InprocClient) == (environment != CORE)
        assert_equal(run(llm, wanted, truth()), plain)
        assert check(gather(llm), aborts=True).fallbacks["penalties"] == 1


def drafter(name: str) -> None:
    """With n-grams around it: each worker has a part of EAGLE, and whole heads."""
    wanted = [*v2_drafters.requests(name, 3), *v2_drafters.seeded(name, 3)]
    method, target = v2_drafters.DRAFTERS[name]
    plain = v2_drafters.engine(target).run(wanted)
    options = dict(
        speculative_model=f"[{method}+ngram]{drafter_path(name)}",
        num_speculative_tokens=v2_drafters.DEPTH,
        speculative_tree=f"dynamic:{v2_drafters.NUM_NODES}",
        skip_tokenizer_init=True,
        max_num_seqs=8,
    )
    llm = LLM(drafter_path(target), **DEFAULTS | options | TWO_WORKERS)
    _STARTED.append(llm)
    outputs = run(llm, wanted, None)
    for output, expected in zip(outputs, plain, strict=True):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def lookahead() -> None:
    """Drafted on the hosts of both workers."""
    wanted = v2.asked("greedy", 4, max_tokens=60)
    plain = v2.plain_run("llama", wanted)
    options = dict(speculative_model="[lookahead]", max_num_seqs=8)
    llm = LLM(str(model_path("llama")), **DEFAULTS | options | TWO_WORKERS)
    _STARTED.append(llm)
    assert_equal(run(llm, wanted, None), plain)


def streams() -> None:
    """vLLM's asynchronous engine, as a server uses it."""
    wanted = requests("greedy", ABORTED + 2)
    assert_streamed(wanted, v2.plain_run("llama", wanted), **DEFAULTS | v2.TREE)


def tuned() -> None:
    """Ranks are counted in a core of its own; its times mean nothing, so another tree is served."""
    texts = ["how long can the day be " * 4, "red green red green " * 6]
    engine = DEFAULTS | dict(max_num_seqs=2)
    settings = TuneOptions(str(model_path("llama")), "[ngram]", 4, 8, 64, 0.0, engine)
    with mock.patch.dict(os.environ, CORE):
        envs.disable_envs_cache()
        found = tune(settings, texts)
    assert found.engine == "cpu-v2" and set(found.step_costs) == {1, 2, 9, 18}
    deep = [sum(of_depth) for of_depth in found.rates]
    assert found.accepted[-1] == pytest.approx(sum(accumulate(deep, mul))) and deep[0] > 0
    assert len(deep) == 4 and found.accepted == sorted(found.accepted)
    wide, narrow = (
        Recommended(speculative_tree=f"dynamic:{n}", num_nodes=n, num_accepted=1, speedup=2)
        for n in (v2.NUM_NODES, 3)
    )
    found = found.model_copy(update={"recommended": {1: wide, 3: narrow}})
    with TemporaryDirectory() as folder:
        file = Path(folder) / "tuned.json"
        file.write_text(found.model_dump_json())
        wanted = v2.asked("greedy", 4, max_tokens=40)
        served: dict[str, Any] = dict(speculative_tree=f"tuned:{file}")
        v2.equal(wanted, kind="ngram", moves=False, **served)
        config = v2.engine("llama", "ngram", (*served.items(),)).llm.llm_engine.vllm_config
        widths = getattr(config.speculative_config, WIDTHS)
    assert widths == [(1, 2, v2.NUM_NODES), (3, 8, 3)]


SCENARIOS: dict[str, Callable[[], None]] = {
    "processes: core apart": lambda: features(CORE),
    "processes: two workers": lambda: features({}, **TWO_WORKERS),
    "processes: tuned tree": tuned,
    "processes: asynchronous engine": streams,
    "processes: two workers, eagle": lambda: drafter("eagle"),
    "processes: two workers, lookahead": lookahead,
    "processes: two workers, heads": lambda: drafter("heads"),
}

if __name__ == "__main__":
    v2.main(SCENARIOS)
