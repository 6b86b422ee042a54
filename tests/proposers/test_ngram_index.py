"""The n-gram index against a search of the whole context."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specplus.proposers.ngram_index import LONGEST_MATCH, NgramIndex

LONG = 32_768


def search(tokens: list[int], min_len: int) -> dict[int, int]:
    """Every earlier position and how many tokens up to it equal the last ones."""
    last = len(tokens) - 1
    found = {}
    for position in range(last):
        length = 0
        while length <= position and tokens[position - length] == tokens[last - length]:
            length += 1
        if length >= min_len:
            found[position] = min(length, LONGEST_MATCH)
    return found


def as_array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def text(num_tokens: int, seed: int = 0) -> np.ndarray:
    """Zipf-like tokens with phrases that come back."""
    rng = np.random.default_rng(seed)
    tokens = (rng.zipf(1.3, num_tokens) % 50_000).astype(np.int32)
    for start in rng.integers(200, num_tokens - 40, num_tokens // 100):
        tokens[start : start + 40] = tokens[start - 200 : start - 160]
    return tokens


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=200),
    st.lists(st.integers(1, 60), max_size=20),
    st.integers(1, 3),
    st.integers(0, 4),
)
def test_finds_what_a_search_finds(
    tokens: list[int], chunks: list[int], min_len: int, more: int
) -> None:
    index = NgramIndex(min_len, min_len + more)
    for end in sorted({*np.cumsum(chunks).tolist(), len(tokens)}):
        if end <= len(tokens):
            index.update(as_array(tokens[:end]))
            assert dict(index.matches(limit=10**6)) == search(tokens[:end], min_len)


@given(st.lists(st.integers(0, 2), min_size=20, max_size=80), st.integers(1, 8))
def test_a_limit_keeps_long_n_grams_first_then_recent_ones(tokens: list[int], limit: int) -> None:
    index = NgramIndex(1, 4)
    index.update(as_array(tokens))
    found = search(tokens, 1)
    ranked = sorted(found, key=lambda p: (-min(found[p], 4), -p))
    assert [position for position, _ in index.matches(limit)] == ranked[:limit]


def test_tokens_one_by_one_and_all_at_once_are_linked_alike() -> None:
    tokens = text(3000)
    grown, built = NgramIndex(2, 5), NgramIndex(2, 5)
    grown.update(tokens[:10])
    for end in range(11, len(tokens) + 1):  # outgrows its tables twice
        assert grown.update(tokens[:end]) in ([], [tokens[end - 1]])
    built.update(tokens)
    assert grown.matches(1000) == built.matches(1000)
    assert grown.tokens == built.tokens


def test_very_long_n_grams_are_looked_up_by_what_is_measured() -> None:
    index = NgramIndex(40, 50)
    index.update(as_array([*range(45)] * 2))
    assert index.matches(5) == [(44, LONGEST_MATCH)]


def test_hashes_that_collide_are_no_matches() -> None:
    """600 tokens in 2048 slots collide some 80 times."""
    index = NgramIndex(1, 2)
    tokens = np.random.default_rng(0).permutation(50_000)[:600].astype(np.int32)
    for end in range(1, len(tokens) + 1):
        index.update(tokens[:end])
        assert index.matches(100) == []


def test_what_was_appended_is_returned() -> None:
    index = NgramIndex(1, 3)
    tokens = as_array([5, 6, 7, 8, 9])
    assert index.update(tokens[:3]) == []
    assert index.update(tokens) == [8, 9]
    assert index.update(tokens) == []
    assert index.matches(5) == []


@pytest.mark.parametrize(
    "other",
    [
        [1, 2, 3, 1, 2],  # shrunk
        [1, 2, 3, 1, 2, 3, 1, 9, 3, 9],  # changed at its end
        [7, 8, 7, 8, 7, 8, 7, 8, 7, 8],  # another request of the same name
    ],
)
def test_tokens_that_did_not_just_grow_start_anew(other: list[int]) -> None:
    index = NgramIndex(1, 3)
    index.update(as_array([1, 2, 3] * 3))
    assert index.update(as_array(other)) == []
    assert dict(index.matches(100)) == search(other, 1)


def test_a_step_does_not_depend_on_the_context_and_long_prompts_are_quick() -> None:
    """At 32k tokens; CPU time, with room for a busy machine (alone: 30 ms and 10 us)."""
    tokens = text(LONG + 400)
    index = NgramIndex(1, 5)
    start = time.thread_time()
    index.update(tokens[:LONG])
    assert time.thread_time() - start < 0.25
    steps = []
    for end in range(LONG + 2, LONG + 400, 2):
        start = time.thread_time()
        index.update(tokens[:end])
        index.matches(16)
        steps.append(time.thread_time() - start)
    assert np.median(steps) < 150e-6
