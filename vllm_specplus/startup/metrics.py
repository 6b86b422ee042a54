"""The front-end's side of the statistics: counters `vllm_specplus:*` beside vLLM's own.

Workers send what they counted with each step (engine/metrics.py). Here it is taken out of vLLM's
SchedulerStats before vLLM's loggers see it, and added to counters of prometheus_client, so that it
reaches `/metrics` and `LLM.get_metrics()` whichever processes an engine is made of. As with vLLM's
own counters, the last engine that a process has started owns the names.

The front-end also logs the line at the end, since `vllm serve` kills its workers as soon as it is
told to stop (`--shutdown-timeout` is 0).

vLLM and prometheus_client are imported inside the functions, so importing this module costs
nothing, and prometheus_client sees the environment that vLLM has prepared for it.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_specplus.core.stats import STATS_KEY, SpecStats, summary

logger = logging.getLogger("vllm.specplus")

PREFIX = "vllm_specplus:"
_COUNTERS = {
    "num_rounds": "Requests verified, with drafts or without.",
    "num_drafts": "Requests verified with drafts.",
    "num_draft_tokens": "Draft tokens (tree nodes) verified.",
    "num_accepted_tokens": "Draft tokens accepted.",
    "num_accepted_tokens_per_pos": "Draft tokens accepted, by depth in the tree.",
    "draft_seconds": "Time in which the proposer drafted.",
    "verify_seconds": "Time of the target model's steps that verified drafts.",
    "fallbacks": "Requests that were not drafted a tree, by reason; does_not_pay counts rounds.",
}
_LABELS = {"num_accepted_tokens_per_pos": ["position"], "fallbacks": ["reason"]}
_registered: list[Any] = []


class SpecCounters:
    """The counters of one front-end, labelled as vLLM labels its own.

    When it goes, or the process ends, one line per engine is logged.
    """

    def __init__(self, model_name: str, engines: Sequence[int], max_depth: int) -> None:
        import prometheus_client

        while _registered:
            prometheus_client.REGISTRY.unregister(_registered.pop())
        labels = ["model_name", "engine"]
        self._model_name = model_name
        self._totals: dict[int, Counter[str]] = {}
        self._counters = {
            name: prometheus_client.Counter(PREFIX + name, text, labels + _LABELS.get(name, []))
            for name, text in _COUNTERS.items()
        }
        _registered.extend(self._counters.values())
        for engine in engines:
            self.add(SpecStats(max_depth).counts(), engine)
        weakref.finalize(self, _log, self._totals)

    def add(self, counts: Mapping[str, float], engine: int) -> None:
        """`counts` as of SpecStats.counts."""
        self._totals.setdefault(engine, Counter()).update(counts)
        for key, count in counts.items():
            name, _, label = key.partition("/")
            labels = [self._model_name, str(engine), *([label] if label else [])]
            self._counters[name].labels(*labels).inc(count)


def _log(totals: Mapping[int, Mapping[str, float]]) -> None:
    for counts in totals.values():
        logger.info(summary(counts))


def take_out(scheduler_stats: Any) -> dict[str, float]:
    """Removes what a worker has counted from vLLM's SchedulerStats (or None) and returns it."""
    others = getattr(scheduler_stats, "ec_connector_stats", None)
    if not others or STATS_KEY not in others:
        return {}
    counts = others.pop(STATS_KEY)
    scheduler_stats.ec_connector_stats = others or None
    return counts


def snapshot() -> list[Any]:
    """The counters as vLLM's `get_metrics` gives its own: one Counter per name and labels."""
    from vllm.v1.metrics.reader import Counter

    return [
        Counter(name=metric.name, labels=sample.labels, value=sample.value)
        for counter in _registered
        for metric in counter.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    ]
