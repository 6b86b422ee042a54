"""row_gumbel_argmax: one noise for all implementations, the softmax distribution, special values.

Seen to fail: hashing token i instead of i + 1, tokens past the vocabulary allowed to win, the first
half's bounds used for the second, a signed shift, another temperature. (A bound too tight by a
tenth needs more rows: test_stock_ops.py catches it.)
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from specplus_kernels import row_argmax, row_gumbel_argmax

from tests.kernels.verify_case import check_counts

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WORD = (1 << 64) - 1


def mix(state: int) -> int:
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & WORD
    state = (state ^ state >> 27) * 0x94D049BB133111EB & WORD
    return state ^ state >> 31


def by_definition(scaled: list[float], seed: int) -> int:
    """The docstring's formula in Python's integers and floats."""
    key = mix(seed & WORD)
    scores = []
    for token, value in enumerate(scaled):
        bits = mix(key + (token + 1) * 0x9E3779B97F4A7C15 & WORD) >> 11
        scores.append(value - math.log(-math.log((bits + 0.5) * 2.0**-53)))
    return scores.index(max(scores))


def random_seeds(count: int) -> torch.Tensor:
    return torch.tensor([random.Random(i).getrandbits(63) * (-1) ** i for i in range(count)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 16, 511, 512, 513, 2000])
def test_definition(provider: str, dtype: torch.dtype, vocab_size: int) -> None:
    logits = (3 * torch.randn(30, vocab_size)).to(dtype)
    logits[:5] = 0.0
    temperature, seeds = torch.rand(30) + 0.2, random_seeds(30)
    expected = [
        by_definition(row.tolist(), seed)
        for row, seed in zip(logits.float() / temperature[:, None], seeds.tolist(), strict=True)
    ]
    assert row_gumbel_argmax(logits, temperature, seeds).tolist() == expected


def test_softmax_distribution(provider: str) -> None:
    rows, temperature = 6000, 0.7
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf, 1.5, 0.3])
    probs = torch.softmax(logits.double() / temperature, 0)
    tokens = row_gumbel_argmax(
        logits.expand(rows, -1), torch.full((rows,), temperature), torch.arange(rows)
    )
    counts = torch.bincount(tokens, minlength=len(logits))
    seen = probs > 0
    assert counts[~seen].sum() == 0
    check_counts(counts[seen], probs[seen])


def test_noise_of_neighbours_is_independent(provider: str) -> None:
    """A token's noise says nothing of the next seed's: flat rows agree as often as by chance."""
    logits = torch.zeros(2000, 64)
    tokens = row_gumbel_argmax(logits, torch.ones(2000), torch.arange(2000))
    for shift in (-1, 0, 1):
        agree = (tokens[1:] == (tokens[:-1] + shift) % 64).sum().item()
        assert abs(agree - 1999 / 64) < 5 * math.sqrt(1999 / 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_zero_is_argmax(provider: str, dtype: torch.dtype) -> None:
    logits = torch.randint(-50, -20, (12, 3000)).to(dtype)
    temperature = torch.tensor([0.0, 1.0] * 6)
    tokens = row_gumbel_argmax(logits, temperature, random_seeds(12))
    greedy = row_argmax(logits)
    assert torch.equal(tokens[::2], greedy[::2])
    assert (tokens[1::2] != greedy[1::2]).any()


def test_special_values(provider: str) -> None:
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[nan, nan, 1.0], [-inf] * 3, [0.0, inf, inf], [nan, -inf, -3.0]])
    for temperature in (0.0, 1.0):
        tokens = row_gumbel_argmax(logits, torch.full((4,), temperature), torch.arange(4))
        assert tokens.tolist() == [2, 0, 1, 2]


def test_strided_rows(provider: str) -> None:
    wide, temperature, seeds = torch.randn(10, 3000), torch.rand(10, 2) + 0.5, random_seeds(10)
    tokens = row_gumbel_argmax(wide[::2, :900], temperature[::2, 1], seeds[::2])
    dense = row_gumbel_argmax(
        wide[::2, :900].contiguous(), temperature[::2, 1].contiguous(), seeds[::2].contiguous()
    )
    assert torch.equal(tokens, dense)


def test_rows_alone_and_together(provider: str) -> None:
    logits, temperature, seeds = 2 * torch.randn(9, 20_000), torch.ones(9), random_seeds(9)
    together = row_gumbel_argmax(logits, temperature, seeds)
    alone = [row_gumbel_argmax(logits[[i]], temperature[[i]], seeds[[i]]) for i in range(9)]
    assert torch.equal(together, torch.cat(alone))


def test_no_rows(provider: str) -> None:
    nothing = torch.zeros(0)
    assert row_gumbel_argmax(torch.zeros(0, 9), nothing, nothing.long()).shape == (0,)


def test_errors() -> None:
    logits, temperature, seeds = torch.zeros(2, 5), torch.ones(2), torch.zeros(2).long()
    with pytest.raises(ValueError, match="logits"):
        row_gumbel_argmax(logits[0], temperature, seeds)
    with pytest.raises(ValueError, match="temperature"):
        row_gumbel_argmax(logits, temperature.double(), seeds)
    with pytest.raises(ValueError, match="seeds"):
        row_gumbel_argmax(logits, temperature, seeds[:1])
