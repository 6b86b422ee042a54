"""Greedy text with speculation is the text without it, token for token, in fp32."""

from __future__ import annotations

import pytest

from tests.engine.engines import ALL_METHODS, get_engine, reference
from tests.engine.features import assert_equal, requests

MODELS = ("llama", "sliding")


@pytest.mark.parametrize(
    "batch_size",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 8],
)
@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_greedy_text_equals_plain(model, method, batch_size):
    asked = requests("greedy", max(batch_size, 3))
    plain = reference(model, asked)
    engine = get_engine(model, method)
    num_accepted = num_moved = 0
    for first in range(0, len(asked), batch_size):
        batch = slice(first, first + batch_size)
        assert_equal(engine.run(asked[batch]), plain[batch])
        num_accepted += engine.extra_tokens
        num_moved += engine.probe.moved if engine.probe else 0
    assert num_accepted > 0
    assert num_moved > 0 or method != "oracle"


@pytest.mark.parametrize("method", ["native", "dynamic", "oracle"])
def test_long_contexts_cross_words_of_the_mask_and_many_blocks(method):
    asked = requests("greedy", 4, max_tokens=300, ignore_eos=True)
    plain = reference("sliding", asked)
    assert_equal(get_engine("sliding", method).run(asked), plain)


def test_a_tree_of_the_largest_size():
    asked = requests("greedy", 3)
    plain = reference("llama", asked)
    engine = get_engine("llama", "oracle", speculative_tree="dynamic:127")
    assert_equal(engine.run(asked), plain)
    assert engine.probe.moved > 0
