"""A tiny random Llama, greedy text of it, and a trainer for both."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.engine.models import BUILDERS, VOCAB_SIZE
from vllm_specplus.train.corpus import Corpus
from vllm_specplus.train.heads import Heads
from vllm_specplus.train.mtp3 import MTP3
from vllm_specplus.train.teacher import Teacher
from vllm_specplus.train.text import Sample, Text
from vllm_specplus.train.trainer import FitSettings, HeadsTrainer

PROMPT_LEN = 6
SURE = 8.0


def save_target(folder: Path, kind: str = "llama") -> Path:
    """A target whose final norm has gains of 0.5 to 1.5."""
    model = BUILDERS[kind]()
    gain = model.model.norm.weight.data
    gain += torch.rand(gain.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    model.save_pretrained(folder)
    return folder


@cache
def load_teacher(folder: Path) -> Teacher:
    return Teacher(folder, torch.device("cpu"), torch.float32)


def write_samples(teacher: Teacher, num: int, length: int, seed: int = 0) -> list[Sample]:
    """Greedy text after random prompts, step by step over the whole text so far."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB_SIZE, (num, PROMPT_LEN), generator=generator)
    while tokens.shape[1] < length:
        logits = teacher.hidden(tokens)[:, -1] @ teacher.head.T
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return [
        Sample(token_ids=row, prompt_len=PROMPT_LEN, kind=f"kind {i % 2}", held_out=False)
        for i, row in enumerate(tokens.tolist())
    ]


def on_itself(samples: list[Sample]) -> Text:
    """Text whose held-out part is what is trained on."""
    return Text.of([*samples, *(s.model_copy(update={"held_out": True}) for s in samples)])


def corpus_of(
    text: Text, teacher: Teacher, folder: Path, num_depths: int = MTP3.num_depths
) -> Corpus:
    corpus = Corpus(text, folder / f"hidden-{text.digest()}.bf16", teacher, num_depths)
    corpus.compute(lambda _: None)
    return corpus


def sharpened(corpus: Corpus) -> Corpus:
    """The same text of a target that is surer of it: random ones hardly prefer their argmax."""
    sure = copy(corpus)
    sure.teacher = copy(corpus.teacher)
    sure.teacher.head = SURE * corpus.teacher.head
    return sure


def trainer_of(
    corpus: Corpus,
    folder: Path,
    heads: dict[str, Any] | None = None,
    kind: Callable[..., Heads] = MTP3,
    **settings: Any,
) -> HeadsTrainer:
    defaults: dict[str, Any] = dict(compute="float32", batch_size=8, eval_tokens=10**9)
    return HeadsTrainer(
        kind(corpus.teacher, **heads or {}),
        corpus,
        None,
        FitSettings(**defaults | settings),
        folder / "state.pt",
    )
