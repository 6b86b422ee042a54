"""Are texts with token trees those of plain decoding? `python -m benchmarks.gpu.equality`.

Every cell of the matrix (model, dtype, CUDA graphs or none, temperature) starts plain vLLM, its own
n-gram chains and our trees (n-grams, static and dynamic, and around a drafter), each in a process
of its own, and compares what they write at several batch sizes. The models are tiny and random,
made so that every mask, position and key counts. vLLM chooses the engine: its V2 runner on GPUs, V1
on CPUs.

A cell fails where a greedy text leaves plain's and no near-tie of the logits explains it, where a
sampled text of our trees in fp32 is not plain's (in bf16 that is only counted: rounding moves a
draw, too), or where our trees had no draft accepted, which would prove nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.e2e.benchmark import Options, Result, run_benchmark
from benchmarks.e2e.equality import Equality
from benchmarks.e2e.generate import PROMPTS, RESULTS
from benchmarks.e2e.methods import PLAIN, parse_methods
from benchmarks.e2e.process import EngineError
from benchmarks.e2e.prompts import load_prompts
from benchmarks.provenance import commit, device_name, package_versions
from tests.engine.engines import STATIC_TREE
from tests.engine.heads import write_random
from tests.engine.models import BUILDERS, MAX_MODEL_LEN, save

HEADS = Path(tempfile.gettempdir()) / f"specplus-equality-heads-{os.getuid()}"
OURS = {
    "dynamic": "[ngram]:K=5:tree=dynamic:12:max=3",
    "static": f"[ngram]:K=5:tree={STATIC_TREE}:max=3",
    "heads": f"[mtp3+ngram]{HEADS}:K=3:tree=dynamic:12:max=3",
}
"""Random heads draft nonsense beside what n-grams find; on V2 vLLM drafts their chain."""
NATIVE = {"cpu": "native-ngram:K=5:max=3:min=1", "cuda": "native-ngram-gpu:K=5:max=3:min=1"}
MODELS = ("llama", "sliding")
DTYPES = ("float32", "bfloat16")
GRAPHS = ("off", "on")
TEMPERATURES = (0.0, 0.1)  # sampled hotter, random models have hardly a draft accepted


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the matrix. graphs: "on" leaves compilation and CUDA graphs to vLLM."""

    model: str
    dtype: str
    graphs: str
    temperature: float


def make_options(cell: Cell, model: Path, native: str, arguments: argparse.Namespace) -> Options:
    """The benchmark that compares one cell."""
    return Options(
        model=model,
        prompts=load_prompts(PROMPTS, arguments.prompts),
        methods=parse_methods([native, *(OURS[name] for name in arguments.ours)]),
        batch_sizes=tuple(arguments.batch_sizes),
        max_tokens=arguments.max_tokens,
        temperature=cell.temperature,
        dtype=cell.dtype,
        max_model_len=MAX_MODEL_LEN,
        enforce_eager=cell.graphs == "off",
        kv_cache_bytes=256 << 20,
    )


def problems(cell: Cell, result: Result) -> Iterator[str]:
    """Why the cell fails; nothing if it holds."""
    for row in result.rows:
        if row.method in OURS.values() and not row.accepted:
            yield f"{row.method} at batch {row.batch_size}: no draft was accepted"
    for equality in result.equalities:
        if equality.num_unexplained or (_must_be_equal(cell, equality) and equality.divergences):
            different = len(equality.divergences)
            yield (
                f"{equality.method} at batch {equality.batch_size}: {different} of "
                f"{equality.compared} texts differ, {equality.num_unexplained} unexplained"
            )


def _must_be_equal(cell: Cell, equality: Equality) -> bool:
    """Sampled texts under rule `match`; stock rejection sampling draws other numbers."""
    return cell.temperature > 0 and cell.dtype == "float32" and equality.method in OURS.values()


def run_cell(cell: Cell, native: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Facts of one cell as plain data; `problems` is empty if it holds."""
    start = time.perf_counter()
    facts: dict[str, Any] = asdict(cell)
    with tempfile.TemporaryDirectory(prefix="specplus-equality-") as folder:
        save(BUILDERS[cell.model](), Path(folder))
        options = make_options(cell, Path(folder), native, arguments)
        try:
            result = run_benchmark(options, Console(stderr=True))
        except EngineError as error:
            facts["problems"] = [str(error)]
        else:
            facts["problems"] = list(problems(cell, result))
            facts["equal"] = {
                f"{e.method} at batch {e.batch_size}": f"{e.num_equal} of {e.compared}"
                for e in result.equalities
            }
            facts["accepted"] = {
                f"{r.method} at batch {r.batch_size}": r.accepted
                for r in result.rows
                if r.method != PLAIN
            }
    return facts | {"seconds": round(time.perf_counter() - start, 1)}


def make_parser() -> argparse.ArgumentParser:
    """The command line; without options, the whole matrix."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.equality", description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=MODELS)
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    add("--graphs", nargs="+", choices=GRAPHS, default=GRAPHS)
    add("--temperatures", nargs="+", type=float, default=TEMPERATURES)
    add("--ours", nargs="+", choices=OURS, default=list(OURS), help="our trees")
    add("--batch-sizes", nargs="+", type=int, default=(1, 3, 9), metavar="N")
    add("--prompts", type=int, default=16, help="this many, evenly taken from benchmarks/data")
    add("--max-tokens", type=int, default=96)
    add("--json", type=Path, default=RESULTS / "equality.json", metavar="OUT")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a cell failed."""
    arguments = make_parser().parse_args(argv)
    import torch

    write_random(HEADS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    axes = arguments.models, arguments.dtypes, arguments.graphs, arguments.temperatures
    cells = []
    for cell in itertools.starmap(Cell, itertools.product(*axes)):
        facts = run_cell(cell, NATIVE[device], arguments)
        cells.append(facts)
        print(json.dumps(facts), flush=True)
    failed = sum(bool(facts["problems"]) for facts in cells)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    where = {"device": device_name(), "versions": package_versions(), "commit": commit()}
    arguments.json.write_text(json.dumps(where | {"cells": cells}, indent=1) + "\n")
    print(f"{len(cells) - failed} of {len(cells)} cells hold; written: {arguments.json}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
