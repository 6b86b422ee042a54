"""A target's own MTP modules on the CPU engine: the text stays that of plain decoding, and the
drafts are what the modules give when each runs over the whole sequence at once.

Every sabotage in `SABOTAGES` changes drafts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.nn import functional
from vllm import SamplingParams
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import MLAAttention

from tests.engine.drafters import drafter_path
from tests.engine.engines import Engine, Request, get_engine, reference
from tests.engine.features import assert_equal
from tests.engine.models import TINY_VOCAB_SIZE
from tests.engine.test_mtp import PROB_TOLERANCE, watch_drafts
from vllm_specplus.engine.drafters import paged
from vllm_specplus.engine.drafters.models_v1 import PagedModel, PagedModules, attends
from vllm_specplus.errors import NotBuiltError
from vllm_specplus.proposers import by_level, levels
from vllm_specplus.proposers.by_level import NUM_CHILDREN

DEPTH = 3
OPTIONS = dict(max_num_seqs=8, skip_tokenizer_init=True)
GREEDY = dict(temperature=0, max_tokens=24, ignore_eos=True)


def engine(target, method="mtp3", tree="dynamic:8", drafter="", **options) -> Engine:
    path = drafter and drafter_path(drafter)
    options |= dict(speculative_model=f"[{method}]{path}", num_speculative_tokens=DEPTH)
    path = drafter_path(target)
    return get_engine(path, "dynamic", speculative_tree=tree, **OPTIONS | options)


def requests(num: int, **settings) -> list[Request]:
    rng = random.Random(5)
    prompts = [[rng.randrange(TINY_VOCAB_SIZE) for _ in range(5 + 6 * i)] for i in range(num)]
    return [Request(prompt, SamplingParams(**GREEDY | settings)) for prompt in prompts]


def plain(target: str, asked: list[Request], **options) -> list:
    return reference(drafter_path(target), asked, **OPTIONS | options)


@pytest.mark.parametrize(
    ("target", "method", "tree"),
    [
        ("glm3", "mtp3", "chain"),
        ("glm3", "mtp3+ngram", "dynamic:8"),
        ("glm3", "mtp", "static:[(0,),(1,),(0,0),(0,1),(1,0),(0,0,0)]"),
        ("glm2", "mtp+ngram", "chain"),
        ("glm2", "mtp3", "dynamic:8"),
        ("glm1", "mtp3", "dynamic:8"),
        ("mimo", "mtp+ngram", "dynamic:8"),
        ("mimo_v2", "mtp3+ngram", "chain"),
        ("mimo_v2", "mtp3", "dynamic:8"),
    ],
)
def test_text_equals_plain(target: str, method: str, tree: str) -> None:
    asked = requests(4) + requests(2, temperature=1, seed=7)
    expected, drafting = plain(target, asked), engine(target, method, tree)
    assert_equal(drafting.run(asked), expected)
    assert drafting.extra_tokens > len(asked)
    for one, output in zip(asked[::5], expected[::5], strict=True):
        assert_equal(drafting.run([one]), [output])


def test_preemption_and_the_prefix_cache() -> None:
    asked, few = requests(6, max_tokens=80), dict(num_gpu_blocks_override=10, max_model_len=256)
    few |= dict(max_num_batched_tokens=64)
    drafting = engine("glm3", "mtp3+ngram", prefix_cache_retention_interval=None, **few)
    scheduler = drafting.scheduler
    preempt = mock.patch.object(
        scheduler, "_preempt_request", side_effect=scheduler._preempt_request
    )
    expected = plain("glm3", asked)
    with preempt as preempted:
        assert_equal(drafting.run(asked), expected)
        assert preempted.called
    known = [*asked[-1].prompt, *expected[-1].outputs[0].token_ids, 5]
    again = [Request(known, asked[-1].params)]
    (output,) = drafting.run(again, keep_cache=True)
    assert_equal([output], plain("glm3", again))
    assert output.num_cached_tokens > 0


def test_modules_of_other_attention_are_refused() -> None:
    with pytest.raises(NotBuiltError, match="have MLAAttention, and on vLLM's V1 runner"):
        attends(MLAAttention.__new__(MLAAttention))
    assert not attends(torch.nn.Linear(1, 1))


@contextmanager
def dense(model: PagedModel) -> Iterator[None]:
    """Has the modules' attention see the rows of one call, all of them, and no KV cache."""

    def attention(layer):
        def forward(query, key, value, **_):
            q, k, v = (
                part.view(len(part), -1, layer.head_size).transpose(0, 1)
                for part in (query, key, value)
            )
            distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
            seen = (distance >= 0) & (distance < (layer.sliding_window or len(query)))
            attended = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=layer.impl.scale, enable_gqa=True
            )
            return attended.transpose(0, 1).flatten(1)

        return mock.patch.object(layer, "forward", forward)

    patches = [attention(layer) for layer in model.layers]
    for patch in patches:
        patch.start()
    with set_forward_context(None, model._vllm_config, num_tokens=1):
        yield
    for patch in patches:
        patch.stop()


def expected_drafts(
    model: PagedModel, states: torch.Tensor, tokens: list[int], level: int, convention: str
) -> dict[int, float]:
    """What follows `tokens`, of which the last `level` are drafts. states: the target's, of all
    tokens but these and the last one before them."""
    hidden, several = states, model.num_caches > 1
    for step in range(level + 1):
        shift = 1 + step * several
        inputs = torch.tensor(tokens[shift : shift + len(hidden)])
        out, below = model._run(step, inputs, torch.arange(len(inputs)), hidden)
        if several:
            hidden = states if convention == "target" else below
        else:
            hidden = torch.cat([hidden, below[-1:]])
    (expected,) = model.best_tokens(level, out[-1:], NUM_CHILDREN)
    return expected


def mismatches(drafted, hidden_states, model: PagedModel, convention: str) -> int:
    """How many of the drafts are not what the dense modules give."""
    wrong = 0
    with dense(model):
        for known, path, below in drafted:
            states = torch.stack([hidden_states[t] for t in range(len(known) - 1)])
            tokens = [*known, *path]
            expected = expected_drafts(model, states, tokens, len(path), convention)
            wrong += any(
                abs(below.get(token, prob) - prob) > PROB_TOLERANCE
                for token, prob in expected.items()
            )
    return wrong


def of_other_positions(monkeypatch):
    """The target's hidden states of the position before."""
    absorb = by_level.LevelProposer.absorb
    monkeypatch.setattr(
        by_level.LevelProposer,
        "absorb",
        lambda self, req_id, start, rows: absorb(self, req_id, start, rows.roll(1, 0)),
    )


def one_module(monkeypatch):
    """Every level runs the first module, as vLLM's V1 runner does."""
    monkeypatch.setattr(PagedModules, "_step", lambda self, level: {"spec_step_idx": 0})


def other_positions(monkeypatch):
    """Rows stand twice as far apart as they should."""
    positions = levels.RequestRows.positions
    monkeypatch.setattr(levels.RequestRows, "positions", lambda self: 2 * positions(self))


def other_slots(monkeypatch):
    """Keys and values are written one slot too early."""
    rows = paged.paged_rows

    def shifted(*args):
        of_level = rows(*args)
        return replace(of_level, slot_mapping=(of_level.slot_mapping - 1).clamp(min=0))

    monkeypatch.setattr(paged, "paged_rows", shifted)


def other_convention(monkeypatch):
    """Modules after the first read the other hidden state than they should."""
    other = property(lambda self: "target")  # whatever it was made with
    monkeypatch.setattr(PagedModules, "hidden_state_from", other)


SABOTAGES = [of_other_positions, one_module, other_positions, other_slots, other_convention]


@pytest.mark.parametrize(
    ("target", "tree", "convention", "sabotage"),
    [
        ("glm3", "chain", "previous", None),
        ("glm3", "dynamic:8", "previous", None),
        ("mimo_v2", "chain", "target", None),
        ("mimo_v2", "dynamic:8", "target", None),
        ("mimo", "dynamic:8", "previous", None),
        *(("glm3", "dynamic:8", "previous", sabotage) for sabotage in SABOTAGES),
    ],
)
@torch.inference_mode()
def test_drafts_are_those_of_the_dense_modules(target, tree, convention, sabotage):
    drafting = engine(target, "mtp3+ngram", tree, max_num_batched_tokens=16)
    model, wrong = drafting.spec_round.proposer.model, 0
    for request in requests(4):
        with pytest.MonkeyPatch.context() as patch:
            if sabotage is not None:
                sabotage(patch)
            drafted, hidden_states = watch_drafts(patch)
            drafting.run([request])
        assert {len(path) for _, path, _ in drafted} == {0, 1, 2}
        wrong += mismatches(drafted, hidden_states, model, convention)
    assert (wrong == 0) == (sabotage is None), wrong
