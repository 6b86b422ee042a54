"""Which draft nodes pay: the row budget.

A row costs time, a node brings its probability of acceptance in tokens. Every request of a batch
gets a prefix of its best-first candidates, so that the expected tokens per time

    (num_reqs + sum of weight * probability of the chosen nodes) / cost(num_reqs + chosen nodes)

are most; and where that is not clearly more than without drafts, nobody gets any. (Sequoia, Chen et
al. 2024, arXiv 2402.12374, sizes one tree by the measured cost of its rows; here it is a batch.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from vllm_specplus.core.cost import CostModel

MARGIN = 0.02
"""By how much drafting must promise to beat plain decoding, as estimates err."""
_FAIRNESS = 16  # replayed with 4 to 64: more costs greedy batches, less costs sampled ones
_REFILL_RATE = 0.1


def allocate(
    candidate_probs: Sequence[Sequence[float]],
    cost: CostModel,
    weights: Sequence[float] | np.ndarray | None = None,
    row_ms: Sequence[float] | None = None,
    margin: float = MARGIN,
) -> list[int]:
    """How many of its candidates each request gets: [num_reqs]. Depends on the arguments only.

    candidate_probs: per request, the probability that a node and its ancestors are accepted, never
    rising. weights: per request, what an accepted token is worth, at most 1. row_ms: per request,
    what each of its rows costs beyond `cost` (a sampled row costs more than a greedy one).
    """
    num_reqs = len(candidate_probs)
    lengths = [len(probs) for probs in candidate_probs]
    if not any(lengths):
        return [0] * num_reqs
    owner = np.arange(num_reqs).repeat(lengths)
    value = np.concatenate(candidate_probs)
    if weights is not None:
        value *= np.asarray(weights)[owner]
    row_cost = np.zeros(num_reqs) if row_ms is None else np.asarray(row_ms, dtype=np.float64)
    plain_rate = num_reqs / (float(cost.step_ms(num_reqs)) + row_cost.sum())
    order = np.argsort(plain_rate * row_cost[owner] - value, kind="stable")
    rows = np.arange(num_reqs + 1, num_reqs + 1 + len(order))
    ms = cost.step_ms(rows) + cost.spec_ms + row_cost.sum() + row_cost[owner[order]].cumsum()
    rates = (num_reqs + value[order].cumsum()) / ms
    best = int(rates.argmax())
    if rates[best] < (1 + margin) * plain_rate:
        return [0] * num_reqs
    return np.bincount(owner[order[: best + 1]], minlength=num_reqs).tolist()


@dataclass(slots=True)
class _Pace:
    """One request's steps, and the tokens that it was expected to get in them."""

    num_steps: int = 4
    num_tokens: float = 4.0

    def step(self, granted: Sequence[float]) -> None:
        self.num_steps += 1
        self.num_tokens += 1 + sum(granted)


class RowBudget:
    """The budget of one engine; gives every candidate its row until costs have been measured.

    While finished requests make room for waiting ones, a token saves its share of a step, whoever
    emits it. Without a queue the steps go on until the slowest request has finished, and a request
    that is ahead saves only its own later rows: its tokens weigh less. Until requests have finished
    a queue is taken for granted.
    """

    def __init__(self) -> None:
        self.cost: CostModel | None = None
        self._paces: dict[str, _Pace] = {}
        self._weights: np.ndarray | None = None
        self._refill = 1.0
        self._paused = False

    def measured(self, step_ms: Mapping[int, float], spec_ms: float = 0.0) -> None:
        """Takes the milliseconds of a step by total rows, and what drafts add to any step."""
        self.cost = CostModel(step_ms, spec_ms)

    def observe(self, num_rows: int, ms: float, drafted: bool) -> None:
        """Learns from a step of `num_rows` rows, all of them decoding, that took `ms`."""
        if self.cost is not None:
            self.cost.observe(num_rows, ms - drafted * self.cost.spec_ms)

    def paused(self) -> None:
        """No step followed the last one at once: requests that are all new now did not wait."""
        self._paused = True

    def min_probs(self, req_ids: Sequence[str]) -> list[float]:
        """Opens a step: what a node of each request must promise; from 1 on, looking is useless."""
        self._follow(req_ids)
        if self.cost is None or not req_ids:
            return [0.0] * len(req_ids)
        self._weights = self._worth(self.cost)
        return (self.cost.min_prob(len(req_ids)) / self._weights).tolist()

    def token_ms(self) -> list[float]:
        """What a token of each request is worth in this step, in milliseconds."""
        num_reqs = len(self._paces)
        if self.cost is None or self._weights is None:
            return [inf] * num_reqs
        return (float(self.cost.step_ms(num_reqs)) / num_reqs * self._weights).tolist()

    def allocate(
        self,
        candidate_probs: Sequence[Sequence[float]],
        row_ms: Sequence[float] | None = None,
    ) -> list[int]:
        """`allocate` for the requests of this step, in the order given to `min_probs`."""
        if self.cost is None:
            return [len(probs) for probs in candidate_probs]
        counts = allocate(candidate_probs, self.cost, self._weights, row_ms)
        for pace, probs, count in zip(self._paces.values(), candidate_probs, counts, strict=True):
            pace.step(probs[:count])
        return counts

    def _follow(self, req_ids: Sequence[str]) -> None:
        """Keeps the requests of this step, and notes whether those that left were replaced."""
        paces = {req_id: self._paces.get(req_id) or _Pace() for req_id in req_ids}
        num_stayed = len(paces.keys() & self._paces.keys())
        num_waiting = 0 if self._paused and not num_stayed else len(paces) - num_stayed
        for i in range(len(self._paces) - num_stayed):
            self._refill += _REFILL_RATE * ((i < num_waiting) - self._refill)
        self._paces, self._paused = paces, False

    def _worth(self, cost: CostModel) -> np.ndarray:
        """What a token of each request is worth, as a part of its share of a step: [num_reqs]."""
        num_reqs = len(self._paces)
        ms, half_ms = cost.step_ms(np.array([num_reqs, num_reqs // 2]))
        own_rows = min((ms - half_ms) / (num_reqs - num_reqs // 2) * num_reqs / ms, 1.0)
        pace = np.array([p.num_tokens / p.num_steps for p in self._paces.values()])
        last = (pace.min() / pace) ** _FAIRNESS
        alone = own_rows + (1 - own_rows) * last
        return self._refill + (1 - self._refill) * alone
