"""Sizes of batch and tree, and settings of the whole engine: `python -m tests.engine.v2_settings
settings`. Medusa, what drafts on the host, and what a GPU would run share its process and engines.

Seen to fail: no commit (all but `engine seed` and `distribution`); one noise for rows of all depths
(distribution); a random stream seeded anew (engine seed).
"""

from __future__ import annotations

import tests.engine.interpreter  # noqa: F401  (before vLLM)

# isort: split
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config.reasoning import ReasoningConfig
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from tests.engine import distribution, v2, v2_gpu, v2_host, v2_medusa
from tests.engine.engines import Request, model_path
from tests.engine.features import (
    LOGPROB_TOLERANCE,
    assert_equal,
    differ,
    facts,
    logprob_rows,
    params,
    prompts,
    requests,
)
from tests.engine.models import build_tokenizer
from tests.engine.test_distribution import SMALLEST_P, p_values
from vllm_specplus.core.tree import Tree

LENGTH, NUM_SEQUENCES, NUM_SLOTS = 4, 768, 64
SLIDING = ("all_filters", "penalties_seed", "bad_words", "json", "logprobs", "n", "stop_string")
LOGPROBS: dict[str, Any] = dict(logprobs=3, temperature=0.7, top_k=20)


def batches(model: str) -> None:
    """Batches of 1, 3 and 8 on the same engine, whose first requests are alone."""
    wanted = v2.asked("greedy", 12, max_tokens=v2.MAX_TOKENS)
    plain, trees = v2.plain_run(model, wanted), v2.engine(model, "oracle")
    for batch in (slice(0, 1), slice(1, 4), slice(4, 12)):
        moved = v2.MOVED.moved
        assert_equal(trees.run(wanted[batch]), plain[batch])
        assert v2.MOVED.moved > moved


def features_of_sliding() -> None:
    wanted = [
        Request(prompt, params(name, index, max_tokens=10))
        for index, (name, prompt) in enumerate(zip(SLIDING, prompts(len(SLIDING)), strict=True))
    ]
    v2.equal(wanted, model="sliding")


def largest_tree() -> None:
    with mock.patch.object(v2, "NUM_NODES", 127):
        v2.equal(v2.asked("greedy", 2), speculative_tree="dynamic:127")


def whole_vocabulary() -> None:
    """By token: near-ties may swap their ranks."""
    wanted, options = v2.asked("greedy", 2, logprobs=-1, max_tokens=8), dict(max_logprobs=-1)
    plain = v2.plain_run("llama", wanted, **options)
    ours = v2.engine("llama", "oracle", tuple(options.items())).run(wanted)
    for a, b in zip(ours, plain, strict=True):
        assert facts(a) == facts(b)
        for row_a, row_b in zip(logprob_rows(a), logprob_rows(b), strict=True):
            found, expected = ({token: lp for token, _, lp in row} for row in (row_a, row_b))
            assert found.keys() == expected.keys()
            assert max(abs(found[t] - expected[t]) for t in found) < LOGPROB_TOLERANCE


def thinking_budget() -> None:
    """Requests that think, and others beside them that are drafted trees."""
    think, end = (build_tokenizer().encode(f" {word}")[0] for word in ("them", "water"))
    config = ReasoningConfig(reasoning_start_str=" them", reasoning_end_str=" water")
    budget = dict(thinking_token_budget=6)
    wanted = [
        Request(
            [*prompt, think],
            params(feature, i, max_tokens=v2.MAX_TOKENS, **(budget if i % 2 else {})),
        )
        for feature in ("greedy", "seed")
        for i, prompt in enumerate(prompts(4))
    ]
    v2.plain_run("llama", [r for r in wanted if r.params.thinking_token_budget is None])
    start = v2.engine.__wrapped__
    plain = start("llama", "plain", (("reasoning_config", config),)).run(wanted)
    forced = [output.outputs[0].token_ids[6] == end for output in plain]
    assert all(forced[1::2]), "the budget must bite"
    moved = v2.MOVED.moved
    assert_equal(start("llama", "oracle", (("reasoning_config", config),)).run(wanted), plain)
    assert v2.MOVED.moved > moved


def engine_seed() -> None:
    """The engine's seed decides the text of requests that have none."""
    wanted = [Request(p, params("seed", seed=None, max_tokens=v2.MAX_TOKENS)) for p in prompts(3)]
    start = v2.engine.__wrapped__
    first, second, other = (
        start("llama", "ngram", (("seed", seed),)).run(wanted) for seed in (5, 5, 6)
    )
    assert not differ(first, second)
    assert differ(first, other)


@cache
def tables() -> list[np.ndarray]:
    return distribution.conditionals(model_path("tiny_vocab"), LENGTH)


class Likely(v2.NgramTreeSpeculator):
    """Trees of the three most probable tokens after each node."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._ranked = distribution.Ranked(self.config, tables(), best=True, width=3)
        self._known: dict[tuple[int, ...], list[int]] = {}

    def propose_on(self, trunk: Any, slots: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self._codes(slot) for slot in slots.tolist()])

    def _codes(self, slot: int) -> list[int]:
        length = int(self.req_states.total_len.gpu[slot])
        output = self.req_states.all_token_ids.gpu[slot, len(distribution.PROMPT) : length]
        key = tuple(output[:LENGTH].tolist())  # what is accepted beyond it is not emitted
        if key not in self._known:
            tree = self._ranked._tree(key, LENGTH - len(key), v2.NUM_NODES)
            codes = Tree(tree.tokens, tree.parents).encode()
            self._known[key] = codes + [0] * (v2.NUM_NODES - len(codes))
        return self._known[key]


def sampled() -> None:
    """Chi-square per position and pair of neighbours, as in tests/engine/test_distribution.py; of
    requests with a seed of their own and without, in turn."""
    options = dict(skip_tokenizer_init=True, max_num_seqs=NUM_SLOTS, max_model_len=64)
    with mock.patch.object(v2, "Oracle", Likely):
        trees = v2.engine("tiny_vocab", "oracle", tuple(options.items()))
    settings: dict[str, Any] = dict(max_tokens=LENGTH, ignore_eos=True, detokenize=False)
    wanted = [
        Request(distribution.PROMPT, SamplingParams(seed=i if i % 2 else None, **settings))
        for i in range(NUM_SEQUENCES)
    ]
    accepted = v2.MOVED.accepted
    outputs = trees.run(wanted)
    assert v2.MOVED.accepted - accepted > NUM_SEQUENCES / 2
    tokens = np.array([output.outputs[0].token_ids for output in outputs])
    values = p_values(tokens, distribution.joint(tables()))
    assert min(values.values()) > SMALLEST_P, values


def logprobs(mode: str) -> Callable[[], None]:
    wanted = requests("greedy", 3, max_tokens=10, **LOGPROBS)
    return lambda: v2.equal(wanted, logprobs_mode=mode)


class ByTheTokenBefore(LogitsProcessor):
    """Makes tokens likelier that the token before the last one names: it reads another row."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._tokens = req_states.all_token_ids

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        slots = ctx.expanded_idx_mapping.long()
        committed = self._tokens.gpu[slots, (ctx.pos - 1).clamp(min=0)]
        before = torch.where(ctx.expanded_local_pos > 0, ctx.input_ids.roll(1), committed)
        for offset in range(7, 12):
            logits[torch.arange(len(logits)), (before.long() + offset) % logits.shape[1]] += 2
        return logits


def custom_processor() -> None:
    wanted = v2.asked("greedy", 3, max_tokens=24)
    stock = v2.plain_run("llama", wanted)
    plain = v2.plain_run("llama", wanted, logits_processors=(ByTheTokenBefore,))
    assert differ(plain, stock)
    trees = v2.engine("llama", "oracle", (("logits_processors", (ByTheTokenBefore,)),))
    accepted = v2.MOVED.accepted
    assert_equal(trees.run(wanted), plain)
    assert v2.MOVED.accepted > accepted
    (stats,) = trees.llm.collective_rpc("specplus_stats")
    assert stats["fallbacks"]["logits_processors"] == len(wanted)


SCENARIOS: dict[str, Callable[[], None]] = {
    "settings: batches of 1, 3 and 8": lambda: batches("llama"),
    "settings: batches of 1, 3 and 8, sliding window": lambda: batches("sliding"),
    "settings: features, sliding window": features_of_sliding,
    "settings: largest tree": largest_tree,
    **{
        f"settings: {mode}": logprobs(mode)
        for mode in ("processed_logprobs", "processed_logits", "raw_logits")
    },
    "settings: logprobs of the whole vocabulary": whole_vocabulary,
    "settings: thinking budget": thinking_budget,
    "settings: custom logits processor": custom_processor,
    "settings: engine seed": engine_seed,
    "settings: distribution": sampled,
    **v2_medusa.SCENARIOS,
    **v2_host.SCENARIOS,
    **v2_gpu.SCENARIOS,
}

if __name__ == "__main__":
    v2.main(SCENARIOS)
