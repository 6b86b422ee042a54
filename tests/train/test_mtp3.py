"""Where training of MTP heads begins: sizes and layer of the target, projections by regression.

Sabotages that were caught: queries and keys swapped, gains without their 1, the layer not damped,
regression on hidden states one step off, on the target's hidden state where the previous module's
belongs, without the final norm's gains, with a hundred times the ridge, of the last
depth only for tied weights, half a layer copied from a mixture of experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.engine.models import COMMON
from vllm_specplus.errors import NotBuiltError, OptionError
from vllm_specplus.proposers.heads.checkpoint import HeadsConfig, load_heads
from vllm_specplus.proposers.heads.mtp import MTPHeads, MTPModule
from vllm_specplus.train.corpus import Corpus
from vllm_specplus.train.mtp3 import MTP3
from vllm_specplus.train.teacher import Teacher

TOLERANCE = 2e-5  # float32, one layer

COMMON_HERE: dict[str, Any] = COMMON | {"vocab_size": 64, "num_hidden_layers": 2}
TARGETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"attention_bias": True}),
    "qwen3": (Qwen3Config, {"qk_norm": True}),
    "gemma3": (
        Gemma3TextConfig,
        {"qk_norm": True, "sandwich_norms": True, "norm_adds_one": True, "embed_scale": 8.0},
    ),
}


def make_target(folder: Path, config_class: Any) -> Teacher:
    """A random model whose gains and biases are random too."""
    changes = COMMON_HERE
    if config_class is Gemma3TextConfig:
        changes = changes | {"query_pre_attn_scalar": 32, "layer_types": ["full_attention"] * 2}
    if config_class is Qwen2Config:
        changes = changes | {"hidden_size": 128}  # its head_dim is hidden_size / heads
    model = AutoModelForCausalLM.from_config(config_class(**changes))
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return Teacher(folder, torch.device("cpu"), torch.float32)


def config_of(teacher: Teacher) -> HeadsConfig:
    return HeadsConfig(
        target="x", num_modules=1, tied=True, hidden_state_from="target", **teacher.sizes()
    )


class _Layer(MTPModule):
    """The layer alone, without projection and final norm."""

    def inputs(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        return torch.cat([embeddings, hidden], dim=-1)


@pytest.mark.parametrize("kind", TARGETS)
def test_our_layer_is_the_targets(tmp_path: Path, kind: str) -> None:
    """With its weights, our dense layer computes what the target's last layer does."""
    config_class, features = TARGETS[kind]
    teacher = make_target(tmp_path, config_class)
    config = config_of(teacher)
    names = ("qk_norm", "sandwich_norms", "norm_adds_one", "attention_bias")
    assert {name for name in names if getattr(config, name)} == features.keys() - {"embed_scale"}
    assert config.embed_scale == features.get("embed_scale", 1.0)
    layer = teacher.last_layer(config)
    module = _Layer(config)
    missing, unexpected = module.load_state_dict(layer, strict=False)
    assert {name.split(".")[0] for name in missing} == {"eh_proj", "enorm", "hnorm", "final_norm"}
    assert not unexpected
    size = config.hidden_size
    with torch.no_grad():
        module.eh_proj.weight.copy_(torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1))
        module.final_norm.weight.copy_(teacher.norm_gain - float(config.norm_adds_one))
    tokens = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    before = teacher.decoder(input_ids=tokens, output_hidden_states=True).hidden_states[-2]
    got = module(before, torch.zeros_like(before))
    torch.testing.assert_close(got, teacher.hidden(tokens), atol=TOLERANCE, rtol=TOLERANCE)


def test_a_layer_of_another_kind_is_not_copied(tmp_path: Path) -> None:
    changes = COMMON_HERE | {"num_local_experts": 2}
    AutoModelForCausalLM.from_config(MixtralConfig(**changes)).save_pretrained(tmp_path)
    teacher = Teacher(tmp_path, torch.device("cpu"), torch.float32)
    assert teacher.last_layer(config_of(teacher)) == {}


def test_a_target_without_plain_head_is_refused(tmp_path: Path) -> None:
    phi = AutoConfig.for_model("phi", **COMMON_HERE)
    AutoModelForCausalLM.from_config(phi).save_pretrained(tmp_path)
    with pytest.raises(NotBuiltError, match="has no plain output head"):
        Teacher(tmp_path, torch.device("cpu"), torch.float32)


def _regression(heads: MTP3, corpus: Corpus, tied: bool) -> list[Tensor]:
    """The projections by least squares in float64 over rows that are stacked with the ridge."""
    config, teacher = heads.module.config, corpus.teacher
    fresh = MTPHeads(config)
    fresh.load_state_dict(heads.module.state_dict())
    rows: list[tuple[Tensor, Tensor]] = []
    solved: list[Tensor] = []
    for depth in range(3):
        module, rows = fresh.at(depth), rows if tied else []
        for index in corpus.training:
            tokens, hidden = corpus.text[index].long(), corpus.batch([index]).hidden.float()
            zeros = torch.zeros(3, dtype=torch.int64)
            embeddings = teacher.embed(torch.cat([tokens, zeros])[None, 1:])
            previous = hidden
            for before in range(depth if config.hidden_state_from == "previous" else 0):
                shifted = embeddings[:, before : before + len(tokens)]
                previous = fresh.at(before)(previous, shifted)
            features = module.inputs(previous, embeddings[:, depth : depth + len(tokens)])
            length = len(tokens) - depth - 1
            rows.append((features[0, :length], hidden[0, depth + 1 :] / teacher.norm_gain))
        x, y = (torch.cat(part).double() for part in zip(*rows, strict=True))
        ridge = (1e-4 * x.pow(2).sum(0).mean()).sqrt() * torch.eye(x.shape[1]).double()
        y0 = torch.zeros(x.shape[1], y.shape[1]).double()
        weight = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([y, y0])).solution.T
        solved = [weight] * 3 if tied else [*solved, weight]
        with torch.no_grad():
            module.eh_proj.weight.copy_(weight)
    return solved


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("source", ["previous", "target"])
def test_regression(corpus: Corpus, tied: bool, source: Any) -> None:
    heads = MTP3(corpus.teacher, tied=tied, hidden_state_from=source)
    heads.initialise(corpus)
    with torch.no_grad():
        expected = _regression(heads, corpus, tied)
    for depth, weight in enumerate(expected):
        got = heads.module.at(depth).eh_proj.weight.double()
        assert (got - weight).norm() < 1e-2 * weight.norm(), depth


def test_layer_begins_near_linear(corpus: Corpus) -> None:
    heads = MTP3(corpus.teacher)
    heads.initialise(corpus)
    module = heads.module.at(0)
    batch = corpus.batch(corpus.training)
    hidden, embeddings = batch.hidden.float(), corpus.embeddings(batch)[:, :40]
    with torch.no_grad():
        linear = module.final_norm(module.eh_proj(module.inputs(hidden, embeddings)))
        whole = module(hidden, embeddings)
    away = (whole - linear).norm() / linear.norm()
    assert 0.01 < away < 0.3


def test_files_can_be_gone_on_from(corpus: Corpus, tmp_path: Path) -> None:
    vocab = torch.tensor([7, 3, 5])
    heads = MTP3(corpus.teacher, tied=False, hidden_state_from="target")
    heads.initialise(corpus)
    heads.save(tmp_path, vocab, {"steps": 3})
    checkpoint = load_heads(tmp_path)
    assert checkpoint.draft_vocab is not None and checkpoint.draft_vocab.tolist() == [7, 3, 5]
    assert checkpoint.config.training == {"steps": 3}
    assert (checkpoint.config.tied, checkpoint.config.hidden_state_from) == (False, "target")
    again = MTP3(corpus.teacher, start=checkpoint)
    again.initialise(corpus)  # leaves them as they are
    for name, weight in heads.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], weight.bfloat16().float()), name


def test_heads_of_another_target_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    MTP3(corpus.teacher).save(tmp_path / "h", None, {})
    other = make_target(tmp_path / "m", Qwen2Config)
    with pytest.raises(OptionError, match="have hidden_size 64, but the model has 128"):
        MTP3(other, start=load_heads(tmp_path / "h"))
