"""What a drafting model with a KV cache of its own is asked for: one forward pass per level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal, Protocol

import torch

from vllm_specplus.core.tree import WORD_BITS


@dataclass(frozen=True, slots=True)
class RequestRows:
    """One request's rows in a level: `num_known` committed positions, then nodes of its draft.

    index: its row in the engine's batch. start: the first position, up to which the module has keys
    and values; the rows lie in KV slots `start`, `start + 1`, ... tokens: one per row. parents,
    depths: per node, the node above it (-1: none) and its depth, from 1 on. hidden_states:
    [num_rows, state_size]. first: the first slot that the rows see, where a block begins.
    """

    index: int
    start: int
    num_known: int
    tokens: Sequence[int]
    parents: Sequence[int]
    depths: Sequence[int]
    hidden_states: torch.Tensor
    first: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def positions(self) -> torch.Tensor:
        """RoPE positions, int64 [num_rows]: nodes of depth 1 stand behind the committed rows."""
        end = self.start + self.num_known
        nodes = torch.tensor(self.depths, dtype=torch.int64) + (end - 1)
        return torch.cat([torch.arange(self.start, end), nodes])

    def windows(self) -> Iterator[Window]:
        """The rows in runs that one ancestor word covers: committed ones are causal, nodes see
        all committed rows and their own path."""
        start = self.start - self.first
        for row in range(0, self.num_known, WORD_BITS):
            length = min(WORD_BITS, self.num_known - row)
            yield Window(start + row, [(2 << bit) - 1 for bit in range(length)])
        if self.parents:
            paths: list[int] = []
            for node, parent in enumerate(self.parents):
                paths.append((paths[parent] if parent >= 0 else 0) | 1 << node)
            yield Window(start + self.num_known, paths)


@dataclass(frozen=True, slots=True)
class Window:
    """Rows that lie side by side in KV slots `context_len`, `context_len + 1`, ..., counted from
    their request's first one.

    A row sees all slots before these, and the row of each set bit in its word of `masks`.
    """

    context_len: int
    masks: Sequence[int]


MAX_LEVEL_NODES = WORD_BITS
"""Nodes that a level can run for one request."""


HiddenStates = Literal["previous", "target"] | None
"""Whose hidden states the levels after the first read. None: no level reads any."""

Outputs = tuple[torch.Tensor, torch.Tensor]
"""Of each row of a level: what tokens are chosen from, and the hidden state that the rows below it
take in the next level, [num_rows, state_size]."""


class DraftModel(Protocol):
    """Modules that draft one level each, over an engine's KV cache; or one model that drafts all.

    num_caches: levels with a module and a cache of their own. Deeper ones run the last of these
    modules over its own cache, one position on each time: one module is unrolled.
    hidden_state_from: with None, its rows stand at the positions of their tokens, else before them.
    state_size: features of the hidden state that a row takes, 0 with None. block_size: KV slots of
    a block.
    """

    block_size: int
    num_levels: int
    num_caches: int
    hidden_state_from: HiddenStates
    state_size: int

    def forward(self, level: int, requests: Sequence[RequestRows]) -> Outputs:
        """Runs the module of `level` (from 0) and keeps its keys and values."""

    def best_tokens(
        self, level: int, hidden_states: torch.Tensor, num: int
    ) -> list[dict[int, float]]:
        """Per row, the `num` likeliest next tokens and their probabilities, in (0, 1].

        hidden_states: of the first of the two that `forward` returned for the level.
        """


_GROUP, _LEAST_GROUP = 128, 16  # neighbours in a row of logits


def likeliest(
    logits: torch.Tensor, num: int, vocab: torch.Tensor | None = None
) -> list[dict[int, float]]:
    """Per row of `logits`, [num_rows, num_tokens], the `num` likeliest tokens and what they are
    likely, in (0, 1]; `vocab`: the ids of the tokens, if they are not all."""
    logits = logits.float()
    best, index = _largest(logits, min(num, logits.shape[1]))
    total = (logits - best[:, :1]).exp_().sum(1, keepdim=True)
    probs = (best - best[:, :1]).exp() / total
    tokens = index if vocab is None else vocab[index]
    return [
        {token: prob for token, prob in zip(*row, strict=True) if prob > 0}
        for row in zip(tokens.tolist(), probs.tolist(), strict=True)
    ]


def _largest(logits: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `logits.topk(num)`, in less time where tokens fall into groups: the `num` largest are in
    the `num` groups whose maxima are largest."""
    size = gcd(logits.shape[1], _GROUP)
    if size < _LEAST_GROUP or logits.shape[1] <= num * size:
        return logits.topk(num)
    groups = logits.unflatten(1, (-1, size))
    index = groups.amax(2).topk(num).indices
    best, within = groups[torch.arange(len(logits))[:, None], index].flatten(1).topk(num)
    return best, index.gather(1, within // size) * size + within % size
