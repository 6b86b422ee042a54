"""`make demo`: a real model decodes faster with speculation, and writes the same text.

Takes the first Spec-Bench prompt of six categories through plain vLLM, vLLM's own n-gram drafter,
our n-gram trees, and trees of n-grams and trained MTP heads, one request at a time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.e2e.benchmark import Options
from benchmarks.e2e.generate import PROMPTS, RESULTS
from benchmarks.e2e.methods import DEFAULT_DEPTH, NATIVE_NGRAM, parse_methods
from benchmarks.e2e.prompts import first_of_each, load_prompts
from benchmarks.e2e.report import run_and_report
from benchmarks.gemma import ensure_gemma
from benchmarks.provenance import ROOT

TREE = "dynamic:12"
HEADS = os.path.relpath(ROOT / "assets/gemma-3-270m-mtp3")
CATEGORIES = ("writing", "coding", "translation", "summarization", "math_reasoning", "rag")


def make_options() -> Options:
    """The demo's fixed choice of prompts and methods; fetches the model where it is missing."""
    return Options(
        model=ensure_gemma(),
        prompts=first_of_each(load_prompts(PROMPTS), CATEGORIES),
        methods=parse_methods(
            [NATIVE_NGRAM, f"[ngram]:tree={TREE}", f"[mtp3+ngram]{HEADS}:tree={TREE}"]
        ),
        enforce_eager=True,
    )


def next_steps(model: Path) -> str:
    """The lines to try after the demo."""
    return f"""\
Try next:
  LLM(model="{model}", speculative_model="[mtp3+ngram]{HEADS}",
      num_speculative_tokens={DEFAULT_DEPTH}, speculative_tree="{TREE}")
  vllm serve {model} --speculative-model "[ngram]" --num-speculative-tokens {DEFAULT_DEPTH} \\
      --speculative-tree {TREE}"""


def main() -> int:
    """Run the demo; the value is the exit code."""
    console = Console()
    code = run_and_report(make_options, RESULTS / "demo.json", console)
    if code == 0:
        console.print(next_steps(ensure_gemma()), markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
