"""What drafts level by level on the CPU engine; of it, trained MTP modules are run here.

A module's attention is a layer of vLLM's own. The rest is plain torch, whole on every rank of a
tensor parallel group: drafting needs no communication between ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from vllm_specplus.engine.compat import Attention, VllmConfig
from vllm_specplus.engine.drafters.heads import language_model, warn_of_another_target
from vllm_specplus.engine.drafters.models_v1 import (
    PagedDraftModel,
    PagedModel,
    PagedModules,
    paged_eagle,
)
from vllm_specplus.engine.drafters.packed import gathered_rows, pack, packed_linear
from vllm_specplus.engine.drafters.paged import PagedLayers
from vllm_specplus.proposers.by_level import LevelProposer
from vllm_specplus.proposers.heads.checkpoint import HeadsCheckpoint, load_heads
from vllm_specplus.proposers.heads.files import check_fits
from vllm_specplus.proposers.heads.int8 import drafting_dtype
from vllm_specplus.proposers.heads.mtp import MTPHeads
from vllm_specplus.proposers.levels import HiddenStates, Outputs, likeliest


def load_draft_model(
    proposer: LevelProposer, target: Any, vllm_config: VllmConfig, number: int
) -> PagedHeads | PagedModel:
    """What runs the levels of a proposer, the one of this number."""
    config, drafter = proposer.config, proposer.drafter
    num_levels = config.num_speculative_tokens
    if drafter.name == "draft":
        options = vllm_config.speculative_config.specplus_drafters[number]
        return PagedDraftModel(vllm_config, options, num_levels, f"draft_model_{number}")
    if drafter.name in ("eagle", "eagle3"):
        return paged_eagle(target, vllm_config, num_levels)
    if drafter.model is None:
        return PagedModules(target, vllm_config, num_levels)
    checkpoint = load_heads(drafter.model, config.revision)
    num_levels = proposer.num_levels(checkpoint.config.num_modules)
    return PagedHeads(checkpoint, target, vllm_config, num_levels)


class PagedHeads(PagedLayers):
    """A heads checkpoint beside its target: `DraftModel` on vLLM's V1 runner."""

    def __init__(
        self, checkpoint: HeadsCheckpoint, target: Any, vllm_config: VllmConfig, num_levels: int
    ) -> None:
        config, model = checkpoint.config, vllm_config.model_config
        self.state_size = model.get_hidden_size()
        check_fits(checkpoint, self.state_size, model.get_vocab_size())
        self.num_levels = self.num_caches = num_levels
        self.hidden_state_from: HiddenStates = config.hidden_state_from
        self._embed_scale = config.embed_scale
        self._draft_vocab = checkpoint.draft_vocab
        self._dtype, self._attention_dtype = drafting_dtype(model.dtype), model.dtype
        heads = MTPHeads.from_checkpoint(checkpoint)
        self._modules = [heads.at(depth) for depth in range(num_levels)]
        pack(heads, model.dtype)
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
        super().__init__(layers, vllm_config, model.max_model_len)
        self._share(target, model.get_vocab_size())
        warn_of_another_target(checkpoint, self._embedding)

    def _share(self, target: Any, vocab_size: int) -> None:
        """Takes the target's embedding and the rows of its head that drafts are chosen from."""
        target = language_model(target)
        embedding, head = target.model.embed_tokens, target.lm_head
        self._embedding = gathered_rows(embedding, torch.arange(vocab_size), copy=False)
        if self._draft_vocab is None:
            self._draft_vocab = torch.arange(vocab_size)
        rows = gathered_rows(head, self._draft_vocab, copy=True)
        self._head = packed_linear(rows, self._attention_dtype)

    def _run(
        self, level: int, tokens: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> Outputs:
        layer = self.layers[level]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            heads = [x.flatten(1).to(self._attention_dtype) for x in (q, k, v)]
            attended: torch.Tensor = layer(*heads)
            return attended.to(self._dtype).view_as(q)

        embedded = functional.embedding(tokens, self._embedding).to(self._dtype) * self._embed_scale
        above = hidden_states.to(self._dtype)
        out = self._modules[level](above, embedded, positions, attend)
        return out, out

    def best_tokens(
        self, level: int, hidden_states: torch.Tensor, num: int
    ) -> list[dict[int, float]]:
        """See `DraftModel`."""
        return likeliest(self._head(hidden_states), num, self._draft_vocab)
