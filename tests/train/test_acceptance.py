"""What ranks make of chains and trees, counted by walking each round.

Sabotages that were caught: marginal instead of joint chain acceptance, ranks up to and with the
number asked for, tree nodes chosen on the rounds that they are counted on, paths without their
first ranks, equal logits in favour of the right one, NaN as a bad draft's logit, siblings with
gaps.
"""

from __future__ import annotations

import pytest
import torch

from vllm_specplus.train.acceptance import Ranks, rank_of

RANKS = Ranks(
    torch.tensor([[0, 0, 1, 0], [0, 3, 0, 0], [0, 0, 0, 5]]), ("a", "b", "a", "b"), (0, 0, 1, 1)
)


def test_rank() -> None:
    """The place in a stable sort: of equal logits the first column is drafted first."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (50, 9), generator=generator).bfloat16()
    place = torch.randint(0, 9, (50,), generator=generator)
    order = logits.float().argsort(descending=True, stable=True)
    expected = (order == place[:, None]).nonzero()[:, 1]
    assert torch.equal(rank_of(logits, place), expected)
    assert (rank_of(logits, place) == 0).equal(logits.float().argmax(1) == place)


def test_rank_of_what_cannot_be_drafted() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, torch.nan, 3.0], [torch.nan] * 3])
    assert rank_of(logits, torch.tensor([-1, 2, 0])).tolist() == [3, 1, 3]


def test_top() -> None:
    assert RANKS.top(1) == [0.75, 0.75, 0.75]
    assert RANKS.top(2) == [1.0, 0.75, 0.75]
    assert RANKS.top(4) == [1.0, 1.0, 0.75]


def test_chain_ends_at_the_first_miss() -> None:
    assert RANKS.chain() == (3 + 1 + 0 + 2) / 4


def test_walk() -> None:
    """A round that accepts two tokens skips two roots; a text begins with a round of its own."""
    rank = torch.tensor([[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 7, 0, 0]])
    walk = Ranks(rank, tuple("aaaabbb"), (4, 4, 4, 4, 6, 6, 6)).walk()
    assert walk.rank.tolist() == [[0, 1, 0, 0], [0, 0, 7, 0]]
    assert walk.kinds == tuple("aabb") and walk.samples == (4, 4, 6, 6)
    assert walk.reached() == [0.75, 0.5]


def test_kinds() -> None:
    assert RANKS.of("a").rank.tolist() == [[0, 1], [0, 0], [0, 0]]
    assert RANKS.of("b").top(1) == [1.0, 0.5, 0.5] and RANKS.of("b").kinds == ("b", "b")


def test_tree_is_chosen_on_other_rounds_than_it_is_counted_on() -> None:
    ranks = torch.tensor([[1, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 2]])
    tree = Ranks(ranks, ("a",) * 6, (0,) * 6)
    assert tree.tree(1) == pytest.approx(1 / 3)  # (0,): it comes before (1,)
    assert tree.tree(2) == pytest.approx(3 / 3)  # (1,)
    assert tree.tree(3) == pytest.approx(4 / 3)  # (1, 0): accepted 2, 1, 1


def test_what_cannot_be_drafted_is_in_no_tree() -> None:
    """Rank 300 of a vocabulary of 300, or a rank that 50 siblings come before."""
    for last in (300, 50):
        ranks = Ranks(torch.full((2, 20), last), ("a",) * 20, (0,) * 20)
        assert ranks.tree(16) == 0


def test_tree_walk() -> None:
    """A tree's acceptance is the depth that a walk from the root reaches."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 3000, True, generator=generator)
    ranks = Ranks(rank.view(3, 1000), ("a",) * 1000, (0,) * 1000)
    chosen, counted = rank.view(3, 1000)[:, ::2], rank.view(3, 1000)[:, 1::2]
    share = {
        (a, b): float(((chosen[0] == a) & (chosen[1] == b)).double().mean())
        for a in range(3)
        for b in range(3)
    }
    assert share[0, 0] > share[0, 1] and max(share, key=share.__getitem__) == (0, 0)
    first = float((counted[0] <= 1).double().mean())
    both = float(((counted[0] == 0) & (counted[1] == 0)).double().mean())
    assert ranks.tree(3) == pytest.approx(first + both)  # (0,), (1,), (0, 0)
    assert ranks.chain() < ranks.tree(8) < ranks.tree(16) < 3
