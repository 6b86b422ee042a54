"""Small random heads for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_specplus.proposers.heads.checkpoint import HeadsConfig, module_shapes


def config(**changes: Any) -> HeadsConfig:
    """A Llama-like module of hidden size 12 with two query heads on one key head."""
    fields: dict[str, Any] = dict(
        target="tiny",
        num_modules=3,
        tied=False,
        hidden_state_from="previous",
        hidden_size=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=20,
        hidden_act="silu",
        rope_theta=100.0,
        rms_norm_eps=1e-5,
    )
    return HeadsConfig.model_validate(fields | changes)


def modules(config: HeadsConfig, seed: int = 0) -> list[dict[str, Tensor]]:
    """Gaussian weights for every stored module; gains are random too."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            for name, shape in module_shapes(config).items()
        }
        for _ in range(config.num_stored)
    ]
