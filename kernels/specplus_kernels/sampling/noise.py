"""Random numbers that depend on (seed, position, token) alone, in plain torch.

    bits = MurmurHash3_x86_32 of the 16 bytes (seed: 8, low half of position: 4, token: 4),
           little-endian, with hash seed `domain`

Domain 0 is the noise of the target model's own sampling in vLLM 0.32's V2 sampler
(`v1/worker/gpu/sample/gumbel.py`), so a token drawn with it at a position is the token that plain
decoding draws there. Drafts must be drawn with other noise (vLLM adds 2^30 to their positions).
Domain ACCEPT is ours: the coin of a draft node, keyed by the root's position and the node's row. A
root's position never returns, so no coin is used in two steps.
"""

from __future__ import annotations

import torch

ACCEPT = 0x53504543
WORD = 0xFFFFFFFF


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """-log(-log(1 - u)) in fp32 with u = (bits + 1/2) / 2^32; the arguments broadcast."""
    bits = hash32(seeds, positions, tokens)
    u = (bits >> 16).float() * 2.0**-16 + ((bits & 0xFFFF).float() + 0.5) * 2.0**-32
    return -torch.log(-_log1p_neg(u))


def coin(seeds: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Uniform on the multiples of 2^-24 in [0, 1), fp32; the arguments broadcast."""
    return (hash32(seeds, positions, rows, ACCEPT) >> 8).float() * 2.0**-24


def hash32(
    seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor, domain: int = 0
) -> torch.Tensor:
    """The hash as int64 in [0, 2^32); the arguments are int64 and broadcast."""
    state = torch.full_like(seeds, domain)
    for word in (seeds, seeds >> 32, positions, tokens):
        key = _rotate((word & WORD) * 0xCC9E2D51 & WORD, 15) * 0x1B873593 & WORD
        state = _rotate(state ^ key, 13) * 5 + 0xE6546B64 & WORD
    state = state ^ 16
    state = (state ^ state >> 16) * 0x85EBCA6B & WORD
    state = (state ^ state >> 13) * 0xC2B2AE35 & WORD
    return state ^ state >> 16


def _rotate(word: torch.Tensor, by: int) -> torch.Tensor:
    return (word << by | word >> (32 - by)) & WORD


def _log1p_neg(u: torch.Tensor) -> torch.Tensor:
    """log(1 - u): by series where the difference would lose what decides a Gumbel maximum."""
    series = torch.full_like(u, 1.0 / 8.0)
    for term in range(7, 0, -1):
        series = 1.0 / term + u * series
    direct = torch.log(torch.clamp(1.0 - u, min=2.0**-24))
    return torch.where(u < 0.25, -u * series, direct)
