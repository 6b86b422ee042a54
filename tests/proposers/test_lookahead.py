"""Lookahead decoding: what the window makes, what the pool keeps and what rows of it are worth.

Sabotages that were caught: a window that is not updated, levels that hang below another column
(another mask) or one place higher (another depth), columns that are read from other rows, guesses
that stay where they were when the text moves on, a pool without either bound, state that is not
forgotten, worth that is not learned or takes credit for the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.proposers.conformance import PROMPT, Decoding, make, mixing
from vllm_specplus.proposers import lookahead_window
from vllm_specplus.proposers.lookahead import LookaheadProposer, WindowWorth
from vllm_specplus.proposers.lookahead_window import Pool, Window

ALONE = {"lookahead_prompt_tokens": 0}


def noisy(tokens: Sequence[int]) -> int:
    """Text in which nothing is found again."""
    return hash((tokens[-1], tokens[-2], len(tokens))) % 5000


def proposer_of(decoding: Decoding) -> LookaheadProposer:
    assert isinstance(decoding.proposer, LookaheadProposer)
    return decoding.proposer


def decode(rounds: int = 60, **options: object) -> Decoding:
    decoding = Decoding(make("lookahead", **options), mixing)
    for _ in range(rounds):
        decoding.step()
    return decoding


@pytest.mark.parametrize(("window", "ngram", "least"), [(5, 4, 3.0), (7, 3, 2.4), (1, 2, 1.2)])
def test_ngrams_of_the_targets_own_making_are_accepted(
    window: int, ngram: int, least: float
) -> None:
    """Text of a loop of many tokens, from generation alone."""
    alone = decode(lookahead_window=window, lookahead_ngram=ngram, **ALONE)
    assert least < alone.tokens_per_round <= ngram + window


def test_the_pool_holds_what_the_target_says_along_a_column() -> None:
    """Once the first guesses have left the window, each token of an n-gram follows the two before
    it, whatever these were."""
    decoding = Decoding(make("lookahead", **ALONE), mixing)
    added: list[tuple[int, ...]] = []
    decoding.step(max_nodes=14)
    pool = proposer_of(decoding)._requests["r"].pool
    add = pool.add
    pool.add = lambda ngram, given: (added.append(ngram), add(ngram, given))[1]  # type: ignore
    for _ in range(12):
        decoding.step(max_nodes=14)
    full = [n for n in added if all(mixing(n[i : i + 2]) == n[i + 2] for i in range(2))]
    assert len(full) > len(added) / 2 > 20


def test_columns_are_paths_of_a_tree_and_levels_move_on() -> None:
    text, window = np.arange(20, dtype=np.int32), Window(3, 3)
    assert window.columns(text) == [(), (17,), (17, 18)]
    assert window.advance([50, 51, 52], 1) == []
    text = np.append(text, np.int32(20))
    # 51 was guessed for the place behind column 1, which is that of column 0 now.
    assert window.columns(text) == [(51,), (18, 52), (18, 19, 20)]
    assert window.advance([60, 61, 62], 2) == [(20, 51, 60), (18, 52, 61), (19, 20, 62)]
    assert window.columns(np.arange(23, dtype=np.int32)) == [(61,), (20, 62), (20, 21, 22)]


def test_only_columns_that_the_target_saw_go_on() -> None:
    window = Window(3, 3)
    window.columns(np.arange(9, dtype=np.int32))
    window.advance([50, 51], 1)
    assert window.columns(np.arange(10, dtype=np.int32))[0] == (51,)
    assert window.columns(np.arange(10, dtype=np.int32))[1][0] == 7  # text: it starts anew


def test_a_pool_is_bounded_and_keeps_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead_window, "MAX_FIRST_TOKENS", 4)
    pool = Pool(3)
    for number in range(1000):
        pool.add((number % 50, number, 0), given=False)
        pool.add((7, number, 1), given=False)
    assert len(pool) <= 3 * 4
    assert [rest for rest, _ in pool.after(7)] == [(999, 1), (998, 1), (997, 1)]
    pool.add((7, 998, 1), given=True)
    assert next(pool.after(7)) == ((998, 1), False)


def test_long_generation_keeps_memory_bounded_and_forget_empties_it() -> None:
    decoding = Decoding(make("lookahead", lookahead_candidates=2), noisy)
    for _ in range(600):
        decoding.step()
    state = proposer_of(decoding)._requests["r"]
    assert 1000 < len(state.pool) <= 2 * lookahead_window.MAX_FIRST_TOKENS
    assert [len(level) for level in state.window._levels] == [5, 5, 5]
    decoding.proposer.forget("r")
    assert not proposer_of(decoding)._requests


def test_a_window_that_brings_nothing_loses_its_rows_and_is_tried_again() -> None:
    decoding = Decoding(make("lookahead", **ALONE), noisy)
    rows = [len(decoding.step(min_prob=0.1)) for _ in range(100)]
    assert rows[0] >= 4 and rows[10] >= 10 and rows[-1] == 0
    shut = sum(len(decoding.step(min_prob=0.1)) == 0 for _ in range(1000))
    assert 900 < shut < 1000


def test_what_the_prompt_or_another_source_knows_is_no_merit_of_the_window() -> None:
    assert proposer_of(decode(40, **ALONE))._worth.value > WindowWorth.START_VALUE
    decoding = Decoding(make("lookahead+ngram"), lambda tokens: PROMPT[len(tokens) % 3], PROMPT * 9)
    for _ in range(40):
        decoding.step()
    assert decoding.tokens_per_round > 3
    assert proposer_of(decoding)._worth.value < 1.02 * WindowWorth.START_VALUE


def test_sources_share_their_nodes() -> None:
    decoding = Decoding(make("lookahead+ngram"), mixing)
    for _ in range(30):
        decoding.step()
    both = decoding.step().paths()
    assert len(set(both)) == len(both)
    alone = Decoding(make("ngram"), mixing, list(decoding.tokens)).step()
    assert set(decoding.proposer.propose([decoding.request()])[0].paths()) & set(alone.paths())


def test_an_idle_window_is_worth_no_more_than_at_first() -> None:
    """A worth that grows without bound was seen to fail."""
    worth = WindowWorth()
    worth.observe(0, 10_000)
    for _ in range(100_000):
        worth.observe(0, 0)
    assert worth.value == pytest.approx(WindowWorth.START_VALUE)
