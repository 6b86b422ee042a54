"""Tiny MTP heads for the tiny models: random ones, which draft nonsense, and fitted ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tests.engine.engines import model_path
from tests.engine.models import VOCAB_SIZE
from tests.proposers.heads.heads import config, modules
from tests.train.tiny import (
    corpus_of,
    load_teacher,
    on_itself,
    sharpened,
    trainer_of,
    write_samples,
)
from vllm_specplus.proposers.heads.checkpoint import save_heads

SIZES: dict[str, Any] = dict(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=128,
)
FIRST_DRAFTED = 3
"""The draft vocabulary leaves the tokens before this one out."""


def write_random(path: Path, **fields: Any) -> Path:
    """Random heads for the tiny models."""
    draft_vocab = torch.arange(FIRST_DRAFTED, VOCAB_SIZE)
    about = dict(draft_vocab_size=len(draft_vocab), vocab_size=VOCAB_SIZE)
    heads = config(**SIZES | about | fields)
    save_heads(path, heads, modules(heads), draft_vocab)
    return path


@cache
def random_path(**fields: Any) -> str:
    return str(write_random(Path(mkdtemp(prefix="specplus-heads-")), **fields))


@cache
def fitted(model: str, sure: bool = False, **fields: Any) -> tuple[str, list[list[int]]]:
    """Heads that know eight greedy texts of a model by heart, and these texts. Those that are
    `sure` of them know them in 16 bits as well, and depend less on what they read."""
    teacher = load_teacher(model_path(model))
    samples = write_samples(teacher, num=8, length=40)
    folder = Path(mkdtemp(prefix=f"specplus-fitted-{model}-"))
    corpus = corpus_of(on_itself(samples), teacher, folder)
    corpus = sharpened(corpus) if sure else corpus
    trainer = trainer_of(corpus, folder, fields, learning_rate=1e-2, max_tokens=250 * 8 * 40)
    trainer.run()
    # All tokens, in an order of its own: a token that is not mapped back is never right.
    trainer.heads.save(folder / "heads", torch.arange(VOCAB_SIZE).flip(0), {})
    return str(folder / "heads"), [sample.token_ids for sample in samples]
