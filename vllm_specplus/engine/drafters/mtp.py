"""Trained MTP modules, run level by level: what grows chains and trees of them on the CPU engine.

A module's attention is a layer of vLLM's own. The rest is plain torch, whole on every rank of a
tensor parallel group: drafting needs no communication between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from vllm_specplus.engine.compat import Attention, VllmConfig
from vllm_specplus.engine.drafters.heads import language_model, warn_of_another_target
from vllm_specplus.engine.drafters.modules_v1 import PagedModules
from vllm_specplus.engine.drafters.packed import (
    drafting_dtype,
    gathered_rows,
    pack,
    packed_linear,
)
from vllm_specplus.engine.drafters.paged import PagedLayers, likeliest
from vllm_specplus.proposers.heads.checkpoint import HeadsCheckpoint, load_heads
from vllm_specplus.proposers.heads.files import check_fits
from vllm_specplus.proposers.heads.mtp import MTPHeads
from vllm_specplus.proposers.levels import RequestRows
from vllm_specplus.proposers.mtp import MtpProposer


def load_draft_model(
    proposer: MtpProposer, target: Any, vllm_config: VllmConfig
) -> PagedHeads | PagedModules:
    """What runs the proposer's levels: its heads, or the target's own modules."""
    config = proposer.config
    if proposer.path is None:
        return PagedModules(target, vllm_config, config.num_speculative_tokens)
    checkpoint = load_heads(proposer.path, config.revision)
    num_levels = proposer.num_levels(checkpoint.config.num_modules)
    return PagedHeads(checkpoint, target, vllm_config, num_levels)


class PagedHeads(PagedLayers):
    """A heads checkpoint beside its target: `DraftModel` on vLLM's V1 runner."""

    def __init__(
        self, checkpoint: HeadsCheckpoint, target: Any, vllm_config: VllmConfig, num_levels: int
    ) -> None:
        config, model = checkpoint.config, vllm_config.model_config
        check_fits(checkpoint, model.get_hidden_size(), model.get_vocab_size())
        self.num_levels = self.num_caches = num_levels
        self.hidden_state_from = config.hidden_state_from
        self._embed_scale = config.embed_scale
        self._draft_vocab = checkpoint.draft_vocab
        self._dtype, self._attention_dtype = drafting_dtype(model.dtype), model.dtype
        heads = MTPHeads.from_checkpoint(checkpoint).to(model.dtype)
        self._modules = [heads.at(depth) for depth in range(num_levels)]
        pack(heads)
        first = model.get_total_num_hidden_layers()
        layers = [
            Attention(
                config.num_attention_heads,
                config.head_dim,
                config.head_dim**-0.5,
                config.num_key_value_heads,
                prefix=f"specplus.mtp.{first + depth}.attn",
            )
            for depth in range(num_levels)
        ]
        super().__init__(layers, vllm_config)
        self._share(target, model.get_vocab_size())
        warn_of_another_target(checkpoint, self._embedding)

    def _share(self, target: Any, vocab_size: int) -> None:
        """Takes the target's embedding and the rows of its head that drafts are chosen from."""
        target = language_model(target)
        embedding, head = target.model.embed_tokens, target.lm_head
        self._embedding = gathered_rows(embedding, torch.arange(vocab_size), copy=False)
        if self._draft_vocab is None:
            self._draft_vocab = torch.arange(vocab_size)
        self._head = packed_linear(gathered_rows(head, self._draft_vocab, copy=True))

    def forward(self, level: int, requests: Sequence[RequestRows]) -> torch.Tensor:
        """See `DraftModel`."""
        tokens = torch.tensor([token for rows in requests for token in rows.tokens])
        layer = self.layers[level]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            attended: torch.Tensor = layer(
                *(x.flatten(1).to(self._attention_dtype) for x in (q, k, v))
            )
            return attended.to(self._dtype).view_as(q)

        with self.running(requests):
            return self._modules[level](
                torch.cat([rows.hidden_states for rows in requests]).to(self._dtype),
                functional.embedding(tokens, self._embedding).to(self._dtype) * self._embed_scale,
                torch.cat([rows.positions() for rows in requests]),
                attend,
            )

    def best_tokens(
        self, level: int, hidden_states: torch.Tensor, num: int
    ) -> list[dict[int, float]]:
        """See `DraftModel`."""
        return likeliest(self._head(hidden_states), num, self._draft_vocab)
