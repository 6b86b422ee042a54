"""What an engine says of its rounds, gathered and compared."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import LLM
from vllm.v1.metrics.reader import Vector

from vllm_specplus.core.stats import SpecStats
from vllm_specplus.startup.metrics import PREFIX

LOGGED = "Speculative decoding by vllm_specplus: "
_THEIRS = "vllm:spec_decode_"


def gather(llm: LLM) -> dict[str, Any]:
    """The workers' counters, and vLLM's and ours of `get_metrics`; the engine logs statistics."""
    metrics = {}
    for metric in llm.get_metrics():
        if metric.name.startswith((PREFIX, _THEIRS)):
            labels = [v for k, v in metric.labels.items() if k not in ("model_name", "engine")]
            values = metric.values if isinstance(metric, Vector) else metric.value
            metrics["/".join([metric.name, *labels])] = values
    return {"stats": llm.collective_rpc("specplus_stats"), "metrics": metrics}


def check(found: dict[str, Any], aborts: bool = False) -> SpecStats:
    """The first worker's counters; asserts that the front-end and vLLM counted the same.

    aborts: requests end at stop strings while their next step runs, which vLLM does not count.
    """
    stats, metrics = SpecStats(0), found["metrics"]
    for name, value in found["stats"][0].items():
        setattr(stats, name, value)
    ours = {k.removeprefix(PREFIX): v for k, v in metrics.items() if k.startswith(PREFIX)}
    assert ours == pytest.approx(stats.counts(), rel=1e-9)
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        missed = getattr(stats, name) - metrics[_THEIRS + name]
        assert missed == 0 or (aborts and 0 < missed < getattr(stats, name) / 10)
    per_pos = stats.num_accepted_tokens_per_pos
    assert aborts or metrics[f"{_THEIRS}num_accepted_tokens_per_pos"][: len(per_pos)] == per_pos
    assert per_pos[0] > 0 and per_pos == sorted(per_pos, reverse=True)
    assert stats.num_rounds > stats.num_drafts >= per_pos[0]
    assert stats.draft_seconds > 0 and stats.verify_seconds > 0
    return stats
