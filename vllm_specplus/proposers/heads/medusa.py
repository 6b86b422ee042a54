"""Medusa heads in plain torch (Cai et al. 2024, arXiv 2401.10774)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_specplus.proposers.heads.medusa_checkpoint import MedusaCheckpoint, MedusaConfig

Head = Callable[[Tensor], Tensor]
"""Hidden states [num_rows, hidden_size] -> logits [num_rows, draft_vocab_size]."""


class ResidualBlocks(nn.Module):
    """x + SiLU(W x + b), one after the other."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.layers = nn.ModuleList(
            nn.Linear(size, size, bias=config.has_bias) for _ in range(config.num_layers)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = hidden + functional.silu(layer(hidden))
        return hidden


class MedusaHeads(nn.Module):
    """All heads, with their own matrices over the vocabulary if they have some.

    num_lm_heads: of these, 0, 1 for all, or one for each head. draft_vocab: int64
    [draft_vocab_size], the target's tokens, None for all. shared: the target's head over the draft
    vocabulary, which is needed where they have none.
    """

    shared: Head
    draft_vocab: Tensor | None
    lm_heads: nn.ModuleList

    def __init__(
        self, config: MedusaConfig, num_lm_heads: int = 0, draft_vocab: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        size, rows = config.hidden_size, config.draft_vocab_size or config.vocab_size or 0
        self.blocks = nn.ModuleList(ResidualBlocks(config) for _ in range(config.num_heads))
        self.lm_heads = nn.ModuleList(
            nn.Linear(size, rows, bias=False) for _ in range(num_lm_heads)
        )
        self.register_buffer("draft_vocab", draft_vocab, persistent=False)

    @classmethod
    def from_checkpoint(cls, checkpoint: MedusaCheckpoint) -> MedusaHeads:
        """The heads of a checkpoint, in the dtypes of its file."""
        with torch.device("meta"):
            heads = cls(checkpoint.config, checkpoint.num_lm_heads, checkpoint.draft_vocab)
        heads.load_state_dict(checkpoint.tensors, assign=True)
        return heads.requires_grad_(False)

    def forward(self, hidden: Tensor, _: Tensor | None = None) -> Tensor:
        """Hidden states [num_heads, ..., hidden_size]: row t of head k predicts token t+k+2.

        hidden: [..., hidden_size], those that the target's head takes. (Embeddings, which other
        heads take beside them, are not used.)
        """
        return torch.stack([block(hidden) for block in self.blocks])

    def best(self, hidden: Tensor, num_heads: int, num: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens of the first heads, best first, and their log-probabilities:
        int64 and float32 [num_rows, num_heads, num].

        hidden: [num_rows, hidden_size]. num: fewer where there are fewer tokens.
        """
        each = [self._best(head, hidden, num) for head in range(num_heads)]
        tokens, logprobs = (torch.stack(parts, dim=1) for parts in zip(*each, strict=True))
        return tokens if self.draft_vocab is None else self.draft_vocab[tokens], logprobs

    def _best(self, head: int, hidden: Tensor, num: int) -> tuple[Tensor, Tensor]:
        own = self.lm_heads
        to_logits = own[min(head, len(own) - 1)] if own else self.shared
        logits = to_logits(self.blocks[head](hidden)).float() * self.config.logit_scale
        best, tokens = logits.topk(min(num, logits.shape[1]))
        return tokens, best - logits.logsumexp(1, keepdim=True)
