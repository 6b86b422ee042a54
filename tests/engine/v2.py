"""Scenarios of V2: `python -m tests.engine.v2 GROUP...` prints how each of the groups ended.

Seen to fail: plain text looked up by the prompt alone (feature).
"""

from __future__ import annotations

import tests.engine.interpreter  # noqa: F401  (before vLLM)

# isort: split
import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Literal
from unittest import mock

import torch
from msgspec.structs import astuple
from specplus_kernels import dispatch
from vllm import LLM
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.gpu.spec_decode import rejection_sampler

from tests.engine.apart import RESULT
from tests.engine.engines import DEFAULTS, STATIC_TREE, Engine, Request, model_path
from tests.engine.features import (
    FEATURES,
    assert_equal,
    differ,
    params,
    prompts,
    requests,
)
from tests.engine.metrics import check, gather
from tests.engine.models import VOCAB_SIZE
from tests.engine.proposers import continuations, learn, plant, truth
from vllm_specplus.core.stats import FALLBACKS
from vllm_specplus.core.tree import Tree
from vllm_specplus.engine import v2
from vllm_specplus.engine.v2_speculator import NgramTreeSpeculator

NUM_NODES = 8
TREE = dict(
    speculative_model="[ngram]", num_speculative_tokens=5, speculative_tree=f"dynamic:{NUM_NODES}"
)
MAX_TOKENS = 16
Provider = Literal["reference", "triton"]


class Oracle(NgramTreeSpeculator):
    """Random trees with the true continuation hidden in them; chains where one is asked for."""

    def propose_on(self, trunk: Any, slots: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self._codes(slot) for slot in slots.tolist()])

    def _codes(self, slot: int) -> list[int]:
        length = int(self.req_states.total_len.gpu[slot])
        known = self.req_states.all_token_ids.gpu[slot, :length].tolist()
        rng = random.Random(repr(known[-8:]) + str(length))
        chain = bool(self.req_states.chain_only[slot])
        parents = [row if chain else rng.randint(0, row) for row in range(NUM_NODES)]
        rest = rng.choice([r for r in continuations(truth(), known) if r] or [[]])
        planted = plant(rest, parents, rng)
        return Tree(planted.tokens, planted.parents).encode()


class Moved:
    """Counts what the commits accepted and moved."""

    def __init__(self) -> None:
        self.accepted = self.moved = 0
        commit = v2.TreeModelState.commit

        def counted(state: Any, input_batch: Any, path: torch.Tensor) -> None:
            self.accepted += int((path > 0).sum())
            self.moved += int((path > torch.arange(path.shape[1])).sum())
            commit(state, input_batch, path)

        v2.TreeModelState.commit = counted  # type: ignore[assignment,method-assign]


MOVED = Moved()


_STARTED: list[Engine] = []
"""vLLM tears the process' distributed state down, for all engines, when one is collected."""


@cache
def engine(model: str, kind: str, options: tuple[tuple[str, Any], ...] = ()) -> Engine:
    """kind: plain, ngram or oracle."""
    speculator = Oracle if kind == "oracle" else NgramTreeSpeculator
    trees = {} if kind == "plain" else dict(max_num_seqs=8) | TREE
    settings = DEFAULTS | trees | dict(options)
    with mock.patch.object(v2, "NgramTreeSpeculator", speculator):
        _STARTED.append(Engine(LLM(str(model_path(model)), **settings), None))
    return _STARTED[-1]


def asked(feature: str, num: int = 4, **options: Any) -> list[Request]:
    return requests(feature, num, **dict(max_tokens=MAX_TOKENS) | options)


_PLAIN: dict[str, Any] = {}
"""What plain decoding gave for a model, options and a request."""
SCHEDULING = (
    "max_num_batched_tokens",
    "max_num_seqs",
    "num_gpu_blocks_override",
)
"""Options that plain text does not depend on."""


def plain_run(model: str, wanted: list[Request], **options: Any) -> list:
    """Plain decoding of the requests, which the oracle learns from; each runs once."""
    settings = tuple(
        (name, value)
        for name, value in options.items()
        if name not in SCHEDULING and "specul" not in name
    )
    keys = [repr((model, settings, list(r.prompt), astuple(r.params))) for r in wanted]
    new = {key: r for key, r in zip(keys, wanted, strict=True) if key not in _PLAIN}
    plain = [Request(request.prompt, request.params) for request in new.values()]
    outputs = engine(model, "plain", settings).run(plain) if plain else []
    for key, request, output in zip(new, plain, outputs, strict=True):
        _PLAIN[key] = output
        for sequence in output.outputs:
            learn(request.prompt, sequence.token_ids)
    return [_PLAIN[key] for key in keys]


def equal(
    wanted: list[Request],
    kind: str = "oracle",
    model: str = "llama",
    provider: Provider = "reference",
    accepts: bool = True,
    moves: bool = True,
    **options: Any,
) -> None:
    """Runs the requests plainly and with trees; raises AssertionError unless they agree."""
    with dispatch.force(provider):
        plain = plain_run(model, wanted, **options)
        accepted, moved = MOVED.accepted, MOVED.moved
        assert_equal(engine(model, kind, tuple(options.items())).run(wanted), plain)
    assert MOVED.accepted > accepted or not accepts, "no node was accepted"
    assert MOVED.moved > moved or not moves, "no accepted node had to move"


def feature(name: str) -> Callable[[], None]:
    """vLLM's V2 sampler takes at most 128 stop tokens."""
    chain = (
        "repetition",
        "presence",
        "frequency",
        "penalt",
        "bad_words",
        "regex",
        "choice",
        "json",
    )
    short = name in ("one_token", "stop_string_kept", "min_tokens_seed")
    moves = not (short or any(word in name for word in chain))
    options: dict[str, Any] = {} if name == "one_token" else dict(max_tokens=MAX_TOKENS)
    if "min_tokens" in name:
        options["stop_token_ids"] = list(range(300, 420))
    return lambda: equal(requests(name, 3, **options), accepts=not short, moves=moves)


def whole_batch(**options: Any) -> None:
    names = [n for n in FEATURES if n not in ("one_token", "n", "min_tokens", "min_tokens_seed")]
    wanted = [
        Request(prompt, params(name, index, max_tokens=MAX_TOKENS), arrival=index // 3)
        for index, (name, prompt) in enumerate(zip(names, prompts(len(names)), strict=True))
    ]
    equal(wanted, **options)


def prefix_cache(trees: Engine) -> None:
    first = asked("greedy", 2, max_tokens=80, ignore_eos=True)
    plain, before = plain_run("llama", first), MOVED.moved
    outputs = trees.run(first)
    assert_equal(outputs, plain)
    assert MOVED.moved > before, "no accepted node had to move"
    second = [
        Request([*r.prompt, *o.outputs[0].token_ids, 300 + i], r.params)
        for i, (r, o) in enumerate(zip(first, outputs, strict=True))
    ]
    plain = plain_run("llama", second)
    outputs = trees.run(second, keep_cache=True)
    assert_equal(outputs, plain)
    cached = [o.num_cached_tokens - len(r.prompt) for o, r in zip(outputs, first, strict=True)]
    assert min(cached) > 32, "no generated block was reused"


def preemption(kind: str = "oracle", **options: Any) -> None:
    wanted = asked("greedy", 5, max_tokens=100, ignore_eos=True) + asked("seed", 2, max_tokens=100)
    options |= dict(num_gpu_blocks_override=16, max_model_len=256)
    scheduler = engine("llama", kind, tuple(options.items())).scheduler
    with mock.patch.object(
        scheduler, "_preempt_request", side_effect=scheduler._preempt_request
    ) as preempted:
        equal(wanted, kind, **options)
    assert preempted.called


def arrivals_and_aborts(trees: Engine) -> None:
    wanted = [replace(r, arrival=2 * i) for i, r in enumerate(asked("greedy", 6))]
    plain = plain_run("llama", wanted)
    run = [replace(r, abort_at=r.arrival + 4 if i == 2 else None) for i, r in enumerate(wanted)]
    outputs = trees.run(run)
    kept = [i for i in range(6) if i != 2]
    assert_equal([outputs[i] for i in kept], [plain[i] for i in kept])


def longest_length() -> None:
    wanted = asked("greedy", 3, max_tokens=None, ignore_eos=True)
    wanted += [Request([300] * n, params("greedy", max_tokens=None)) for n in (125, 126, 127)]
    equal(wanted, max_model_len=128)


@contextmanager
def asynchronous() -> Iterator[None]:
    """Starts engines that schedule ahead, which the platform switches off on CPUs as it gains
    nothing there."""
    decide = CpuPlatform.check_and_update_config

    def decide_async(vllm_config: Any) -> None:
        decide(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with mock.patch.object(CpuPlatform, "check_and_update_config", staticmethod(decide_async)):
        yield


def ahead(model: str = "llama", **options: Any) -> Engine:
    """Random trees under async scheduling."""
    with asynchronous():
        trees = engine(model, "oracle", (("max_num_seqs", 6), *options.items()))
    assert trees.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    return trees


def async_scheduling(wanted: list[Request], model: str = "llama", **options: Any) -> None:
    plain, before = plain_run(model, wanted, **options), MOVED.moved
    assert_equal(ahead(model, **options).run(wanted), plain)
    assert MOVED.moved > before


def metrics() -> None:
    """A request that comes back after a preemption is one fallback, and its prompt no round."""
    wanted = [*asked("greedy", 2, max_tokens=60), *asked("penalties_seed", 3, max_tokens=60)]
    plain_run("llama", wanted)
    options = dict(num_gpu_blocks_override=10, max_model_len=256, disable_log_stats=False)
    trees = engine("llama", "oracle", tuple(options.items()))
    with mock.patch.object(
        trees.scheduler, "_preempt_request", side_effect=trees.scheduler._preempt_request
    ) as preempted:
        outputs = trees.run(wanted)
    assert preempted.called
    stats = check(gather(trees.llm))
    assert stats.fallbacks == dict.fromkeys(FALLBACKS, 0) | {"penalties": 3}
    # What is accepted beyond max_tokens is not emitted.
    surplus = stats.num_rounds + stats.num_accepted_tokens
    surplus -= sum(len(output.outputs[0].token_ids) for output in outputs)
    assert 0 <= surplus <= NUM_NODES * len(wanted), surplus


def ranks() -> None:
    """What is counted of the trees for `vllm-specplus tune` is what was accepted of them."""
    wanted = asked("greedy", 3, max_tokens=30)
    plain_run("llama", wanted)
    trees, accepted = engine("llama", "oracle"), MOVED.accepted
    trees.llm.collective_rpc("specplus_count_ranks")
    trees.run(wanted)
    found = trees.llm.collective_rpc("specplus_measured")[0]
    num_accepted = MOVED.accepted - accepted
    assert sum(map(sum, found["by_rank"])) == sum(found["by_row"][1:]) == num_accepted > 0
    assert any(count for of_depth in found["by_rank"] for count in of_depth[1:])


def verified_in_chunks() -> None:
    """Every request is a chunk of its own, with or without logprobs."""
    names = ("greedy", "logprobs", "seed", "logprobs_seed", "logprobs_penalty", "json")
    wanted = [
        Request(prompt, params(name, index, max_tokens=MAX_TOKENS))
        for index, (name, prompt) in enumerate(zip(names, prompts(len(names)), strict=True))
    ]
    one_tree = 4 * VOCAB_SIZE * (1 + NUM_NODES)
    with mock.patch.object(rejection_sampler, "MAX_CHUNK_BYTES", one_tree):
        equal(wanted)


def control(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """A part taken out: the text must change."""

    def run() -> None:
        wanted = asked("greedy", 4, max_tokens=40)
        plain = plain_run("llama", wanted)
        with mock.patch.object(owner, name, value):
            outputs = engine("llama", "oracle").run(wanted)
        assert differ(outputs, plain), "the text did not change"

    return run


def no_mask(codes: Any, start: Any, rows: Any, positions: Any, mask: torch.Tensor) -> None:
    STAGE(codes, start, rows, positions, mask)
    mask.fill_(-1)


def no_positions(codes: Any, start: Any, rows: Any, positions: Any, mask: torch.Tensor) -> None:
    STAGE(codes, start, rows, positions.clone(), mask)


STAGE = v2.tree_stage
SCENARIOS: dict[str, Callable[[], None]] = {
    **{f"feature: {name}": feature(name) for name in FEATURES},
    "schedule: ngram trees": lambda: equal(
        asked("greedy", 4, max_tokens=40), kind="ngram", moves=False
    ),
    "schedule: static tree": lambda: equal(
        asked("greedy", 4, max_tokens=40), kind="ngram", moves=False, speculative_tree=STATIC_TREE
    ),
    "schedule: optimal tree": lambda: equal(
        asked("greedy", 4, max_tokens=40), kind="ngram", moves=False, speculative_tree="optimal:8"
    ),
    "schedule: sliding window": lambda: equal(asked("greedy", 3, max_tokens=40), model="sliding"),
    "schedule: sliding window, seed": lambda: equal(asked("seed", 4), model="sliding"),
    "schedule: whole batch": whole_batch,
    "schedule: chunked prefill": lambda: whole_batch(max_num_batched_tokens=64),
    "schedule: prefix cache": lambda: prefix_cache(engine("llama", "oracle")),
    "schedule: preemption": preemption,
    "schedule: arrivals and aborts": lambda: arrivals_and_aborts(engine("llama", "oracle")),
    "schedule: longest length": longest_length,
    "schedule: async": lambda: async_scheduling([*asked("greedy", 3), *asked("seed", 3)]),
    "schedule: async, sliding window": lambda: async_scheduling(
        asked("greedy", 3, max_tokens=40), "sliding"
    ),
    "schedule: async, preemption": lambda: async_scheduling(
        asked("greedy", 6, max_tokens=100, ignore_eos=True),
        num_gpu_blocks_override=16,
        max_model_len=256,
    ),
    "schedule: async, prefix cache": lambda: prefix_cache(ahead()),
    "schedule: async, arrivals and aborts": lambda: arrivals_and_aborts(ahead()),
    "schedule: metrics": metrics,
    "schedule: ranks": ranks,
    "schedule: verified in chunks": verified_in_chunks,
    "control: no commit": control(v2.KVCommitPlan, "__call__", lambda *_: None),
    "control: no mask": control(v2, "tree_stage", no_mask),
    "control: no depth positions": control(v2, "tree_stage", no_positions),
    "triton: seed": lambda: equal(
        [*asked("greedy", 1, max_tokens=10), *asked("seed", 2, max_tokens=10)], provider="triton"
    ),
    "triton: sliding window": lambda: equal(
        asked("seed", 2, max_tokens=8), model="sliding", provider="triton"
    ),
    "triton: ngram trees": lambda: equal(
        asked("greedy", 2, max_tokens=10), kind="ngram", provider="triton", moves=False
    ),
}


def outcome(scenario: Callable[[], None]) -> str:
    try:
        scenario()
    except Exception:
        engine.cache_clear()  # what failed may have left requests behind
        return traceback.format_exc()
    return "ok"


def timed(name: str, scenario: Callable[[], None]) -> str:
    """The outcome; standard error says how long it took."""
    began = time.monotonic()
    said = outcome(scenario)
    print(f"{time.monotonic() - began:5.1f} s  {name}", file=sys.stderr, flush=True)
    return said


def main(scenarios: dict[str, Callable[[], None]]) -> None:
    """Runs those whose names start with one of the arguments."""
    names = [name for name in scenarios if name.startswith(tuple(sys.argv[1:]))]
    outcomes = {name: timed(name, scenarios[name]) for name in names}
    print("\n" + RESULT + json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    main(SCENARIOS)
