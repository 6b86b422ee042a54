"""row_gumbel_argmax in plain torch, row by row (a row of noise in double is large)."""

from __future__ import annotations

import torch


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


GAMMA, MIX_1, MIX_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def row_gumbel_argmax(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor
) -> torch.Tensor:
    """See the package's docstring."""
    rows = [
        _sample(row, row_temperature, seed)
        for row, row_temperature, seed in zip(logits, temperature, seeds, strict=True)
    ]
    return torch.stack(rows) if rows else torch.zeros_like(seeds)


def _sample(logits: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)
    numbers = torch.nan_to_num(scaled, -torch.inf, torch.inf, -torch.inf).double()
    count = torch.arange(1, len(logits) + 1, device=logits.device)
    bits = _shift(_mix(_mix(seed) + count * GAMMA), 11)
    uniform = (bits.double() + 0.5) * 2.0**-53
    noise = torch.where(greedy, 0.0, -torch.log(-torch.log(uniform)))
    return torch.argmax(numbers + noise)


def _mix(state: torch.Tensor) -> torch.Tensor:
    """SplitMix64's mixing; int64 products wrap as uint64 ones do."""
    state = (state ^ _shift(state, 30)) * MIX_1
    state = (state ^ _shift(state, 27)) * MIX_2
    return state ^ _shift(state, 31)


def _shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    """A shift to the right that brings in zeros; torch's brings in the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
