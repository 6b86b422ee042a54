"""Trees that V2 grows from a drafter, held against what the drafter says of each of their paths.

Sabotages that `dense` and, of heads, `second` were seen to catch: rows that see only themselves, or
all rows before them; positions one too far; keys and values one slot too early; paths that begin
one position too early; with states of the module before, hidden states of another path. `dense`
alone: hidden states of the first level at every level. `second` and tests/core/test_draft_tree.py
alone, as they choose the nodes: the path of another parent.
"""

from __future__ import annotations

import tests.engine.interpreter  # noqa: F401  (before vLLM)

# isort: split
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from vllm import SamplingParams
from vllm.v1.worker.gpu.warmup import warmup_kernels

from tests.engine.drafters import HEADS
from tests.engine.engines import Engine, Request
from tests.engine.heads import fitted
from tests.engine.v2_draft_engines import (
    DEPTH,
    DRAFTERS,
    KNOWN,
    NUM_NODES,
    drafting,
    engine,
    requests,
    texts,
)
from vllm_specplus.core import draft_tree
from vllm_specplus.core.growth import MAX_FRONTIER
from vllm_specplus.engine.drafters.trees import GrowingMixin
from vllm_specplus.engine.drafters.windows import WindowsSpeculator
from vllm_specplus.proposers.heads.checkpoint import load_heads
from vllm_specplus.proposers.heads.mtp import MTPHeads

SECOND = "static:[(0,),(1,),(1,0),(1,1),(1,1,0),(1,1,1)]"
"""The second best of the second best of the second best, and what must be there beside it."""
LOGPROB_TOLERANCE = 1e-3
"""fp32: the same rows in matrices of other heights, through a paged cache."""


def chains() -> Any:
    """Trees have no room for more than the best child of each node: they are vLLM's chains."""
    return mock.patch.object(draft_tree, "NUM_CHILDREN", 1)


@contextmanager
def second_best() -> Iterator[None]:
    """While a tree grows, a wrong token looks better than the best one after every node."""
    branch = draft_tree.DraftTree.branch

    def behind_a_decoy(tree: Any, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        best = logits.max(1, keepdim=True)
        decoy = (best.indices + 1) % logits.shape[1]
        return branch(tree, logits.scatter(1, decoy, best.values + 0.1), *args)

    with mock.patch.object(draft_tree.DraftTree, "branch", behind_a_decoy):
        yield


class Growth:
    """What trees grew from: per request and path of tokens, the logits behind it."""

    def __init__(self, run_by: Engine) -> None:
        core = run_by.llm.llm_engine.engine_core.engine_core
        self._runner = core.model_executor.driver_worker.worker.model_runner
        self._target_states: dict[tuple[int, int], torch.Tensor] = {}
        self._levels: list[tuple[torch.Tensor, torch.Tensor, Any]] = []
        self.drafted: list[tuple[list[int], list[int], torch.Tensor, torch.Tensor]] = []
        """Tokens so far, a path behind them, logits behind it, hidden states of the target."""

    @property
    def kv_cache_groups(self) -> list[Any]:
        groups: list[Any] = self._runner.kv_cache_config.kv_cache_groups
        return groups

    @contextmanager
    def watched(self) -> Iterator[None]:
        prepare, grow = WindowsSpeculator._prepare_inputs, GrowingMixin.grow
        branch = draft_tree.DraftTree.branch

        def prepared(drafter: Any, states: Any, batch: Any, *args: Any) -> None:
            prepare(drafter, states, batch, *args)
            for index, slot in enumerate(batch.idx_mapping.tolist()):
                first = int(drafter.input_buffers.query_start_loc[index])
                for row in range(first, int(drafter.last_token_indices[index]) + 1):
                    place = slot, int(drafter.input_buffers.positions[row])
                    self._target_states[place] = drafter.hidden_states[row].clone()

        def branched(tree: Any, logits: Any, width: int, drafts: Any = None) -> torch.Tensor:
            self._levels.append((tree.paths, logits.view(*tree.paths.shape[:2], -1), drafts))
            return branch(tree, logits, width, drafts)

        def grown(drafter: Any, batch: Any, num_sampled: torch.Tensor, *args: Any) -> Any:
            self._levels = []
            rows = grow(drafter, batch, num_sampled, *args)
            for index, slot in enumerate(batch.idx_mapping.tolist()):
                if num_sampled[index]:
                    self._note(index, slot)
            return rows

        with (
            mock.patch.object(WindowsSpeculator, "_prepare_inputs", prepared),
            mock.patch.object(draft_tree.DraftTree, "branch", branched),
            mock.patch.object(GrowingMixin, "grow", grown),
        ):
            yield

    def _note(self, index: int, slot: int) -> None:
        states = self._runner.req_states
        length = int(states.total_len.gpu[slot])
        known = states.all_token_ids.gpu[slot, :length].tolist()
        target = torch.stack([self._target_states[slot, place] for place in range(length - 1)])
        for paths, logits, drafts in self._levels:
            if drafts is None or drafts[index]:
                of_paths = zip(paths[index].tolist(), logits[index], strict=True)
                self.drafted += [(known, path, row.clone(), target) for path, row in of_paths]

    @torch.inference_mode()
    def mismatches(self, heads: str) -> int:
        """How many of the logits are not what the dense modules give after the whole sequence."""
        model, dense = self._runner.speculator.model, MTPHeads.from_checkpoint(load_heads(heads))
        wrong = 0
        for known, path, logits, target in self.drafted:
            tokens = torch.tensor([*known[1:], *path, 0, 0][: len(known) + 1])
            embeddings = model.embed_input_ids(tokens)
            state = dense(target[None], embeddings[None])[len(path), 0, -1]
            expected = functional.log_softmax(model.compute_logits(state[None])[0], 0)
            off = (functional.log_softmax(logits, 0) - expected).abs()
            wrong += not bool((off[expected.isfinite()] < LOGPROB_TOLERANCE).all())
        return wrong


def second(name: str) -> None:
    """Where a wrong token looks best after every node, the second best of each still are vLLM's
    chain: at least what that accepts is accepted, and of fitted heads far more than chains have."""
    wanted, native = requests(name), drafting(name)
    ours = drafting(name, NUM_NODES, ngram=False, speculative_tree=SECOND)
    plain = texts(engine(DRAFTERS[name][1]), wanted)
    assert texts(native, wanted) == plain
    with second_best():
        assert texts(ours, wanted) == plain
    assert ours.extra_tokens >= native.extra_tokens > 0
    if name == "heads":
        assert ours.extra_tokens == native.extra_tokens
        chain = drafting(name, DEPTH, ngram=False)
        with second_best(), chains():
            assert texts(chain, wanted) == plain
        assert chain.extra_tokens < ours.extra_tokens / 4


def known_by_heart(hidden_state_from: str, tied: bool, model: str) -> tuple[str, Any, Any]:
    """Heads, what they are asked, and what follows."""
    heads, learned = fitted(model, **HEADS | dict(hidden_state_from=hidden_state_from, tied=tied))
    rest = [text[KNOWN:] for text in learned]
    settings = SamplingParams(temperature=0, max_tokens=len(rest[0]), ignore_eos=True)
    return heads, [Request(text[:KNOWN], settings) for text in learned], rest


def by_heart(
    hidden_state_from: str, tied: bool = False, model: str = "llama", depth: int = DEPTH
) -> None:
    """Heads that know texts by heart: nearly all that they draft is accepted."""
    heads, wanted, rest = known_by_heart(hidden_state_from, tied, model)
    options = dict(speculative_model=f"[mtp3]{heads}", num_speculative_tokens=depth)
    chain = engine(model, tuple(options.items()))
    assert texts(chain, wanted) == rest
    num_drafts = -(-(len(rest[0]) - 1) // (1 + depth))
    assert chain.extra_tokens > 0.9 * len(rest) * (len(rest[0]) - 1 - num_drafts)


def dense(hidden_state_from: str, tied: bool = False, model: str = "llama") -> None:
    """What follows each path of a tree is what the dense modules say of the whole sequence."""
    heads, wanted, rest = known_by_heart(hidden_state_from, tied, model)
    options = dict(speculative_model=f"[mtp3]{heads}", speculative_tree="dynamic:12")
    ours = engine(model, tuple(options.items()))
    growth = Growth(ours)
    assert len(growth.kv_cache_groups) == (2 if model == "sliding" else 1)
    with growth.watched():
        assert texts(ours, wanted[:3]) == rest[:3]
    assert {len(path) for _, path, *_ in growth.drafted} == set(range(DEPTH))
    assert growth.mismatches(heads) == 0


@contextmanager
def calls(ours: Engine, name: str) -> Iterator[Any]:
    """The calls of a method of an engine's drafter."""
    core = ours.llm.llm_engine.engine_core.engine_core
    drafter = type(core.model_executor.driver_worker.worker.model_runner.speculator.__wrapped__)
    method = getattr(drafter, name)
    with mock.patch.object(drafter, name, autospec=True, side_effect=method) as called:
        yield called.call_args_list


def warm_up(name: str) -> None:
    """vLLM's warm-up grows trees, and its memory profile has the logits of their widest level."""
    ours = drafting(name, NUM_NODES, max_num_seqs=4)  # an engine that has not run yet
    worker = ours.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner = worker.model_runner
    with calls(ours, "grow") as grown, mock.patch.object(torch.accelerator, "synchronize"):
        warmup_kernels(runner, worker.execute_model, worker.sample_tokens)
        assert {1, runner.max_num_reqs} <= {call.args[1].num_reqs for call in grown}
        with calls(ours, "compute_draft_logits") as passes:
            runner.profile_run()
    assert max(len(call.args[1]) for call in passes) == MAX_FRONTIER * runner.max_num_reqs


def one_head_pass(name: str) -> None:
    """The drafter's head runs once for each level: not for the first tokens of vLLM's chain."""
    ours = drafting(name, NUM_NODES)
    with calls(ours, "grow") as grown, calls(ours, "compute_draft_logits") as passes:
        ours.run(requests(name, 2))
    assert 0 < len(passes) <= DEPTH * len(grown)
