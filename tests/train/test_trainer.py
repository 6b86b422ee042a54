"""The trainer: it learns, it can be interrupted, and it refuses states of other runs.

Sabotages that were caught: the teacher's distribution one step off, the embeddings one step off,
depth weights left out, rows beyond a sample in the loss, the optimizer's state or the step not
restored, a random generator that goes on instead of starting from (seed, step), ranks counted with
NaN as a good draft, rounds that begin in the prompt, a token's own row missing among the sampled
ones, a warm-up of half the run, an infinite loss let pass, a state over other text taken.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.tiny import (
    PROMPT_LEN,
    corpus_of,
    on_itself,
    sharpened,
    trainer_of,
    write_samples,
)
from vllm_specplus.errors import OptionError
from vllm_specplus.train.corpus import Corpus
from vllm_specplus.train.eagle import Eagle
from vllm_specplus.train.medusa import Medusa
from vllm_specplus.train.mtp3 import MTP3
from vllm_specplus.train.trainer import FitSettings, HeadsTrainer, Progress

STEP = 8 * 40
three_medusa = partial(Medusa, num_heads=3, num_layers=3)
TOLERANCE = 1e-4  # float32, sums in another order


@pytest.mark.parametrize("heads", [{}, {"tied": False, "hidden_state_from": "target"}])
def test_over_fitted_heads_know_their_text(
    corpus: Corpus, tmp_path: Path, heads: dict[str, Any]
) -> None:
    """More than 90 % first drafts right at every depth: a hidden state, token or position that is
    off by one cannot reach that. The regression alone has about half."""
    trainer = trainer_of(
        corpus, tmp_path, heads, learning_rate=1e-2, max_tokens=130 * STEP, eval_tokens=100 * STEP
    )
    trainer.run()
    ranks = trainer.evaluate()
    assert len(ranks.kinds) == 8 * (40 - PROMPT_LEN - 3)
    assert min(ranks.top(1)) > 0.9, ranks.top(1)
    assert ranks.chain() > 2.6
    (start, at_start), (later, _), (end, at_end) = trainer.progress.evaluations
    assert (start, later, end) == (0, 100 * STEP, 130 * STEP)
    assert at_end[0] == ranks.top(1)
    assert min(at_start[0]) > 0.3 and max(at_start[0]) < 0.7


def test_over_fitted_medusa_knows_its_text(corpus: Corpus, tmp_path: Path) -> None:
    """As above; the target's own head, where training begins, knows next to nothing of these."""
    limits: dict[str, Any] = dict(learning_rate=1e-2, max_tokens=200 * STEP)
    trainer = trainer_of(sharpened(corpus), tmp_path, kind=three_medusa, **limits)
    trainer.run()
    ranks = trainer.evaluate()
    assert min(ranks.top(1)) > 0.9, ranks.top(1)
    assert max(trainer.progress.evaluations[0][1][0]) < 0.3


def _state(trainer: HeadsTrainer) -> dict[str, Any]:
    module = trainer.heads.module
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    moments = trainer.optimizer.state_dict()["state"]
    return {"weights": weights, "moments": moments, "losses": trainer.progress.losses}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


@pytest.mark.parametrize(
    ("compute", "kind"),
    [("float32", MTP3), ("bfloat16", MTP3), ("bfloat16", three_medusa), ("bfloat16", Eagle)],
)
def test_resumed_is_uninterrupted_bit_for_bit(
    corpus: Corpus, tmp_path: Path, compute: str, kind: Any
) -> None:
    """Seven steps of three samples, sampled rows, through two epochs and a warm-up."""
    settings: dict[str, Any] = dict(
        kind=kind,
        compute=compute,
        batch_size=3,
        head_rows=200,
        max_tokens=7 * 3 * 40,
        eval_tokens=4 * 3 * 40,
    )
    for name in "ab":
        (tmp_path / name).mkdir()
    whole = trainer_of(corpus, tmp_path / "a", **settings)
    whole.run()
    trainer_of(corpus, tmp_path / "b", **settings).run(lambda progress: progress.step == 2)
    trainer_of(corpus, tmp_path / "b", **settings).run(lambda progress: progress.step == 5)
    resumed = trainer_of(corpus, tmp_path / "b", **settings)
    resumed.run()
    assert whole.progress.step == resumed.progress.step == 7
    assert _same(_state(whole), _state(resumed))
    assert whole.progress.evaluations == resumed.progress.evaluations
    one_more = trainer_of(corpus, tmp_path / "b", **settings)
    one_more.run()  # a finished run stays finished
    assert _same(_state(whole), _state(one_more))


def _damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


REFUSED: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
    (_damage, {}, {}, "holds a training state that is damaged"),
    (lambda file: file.write_text("no state"), {}, {}, "holds a training state that is damaged"),
    (lambda file: torch.save({"x": 1}, file), {}, {}, "holds a training state that is damaged"),
    (None, {}, {"seed": 5}, "was trained with seed 0, but this run has 5"),
    (None, {}, {"learning_rate": 0.1}, "was trained with learning_rate"),
    (None, {"tied": False}, {}, "was trained with tied True, but this run has False"),
    (None, {"hidden_state_from": "target"}, {}, "was trained with hidden_state_from 'previous'"),
]


@pytest.mark.parametrize(("damage", "heads", "settings", "said"), REFUSED)
def test_state_of_another_run_is_refused(
    corpus: Corpus,
    tmp_path: Path,
    damage: Any,
    heads: dict[str, Any],
    settings: dict[str, Any],
    said: str,
) -> None:
    trainer_of(corpus, tmp_path, max_tokens=1).run()
    if damage is not None:
        damage(tmp_path / "state.pt")
    with pytest.raises(OptionError, match=r"^out=.*take another folder\.$") as refused:
        trainer_of(corpus, tmp_path, heads, max_tokens=1, **settings).run()
    assert said in str(refused.value)


def test_state_over_other_text_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    trainer_of(corpus, tmp_path, max_tokens=1).run()
    other = on_itself(write_samples(corpus.teacher, 8, 40, seed=1))
    with pytest.raises(OptionError, match="was trained with text"):
        trainer_of(corpus_of(other, corpus.teacher, tmp_path), tmp_path, max_tokens=1).run()


def _ragged(corpus: Corpus, folder: Path) -> Corpus:
    """Samples of 40, 23 and 10 tokens."""
    samples = write_samples(corpus.teacher, 3, 40)
    lengths = (40, 23, 10)
    cut = [
        sample.model_copy(update={"token_ids": sample.token_ids[:length]})
        for sample, length in zip(samples, lengths, strict=True)
    ]
    return corpus_of(on_itself(cut), corpus.teacher, folder)


def _feature_loss(output: Tensor, wanted: Tensor, spread: Tensor) -> Tensor:
    away = ((output - wanted) / spread).abs().double()
    return torch.where(away < 1, away**2 / 2, away - 0.5).mean()


@pytest.mark.parametrize("kind", [MTP3, Eagle])
def test_loss_and_gradient(corpus: Corpus, tmp_path: Path, kind: Any) -> None:
    """Against the sum written out: sample by sample, row by row, KL(target, heads) in float64, and
    for EAGLE the smooth L1 of features."""
    ragged = _ragged(corpus, tmp_path)
    trainer = trainer_of(ragged, tmp_path, kind=kind)
    module, teacher = trainer.heads.module, ragged.teacher
    trainer.heads.initialise(ragged)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    stored_rows = [ragged.batch([index]).hidden[0].float() for index in ragged.training]
    spread = torch.cat(stored_rows).std(0)
    parts: list[list[Tensor]] = [[], [], []]
    for index in ragged.training:
        tokens = ragged.text[index].long()
        stored = ragged.batch([index]).hidden[0].float()
        zeros = torch.zeros(3, dtype=torch.int64)
        embeddings = teacher.embed(torch.cat([tokens, zeros])[None, 1:])
        outputs = module(stored[None], embeddings[:, : len(tokens) + 2])
        for depth in range(3):
            for row in range(len(tokens) - depth - 1):
                p = (teacher.head.double() @ stored[row + depth + 1].double()).softmax(0)
                q = (teacher.head.double() @ outputs[depth, 0, row].double()).softmax(0)
                parts[depth].append((p * (p.log() - q.log())).sum())
                if kind is Eagle:
                    wanted = outputs[depth, 0, row], stored[row + depth + 1]
                    parts[depth][-1] += _feature_loss(*wanted, spread)
    means = [torch.stack(part).mean() for part in parts]
    (means[0] + 0.8 * means[1] + 0.64 * means[2]).backward()
    expected = [weight.grad for weight in module.parameters()]
    module.zero_grad()
    loss = trainer._backward(ragged.batch(ragged.training))
    assert loss == pytest.approx(float(torch.stack(means).mean().detach()), rel=TOLERANCE)
    for weight, gradient in zip(module.parameters(), expected, strict=True):
        assert gradient is not None
        scale = float(gradient.abs().max())
        torch.testing.assert_close(weight.grad, gradient, atol=TOLERANCE * scale, rtol=1e-3)


def test_an_epoch_takes_every_sample_once(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_of(corpus, tmp_path, batch_size=3)
    epochs = []
    for epoch in range(2):
        taken = []
        for step in range(2):
            trainer.progress.step = 2 * epoch + step
            taken += trainer._samples()
        assert len(set(taken)) == 6 and set(taken) <= set(corpus.training)
        epochs.append(taken)
    assert epochs[0] != epochs[1]


def test_sampled_rows_hold_the_batch(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_of(corpus, tmp_path, head_rows=150)
    batch = corpus.batch(corpus.training[:3])
    rows = trainer._head_rows(batch)
    trainer.progress.step += 1
    assert len(rows) == 150 and not torch.equal(rows, trainer._head_rows(batch))
    present = {tuple(row) for row in rows.tolist()}
    assert all(tuple(corpus.teacher.head[token].tolist()) in present for token in batch.tokens[0])


def test_learning_rate_warms_up_and_ends_at_nought(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_of(corpus, tmp_path, max_tokens=1000, max_seconds=100.0)
    seen = []
    for tokens, seconds in ((0, 0), (10, 0), (20, 0), (500, 0), (0, 50), (1000, 0)):
        trainer.progress = Progress(tokens=tokens, seconds=seconds)
        seen.append(trainer._schedule())
    assert seen[0] < 0.01 and seen[1] == pytest.approx(0.5, abs=0.01)
    assert seen[2] > 0.99 and seen[3] == seen[4] == pytest.approx(0.5) and seen[5] == 0


def test_ranks_are_those_of_the_model(corpus: Corpus, tmp_path: Path) -> None:
    """A draft vocabulary of 300 of 448 tokens in an order of its own; ranks by sorting."""
    ragged = _ragged(corpus, tmp_path)
    vocab = torch.randperm(448, generator=torch.Generator().manual_seed(0))[:300]
    heads = MTP3(ragged.teacher)
    trainer = HeadsTrainer(heads, ragged, vocab, FitSettings(compute="float32"), tmp_path / "s")
    heads.initialise(ragged)
    expected = []
    for index in ragged.held_out:
        batch, tokens = ragged.batch([index]), ragged.text[index].tolist()
        outputs = heads.module(batch.hidden.float(), ragged.embeddings(batch))[:, 0]
        for row in range(PROMPT_LEN - 1, len(tokens) - 4):
            ranks = []
            for depth in range(3):
                logits = outputs[depth, row] @ ragged.teacher.head[vocab].T
                order = vocab[logits.argsort(descending=True)]
                found = (order == tokens[row + depth + 2]).nonzero()
                ranks.append(int(found) if len(found) else 300)
            expected.append(ranks)
    got = trainer.evaluate()
    assert got.rank.T.tolist() == expected
    assert got.kinds == ("kind 0",) * 31 + ("kind 1",) * 14 + ("kind 0",)


def test_heads_that_give_no_numbers_draft_nothing_right(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_of(corpus, tmp_path)
    with torch.no_grad():
        next(trainer.heads.module.parameters()).fill_(torch.nan)
    assert trainer.evaluate().top(4) == [0.0, 0.0, 0.0]
    with pytest.raises(OptionError, match=r"learning_rate=.* makes the loss infinite"):
        trainer._step()


def test_progress_is_plain_data(corpus: Corpus, tmp_path: Path) -> None:
    progress = trainer_of(corpus, tmp_path, max_tokens=2 * STEP).run()
    assert progress.step == 2 and progress.tokens == 2 * STEP and progress.seconds > 0
    assert [tokens for tokens, _ in progress.losses] == [STEP, 2 * STEP]
    assert Progress(**asdict(progress)) == progress
