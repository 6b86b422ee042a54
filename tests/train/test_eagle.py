"""EAGLE heads: what is trained is what vLLM serves, and vLLM's loader takes the files.

Sabotages that were caught: positions of the first step at all steps, a chain that does not attend
to its own steps, embeddings as the target scales them, queries and keys swapped in the files, the
regression one token off, the layer without its residual, a head to go on from taken without its
units.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.engine.engines import Engine, Request, get_engine, model_path
from tests.engine.features import params
from tests.engine.models import MAX_MODEL_LEN
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
from vllm_specplus.proposers.heads import files
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
    return get_engine(model, "plain", speculative_model=method, num_speculative_tokens=NUM_DEPTHS)


@pytest.mark.parametrize("model", TARGETS)
def test_fitted_head_is_served_as_a_chain(model: str) -> None:
    """What it knows by heart is accepted, nine drafts in ten; the regression alone knows less."""
    trainer, _, texts = fitted(model)
    assert min(trainer.evaluate().top(1)) > 0.9
    at_start = trainer.progress.evaluations[0][1][0]
    assert min(at_start) > 0.3 and max(at_start) < 0.7
    length = 1 + 6 * (1 + NUM_DEPTHS)  # whole drafts only
    asked = [Request(text[:PROMPT_LEN], params("greedy", max_tokens=length)) for text in texts]
    engine = serve(model)
    outputs = engine.run(asked)
    rest = [text[PROMPT_LEN:][:length] for text in texts]
    assert [list(output.outputs[0].token_ids) for output in outputs] == rest
    assert engine.extra_tokens > 0.9 * len(texts) * 6 * NUM_DEPTHS


def record(drafter: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """All calls of the served class: token ids, positions, hidden states, and what it gives."""
    forward, calls = drafter.model.forward, []

    def recorded(input_ids: Tensor, positions: Tensor, hidden_states: Tensor, **rest: Any) -> Any:
        out = forward(input_ids, positions, hidden_states, **rest)
        calls.append(tuple(each.clone() for each in (input_ids, positions, hidden_states, out[1])))
        return out

    monkeypatch.setattr(drafter.model, "forward", recorded)
    return calls


@pytest.mark.parametrize("model", TARGETS)
def test_training_computes_what_is_served(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt and the drafts after it: every hidden state of vLLM's class, step by step, and the
    hidden states of the target that it is given."""
    _, folder, texts = fitted(model)
    engine, prompt = serve(model), texts[0][:20]
    runner = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    calls = record(runner.model_runner.drafter, monkeypatch)
    engine.run([Request(prompt, params("greedy", max_tokens=2))])
    (tokens, positions, hidden, first), *later = calls[:NUM_DEPTHS]
    length = len(prompt)
    assert tokens[:length].tolist() == texts[0][1 : length + 1]
    assert positions[:length].tolist() == list(range(length))
    teacher, checkpoint = load_teacher(model_path(model)), load_eagle(folder)
    expected = teacher.hidden(torch.tensor([prompt]))[0]
    torch.testing.assert_close(hidden[:length], expected, atol=TOLERANCE, rtol=TOLERANCE)

    head = EagleHead(checkpoint.config)
    head.load_state_dict(checkpoint.tensors)
    drafted = torch.cat([tokens[:length], *(call[0][:1] for call in later)]).long()
    with torch.no_grad():
        outputs = head(hidden[None, :length], teacher.embedding[drafted][None])
    torch.testing.assert_close(outputs[0, 0], first[:length], atol=TOLERANCE, rtol=TOLERANCE)
    for depth, (_, position, given, got) in enumerate(later, 1):
        assert position[0] == length - 1 + depth
        assert torch.equal(given[0], calls[depth - 1][3][(length - 1) * (depth == 1)])
        rows = outputs[depth, 0, -1], got[0]
        torch.testing.assert_close(*rows, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_head_over_another_embedding_is_refused(tmp_path: Path) -> None:
    """Sizes alone do not tell: a head's projection is for one table."""
    other = load_teacher(save_target(tmp_path, "llama"))
    other = copy(other)
    other.embedding = other.embedding.flip(0)
    with pytest.raises(OptionError, match="was trained for a target with another embedding"):
        Eagle(other, start=load_eagle(fitted("llama")[1]))


def test_files_can_be_gone_on_from(corpus: Corpus, tmp_path: Path) -> None:
    heads = Eagle(corpus.teacher)
    heads.initialise(corpus)
    heads.save(tmp_path, None, {"steps": 3})
    checkpoint = load_eagle(tmp_path)
    assert checkpoint.config.training == {"steps": 3}
    assert checkpoint.config.max_position_embeddings == MAX_MODEL_LEN
    again = Eagle(corpus.teacher, start=checkpoint)
    again.initialise(corpus)
    for name, weight in heads.module.served().items():
        torch.testing.assert_close(again.module.served()[name], weight.bfloat16().float())


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
DAMAGES: list[tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], type, str]] = [
    (lambda c, t: c.update(num_hidden_layers=2), NotBuiltError, "has num_hidden_layers 2"),
    (lambda c, t: c.update(model_type="qwen3"), NotBuiltError, "has model_type 'qwen3'"),
    (lambda c, t: c.update(hidden_act="gelu"), NotBuiltError, "has hidden_act 'gelu'"),
    (lambda c, t: c.update(rope_parameters=YARN), NotBuiltError, "has rope_type 'yarn'"),
    (lambda c, t: c.update(hidden_size=32), OptionError, "of shape .* where config.json asks for"),
    (lambda c, t: t.pop("fc.weight"), OptionError, "lack the tensor 'fc.weight'"),
    (lambda c, t: t.pop("layers.0.self_attn.k_proj.weight"), OptionError, "lack the tensor"),
    (lambda c, t: t.update(x=torch.ones(1)), OptionError, "have a tensor 'x'"),
    (lambda c, t: t["fc.weight"].fill_(torch.nan), OptionError, "NaN or infinity in 'fc.weight'"),
]


@pytest.mark.parametrize(("damage", "error", "said"), DAMAGES)
def test_what_is_no_such_head_is_refused(
    tmp_path: Path, damage: Any, error: type[Exception], said: str
) -> None:
    _, folder, _ = fitted("llama")
    fields = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    damage(fields, tensors)
    files.write(tmp_path, json.dumps(fields), tensors)
    with pytest.raises(error, match=said):
        load_eagle(tmp_path)


def test_the_authors_file_is_read(tmp_path: Path) -> None:
    """A pickle, and a config without a word about training."""
    _, folder, _ = fitted("llama")
    fields = json.loads((folder / "config.json").read_text())
    del fields["specplus"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    read, written = load_eagle(tmp_path), load_eagle(folder)
    assert read.config.target == "unknown" and read.config.embedding_sha256 is None
    assert all(torch.equal(read.tensors[name], t) for name, t in written.tensors.items())
