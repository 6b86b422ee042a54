"""Medusa heads on the CPU engine: the text stays that of plain decoding, and heads that know texts
by heart are right.

Sabotages that were caught: the hidden state of the position before, a head in another's place,
drafts of a reduced vocabulary that are not looked up.
"""

from __future__ import annotations

import pytest

from tests.engine.engines import Request, get_engine, reference
from tests.engine.features import assert_equal, mixed, params, requests
from tests.engine.medusa import NUM_HEADS, fitted_medusa, random_medusa
from tests.train.tiny import PROMPT_LEN
from vllm_specplus.errors import OptionError
from vllm_specplus.proposers.heads.medusa import MedusaHeads
from vllm_specplus.proposers.medusa import MedusaProposer

SHAPES = ("chain", "dynamic:12", "medusa:mc_sim_7b_63")


def engine(method="medusa", tree="dynamic:12", heads=None, depth=NUM_HEADS, **options):
    return get_engine(
        "llama",
        "dynamic",
        speculative_model=f"[{method}]{heads or random_medusa()}",
        num_speculative_tokens=depth,
        speculative_tree=tree,
        **options,
    )


@pytest.mark.parametrize(("method", "tree"), [*(("medusa", shape) for shape in SHAPES)])
def test_text_equals_plain(method, tree):
    for feature in ("greedy", "seed"):
        asked = requests(feature, 4)
        plain = reference("llama", asked)
        drafting = engine(method, tree)
        assert_equal(drafting.run(asked), plain)
        assert drafting.probe.drafted > 0
        assert_equal(drafting.run(asked[:1]), plain[:1])


def test_all_features_beside_ngrams_and_preemption():
    asked = mixed(arrivals=lambda index: index // 3)
    plain = reference("llama", asked)
    tight = dict(num_gpu_blocks_override=60, max_model_len=256, max_num_batched_tokens=64)
    drafting = engine("medusa+ngram", heads=random_medusa(own_heads=True), depth=6, **tight)
    assert_equal(drafting.run(asked), plain)
    assert drafting.probe.accepted > 0


def test_fewer_heads_than_tokens_are_refused():
    with pytest.raises(OptionError, match="num_speculative_tokens=5 is more than the 4 heads"):
        engine(depth=5)


def other_hidden_state(monkeypatch):
    """The state of the position before."""
    absorb = MedusaProposer.absorb
    monkeypatch.setattr(
        MedusaProposer,
        "absorb",
        lambda self, req_id, start, rows: absorb(self, req_id, start, rows.roll(1, 0)),
    )


def other_heads(monkeypatch):
    """Each head drafts for the depth of another."""
    best = MedusaHeads._best
    monkeypatch.setattr(MedusaHeads, "_best", lambda self, k, *rest: best(self, k ^ 1, *rest))


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", [None, other_hidden_state, other_heads])
def test_fitted_heads_are_accepted(sabotage, monkeypatch):
    heads, texts = fitted_medusa("llama")
    drafting = engine(tree="chain", heads=heads)
    if sabotage is not None:
        sabotage(monkeypatch)
    stats = drafting.spec_round.stats
    drafts, accepted = stats.num_drafts, list(stats.num_accepted_tokens_per_pos)
    length = 1 + 6 * (1 + NUM_HEADS)  # whole drafts only
    asked = [Request(text[:PROMPT_LEN], params("greedy", max_tokens=length)) for text in texts]
    outputs = drafting.run(asked)
    rest = [text[PROMPT_LEN:][:length] for text in texts]
    assert [list(output.outputs[0].token_ids) for output in outputs] == rest
    drafts, per_pos = stats.num_drafts - drafts, stats.num_accepted_tokens_per_pos
    rates = [(n - before) / drafts for n, before in zip(per_pos, accepted, strict=True)]
    if sabotage is None:
        assert min(rates[:NUM_HEADS]) > 0.9, rates
    else:
        assert min(rates[:NUM_HEADS]) < 0.6, rates
