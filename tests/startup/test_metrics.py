"""The front-end's counters; engines are in tests/engine/test_metrics.py.

Seen to fail: an empty dict left behind for vLLM's loggers.
"""

from __future__ import annotations

import logging

import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.stats import SchedulerStats

from vllm_specplus.core.stats import FALLBACKS, STATS_KEY
from vllm_specplus.startup import metrics
from vllm_specplus.startup.metrics import SpecCounters, take_out

POSITION = "vllm_specplus:num_accepted_tokens_per_pos_total"


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"model_name": "m", "engine": "0", **labels})


@pytest.mark.parametrize("others", [None, {}, {"num_loads": 3}])
def test_nothing_of_others_is_taken(others):
    stats = SchedulerStats(ec_connector_stats=others)
    assert take_out(stats) == take_out(None) == {}
    assert stats.ec_connector_stats == others


def test_what_is_taken_is_gone():
    """vLLM's loggers would take it for a connector's."""
    mine, both = {STATS_KEY: {"num_rounds": 2}}, {STATS_KEY: {"num_rounds": 2}, "num_loads": 3}
    stats = SchedulerStats(ec_connector_stats=mine)
    assert take_out(stats) == {"num_rounds": 2} and stats.ec_connector_stats is None
    stats = SchedulerStats(ec_connector_stats=both)
    assert take_out(stats) == {"num_rounds": 2} and stats.ec_connector_stats == {"num_loads": 3}


def test_counters_start_at_zero_and_add_up_by_engine():
    counters = SpecCounters("m", [0, 1], max_depth=2)
    assert value(POSITION, position="1") == 0 and value(POSITION, position="2") is None
    assert value("vllm_specplus:fallbacks_total", reason="penalties") == 0
    for _ in range(2):
        counters.add({"num_rounds": 2, "num_accepted_tokens_per_pos/2": 1}, engine=1)
    assert value(POSITION, position="2", engine="1") == 2
    assert value("vllm_specplus:num_rounds_total", engine="1") == 4
    assert value("vllm_specplus:num_rounds_total") == 0
    SpecCounters("m", [0], max_depth=2)
    assert value("vllm_specplus:num_rounds_total") == 0
    assert value("vllm_specplus:num_rounds_total", engine="1") is None
    names = {(m.name, *m.labels.values()) for m in metrics.snapshot()}
    assert len(names) == 6 + 2 + len(FALLBACKS)  # plain counters, depths, reasons


def test_each_engine_has_its_line_at_the_end(caplog):
    counters = SpecCounters("m", [0, 1], max_depth=2)
    counters.add({"num_rounds": 7}, engine=1)
    with caplog.at_level(logging.INFO, "vllm.specplus"):
        del counters
    assert ["0 rounds" in m for m in caplog.messages] == [True, False]
    assert ["7 rounds" in m for m in caplog.messages] == [False, True]
