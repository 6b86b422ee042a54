"""The dense modules against an implementation written here: one position and one head at a time,
in float64, with rotations as complex numbers.

Sabotages that were caught: no causal mask, hidden and embedding swapped, the depth's embeddings off
by one, the previous module's hidden state where the target's belongs and the other way round, gains
without their 1, RoPE with interleaved pairs, the wrong key head of a group, gate and up swapped,
final norm left out, one module for all depths of untied heads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.proposers.heads.heads import config, modules
from vllm_specplus.proposers.heads.checkpoint import HeadsCheckpoint, HeadsConfig
from vllm_specplus.proposers.heads.mtp import MTPHeads, causal

TOLERANCE = 2e-5  # float32 against float64 through one layer and three depths
LENGTH = 9

KINDS: list[dict[str, Any]] = [
    {},
    {"hidden_state_from": "target"},
    {"tied": True},
    {"num_modules": 2, "num_key_value_heads": 2, "attention_bias": True},
    {"qk_norm": True, "num_attention_heads": 4, "num_key_value_heads": 2},
    dict(norm_adds_one=True, sandwich_norms=True, qk_norm=True, hidden_act="gelu_pytorch_tanh"),
]


class Oracle:
    """The equations of one module."""

    def __init__(self, config: HeadsConfig, tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(self, name: str, x: Tensor) -> Tensor:
        gain = self.tensors[f"{name}.weight"] + (1 if self.config.norm_adds_one else 0)
        return x / (x.pow(2).mean() + self.config.rms_norm_eps).sqrt() * gain

    def project(self, name: str, x: Tensor) -> Tensor:
        bias = self.tensors.get(f"{name}.bias", torch.zeros((), dtype=torch.float64))
        return self.tensors[f"{name}.weight"] @ x + bias

    def rotate(self, x: Tensor, position: int) -> Tensor:
        half = len(x) // 2
        pairs = torch.complex(x[:half], x[half:])
        angles = position / self.config.rope_theta ** (torch.arange(half).double() / half)
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag])

    def heads_at(self, x: Tensor, position: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        config = self.config
        split = self.project("self_attn.qkv_proj", self.norm("input_layernorm", x))
        rows = list(split.split(config.head_dim))
        q, rows = rows[: config.num_attention_heads], rows[config.num_attention_heads :]
        k, v = rows[: config.num_key_value_heads], rows[config.num_key_value_heads :]
        if config.qk_norm:
            q = [self.norm("self_attn.q_norm", row) for row in q]
            k = [self.norm("self_attn.k_norm", row) for row in k]
        return [self.rotate(r, position) for r in q], [self.rotate(r, position) for r in k], v

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.project("mlp.gate_up_proj", x).split(self.config.intermediate_size)
        silu = self.config.hidden_act == "silu"
        tanh = torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
        act = gate / (1 + torch.exp(-gate)) if silu else gate / 2 * (1 + tanh)
        return self.project("mlp.down_proj", act * up)

    def run(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """hidden, embeddings: [T, hidden_size]."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        keys, values, outputs = [], [], []
        for t in range(len(hidden)):
            both = torch.cat([self.norm("enorm", embeddings[t]), self.norm("hnorm", hidden[t])])
            x = self.project("eh_proj", both)
            q, k, v = self.heads_at(x, t)
            keys.append(k)
            values.append(v)
            attended = []
            for number, query in enumerate(q):
                scores = [query @ row[number // group] / len(query) ** 0.5 for row in keys]
                weights = torch.stack(scores).softmax(0)
                rows = zip(weights, values, strict=True)
                attended.append(sum(w * row[number // group] for w, row in rows))
            outputs.append(self.rest(x, torch.cat(attended)))
        return torch.stack(outputs)

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        out = self.project("self_attn.o_proj", attended)
        if self.config.sandwich_norms:
            x = x + self.norm("post_attention_layernorm", out)
            inner = self.mlp(self.norm("pre_feedforward_layernorm", x))
            x = x + self.norm("post_feedforward_layernorm", inner)
        else:
            x = x + out
            x = x + self.mlp(self.norm("post_attention_layernorm", x))
        return self.norm("final_norm", x)


def inputs(config: HeadsConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(2, LENGTH, config.hidden_size, generator=generator) * 3
    length = LENGTH + config.num_modules - 1
    return hidden, torch.randn(2, length, config.hidden_size, generator=generator)


@pytest.mark.parametrize("changes", KINDS, ids=lambda changes: "-".join(changes) or "plain")
def test_dense_modules_are_the_equations(changes: dict[str, Any]) -> None:
    about = config(**changes)
    weights = modules(about)
    tensors = {f"mtp.{i}.{n}": t for i, module in enumerate(weights) for n, t in module.items()}
    hidden, embeddings = inputs(about)
    got = MTPHeads.from_checkpoint(HeadsCheckpoint("x", about, None, tensors))(hidden, embeddings)
    for row in range(2):
        source = hidden[row].double()
        for depth in range(about.num_modules):
            oracle = Oracle(about, weights[0 if about.tied else depth])
            expected = oracle.run(source, embeddings[row, depth : depth + LENGTH].double())
            torch.testing.assert_close(
                got[depth, row].double(), expected, atol=TOLERANCE, rtol=TOLERANCE
            )
            source = expected if about.hidden_state_from == "previous" else source


def test_a_later_token_changes_no_earlier_row() -> None:
    """Row t of depth k knows tokens up to t+k+1 only: what inference has when it drafts."""
    about = config()
    heads = MTPHeads(about)
    hidden, embeddings = inputs(about)
    before = heads(hidden, embeddings)
    changed = embeddings.clone()
    changed[:, 6] += 1  # token 7
    after = heads(hidden, changed)
    for depth in range(3):
        first = 6 - depth
        assert torch.equal(before[depth, :, :first], after[depth, :, :first])
        assert (before[depth, :, first] != after[depth, :, first]).any()


def test_rows_may_stand_at_any_position() -> None:
    """Without a batch dimension, and with another attention, as an engine runs it: rows 5 to 8
    alone, over the keys of all, are those rows of the whole sequence."""
    about = config(qk_norm=True)
    module = MTPHeads(about).stored[0]
    hidden, embeddings = (x[0, :LENGTH] for x in inputs(about))
    kept: list[Tensor] = []

    def keep(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.extend((k, v))
        return causal(q, k, v)

    def last_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.cat([old[:5], new]) for old, new in zip(kept, (k, v), strict=True))
        return causal(torch.cat([q.new_zeros(5, *q.shape[1:]), q]), k, v)[5:]

    whole = module(hidden, embeddings, attend=keep)
    rows = module(hidden[5:], embeddings[5:], torch.arange(5, LENGTH), last_rows)
    torch.testing.assert_close(rows, whole[5:], atol=TOLERANCE, rtol=TOLERANCE)
