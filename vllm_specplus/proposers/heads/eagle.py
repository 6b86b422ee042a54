"""EAGLE's head over whole sequences, for training: what vLLM's `EagleLlamaForCausalLM` computes.

One Llama layer without its first norm, on a projection of the next token's embedding and the
target's hidden state; there is no final norm, and the layer's output is both what the target's head
reads and the hidden state of the next step (EAGLE, Li et al. 2024, arXiv 2401.15077).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_specplus.proposers.heads.eagle_checkpoint import EagleConfig
from vllm_specplus.proposers.heads.mtp import MLP, Attend, Attention, RMSNorm, causal


class EagleHead(nn.Module):
    """The weights of one head; its state dict has the names of `eagle_checkpoint.head_shapes`."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config)

    def step(self, hidden: Tensor, embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The hidden state after one more token, [..., T, hidden_size] like hidden and embeddings.

        embeddings: rows of the target's table, not scaled. positions: integers [..., T].
        """
        x = self.fc(torch.cat([embeddings, hidden], dim=-1))
        x = x + self.self_attn(x, positions, attend)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Hidden states [num_depths, B, T, hidden_size]: row t of depth k predicts token t+k+2.

        hidden: [B, T, hidden_size], the target's. embeddings: [B, T + num_depths - 1, hidden_size],
        row i that of token i+1: drafts are taken as right. Depth k of row t attends to what the
        target's hidden states gave for tokens up to t, and to its own chain's steps after that.
        """
        length = hidden.shape[1]
        positions = torch.arange(length, device=hidden.device)
        outputs, attend = [], _Chains()
        for depth in range(embeddings.shape[1] - length + 1):
            rows = embeddings[:, depth : depth + length]
            hidden = self.step(hidden, rows, positions + depth, attend)
            outputs.append(hidden)
        return torch.stack(outputs)


class _Chains:
    """Attention of one step after the other of chains that begin at every row."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, T, num_heads, head_dim]; k, v: [B, T, num_kv_heads, head_dim]."""
        self.steps.append((k, v))
        if len(self.steps) == 1:
            return causal(q, k, v)
        repeats = q.shape[-2] // k.shape[-2]
        keys, values = (
            [each.repeat_interleave(repeats, dim=-2).transpose(-3, -2) for each in part]
            for part in zip(*self.steps, strict=True)
        )
        q, length = q.transpose(-3, -2), q.shape[-3]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        context = (q @ keys[0].transpose(-2, -1)).float().masked_fill(future, -torch.inf)
        own = torch.stack([(q * key).float().sum(-1) for key in keys[1:]], dim=-1)
        scores = torch.cat([context, own], dim=-1) * q.shape[-1] ** -0.5
        weights = scores.softmax(-1).to(v.dtype)
        out = weights[..., :length] @ values[0]
        for place, value in enumerate(values[1:]):
            out = out + weights[..., length + place, None] * value
        return out.transpose(-3, -2)
