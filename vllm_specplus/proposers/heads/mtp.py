"""MTP modules as plain torch modules over whole sequences, for training and as an oracle.

Module k at position t reads a hidden state of t and token t+k+1, attends to its own positions up to
t, and gives the hidden state from which the target's head predicts token t+k+2 (DeepSeek-V3, 2024,
arXiv 2412.19437; one tied module at all depths: FastMTP, Cai et al. 2025, arXiv 2509.18362).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from vllm_specplus.proposers.heads.checkpoint import HeadsCheckpoint, HeadsConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q [..., T, num_heads, head_dim] over k and v [..., T, num_kv_heads, head_dim], with
scores times head_dim**-0.5; the result is shaped like q."""


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each row attends to itself and the rows before it."""
    q, k, v = (each.transpose(-3, -2) for each in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(-3, -2)


class RMSNorm(nn.Module):
    """x / rms(x) times the gain, in float32."""

    def __init__(self, size: int, config: HeadsConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 0.0 if config.norm_adds_one else 1.0))
        self.eps, self.offset = config.rms_norm_eps, float(config.norm_adds_one)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size]."""
        gain = self.weight.float() + self.offset
        return functional.rms_norm(x.float(), gain.shape, gain, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Attention with grouped queries and rotary positions."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config)
            self.k_norm = RMSNorm(self.head_dim, config)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """x: [..., T, hidden_size]; positions: [..., T]."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=-2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = _rotary(positions, self.head_dim, self.rope_theta)
        q, k = (_rotate(each, cos, sin).to(v.dtype) for each in (q, k))
        return self.o_proj(attend(q, k, v).flatten(-2))


class MLP(nn.Module):
    """act(gate) * up, and down again."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)


class MTPModule(nn.Module):
    """One module; its state dict has the names of `checkpoint.module_shapes`."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.enorm, self.hnorm = RMSNorm(size, config), RMSNorm(size, config)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.input_layernorm = RMSNorm(size, config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(size, config)
        self.mlp = MLP(config)
        if config.sandwich_norms:
            self.pre_feedforward_layernorm = RMSNorm(size, config)
            self.post_feedforward_layernorm = RMSNorm(size, config)
        self.sandwich_norms = config.sandwich_norms
        self.final_norm = RMSNorm(size, config)

    def inputs(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """What `eh_proj` takes: [..., 2 * hidden_size]."""
        return torch.cat([self.enorm(embeddings), self.hnorm(hidden)], dim=-1)

    def forward(
        self,
        hidden: Tensor,
        embeddings: Tensor,
        positions: Tensor | None = None,
        attend: Attend = causal,
    ) -> Tensor:
        """The module's hidden state, [..., T, hidden_size] like hidden and embeddings.

        embeddings: as the target scales them. positions: integers [..., T], None for 0, 1, 2, ...
        """
        if positions is None:
            positions = torch.arange(hidden.shape[-2], device=hidden.device)
        x = self.eh_proj(self.inputs(hidden, embeddings))
        attended = self.self_attn(self.input_layernorm(x), positions, attend)
        if self.sandwich_norms:
            x = x + self.post_attention_layernorm(attended)
            x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        else:
            x = x + attended
            x = x + self.mlp(self.post_attention_layernorm(x))
        return self.final_norm(x)


class MTPHeads(nn.Module):
    """All depths, each over the whole sequence with its own keys and values."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.stored = nn.ModuleList(MTPModule(config) for _ in range(config.num_stored))

    @classmethod
    def from_checkpoint(cls, checkpoint: HeadsCheckpoint) -> MTPHeads:
        """The modules of a checkpoint, in float32."""
        heads = cls(checkpoint.config)
        for number, module in enumerate(heads.stored):
            module.load_state_dict(checkpoint.module(number))
        return heads

    def at(self, depth: int) -> MTPModule:
        """The module of a depth, from 0; past the last it is the last."""
        module = self.stored[min(depth, len(self.stored) - 1)]
        assert isinstance(module, MTPModule)
        return module

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Hidden states [num_modules, B, T, hidden_size]: row t of depth k predicts token t+k+2.

        hidden: [B, T, hidden_size], the target's. embeddings: [B, T + num_modules - 1,
        hidden_size], row i that of token i+1. Every draft before depth k is taken as token t+k+1
        says, which is how a draft that was right so far is continued.
        """
        outputs, previous = [], hidden
        for depth in range(self.config.num_modules):
            source = previous if self.config.hidden_state_from == "previous" else hidden
            previous = self.at(depth)(source, embeddings[:, depth : depth + hidden.shape[1]])
            outputs.append(previous)
        return torch.stack(outputs)


def _rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., T, 1, head_dim / 2] (Su et al. 2021, arXiv 2104.09864)."""
    angles = positions.float()[..., None, None] * _frequencies(head_dim, theta, positions.device)
    return angles.cos(), angles.sin()


@functools.cache
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    steps = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return theta**-steps


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., T, heads, head_dim]; the halves of head_dim are the pairs, as in Llama."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
