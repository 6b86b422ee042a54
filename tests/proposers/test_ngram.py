"""n-gram trees: what they propose, in which order, and what they learn."""

from __future__ import annotations

import gc
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.strategies import path_tokens
from tests.proposers.test_ngram_index import LONG, text
from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.growth import Candidates, Path
from vllm_specplus.proposers.base import DraftRequest
from vllm_specplus.proposers.ngram import NgramProposer

LOOP = [1, 2, 3] * 4


def make(
    tree: str = "dynamic:16", depth: int = 8, lookup: tuple[int, int] = (1, 5)
) -> NgramProposer:
    options = {"ngram_prompt_lookup_min": lookup[0], "ngram_prompt_lookup_max": lookup[1]}
    config = {"speculative_model": "[ngram]", "num_speculative_tokens": depth, "tree": tree}
    return NgramProposer(SpecPlusConfig.model_validate(config | options))


def propose(
    proposer: NgramProposer,
    tokens: list[int] | np.ndarray,
    max_depth: int = 8,
    max_nodes: int = 16,
    **more: object,
) -> Candidates:
    token_ids = np.array(tokens, dtype=np.int32)
    request = DraftRequest("r", token_ids, max_depth, max_nodes, **more)  # type: ignore[arg-type]
    [candidates] = proposer.propose([request])
    return candidates


def paths(candidates: Candidates) -> list[Path]:
    tree = candidates.tree(len(candidates))
    return [path_tokens(tree, row) for row in range(1, len(tree) + 1)]


def test_proposes_what_followed() -> None:
    found = paths(propose(make(), [9, 1, 2, 3, 4, 8, 7, 6, 1, 2], max_depth=3))
    assert found[:3] == [(3,), (3, 4), (3, 4, 8)]


def test_unknown_or_too_short_matches_give_nothing() -> None:
    assert len(propose(make(), [1, 2, 3, 4])) == 0
    assert len(propose(make(), [5])) == 0
    assert len(propose(make(lookup=(2, 5)), [1, 2, 3, 2])) == 0
    assert len(propose(make(lookup=(2, 5)), [1, 2, 3, 1, 2])) > 0


def test_longer_matches_come_first_and_all_are_merged() -> None:
    tokens = [5, 1, 2, 7, 0, 1, 2, 8, 0, 3, 2, 9, 6, 5, 1, 2]  # after 5 1 2: 7, 1 2: 8, 2: 9
    found = paths(propose(make(), tokens, max_depth=2))
    assert [path for path in found if len(path) == 1] == [(7,), (8,), (9,)]
    assert {(7, 0), (8, 0), (9, 6)} <= set(found)


def test_many_votes_beat_one() -> None:
    tokens = [0, 1, 4, 0, 1, 4, 0, 1, 4, 0, 2, 5, 0, 2, 6, 0, 1, 4, 3, 1]
    first = paths(propose(make(lookup=(1, 1)), tokens, max_depth=1))
    assert first[0] == (4,)
    tokens = [9, 4, 0, 9, 4, 0, 9, 5, 7, 9]  # 5 is more recent, 4 came twice
    assert paths(propose(make(lookup=(1, 1)), tokens, max_depth=1)) == [(4,), (5,)]


def test_a_loop_is_continued_to_any_depth() -> None:
    found = propose(make(depth=20), LOOP, max_depth=20, max_nodes=20)
    assert list(found.tokens)[:10] == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    assert found.tree(10).branches is False
    same = propose(make(depth=20), [7] * 3, max_depth=20, max_nodes=20)
    assert list(same.tokens) == [7] * 20


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=120), st.integers(1, 9), st.integers(1, 20))
def test_candidates_are_valid_and_within_bounds(
    tokens: list[int], max_depth: int, max_nodes: int
) -> None:
    candidates = propose(make(), tokens, max_depth, max_nodes)
    tree = candidates.tree(len(candidates))
    tree.validate()
    assert len(tree) <= max_nodes and max(tree.depths()) <= max_depth
    assert all(0 < p <= 1 for p in candidates.probs)
    assert list(candidates.probs) == sorted(candidates.probs, reverse=True)


def test_min_prob_and_static_shapes() -> None:
    tokens = text(2000)
    free = propose(make("dynamic:99"), tokens, max_nodes=99)
    likely = propose(make("dynamic:99"), tokens, max_nodes=99, min_prob=0.05)
    assert 0 < len(likely) < len(free) and min(likely.probs) >= 0.05
    chain = propose(make("dynamic:99"), tokens, chain_only=True)
    assert len(chain) == 8 and not chain.tree(8).branches
    static = propose(make("static:[(0,),(1,),(1,0)]"), tokens, max_nodes=3)
    assert list(static.tree(3).parents) in ([0, 0, 2], [0, 0, 1])
    assert len(propose(make("chain"), tokens)) == 8


def run(proposer: NgramProposer, tokens: list[int], start: int) -> None:
    """Steps of one token through all of `tokens`."""
    for end in range(start, len(tokens) + 1):
        propose(proposer, tokens[:end])


def test_learns_from_what_came_whether_drafted_or_not() -> None:
    rng = np.random.default_rng(0)
    surprises = rng.integers(0, 10, 400).tolist()  # a match says nothing about the next token
    fresh, taught, spoilt = make(), make(), make()
    run(taught, LOOP * 20, 4)
    run(spoilt, surprises, 4)
    for proposer in (taught, spoilt):
        proposer.forget("r")
    probe = [8, 9, 8]
    before, after, worse = (propose(p, probe).probs[0] for p in (fresh, taught, spoilt))
    assert worse < before
    assert after >= before


def test_several_tokens_at_once_teach_along_their_path_only() -> None:
    one, other = make(), make()
    for proposer, rest in ((one, [1, 2, 3]), (other, [9, 2, 3])):
        propose(proposer, LOOP)
        propose(proposer, LOOP + rest)
        proposer.forget("r")
    fresh = propose(make(), LOOP).probs[0]
    assert propose(one, LOOP).probs[0] > fresh > propose(other, LOOP).probs[0]


def test_same_calls_give_the_same_candidates() -> None:
    tokens = text(1500).tolist()
    first, second = make(), make()
    for end in range(1400, 1500, 3):
        assert propose(first, tokens[:end]) == propose(second, tokens[:end])


@pytest.mark.parametrize("other", [LOOP[:5], [4, 5, 4, 5, 4], [1, 2, 3] * 3 + [3, 2, 1, 3, 2, 1]])
def test_a_request_that_shrank_or_changed_is_read_anew(other: list[int]) -> None:
    reused = make()
    propose(reused, LOOP)
    candidates = propose(reused, other)
    assert paths(candidates) == paths(propose(make(), other))


def test_requests_are_apart_and_finished_ones_leave_nothing() -> None:
    proposer = make()
    requests = [
        DraftRequest(name, np.array(tokens, dtype=np.int32), 2, 4)
        for name, tokens in (("a", [1, 2, 1]), ("b", [1, 3, 1]), ("c", [1, 2, 3]))
    ]
    assert [c.tokens[0] if len(c) else None for c in proposer.propose(requests)] == [2, 3, None]
    index = weakref.ref(proposer._requests["a"].index)
    for name in ("a", "b", "c", "never seen"):
        proposer.forget(name)
    gc.collect()
    assert not proposer._requests
    assert index() is None


def test_a_step_at_32k_tokens_is_quick() -> None:
    """CPU time with room for a busy machine (alone: 0.05 ms)."""
    proposer, tokens = make(depth=16), text(LONG + 300)
    propose(proposer, tokens[:LONG])
    steps = []
    for end in range(LONG + 2, LONG + 300, 2):
        start = time.thread_time()
        propose(proposer, tokens[:end], 16, 16)
        steps.append(time.thread_time() - start)
    assert np.median(steps) < 0.6e-3
