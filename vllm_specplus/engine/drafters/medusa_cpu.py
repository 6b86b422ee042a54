"""Medusa heads on the CPU engine: packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.engine.compat import VllmConfig
from vllm_specplus.engine.drafters.medusa import load_beside
from vllm_specplus.engine.drafters.packed import gathered_rows, pack, packed_linear
from vllm_specplus.proposers.heads.medusa import MedusaHeads


def packed_medusa(config: SpecPlusConfig, target: Any, vllm_config: VllmConfig) -> MedusaHeads:
    """`load_beside` with packed matrices, rows of the target's head among them."""
    model = vllm_config.model_config

    def packed_head(lm_head: Any, vocab: torch.Tensor | None) -> nn.Module:
        if vocab is None:
            vocab = torch.arange(model.get_vocab_size())
        return packed_linear(gathered_rows(lm_head, vocab, copy=True), model.dtype)

    heads = load_beside(config, target, vllm_config, torch.device("cpu"), packed_head)
    pack(heads, model.dtype)
    return heads
