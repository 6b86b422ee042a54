"""Engines under test: started once per configuration, driven step by step.

Several in-process engines live side by side; one start takes about half a second.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import parallel_state

from tests.engine.models import BUILDERS, MAX_MODEL_LEN, save
from tests.engine.proposers import Probe, learn, truth, watch

STATIC_TREE = "static:[(0,),(1,),(0,0),(0,1),(1,0),(0,0,0),(0,0,0,0)]"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "native": dict(speculative_model="[ngram]", num_speculative_tokens=5),
    "chain": dict(speculative_tree="static:[(0,),(0,0),(0,0,0),(0,0,0,0)]"),
    "static": dict(speculative_tree=STATIC_TREE),
    "dynamic": dict(speculative_tree="dynamic:12"),
    "oracle": dict(speculative_tree="dynamic:23"),
}
"""`chain` to `oracle` are trees of ours; `oracle` hides the true continuation in random trees."""
TREE_METHODS = ("static", "dynamic", "oracle")
ALL_METHODS = ("native", "chain", *TREE_METHODS)
DEFAULTS = dict(
    dtype="float32",
    enforce_eager=True,
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=32,
    block_size=32,
    num_gpu_blocks_override=512,
    seed=0,
)


@atexit.register
def _leave_garbage_alone() -> None:
    """When a process ends, vLLM searches all that it imported, twice for each of its engines."""
    gc.collect = lambda generation=2: 0


@dataclass(frozen=True)
class Request:
    """One request of a run: it arrives at engine step `arrival` and may be aborted later."""

    prompt: Sequence[int]
    params: SamplingParams
    arrival: int = 0
    abort_at: int | None = None


@dataclass
class Engine:
    """An LLM and its speculative round's Probe (None without one of ours).

    extra_tokens: tokens of the last run that came in a step together with an earlier one of the
    same sequence, so they were drafted and accepted.
    """

    llm: LLM
    probe: Any
    extra_tokens: int = field(default=0, init=False)

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def run(self, requests: Sequence[Request], keep_cache: bool = False) -> list[RequestOutput]:
        """Drives the engine to the end; the last output of each request, in order."""
        if not keep_cache:
            assert self.llm.reset_prefix_cache()
        if self.probe is not None:
            self.probe.reset()
        engine, internal_ids = self.llm.llm_engine, {}
        lengths: dict[tuple[str, int], int] = {}
        outputs: list[RequestOutput | None] = [None] * len(requests)
        step = self.extra_tokens = 0
        while engine.has_unfinished_requests() or any(r.arrival >= step for r in requests):
            for index, request in enumerate(requests):
                if request.arrival == step:
                    prompt = {"prompt_token_ids": list(request.prompt)}
                    internal_ids[index] = engine.add_request(str(index), prompt, request.params)
                if request.abort_at == step:
                    engine.abort_request([internal_ids[index]], internal=True)
            for output in engine.step():
                index = int(output.request_id)
                for sequence in output.outputs:
                    key, length = (output.request_id, sequence.index), len(sequence.token_ids)
                    self.extra_tokens += max(0, length - lengths.get(key, 0) - 1)
                    lengths[key] = length
                outputs[index] = _merge(outputs[index], output)
            step += 1
        assert self.free_blocks == self.all_blocks, "a finished run must free all KV blocks"
        return outputs

    @property
    def spec_round(self) -> Any:
        """The speculative round of the one worker."""
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        return executor.driver_worker.worker.model_runner.round

    @property
    def max_nodes(self) -> int:
        return self.scheduler.num_spec_tokens

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def all_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1


@cache
def allow_engines_after_numba() -> None:
    """vLLM's kernel registry looks at `__dict__` of all globals in all modules when a worker
    starts. llvmlite's library object answers with a wrapped C function, which ends the start of
    every in-process engine after the first that drafted with vLLM's own n-gram (numba)."""
    from llvmlite.binding.ffi import _lib_wrapper

    lookup = _lib_wrapper.__getattr__

    def without_dunders(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return lookup(self, name)

    _lib_wrapper.__getattr__ = without_dunders


def allow_experts_after_others() -> None:
    """vLLM makes the group of ranks that share experts with a process' first engine, if that has
    some. With one rank all groups are alike."""
    if parallel_state._EP is None:
        parallel_state._EP = parallel_state._TP


@cache
def model_path(model: str) -> Path:
    """A folder, or one that is written for a name of `BUILDERS`."""
    if "/" in model:
        return Path(model)
    path = Path(mkdtemp(prefix=f"specplus-{model}-"))
    save(BUILDERS[model](), path)
    return path


def spec_options(method: str) -> dict[str, Any]:
    ours = dict(speculative_model="[ngram]", num_speculative_tokens=6)
    return OPTIONS[method] if method in ("plain", "native") else ours | OPTIONS[method]


def _merge(before: RequestOutput | None, now: RequestOutput) -> RequestOutput:
    """`now` with the sequences (n > 1) that had no part in its step."""
    new = {sequence.index for sequence in now.outputs}
    now.outputs += [s for s in (before.outputs if before else ()) if s.index not in new]
    return now


_STARTED: list[Engine] = []
"""vLLM tears the process' distributed state down, for all engines, when one is collected."""


def start(model: str, method: str, **options: Any) -> Engine:
    """A new engine; `get_engine` shares one per configuration."""
    allow_engines_after_numba()
    allow_experts_after_others()
    llm = LLM(model=str(model_path(model)), **DEFAULTS | spec_options(method) | options)
    ours = method not in ("plain", "native")
    _STARTED.append(Engine(llm, install(llm, method == "oracle")[0] if ours else None))
    return _STARTED[-1]


@cache
def _shared(model: str, method: str, options: tuple[tuple[str, Any], ...]) -> Engine:
    return start(model, method, **dict(options))


def get_engine(model: str, method: str, **options: Any) -> Engine:
    return _shared(model, method, tuple(sorted(options.items())))


def install(llm: LLM, oracle: bool) -> list[Probe]:
    """Makes every worker draft whatever its proposer finds, and watches it."""
    return llm.collective_rpc(watch, args=(truth() if oracle else None,))


def reference(model: str, requests: Sequence[Request], **options: Any) -> list[RequestOutput]:
    """Plain decoding of the requests, which the oracle learns from."""
    outputs = get_engine(model, "plain", **options).run(
        [Request(request.prompt, request.params) for request in requests]
    )
    for request, output in zip(requests, outputs, strict=True):
        for sequence in output.outputs:
            learn(request.prompt, sequence.token_ids)
    return outputs
