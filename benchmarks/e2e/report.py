"""A result as tables on the console, as JSON and as a plot; how a run ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.e2e.benchmark import Options, Result, run_benchmark
from benchmarks.e2e.environment import provenance
from benchmarks.e2e.equality import Divergence, Equality
from benchmarks.e2e.methods import PLAIN
from benchmarks.e2e.plots import plot_rows
from benchmarks.e2e.process import EngineError
from benchmarks.e2e.summary import Row
from benchmarks.provenance import cpu_name

SCHEMA = 1

_DEPTHS_SHOWN = 5
"""The JSON and the plot have all depths."""


def run_and_report(make_options: Callable[[], Options], json_path: Path, console: Console) -> int:
    """Run, print, write `json_path` and the PNG beside it; returns the process's exit code.

    0 is success, 1 a failed engine, 2 a mistake in the options, 130 Ctrl-C.
    """
    try:
        result = run_benchmark(make_options(), console)
    except ValueError as error:
        console.print(f"error: {error}", markup=False)
        return 2
    except EngineError as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; all engines have ended")
        return 130
    plot_path = json_path.with_suffix(".png")
    print_result(result, console)
    write_json(result, json_path)
    plot_rows(result.rows, f"{result.options.model.name}, {cpu_name()}", plot_path)
    console.print(f"written: {json_path} and {plot_path}")
    return 0


def print_result(result: Result, console: Console) -> None:
    """The tables, then what is to be said about equality."""
    console.print(speed_table(result.rows), "", drafts_table(result.rows), "", sep="\n")
    for equality in result.equalities:
        text = equality_text(equality, result)
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def speed_table(rows: Sequence[Row]) -> Table:
    """Tokens/s and speed-up over plain: percentiles over the rounds."""
    names = ("tokens/s\np20", "\np50", "\np80", "speed-up\np20", "\np50", "\np80")
    table = _table(names)
    for row in rows:
        speed, gain = row.tokens_per_second, row.speedup
        speeds = [f"{value:.1f}" for value in (speed.p20, speed.p50, speed.p80)]
        gains = [f"{value:.2f}" for value in (gain.p20, gain.p50, gain.p80)]
        table.add_row(*_name_cells(row), *speeds, *gains)
    return table


def drafts_table(rows: Sequence[Row]) -> Table:
    """What became of the drafts of each method and batch size, and what they took."""
    table = _table(
        (
            "acceptance\nlength",
            "accepted at\ndepth 1, 2, ...",
            "nodes\na round",
            "ms a step\nwhole",
            "\ndrafting",
        )
    )
    for row in rows:
        if row.method != PLAIN:
            shares = [f"{share:.2f}" for share in row.acceptance_per_depth]
            per_depth = " ".join([*shares[:_DEPTHS_SHOWN], *["..."][: len(shares) > _DEPTHS_SHOWN]])
            drafting = "-" if row.draft_ms is None else f"{row.draft_ms:.1f}"
            costs = f"{row.nodes:.2f}", f"{row.step_ms:.1f}", drafting
            table.add_row(*_name_cells(row), f"{row.acceptance_length:.2f}", per_depth, *costs)
    return table


def equality_text(equality: Equality, result: Result) -> str:
    """Whether the texts are equal, and each place where one is not."""
    other = "plain" if equality.method != PLAIN else f"plain at batch {equality.plain_batch_size}"
    text = (
        f"{equality.method} at batch {equality.batch_size}: {equality.num_equal} of "
        f"{equality.compared} texts equal those of {other}"
    )
    if not equality.greedy or not equality.divergences:
        return text
    text += f", {len(equality.divergences) - equality.num_unexplained} leave at a near-tie"
    if equality.num_unexplained:
        text += f", {equality.num_unexplained} NOT EXPLAINED BY ROUNDING"
    places = [_divergence_text(d, result) for d in equality.divergences]
    return "\n".join([text, *places])


def to_json(result: Result) -> dict[str, Any]:
    """The whole result as plain data; `rounds` has every single measurement."""
    options = result.options
    return {
        "schema": SCHEMA,
        **provenance(),
        "settings": {
            "model": str(options.model),
            "dtype": result.dtype,
            "methods": {m.label: dict(m.engine_kwargs) for m in options.methods},
            "prompt_ids": [prompt.prompt_id for prompt in options.prompts],
            "batch_sizes": list(options.batch_sizes),
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "repeats": options.repeats,
            "per_place": options.per_place,
            "max_model_len": options.max_model_len,
            "enforce_eager": options.enforce_eager,
        },
        "startup_seconds": result.startup_seconds,
        "rows": [asdict(row) for row in result.rows],
        "equality": [_equality_json(equality, result) for equality in result.equalities],
        "rounds": [
            {
                "method": run.method,
                "batch_size": run.round.batch_size,
                "repeat": run.round.repeat,
                "prompts": [options.prompts[i].prompt_id for i in run.round.group],
                "num_tokens": run.num_tokens,
                "seconds": run.generated.seconds,
                **asdict(run.generated.counters),
            }
            for run in result.runs
        ],
    }


def write_json(result: Result, path: Path) -> None:
    """Write `to_json` to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(result), indent=1) + "\n")


def _table(names: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\nmethod", overflow="fold")
    for name in ("\nbatch", *names):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _name_cells(row: Row) -> tuple[str, str]:
    return escape(row.method), str(row.batch_size)


def _divergence_text(divergence: Divergence, result: Result) -> str:
    prompt = result.options.prompts[divergence.prompt_index].prompt_id
    place = f"  prompt {prompt}: token {divergence.token_index} is {divergence.token} instead of "
    if divergence.logit_gap is None:
        return f"{place}{divergence.plain_token}, which is not among plain's best"
    return (
        f"{place}{divergence.plain_token}, logit gap {divergence.logit_gap:.4f} "
        f"({divergence.gap_in_ulps:g} units in the last place of {result.dtype})"
    )


def _equality_json(equality: Equality, result: Result) -> dict[str, Any]:
    data = asdict(equality) | {
        "num_equal": equality.num_equal,
        "num_unexplained": equality.num_unexplained,
    }
    for entry in data["divergences"]:
        entry["prompt"] = result.options.prompts[entry.pop("prompt_index")].prompt_id
    return data
