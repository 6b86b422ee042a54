"""Tiny Medusa heads for the tiny models: random ones, which draft nonsense, and fitted ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tests.engine.engines import model_path
from tests.engine.models import COMMON, VOCAB_SIZE
from tests.train.tiny import (
    SURE,
    corpus_of,
    load_teacher,
    on_itself,
    sharpened,
    trainer_of,
    write_samples,
)
from vllm_specplus.proposers.heads.medusa import MedusaHeads
from vllm_specplus.proposers.heads.medusa_checkpoint import MedusaConfig, save_medusa
from vllm_specplus.train.medusa import Medusa

NUM_HEADS = 4
HIDDEN = int(str(COMMON["hidden_size"]))
LENGTH = 40


def config(**fields: object) -> MedusaConfig:
    sizes = dict(num_heads=NUM_HEADS, num_layers=1, hidden_size=HIDDEN, vocab_size=VOCAB_SIZE)
    about = dict(has_bias=True, shares_head=True) | sizes | fields
    return MedusaConfig.model_validate(about, by_name=True)


@cache
def random_medusa(own_heads: bool = False) -> str:
    """Heads near the target's own, over a part of the vocabulary; or with matrices of their own."""
    folder = Path(mkdtemp(prefix="specplus-medusa-"))
    drafted = None if own_heads else torch.arange(3, VOCAB_SIZE)
    about = config(
        shares_head=not own_heads, draft_vocab_size=None if own_heads else VOCAB_SIZE - 3
    )
    tensors = MedusaHeads(about, NUM_HEADS if own_heads else 0).state_dict()
    generator = torch.Generator().manual_seed(0)
    for weight in tensors.values():
        weight.copy_(torch.randn(weight.shape, generator=generator) * HIDDEN**-0.5)
    save_medusa(folder, about, tensors, drafted)
    return str(folder)


@cache
def fitted_medusa(model: str) -> tuple[str, list[list[int]]]:
    """Heads that know eight greedy texts of a model by heart, and these texts."""
    teacher = load_teacher(model_path(model))
    samples = write_samples(teacher, num=8, length=LENGTH)
    folder = Path(mkdtemp(prefix=f"specplus-medusa-{model}-"))
    corpus = sharpened(corpus_of(on_itself(samples), teacher, folder, NUM_HEADS))
    heads = dict(num_heads=NUM_HEADS, num_layers=2)
    limits: dict[str, Any] = dict(learning_rate=1e-2, max_tokens=300 * 8 * LENGTH)
    trainer = trainer_of(corpus, folder, heads, Medusa, **limits)
    trainer.run()
    module: Any = trainer.heads.module
    module.config = module.config.model_copy(update={"logit_scale": SURE})
    # All tokens, in an order of its own: a token that is not mapped back is never right.
    trainer.heads.save(folder / "heads", torch.arange(VOCAB_SIZE).flip(0), {})
    return str(folder / "heads"), [sample.token_ids for sample in samples]
