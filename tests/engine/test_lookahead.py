"""Lookahead decoding on the CPU engine: exact, and its window sees what it should."""

from __future__ import annotations

import pytest

from tests.engine.engines import Request, get_engine, reference
from tests.engine.features import assert_equal, mixed, params, requests
from tests.engine.lookahead import rows_of_the_batch, watch_rows
from vllm_specplus import round as spec_round

METHODS = ("lookahead", "lookahead+ngram")


def engine(model="llama", method="lookahead", **options):
    return get_engine(
        model,
        "dynamic",
        **dict.fromkeys(("num_speculative_tokens", "speculative_tree")),
        speculative_model=f"[{method}]",
        **options,
    )


@pytest.mark.parametrize("feature", ["greedy", "seed"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["llama", pytest.param("sliding", marks=pytest.mark.slow)])
def test_text_equals_plain(model, method, feature):
    asked = requests(feature, 4)
    plain = reference(model, asked)
    drafting = engine(model, method)
    assert_equal(drafting.run(asked), plain)
    assert drafting.probe.accepted > 0 and drafting.probe.moved > 0
    for one, output in zip(asked, plain, strict=True):
        assert_equal(drafting.run([one]), [output])
    # vLLM tells the worker of a finished request with the next step.
    assert len(drafting.spec_round.proposer._requests) == 1


def test_all_features_in_one_batch():
    asked = mixed(arrivals=lambda index: index // 3)[::2]
    plain = reference("llama", asked)
    options = dict(num_gpu_blocks_override=60, max_model_len=256)  # some are preempted
    assert_equal(engine(method="lookahead+ngram", **options).run(asked), plain)


def no_depth(monkeypatch):
    """Rows of the window keep the positions of their slots."""
    monkeypatch.setattr(spec_round.Staged, "tree_positions", lambda *_: None)


@pytest.mark.parametrize("sabotage", [None, no_depth, rows_of_the_batch])
def test_the_target_is_asked_what_follows_each_path(sabotage, monkeypatch):
    drafting = engine(lookahead_prompt_tokens=0)
    seen = watch_rows(monkeypatch)
    if sabotage is not None:
        sabotage(monkeypatch)
    drafting.run(requests("greedy", 2, max_tokens=12))
    some = seen[:: len(seen) // 60]
    asked = [Request(tokens, params("greedy", max_tokens=1, ignore_eos=True)) for tokens, _ in some]
    plain = reference("llama", asked)
    said = [output.outputs[0].token_ids[0] for output in plain]
    assert (said == [token for _, token in some]) is (sabotage is None)


def test_text_that_repeats_itself_is_found_from_generation_alone():
    """Without the prompt's n-grams: what is accepted, the window has found."""
    drafting = engine(lookahead_prompt_tokens=0)
    asked = requests("greedy", 4, max_tokens=200, ignore_eos=True)
    assert_equal(drafting.run(asked), reference("llama", asked))
    stats = drafting.spec_round.stats
    assert stats.acceptance_length > 1.2, stats.acceptance_length
