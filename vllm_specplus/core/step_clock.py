"""What steps really cost, told to the row budget while serving."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_specplus.core.budget import RowBudget

_IDLE_SECONDS = 0.02
_SMOOTHING = 0.1


class StepClock:
    """Times decoding steps from start to start, so that the host's own work between them counts.

    A step is reported when the next one starts soon after it ended; otherwise the engine was idle.
    Sampling is timed apart, as its cost per row depends on what the requests ask for, and so is
    drafting, which weighs its own cost.
    """

    def __init__(self, budget: RowBudget) -> None:
        self._budget = budget
        self._row_ms: dict[str, float] = {}
        self._began = self._ended = 0.0
        self._step: tuple[int, bool] | None = None
        self._sampling_ms = self._drafting_ms = 0.0

    def start(self) -> None:
        now = time.perf_counter()
        if now - self._ended >= _IDLE_SECONDS:
            self._budget.paused()
        elif self._step is not None:
            rows, drafted = self._step
            ms = 1e3 * (now - self._began) - self._sampling_ms - self._drafting_ms
            self._budget.observe(rows, ms, drafted)
        self._began, self._step = now, None

    def sampled(self, way: str, num_rows: int, seconds: float) -> None:
        """`num_rows` were drawn in `seconds`; `way` names how."""
        self._sampling_ms = 1e3 * seconds
        row_ms = self._sampling_ms / num_rows
        before = self._row_ms.setdefault(way, row_ms)
        self._row_ms[way] = before + _SMOOTHING * (row_ms - before)

    def row_ms(self, way: str) -> float:
        """What drawing a row costs."""
        return self._row_ms[way]

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """What runs inside is drafting."""
        began = time.perf_counter()
        yield
        self._drafting_ms = 1e3 * (time.perf_counter() - began)

    def stop(self, num_rows: int | None, drafted: bool) -> None:
        """The step is over; `num_rows` is None if not all of its rows were decoding."""
        self._ended = time.perf_counter()
        self._step = None if num_rows is None else (num_rows, drafted)
