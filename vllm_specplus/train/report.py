"""What a run ends with: acceptance on held-out text as JSON, Markdown and PNG."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_specplus.train.acceptance import TOP, TREE_SIZES, Ranks
from vllm_specplus.train.trainer import Progress

ALL = "all"


def summarize(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Per kind of text and for all: rounds, acceptance per depth, drafts accepted a round."""
    kinds = [ALL, *sorted(set(ranks.kinds))]
    parts = {kind: ranks if kind == ALL else ranks.of(kind) for kind in kinds}
    return {
        kind: {
            "rounds": len(part.kinds),
            "top": {str(num): part.top(num) for num in TOP},
            "chain": part.chain(),
            "walk": part.walk().chain(),
            "trees": {str(size): part.tree(size) for size in TREE_SIZES},
        }
        for kind, part in parts.items()
    }


def table(summary: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The summary as rows of text, the first the header."""
    depths = range(1, 1 + len(summary[ALL]["top"]["1"]))
    head = ["text", "rounds", *(f"depth {depth}" for depth in depths), "chain", "walk"]
    rows = [[*head, *(f"tree {size}" for size in TREE_SIZES)]]
    for kind, part in summary.items():
        tops = zip(*(part["top"][str(num)] for num in TOP), strict=True)
        shares = [" / ".join(f"{share:.3f}" for share in top) for top in tops]
        accepted = [part["chain"], part["walk"], *part["trees"].values()]
        rows.append([kind, str(part["rounds"]), *shares, *(f"{each:.2f}" for each in accepted)])
    return rows


def write(folder: Path, ranks: Ranks, progress: Progress, about: dict[str, Any]) -> list[list[str]]:
    """Writes report.json, report.md and, where matplotlib is installed, report.png; returns the
    table."""
    summary = summarize(ranks)
    rows = table(summary)
    content = {"about": about, "acceptance": summary, "progress": asdict(progress)}
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    title = f"# Heads for {about['target']}: {progress.tokens:,} token passes"
    legend = (
        "Greedy held-out text, the right tokens before each draft. Per depth: the share of rounds "
        f"whose right token is among the first {', '.join(map(str, TOP))} drafts. Chain, tree N: "
        "drafts accepted a round (the root's own token not counted), with a round at every token; "
        "tree nodes are chosen on every other round and counted on the rest. Walk: the chain where "
        "the next round begins behind what it accepted, as in an engine, so that easy text counts "
        "less."
    )
    (folder / "report.md").write_text("\n\n".join([title, legend, "\n".join(lines)]) + "\n")
    _plot(folder / "report.png", summary, progress)
    return rows


def _plot(file: Path, summary: dict[str, dict[str, Any]], progress: Progress) -> None:
    try:
        import matplotlib
    except ImportError:
        warnings.warn(f"matplotlib is not installed: {file.name} is left out", stacklevel=2)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, curve, kinds) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    smooth, drawn = None, []
    for tokens, value in progress.losses:
        smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
        drawn.append((tokens, smooth))
    loss.plot([t for t, _ in drawn], [v for _, v in drawn])
    loss.set(xlabel="token passes", ylabel="KL, nats a token (smoothed)")
    for depth in range(len(progress.evaluations[0][1][0]) if progress.evaluations else 0):
        places = [tokens for tokens, _ in progress.evaluations]
        for place, num in enumerate(TOP[:2]):
            shares = [tops[place][depth] for _, tops in progress.evaluations]
            style = "-" if num == 1 else ":"
            label = f"depth {depth + 1}, top {num}"
            curve.plot(places, shares, style, color=f"C{depth}", label=label)
    curve.set(xlabel="token passes", ylabel="held-out acceptance (some samples)", ylim=(0, 1))
    curve.legend()
    names = list(summary)
    accepted = [("chain", [part["chain"] for part in summary.values()])]
    accepted += [
        (f"tree {size}", [part["trees"][str(size)] for part in summary.values()])
        for size in TREE_SIZES
    ]
    for number, (label, values) in enumerate(accepted):
        kinds.barh([i + 0.2 * number for i in range(len(names))], values, 0.2, label=label)
    kinds.set_yticks([i + 0.3 for i in range(len(names))], names)
    kinds.set_xlabel("drafts accepted a round")
    kinds.legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)
