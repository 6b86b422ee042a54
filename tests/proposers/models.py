"""What drafts in the conformance suite: random heads and modules, real ones but for attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tests.proposers.heads.heads import config, modules
from vllm_specplus.proposers.base import Proposer
from vllm_specplus.proposers.heads.medusa import MedusaHeads
from vllm_specplus.proposers.heads.medusa_checkpoint import MedusaConfig
from vllm_specplus.proposers.heads.mtp import MTPHeads
from vllm_specplus.proposers.levels import RequestRows
from vllm_specplus.proposers.medusa import MedusaProposer
from vllm_specplus.proposers.mtp import MtpProposer

VOCAB_SIZE, HIDDEN_SIZE, NUM_HEADS = 16, 12, 3
_random = torch.Generator().manual_seed(0)
EMBEDDING = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=_random)


def hidden_state(tokens: Sequence[int]) -> Tensor:
    """The target's at the last of the tokens: float32 [hidden_size], by the last two."""
    first, second = (token % VOCAB_SIZE for token in [0, *tokens][-2:])
    return EMBEDDING[second] + EMBEDDING[first] / 2


def own_row(q: Tensor, _: Tensor, v: Tensor) -> Tensor:
    """Attention to the row itself: a context needs the KV cache of an engine."""
    return v.expand_as(q)


class Modules:
    """A `DraftModel` of MTP modules."""

    num_levels = num_caches = NUM_HEADS
    hidden_state_from: Literal["previous", "target"] = "previous"

    def __init__(self) -> None:
        self._heads = MTPHeads(config()).requires_grad_(False)
        for module, weights in zip(self._heads.stored, modules(config()), strict=True):
            module.load_state_dict(weights)

    def forward(self, level: int, requests: Sequence[RequestRows]) -> Tensor:
        hidden = torch.cat([rows.hidden_states for rows in requests])
        tokens = [token for rows in requests for token in rows.tokens]
        positions = torch.cat([rows.positions() for rows in requests])
        return self._heads.at(level)(hidden, EMBEDDING[tokens], positions, own_row)

    def best_tokens(self, level: int, hidden_states: Tensor, num: int) -> list[dict[int, float]]:
        best, tokens = (hidden_states @ EMBEDDING.T).softmax(1).topk(num)
        pairs = zip(tokens.tolist(), best.tolist(), strict=True)
        return [dict(zip(*pair, strict=True)) for pair in pairs]


def give_model(proposer: Proposer) -> Proposer:
    """The proposer with what an engine would have loaded for it."""
    if isinstance(proposer, MtpProposer):
        proposer.model = Modules()
    elif isinstance(proposer, MedusaProposer):
        sizes: dict[str, Any] = dict(num_heads=NUM_HEADS, num_layers=1, hidden_size=HIDDEN_SIZE)
        about = MedusaConfig(**sizes, vocab_size=VOCAB_SIZE, has_bias=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            heads = MedusaHeads(about).requires_grad_(False)
        heads.shared = partial(functional.linear, weight=EMBEDDING)
        proposer.model, proposer.num_heads = heads, NUM_HEADS
    return proposer
