"""The engine accepts of a chain what its heads get right outside it, in a batch.

Sabotages that were caught: a row budget that goes on weighing time and who is ahead while ranks are
counted, walks that go on one token late.
"""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks.acceptance import app, compare
from tests.engine.engines import model_path
from tests.engine.models import WORDS
from tests.train.tiny import corpus_of, load_teacher, on_itself, trainer_of, write_samples
from vllm_specplus.train.command import TrainOptions
from vllm_specplus.train.text import Prompt
from vllm_specplus.train.trainer import FitSettings

NUM_PROMPTS, NEW_TOKENS, DEPTH = 8, 120, 3
NUM_STEPS = 60


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """Heads that are right now and then: a few steps of training on other text."""
    folder, model = tmp_path_factory.mktemp("heads"), model_path("llama")
    teacher = load_teacher(model)
    corpus = corpus_of(on_itself(write_samples(teacher, num=64, length=80)), teacher, folder)
    trainer = trainer_of(corpus, folder, learning_rate=3e-3, max_tokens=NUM_STEPS * 320)
    trainer.run()
    trainer.heads.save(folder, None, {})
    return TrainOptions(
        "mtp3",
        str(model),
        folder,
        folder,
        FitSettings(compute="float32"),
        prompt_tokens=9,
        new_tokens=NEW_TOKENS,
        start=str(folder),
    )


def test_the_engine_accepts_what_heads_get_right(options: TrainOptions) -> None:
    prompts = [Prompt(" ".join(WORDS[i : i + 9]), "text", str(i)) for i in range(NUM_PROMPTS)]
    found = compare(options, prompts, DEPTH)
    (rounds, engine), (walked, outside), (tokens, every) = found.values()
    assert tokens == NUM_PROMPTS * (NEW_TOKENS - DEPTH)
    assert every[0] > outside[0]
    for in_engine, walk in zip(engine, outside, strict=True):
        assert abs(rounds * in_engine - walked * walk) <= NUM_PROMPTS


@pytest.mark.parametrize(
    "option", [("--kind", "ngram"), ("--limit", "0"), ("--new-tokens", "4"), ("--depth", "4")]
)
def test_a_wrong_option_is_refused_by_name(option: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["heads", *option], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and f"'{option[0]}'" in result.output
