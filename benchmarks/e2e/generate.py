"""Tokens/s of drafting methods against plain decoding, end to end.

Example:
    python -m benchmarks.e2e.generate --model M --methods native-ngram "[ngram]:tree=dynamic:12"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.e2e.benchmark import Options
from benchmarks.e2e.methods import NATIVE_NGRAM, SYNTAX, parse_methods
from benchmarks.e2e.prompts import load_prompts
from benchmarks.e2e.report import run_and_report
from benchmarks.gemma import ensure_gemma
from benchmarks.provenance import ROOT

PROMPTS = ROOT / "benchmarks/data/spec_bench_dev.jsonl"
RESULTS = ROOT / "results"


def make_parser() -> argparse.ArgumentParser:
    """The command line; its defaults are those of `Options`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.e2e.generate",
        description="Generate the same texts with several drafting methods, in turns, and compare.",
        epilog=f"METHOD: {SYNTAX}. K is the depth; the other keys are the options of the same "
        "name. The result goes to OUT (JSON) and beside it as a plot (PNG).",
    )
    add = parser.add_argument
    add("--model", type=Path, help="default: Gemma-3-270M, fetched into the user's cache")
    add("--prompts", type=Path, default=PROMPTS, help="JSON lines in Spec-Bench's form")
    add("--limit", type=int, help="use this many prompts, evenly taken from the file")
    add("--methods", nargs="+", default=[NATIVE_NGRAM], metavar="METHOD", help="beside plain")
    add("--batch-sizes", type=int, nargs="+", default=[1], metavar="N")
    add("--max-tokens", type=int, default=128, help="every text gets exactly this many tokens")
    add("--temperature", type=float, default=0.0)
    add("--repeats", type=int, default=1, help="how often each group of prompts is measured")
    add(
        "--per-place",
        type=int,
        default=1,
        metavar="N",
        help="prompts that follow each other in a place of a batch; 1: it ends with its slowest",
    )
    add("--max-model-len", type=int, default=2048, help="longer prompts are cut")
    add("--dtype", default="auto")
    add("--kv-cache-mib", type=int, default=1024, help="of each engine")
    add("--enforce-eager", action="store_true", help="no torch.compile: starts sooner, runs slower")
    add("--json", type=Path, default=RESULTS / "generate.json", metavar="OUT")
    return parser


def make_options(arguments: argparse.Namespace) -> Options:
    """Options of the parsed command line; ValueError says what is wrong with them."""
    return Options(
        model=arguments.model or ensure_gemma(),
        prompts=load_prompts(arguments.prompts, arguments.limit),
        methods=parse_methods(arguments.methods),
        batch_sizes=tuple(arguments.batch_sizes),
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        repeats=arguments.repeats,
        per_place=arguments.per_place,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        enforce_eager=arguments.enforce_eager,
        kv_cache_bytes=arguments.kv_cache_mib << 20,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the value is the exit code."""
    arguments = make_parser().parse_args(argv)
    return run_and_report(lambda: make_options(arguments), arguments.json, Console())


if __name__ == "__main__":
    sys.exit(main())
