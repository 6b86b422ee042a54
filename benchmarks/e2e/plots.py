"""A result as one PNG: tokens/s and speed-up by batch size, acceptance by depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.e2e.summary import Row, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_rows(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw `rows` to `path`, making its folder; bars are medians, whiskers p20 and p80."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, gain, depth) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    _draw_bars(speed, rows, [row.tokens_per_second for row in rows])
    speed.set_ylabel("tokens/s")
    _draw_bars(gain, rows, [row.speedup for row in rows])
    gain.axhline(1, color="black", linewidth=0.8)
    gain.set_ylabel("speed-up over plain")
    _draw_depths(depth, rows)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_bars(axes: Axes, rows: Sequence[Row], spreads: Sequence[Spread]) -> None:
    sizes = list(dict.fromkeys(row.batch_size for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        chosen = [(r, s) for r, s in zip(rows, spreads, strict=True) if r.method == method]
        centre = [sizes.index(r.batch_size) + (number + 0.5) * width - 0.4 for r, _ in chosen]
        medians = [s.p50 for _, s in chosen]
        whiskers = [[s.p50 - s.p20 for _, s in chosen], [s.p80 - s.p50 for _, s in chosen]]
        axes.bar(centre, medians, width, yerr=whiskers, capsize=3, label=method)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("batch size")


def _draw_depths(axes: Axes, rows: Sequence[Row]) -> None:
    """Acceptance by depth at the smallest batch size; plain keeps its colour and draws nothing."""
    smallest = min(row.batch_size for row in rows)
    for row in rows:
        if row.batch_size == smallest:
            depths = range(1, len(row.acceptance_per_depth) + 1)
            axes.plot(depths, row.acceptance_per_depth, marker="o", label=row.method)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(1, 1 + max(len(row.acceptance_per_depth) for row in rows)))
    axes.set_xlabel(f"depth (batch size {smallest})")
    axes.set_ylabel("accepted per draft")
