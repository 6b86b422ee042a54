"""Tiny MTP heads for the tiny models: random ones, which draft nonsense, and fitted ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tests.engine.engines import model_path
from tests.engine.models import VOCAB_SIZE
from tests.train.tiny import corpus_of, load_teacher, on_itself, trainer_of, write_samples
from vllm_specplus.proposers.heads.checkpoint import HeadsConfig, save_heads
from vllm_specplus.proposers.heads.mtp import MTPHeads


def tiny_config(**fields: Any) -> HeadsConfig:
    return HeadsConfig(
        **dict(
            target="tiny",
            num_modules=3,
            tied=False,
            hidden_state_from="previous",
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=128,
            hidden_act="silu",
            rope_theta=1e4,
            rms_norm_eps=1e-6,
            draft_vocab_size=VOCAB_SIZE - 3,
        )
        | fields
    )


def random_heads(config: HeadsConfig, seed: int = 0) -> MTPHeads:
    """Modules whose matrices have unit gain, so that attention and tokens decide the draft."""
    generator = torch.Generator().manual_seed(seed)
    heads = MTPHeads(config)
    for weight in heads.parameters():
        if weight.dim() == 2:
            weight.data = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
    return heads


def save(heads: MTPHeads) -> str:
    """Writes heads whose draft vocabulary leaves the first tokens out; returns the folder."""
    path = Path(mkdtemp(prefix="specplus-heads-"))
    modules = [module.state_dict() for module in heads.stored]
    size = heads.config.draft_vocab_size
    save_heads(path, heads.config, modules, torch.arange(VOCAB_SIZE - size, VOCAB_SIZE))
    return str(path)


@cache
def random_path(**fields: Any) -> str:
    return save(random_heads(tiny_config(**fields)))


@cache
def fitted(model: str, **fields: Any) -> tuple[str, list[list[int]]]:
    """Heads that know eight greedy texts of a model by heart, and these texts."""
    teacher = load_teacher(model_path(model))
    samples = write_samples(teacher, num=8, length=40)
    folder = Path(mkdtemp(prefix=f"specplus-fitted-{model}-"))
    corpus = corpus_of(on_itself(samples), teacher, folder)
    trainer = trainer_of(corpus, folder, fields, learning_rate=1e-2, max_tokens=250 * 8 * 40)
    trainer.run()
    trainer.heads.save(folder / "heads", None, {})
    return str(folder / "heads"), [sample.token_ids for sample in samples]
