"""Every request feature means on trees what it means in plain decoding."""

from __future__ import annotations

import pytest

from tests.engine.engines import get_engine, reference
from tests.engine.features import FEATURES, assert_equal, mixed, requests

NO_TIME_TO_ACCEPT = {"one_token", "choice", "stop_string_kept", "min_tokens_seed"}
CASES = [
    pytest.param("llama", "dynamic", marks=pytest.mark.slow),
    ("llama", "oracle"),
    pytest.param("sliding", "oracle", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("model", "method"), CASES)
def test_feature_equals_plain(model, method, feature):
    asked = requests(feature, 6)
    plain = reference(model, asked)
    engine = get_engine(model, method)
    assert_equal(engine.run(asked), plain)
    if method == "oracle" and feature not in NO_TIME_TO_ACCEPT:
        assert engine.extra_tokens > 0


SCHEDULES = {
    "together": ({}, lambda index: 0),
    "staggered": ({}, lambda index: 3 * (index % 7)),
    "chunked_prefill": (dict(max_num_batched_tokens=64, max_num_seqs=16), lambda index: index // 3),
    "queue": (dict(max_num_seqs=5), lambda index: 0),
    "preemption": (dict(num_gpu_blocks_override=60, max_model_len=256), lambda index: index % 2),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param("static", marks=pytest.mark.slow),
        pytest.param("dynamic", marks=pytest.mark.slow),
        "oracle",
    ],
)
@pytest.mark.parametrize("model", ["llama", pytest.param("sliding", marks=pytest.mark.slow)])
def test_all_features_in_one_batch(model, method, schedule):
    options, arrivals = SCHEDULES[schedule]
    asked = mixed(arrivals=arrivals)
    plain = reference(model, asked)
    engine = get_engine(model, method, **options)
    assert_equal(engine.run(asked), plain)
    if method == "oracle":
        assert engine.extra_tokens > 0 and engine.probe.moved > 0
