"""Are the drafts of heads as often right in the engine as they are outside it, on the same text?

The engine decodes prompts greedily beside a chain of which every level is drafted. The target reads
that text again in one pass, the heads draft at every token of it, and a walk from round to round
says what the engine should have accepted. Of a text's last tokens the engine drafts fewer, and the
walk has no rounds there: the longer the texts, the less that matters.

Example:
    python -m benchmarks.acceptance assets/gemma-3-270m-mtp3
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.e2e.generate import PROMPTS
from benchmarks.gemma import ensure_gemma
from vllm_specplus.core.growth import chain_paths
from vllm_specplus.shapes import StaticTree
from vllm_specplus.train.acceptance import Ranks
from vllm_specplus.train.command import KINDS, TrainOptions
from vllm_specplus.train.corpus import Corpus
from vllm_specplus.train.target import Writer
from vllm_specplus.train.teacher import Teacher
from vllm_specplus.train.text import Prompt, Text, read_prompts
from vllm_specplus.train.trainer import FitSettings, HeadsTrainer


def decode(options: TrainOptions, prompts: list[Prompt], depth: int) -> tuple[Text, dict[str, Any]]:
    """What the engine writes after the prompts, and its counters (core/stats.py)."""
    chain: dict[str, Any] = {
        "speculative_model": f"[{options.kind}]{options.start}",
        "num_speculative_tokens": depth,
        "speculative_tree": str(StaticTree(tuple(chain_paths(depth)))),
        "speculative_step_costs": "1:1000",
    }
    lengths = options.prompt_tokens, options.new_tokens
    writer = Writer(options.model, *lengths, chat=False, seed=0, dtype="float32", **chain)
    writer.llm.collective_rpc("specplus_count_ranks")  # and no level is left out for its time
    samples = [sample for wave in writer.held_out(prompts, 0) for sample in wave]
    counted = writer.llm.collective_rpc("specplus_stats")[0]
    writer.close()
    trained_on = samples[0].model_copy(update={"held_out": False})  # a corpus must have some
    return Text.of([trained_on, *samples]), counted


def read_again(options: TrainOptions, text: Text) -> Ranks:
    """Ranks of the heads' drafts at every token of a text, outside the engine."""
    load, make = KINDS[options.kind]
    assert options.start is not None
    start = load(options.start)
    teacher = Teacher(options.model, torch.device("cpu"), torch.float32)
    heads = make(options, teacher, start)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(text, Path(folder) / "hidden", teacher, heads.num_depths)
        corpus.compute(lambda _: None)
        vocab = None if heads.drafts_all_tokens else start.draft_vocab
        return HeadsTrainer(heads, corpus, vocab, options.fit, Path(folder) / "state").evaluate()


def compare(
    options: TrainOptions, prompts: list[Prompt], depth: int
) -> dict[str, tuple[int, list[float]]]:
    """Rounds, and per depth the share in which a chain was right down to there."""
    text, counted = decode(options, prompts, depth)
    rounds = counted["num_drafts"]
    reached = [accepted / rounds for accepted in counted["num_accepted_tokens_per_pos"]]
    found = read_again(options, text)
    ranks = replace(found, rank=found.rank[:depth])
    parts = {"its rounds, outside": ranks.walk(), "every token": ranks}
    outside = {name: (len(part.kinds), part.reached()) for name, part in parts.items()}
    return {"the engine": (rounds, reached)} | outside


def main(
    heads: Annotated[str, typer.Argument(help="Folder of the heads.")],
    kind: Literal["mtp3", "medusa", "eagle"] = "mtp3",
    model: Annotated[Path | None, typer.Option(help="Default: Gemma-3-270M.")] = None,
    prompts: Annotated[Path, typer.Option(help="As for `vllm-specplus train`.")] = PROMPTS,
    limit: Annotated[int, typer.Option(min=1, help="So many prompts, at even distances.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=5)] = 40,
    depth: Annotated[int, typer.Option(min=1, max=3)] = 3,
) -> None:
    """Compare what the engine accepts of a chain with what the heads get right outside it."""
    found = read_prompts(prompts)
    chosen = [found[i * len(found) // limit] for i in range(min(limit, len(found)))]
    options = TrainOptions(
        kind,
        str(model or ensure_gemma()),
        prompts,
        Path(),
        FitSettings(compute="float32"),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        start=heads,
    )
    table = Table("", "rounds", *(f"depth {d + 1}" for d in range(depth)), "drafts accepted")
    for name, (rounds, reached) in compare(options, chosen, depth).items():
        shares = (f"{share:.3f}" for share in reached)
        table.add_row(name, str(rounds), *shares, f"{sum(reached):.2f}")
    Console().print(table)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
