"""Hidden states on disk are the target's, also after an interruption.

Sabotages that were caught: a file that is continued from the middle of a sample, an interrupted
file that is begun again at its end, rows of another sample, prompts counted among what was written.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.train.tiny import PROMPT_LEN, corpus_of, write_samples
from vllm_specplus.errors import OptionError
from vllm_specplus.train import corpus as corpus_module
from vllm_specplus.train.corpus import Corpus
from vllm_specplus.train.teacher import Teacher
from vllm_specplus.train.text import Text

LENGTHS = (30, 12, 17, 10, 30)


@pytest.fixture
def ragged(teacher: Teacher, tmp_path: Path) -> Corpus:
    samples = [
        sample.model_copy(update={"token_ids": sample.token_ids[:length], "held_out": length == 17})
        for sample, length in zip(write_samples(teacher, 5, 30), LENGTHS, strict=True)
    ]
    return corpus_of(Text.of(samples), teacher, tmp_path)


def test_hidden_states(ragged: Corpus, teacher: Teacher) -> None:
    """Padding changes no row: each sample alone gives the same, to bfloat16."""
    batch = ragged.batch([1, 4, 3])
    assert batch.hidden.shape == (3, 30, 64) and batch.tokens.shape == (3, 33)
    assert batch.lengths.tolist() == [12, 30, 10] and batch.prompt_lens.tolist() == [PROMPT_LEN] * 3
    for row, index in enumerate((1, 4, 3)):
        tokens = ragged.text[index].long()
        alone = teacher.hidden(tokens[None])[0]
        assert torch.equal(batch.tokens[row, : len(tokens)], tokens)
        assert not batch.tokens[row, len(tokens) :].any()
        torch.testing.assert_close(
            batch.hidden[row, : len(tokens)].float(), alone, atol=1e-5, rtol=2**-7
        )


def test_embeddings_are_those_of_the_next_tokens(ragged: Corpus, teacher: Teacher) -> None:
    batch = ragged.batch([4])
    rows = ragged.embeddings(batch)
    assert rows.shape == (1, 30 + 2, 64)
    scale = 8.0 if teacher.norm_adds_one else 1.0  # sqrt(64), of the Gemma
    expected = teacher.embedding[batch.tokens[0, 5]] * scale
    assert torch.equal(rows[0, 4], expected)


def test_rows_inside(ragged: Corpus) -> None:
    batch = ragged.batch([1, 3])
    assert batch.inside(1).sum(1).tolist() == [11, 9]
    assert batch.inside(3)[1].tolist() == [True] * 7 + [False] * 5


def test_split(ragged: Corpus) -> None:
    assert (ragged.training, ragged.held_out) == ([0, 1, 3, 4], [2])


def test_samples_too_short_to_draft_in_are_left_out(teacher: Teacher, tmp_path: Path) -> None:
    """Three drafts after the first token that the target wrote: four tokens at least."""
    samples = write_samples(teacher, 4, PROMPT_LEN + 4)
    cut = samples[1].model_copy(update={"token_ids": samples[1].token_ids[:-1]})
    measured = samples[2].model_copy(update={"held_out": True})
    corpus = corpus_of(Text.of([samples[0], cut, measured]), teacher, tmp_path)
    assert (corpus.training, corpus.held_out) == ([0], [2])
    for useless in ([samples[0], cut], [cut, measured]):
        with pytest.raises(OptionError, match="new_tokens=4 is what the target wrote at most"):
            corpus_of(Text.of(useless), teacher, tmp_path)


def test_counts_are_of_written_text_for_training(ragged: Corpus) -> None:
    written = torch.cat([ragged.text[index][PROMPT_LEN:] for index in (0, 1, 3, 4)])
    assert torch.equal(ragged.token_counts(), torch.bincount(written, minlength=448))


@pytest.mark.parametrize("kept_rows", [0, 5, 42, 59, 60, 69, 99])
def test_interrupted_file_is_completed(
    ragged: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_rows: int
) -> None:
    """Cut anywhere, in the middle of a row too: the rest is computed, from a sample's start."""
    monkeypatch.setattr(corpus_module, "_TOKENS_PER_FORWARD", 60)
    whole = Corpus(ragged.text, tmp_path / "whole", ragged.teacher, 3)
    whole.compute(lambda _: None)
    cut = Corpus(ragged.text, tmp_path / "cut", ragged.teacher, 3)
    shutil.copy(whole.file, cut.file)
    with cut.file.open("rb+") as file:
        file.truncate(kept_rows * 128 + 3)
    seen: list[int] = []
    cut.compute(seen.append)
    assert seen[-1:] == ([99] if kept_rows < 99 else [])
    got, expected = (
        torch.frombuffer(bytearray(c.file.read_bytes()), dtype=torch.bfloat16).float()
        for c in (cut, whole)
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=2**-7)
