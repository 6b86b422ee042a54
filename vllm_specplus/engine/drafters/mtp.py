"""MTP modules over vLLM's paged KV cache: what runs a level of drafts on the CPU engine.

A module's attention is a layer of vLLM's own, so that its keys and values lie in blocks of the
target's block tables and are cached, freed and preempted with them. The rest is plain torch, whole
on every rank of a tensor parallel group: drafting needs no communication between ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from specplus_kernels.tree_attention import tree_attention
from torch import nn
from torch.nn import functional

from vllm_specplus.engine.attention_cpu import vec_kv_views
from vllm_specplus.engine.compat import (
    Attention,
    VllmConfig,
    VocabParallelEmbedding,
)
from vllm_specplus.engine.compat_cpu import dispatch_cpu_unquantized_gemm
from vllm_specplus.engine.drafters.heads import language_model, warn_of_another_target
from vllm_specplus.proposers.heads.checkpoint import HeadsCheckpoint
from vllm_specplus.proposers.heads.files import check_fits
from vllm_specplus.proposers.heads.mtp import MTPHeads
from vllm_specplus.proposers.levels import RequestRows


class PagedHeads:
    """A heads checkpoint beside its target: `DraftModel` on vLLM's V1 runner."""

    def __init__(
        self, checkpoint: HeadsCheckpoint, target: Any, vllm_config: VllmConfig, num_levels: int
    ) -> None:
        config, model = checkpoint.config, vllm_config.model_config
        check_fits(checkpoint, model.get_hidden_size(), model.get_vocab_size())
        self.num_levels = num_levels
        self.hidden_state_from = config.hidden_state_from
        self._block_tables: dict[str, Any] = {}
        self._embed_scale = config.embed_scale
        self._draft_vocab = checkpoint.draft_vocab
        heads = MTPHeads.from_checkpoint(checkpoint).to(model.dtype)
        self._modules = [heads.at(depth) for depth in range(num_levels)]
        pack_linear_layers(heads)
        first = model.get_total_num_hidden_layers()
        self.layers = [
            Attention(
                config.num_attention_heads,
                config.head_dim,
                config.head_dim**-0.5,
                config.num_key_value_heads,
                prefix=f"specplus.mtp.{first + depth}.attn",
            )
            for depth in range(num_levels)
        ]
        self._share(target, model.get_vocab_size())
        warn_of_another_target(checkpoint, self._embedding)

    def _share(self, target: Any, vocab_size: int) -> None:
        """Takes the target's embedding and the rows of its head that drafts are chosen from."""
        target = language_model(target)
        embedding, head = target.model.embed_tokens, target.lm_head
        self._embedding = gathered_rows(embedding, torch.arange(vocab_size), copy=False)
        if self._draft_vocab is None:
            self._draft_vocab = torch.arange(vocab_size)
        self._head = PackedLinear(gathered_rows(head, self._draft_vocab, copy=True))

    def bind(self, layer_names: Sequence[str], block_table: Any) -> None:
        """Tells the runner's block table of a KV cache group."""
        self._block_tables |= dict.fromkeys(layer_names, block_table)

    def num_slots(self, index: int) -> int:
        """KV slots of row `index` of the batch in the modules' layers."""
        tables = [self._block_tables[layer.layer_name] for layer in self.layers]
        return min(int(table.num_blocks_per_row[index]) * table.block_size for table in tables)

    def forward(self, level: int, requests: Sequence[RequestRows]) -> torch.Tensor:
        """See `DraftModel`."""
        tokens = torch.tensor([token for rows in requests for token in rows.tokens])
        layer = self.layers[level]
        return self._modules[level](
            torch.cat([rows.hidden_states for rows in requests]),
            functional.embedding(tokens, self._embedding) * self._embed_scale,
            torch.cat([rows.positions() for rows in requests]),
            _PagedAttention(layer, self._block_tables[layer.layer_name], requests),
        )

    def best_tokens(self, hidden_states: torch.Tensor, num: int) -> list[dict[int, float]]:
        """See `DraftModel`."""
        assert self._draft_vocab is not None
        logits = self._head(hidden_states).float()
        best, index = logits.topk(min(num, logits.shape[1]))
        weights = torch.exp(logits - best[:, :1])
        probs = torch.exp(best - best[:, :1]) / weights.sum(1, keepdim=True)
        tokens = self._draft_vocab[index].tolist()
        return [
            {token: prob for token, prob in zip(*row, strict=True) if prob > 0}
            for row in zip(tokens, probs.tolist(), strict=True)
        ]


class _PagedAttention:
    """`attend` for a level: writes the rows' keys and values, then attends to all before them."""

    def __init__(self, layer: Any, block_table: Any, requests: Sequence[RequestRows]) -> None:
        self.layer = layer
        windows = [(rows.index, window) for rows in requests for window in rows.windows()]
        lengths = [len(window.masks) for _, window in windows]
        owners = torch.arange(len(windows)).repeat_interleave(torch.tensor(lengths))
        self.block_table = block_table.block_table.cpu[[index for index, _ in windows]]
        self.query_start_loc = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        self.context_lens = torch.tensor([w.context_len for _, w in windows], dtype=torch.int32)
        masks = np.array([mask for _, window in windows for mask in window.masks], np.uint64)
        self.ancestor_mask = torch.from_numpy(masks.view(np.int64))[:, None]
        rows = torch.arange(len(owners))
        self.slots = rows - self.query_start_loc[owners] + self.context_lens[owners]
        size = block_table.block_size
        blocks = self.block_table[owners, self.slots // size].long()
        self.slot_mapping = blocks * size + self.slots % size

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See `heads.mtp.Attend`; T is all rows of the level."""
        layer = self.layer
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, self.slot_mapping)
        return tree_attention(
            query,
            *vec_kv_views(layer.kv_cache),
            self.block_table,
            self.query_start_loc,
            self.context_lens,
            self.ancestor_mask,
            self.slots,
            scale=layer.impl.scale,
            out=torch.empty_like(query),
        )


class PackedLinear(nn.Module):
    """x @ weight.T + bias, with the weight in the layout that vLLM's own linear layers have."""

    cpu_linear: Callable[..., torch.Tensor]

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_rows, in_features]."""
        return self.cpu_linear(x, self.weight, self.bias)


def pack_linear_layers(module: nn.Module) -> None:
    """Puts a PackedLinear in the place of every linear layer."""
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, PackedLinear(layer.weight, layer.bias))


def gathered_rows(layer: Any, token_ids: torch.Tensor, copy: bool) -> torch.Tensor:
    """Rows of an embedding or of a head, [num_tokens, hidden_size], gathered from all ranks."""
    if layer.tp_size == 1 and not copy:
        return layer.weight[: len(token_ids)]
    return VocabParallelEmbedding.forward(layer, token_ids)
