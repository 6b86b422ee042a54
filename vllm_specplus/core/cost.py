"""What a step costs by its number of rows: measured at start-up, corrected while serving."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

_FORGET = 0.98
_OUTLIER = 1.3
_TOGETHER = 0.01
_LEAST_PART = 0.2
_FAR = 1_000_000


def fastest(
    ms_of: Callable[[int], float], points: Iterable[int], repeats: int = 5
) -> dict[int, float]:
    """The least of several measurements at each point, in turns: what disturbs the machine for a
    while disturbs one of each."""
    points = list(points)
    timed = [[ms_of(point) for point in points] for _ in range(repeats)]
    return dict(zip(points, map(min, zip(*timed, strict=True)), strict=True))


class CostModel:
    """Milliseconds per step: linear between the measured points, and beyond them as at the end.

    step_ms: total rows -> ms, one point or more. What disturbs a measurement adds to it, so no
    point is taken to cost more than one of more rows.
    spec_ms: what a step with drafts takes on top, however many rows it has.
    """

    def __init__(self, step_ms: Mapping[int, float], spec_ms: float = 0.0) -> None:
        rows, ms = np.array(sorted(step_ms.items()), dtype=np.float64).T
        ms = np.minimum.accumulate(ms[::-1])[::-1]
        slope = (ms[-1] - ms[-2]) / (rows[-1] - rows[-2]) if len(rows) > 1 else 0.0
        rows, ms = np.append(rows, rows[-1] + _FAR), np.append(ms, ms[-1] + slope * _FAR)
        self.spec_ms = spec_ms
        self._slopes = np.diff(ms) / np.diff(rows)
        self._rows, self._fixed_ms, self._row_ms = rows, ms[0], ms - ms[0]
        self._fixed, self._slope = 1.0, 1.0
        self._moments = np.zeros((2, 3))

    def step_ms(self, rows: np.ndarray | float) -> np.ndarray:
        """ms of steps with so many rows, `spec_ms` left out: float64, the shape of `rows`."""
        row_ms = np.interp(rows, self._rows, self._row_ms)
        return self._fixed * self._fixed_ms + self._slope * row_ms

    def min_prob(self, num_reqs: int) -> float:
        """A node of a smaller probability cannot raise the tokens per time of `num_reqs` requests.

        A chosen node brings at least the rate of plain decoding times the cost of its row, and no
        row costs less than on the flattest stretch of the curve.
        """
        flattest = self._slopes[np.searchsorted(self._rows[1:], num_reqs, side="right") :].min()
        return float(self._slope * flattest * num_reqs / self.step_ms(num_reqs))

    def observe(self, rows: int, ms: float) -> None:
        """Corrects the fixed and the per-row part by a real step, `spec_ms` left out.

        Least squares over the last 50 steps or so. Both parts are taken to err alike, as they do
        on a busy machine, unless the steps say otherwise. Outliers are clipped.
        """
        predicted = float(self.step_ms(rows))
        ms = min(max(ms, predicted / _OUTLIER), predicted * _OUTLIER)
        parts = np.array([self._fixed_ms, np.interp(rows, self._rows, self._row_ms)])
        self._moments = _FORGET * self._moments + np.outer(parts, [*parts, ms])
        (a, b, y), (_, c, z) = self._moments.tolist()
        ridge = _TOGETHER * a
        a, b, c = a + ridge, b - ridge, c + ridge
        det = a * c - b * b
        self._slope = max((a * z - b * y) / det, _LEAST_PART)
        self._fixed = max((y - b * self._slope) / a, _LEAST_PART)
