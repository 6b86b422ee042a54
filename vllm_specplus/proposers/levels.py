"""What a drafting model with a KV cache of its own is asked for: one forward pass per level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from vllm_specplus.core.tree import WORD_BITS


@dataclass(frozen=True, slots=True)
class RequestRows:
    """One request's rows in a level: `num_known` committed positions, then nodes of its draft.

    index: its row in the engine's batch. start: the first position, up to which the module has keys
    and values; the rows lie in KV slots `start`, `start + 1`, ... tokens: one per row. parents,
    depths: per node, the node above it (-1: none) and its depth, from 1 on. hidden_states:
    [num_rows, hidden_size].
    """

    index: int
    start: int
    num_known: int
    tokens: Sequence[int]
    parents: Sequence[int]
    depths: Sequence[int]
    hidden_states: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def positions(self) -> torch.Tensor:
        """RoPE positions, int64 [num_rows]: nodes of depth 1 stand behind the committed rows."""
        end = self.start + self.num_known
        nodes = torch.tensor(self.depths, dtype=torch.int64) + (end - 1)
        return torch.cat([torch.arange(self.start, end), nodes])

    def visible(self, words: int) -> torch.Tensor:
        """Bitmask over the request's rows, int64 [num_rows, words]: causal, and along the draft."""
        known = self.num_known
        masks = leading_bits(torch.arange(1, len(self) + 1).clamp(max=known), words)
        paths: list[int] = []
        for node, parent in enumerate(self.parents):
            row = known + node
            paths.append((paths[parent] if parent >= 0 else 0) | 1 << row)
            for word in range(known // WORD_BITS, words):
                masks[row, word] |= _signed(paths[node] >> WORD_BITS * word)
        return masks


def leading_bits(counts: torch.Tensor, words: int) -> torch.Tensor:
    """int64 [num_rows, words] with the first `counts[i]` bits of row i set."""
    bits = (counts[:, None] - WORD_BITS * torch.arange(words)).clamp(0, WORD_BITS)
    return torch.where(bits == WORD_BITS, -1, (1 << bits % WORD_BITS) - 1)


def _signed(word: int) -> int:
    """The low 64 bits as int64."""
    word &= (1 << WORD_BITS) - 1
    return word - (1 << WORD_BITS) if word >> WORD_BITS - 1 else word


class DraftModel(Protocol):
    """Modules that draft one level each, over an engine's KV cache."""

    num_levels: int
    hidden_state_from: Literal["previous", "target"]

    def forward(self, level: int, requests: Sequence[RequestRows]) -> torch.Tensor:
        """Runs the module of `level` (from 0) and keeps its keys and values.

        Returns the rows' hidden states, [sum of rows, hidden_size].
        """

    def best_tokens(self, hidden_states: torch.Tensor, num: int) -> list[dict[int, float]]:
        """Per row, the `num` likeliest next tokens and their probabilities, in (0, 1]."""
