"""Replays recorded texts through the n-gram proposer and the row budget, without a model.

A text is what a model emitted once. Rule `match` accepts exactly the drafts that equal what comes
next, in greedy and in sampled texts, so a replay accepts what the engine would. A step costs what a
measured curve says plus the CPU time that the look-up really takes here; prefills are not counted.

Example:
    python -m benchmarks.ngram_replay TEXTS.jsonl --columns greedy_ids --batch-sizes 1,8

TEXTS has a line {"prompt_ids": [...], COLUMN: [...]} per text.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.budget import RowBudget
from vllm_specplus.core.cost import CostModel
from vllm_specplus.core.growth import Candidates
from vllm_specplus.core.stats import SpecStats
from vllm_specplus.proposers.base import DraftRequest
from vllm_specplus.proposers.registry import create

CURVE = "1:17.9,4:19.0,8:23.3,16:29.2,32:44.9"
EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(slots=True)
class Text:
    """A recorded text, of which the first `num_tokens` are there."""

    req_id: str
    token_ids: np.ndarray
    num_tokens: int

    @property
    def known(self) -> np.ndarray:
        return self.token_ids[: self.num_tokens]

    @property
    def max_depth(self) -> int:
        return len(self.token_ids) - self.num_tokens - 1

    @property
    def rest(self) -> list[int]:
        return self.token_ids[self.num_tokens :].tolist()


class Drafter(Protocol):
    """Candidates of a step and how many of them get rows, per text."""

    def draft(self, texts: Sequence[Text]) -> list[tuple[Candidates, int]]: ...

    def finish(self, text: Text) -> None: ...


class Plain:
    """No drafts."""

    def draft(self, texts: Sequence[Text]) -> list[tuple[Candidates, int]]:
        return [(Candidates(), 0)] * len(texts)

    def finish(self, text: Text) -> None:
        pass


class Native(Plain):
    """vLLM's rule: what follows the earliest of the longest matches, always."""

    def __init__(self, config: SpecPlusConfig) -> None:
        from vllm.v1.spec_decode import ngram_proposer

        self._find = ngram_proposer._find_longest_matched_ngram_and_propose_tokens
        self._limits = config.ngram_prompt_lookup_min, config.ngram_prompt_lookup_max
        self._depth = config.num_speculative_tokens
        self._find(np.zeros(9, dtype=np.int32), *self._limits, 99, self._depth)  # compiles

    def draft(self, texts: Sequence[Text]) -> list[tuple[Candidates, int]]:
        return [self._draft(text) for text in texts]

    def _draft(self, text: Text) -> tuple[Candidates, int]:
        tokens = self._find(text.known, *self._limits, len(text.token_ids) - 1, self._depth)
        n = len(tokens)
        return Candidates(tokens.tolist(), range(n), [1.0] * n), n


class Ours:
    """The n-gram proposer under the row budget, wired as the round does it."""

    def __init__(self, config: SpecPlusConfig, curve: dict[int, float], spec_ms: float) -> None:
        self.config = config
        self.proposer = create(config)
        self.budget = RowBudget()
        self.budget.measured(curve, spec_ms)

    def draft(self, texts: Sequence[Text]) -> list[tuple[Candidates, int]]:
        bounds = self.budget.min_probs([text.req_id for text in texts])
        requests = [
            DraftRequest(
                text.req_id,
                text.known,
                max_depth=min(self.config.num_speculative_tokens, text.max_depth),
                max_nodes=self.config.num_nodes,
                min_prob=bound,
            )
            for text, bound in zip(texts, bounds, strict=True)
            if bound < 1 and text.max_depth > 0
        ]
        proposed = self.proposer.propose(requests)
        found = {r.req_id: c for r, c in zip(requests, proposed, strict=True)}
        drafts = [found.get(text.req_id, Candidates()) for text in texts]
        counts = self.budget.allocate([candidates.probs for candidates in drafts])
        return list(zip(drafts, counts, strict=True))

    def finish(self, text: Text) -> None:
        self.proposer.forget(text.req_id)


@dataclass(slots=True)
class Replay:
    """Totals of a replay. nodes: (probability, hit, depth) of every candidate."""

    drafter: Drafter
    cost: CostModel
    stats: SpecStats = field(default_factory=lambda: SpecStats(max_depth=128))
    num_steps: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    ms: float = 0.0
    lookup_ms: float = 0.0
    nodes: list[tuple[float, bool, int]] = field(default_factory=list)

    def run(self, texts: Sequence[Text], batch_size: int, refill: bool) -> Replay:
        """Runs all texts, at most `batch_size` at a time; without refill, in closed groups."""
        waiting, running = deque(texts), list[Text]()
        self.num_tokens = len(texts)
        while waiting or running:
            room = batch_size - len(running) if refill or not running else 0
            running += [waiting.popleft() for _ in range(min(room, len(waiting)))]
            self.step(running)
            running = [text for text in running if text.rest]
        return self

    def step(self, texts: Sequence[Text]) -> None:
        start = time.thread_time()
        drafts = self.drafter.draft(texts)
        lookup_ms = 1e3 * (time.thread_time() - start)
        num_rows = len(texts) + sum(count for _, count in drafts)
        for text, (candidates, count) in zip(texts, drafts, strict=True):
            outcome = list(_outcome(candidates, text.rest[:-1]))
            self.nodes += [(p, *o) for p, o in zip(candidates.probs, outcome, strict=True)]
            num_accepted = sum(hit for hit, _ in outcome[:count])
            self.stats.observe(count, num_accepted)
            self.num_tokens += 1 + num_accepted
            text.num_tokens += 1 + num_accepted
            if not text.rest:
                self.drafter.finish(text)
        self.num_steps += 1
        self.num_rows += num_rows
        self.lookup_ms += lookup_ms
        self.ms += float(self.cost.step_ms(num_rows)) + lookup_ms
        self.ms += self.cost.spec_ms * (num_rows > len(texts))


def _outcome(candidates: Candidates, rest: Sequence[int]) -> Iterator[tuple[bool, int]]:
    """(whether the node's path is what comes next, depth) of every node."""
    rows = [(True, 0)]
    for token, parent in zip(candidates.tokens, candidates.parents, strict=True):
        on_path, depth = rows[parent]
        rows.append((on_path and depth < len(rest) and rest[depth] == token, depth + 1))
    yield from rows[1:]


def load(path: Path, column: str, half: int | None) -> list[Text]:
    """The texts of a file, their prompt and first token known; half 0 or 1: every second one."""
    texts = []
    for i, row in enumerate(map(json.loads, path.read_text().splitlines())):
        if half in (None, i % 2):
            token_ids = np.array(row["prompt_ids"] + row[column], dtype=np.int32)
            texts.append(Text(str(i), token_ids, len(row["prompt_ids"]) + 1))
    return texts


def reliability(nodes: Sequence[tuple[float, bool, int]]) -> Table:
    """Estimated against real probability of acceptance, by estimate."""
    probs, hit, depth = np.array(nodes).T
    bins = np.searchsorted(EDGES, probs, side="right")
    table = Table("estimate", "nodes", "mean", "accepted", "at depth 1", "deeper")
    for b in np.unique(bins):
        low, high = (0, *EDGES)[b], (*EDGES, 1)[b]
        chosen = bins == b
        parts = [chosen, chosen & (depth == 1), chosen & (depth > 1)]
        rates = [f"{hit[part].mean():.3f}" if part.any() else "-" for part in parts]
        mean = f"{probs[chosen].mean():.3f}"
        table.add_row(f"{low:.2f} to {high:.2f}", str(chosen.sum()), mean, *rates)
    return table


def compare(runs: dict[str, Replay]) -> Iterator[list[str]]:
    """A row per method; the first one is the baseline."""
    rates = {method: run.num_tokens / run.ms for method, run in runs.items()}
    for method, run in runs.items():
        rounds = run.stats.num_rounds
        numbers = [
            1 + run.stats.num_accepted_tokens / rounds,
            run.num_rows / rounds,
            run.lookup_ms / run.num_steps,
            rates[method] / next(iter(rates.values())),
        ]
        yield [method, *(f"{number:.3f}" for number in numbers)]


def main(
    path: Annotated[Path, typer.Argument(metavar="TEXTS", help="JSON lines of token ids")],
    columns: Annotated[str, typer.Option(help="keys of a text's tokens")] = "greedy_ids,t08_ids",
    half: Annotated[int | None, typer.Option(help="0: tuning half, 1: validation half")] = None,
    batch_sizes: str = "1,4,8,16",
    depth: Annotated[int, typer.Option(help="ours; vLLM's own drafts 5")] = 5,
    nodes: Annotated[int, typer.Option(help="most nodes of a tree of ours")] = 12,
    lookup: Annotated[tuple[int, int], typer.Option(help="shortest and longest n-gram")] = (1, 5),
    curve: Annotated[str, typer.Option(help="ROWS:MS,... of a step")] = CURVE,
    spec_ms: Annotated[float, typer.Option(help="what drafts add to a step")] = 0.15,
    closed: Annotated[bool, typer.Option(help="a batch ends before the next begins")] = False,
) -> None:
    """Prints what the methods accept and cost, and how calibrated our estimates are."""
    points = {int(rows): float(ms) for rows, ms in (p.split(":") for p in curve.split(","))}
    limits = dict(zip(("ngram_prompt_lookup_min", "ngram_prompt_lookup_max"), lookup, strict=True))
    options = {"speculative_model": "[ngram]", **limits}
    native = SpecPlusConfig.from_options({**options, "num_speculative_tokens": 5})
    tree = {"num_speculative_tokens": depth, "tree": f"dynamic:{nodes}"}
    ours = SpecPlusConfig.from_options(options | tree)
    cost, console = CostModel(points, spec_ms), Console()
    for column in columns.split(","):
        table = Table("batch", "method", "tokens/round", "rows/round", "look-up ms", "x plain")
        nodes_seen = []
        for size in map(int, batch_sizes.split(",")):
            drafters: dict[str, Drafter] = {
                "plain": Plain(),
                "native K=5": Native(native),
                f"ours K={depth} dynamic:{nodes}": Ours(ours, points, spec_ms),
            }
            runs = {
                method: Replay(drafter, cost).run(load(path, column, half), size, not closed)
                for method, drafter in drafters.items()
            }
            for row in compare(runs):
                table.add_row(str(size), *row)
            nodes_seen += list(runs.values())[-1].nodes
        console.print(column, table, reliability(nodes_seen))


if __name__ == "__main__":
    typer.run(main)
