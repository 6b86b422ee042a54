"""EAGLE heads: what is trained is what vLLM serves, and vLLM's loader takes the files.

Sabotages that were caught:
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.engines import Engine, Request, get_engine, model_path
from tests.engine.features import assert_equal, params
from tests.train.tiny import (
    PROMPT_LEN,
    corpus_of,
    load_teacher,
    on_itself,
    save_target,
    trainer_of,
    write_samples,
)
from vllm_specplus.errors import NotBuiltError, OptionError
from vllm_specplus.proposers.heads.eagle import EagleHead
from vllm_specplus.proposers.heads.eagle_checkpoint import load_eagle
from vllm_specplus.train.corpus import Corpus
from vllm_specplus.train.eagle import Eagle
from vllm_specplus.train.trainer import HeadsTrainer

NUM_DEPTHS = 3
TARGETS = ("llama", "sliding")
TOLERANCE = 1e-4  # float32, sums in another order; hidden states are of size 1


@cache
def fitted(model: str) -> tuple[HeadsTrainer, Path, list[list[int]]]:
    """A head that knows eight greedy texts of a model by heart, its files, and these texts."""
    teacher, folder = load_teacher(model_path(model)), Path(mkdtemp(prefix="specplus-eagle-"))
    samples = write_samples(teacher, num=8, length=40)
    corpus = corpus_of(on_itself(samples), teacher, folder, NUM_DEPTHS)
    heads = dict(num_depths=NUM_DEPTHS)
    trainer = trainer_of(corpus, folder, heads, Eagle, learning_rate=1e-2, max_tokens=150 * 320)
    trainer.run()
    trainer.heads.save(folder, None, {"steps": trainer.progress.step})
    return trainer, folder, [sample.token_ids for sample in samples]


def serve(model: str) -> Engine:
    method = f"[eagle]{fitted(model)[1]}"
    return get_engine(
        model, "plain", speculative_model=method, num_speculative_tokens=NUM_DEPTHS
    )


@pytest.mark.parametrize("model", TARGETS)
def test_fitted_head_is_served_as_a_chain(model: str) -> None:
    trainer, _, texts = fitted(model)
    assert min(trainer.evaluate().top(1)) > 0.9
    length = 1 + 6 * (1 + NUM_DEPTHS)  # whole drafts only
    asked = [Request(text[:PROMPT_LEN], params("greedy", max_tokens=length)) for text in texts]
    engine = serve(model)
    outputs = engine.run(asked)
    rest = [text[PROMPT_LEN:][:length] for text in texts]
    assert [list(output.outputs[0].token_ids) for output in outputs] == rest
    print(engine.extra_tokens, len(texts) * 6 * NUM_DEPTHS)
    assert engine.extra_tokens > 0.9 * len(texts) * 6 * NUM_DEPTHS
