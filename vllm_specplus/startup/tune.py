"""`vllm-specplus tune`: measures what drafts bring and what rows cost, and says which tree is best.

A model decodes prompts beside wide dynamic trees, of which every node gets its row, and two curves
come out of that: tokens accepted of the first n nodes of a dynamic tree, as counted, and of the
best static tree of n nodes, from the rate at which each rank was accepted at each depth. Weighed by
the cost of rows, the better of the two is recommended for a batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_specplus.config import parse_methods
from vllm_specplus.core.budget import MARGIN
from vllm_specplus.core.cost import CostModel
from vllm_specplus.core.optimal import OptimalTrees
from vllm_specplus.core.rank_counts import RankCounts
from vllm_specplus.errors import bad_option
from vllm_specplus.shapes import DynamicTree, StaticTree
from vllm_specplus.startup.derived import Recommended, Tuned
from vllm_specplus.startup.host import engine_config, tree_engine

BATCH_SIZES = (1, 4, 16, 64)
_FREE_ROWS = "1:1000"
"""Step costs under which every node pays on V2; V1 weighs nothing while it counts ranks."""
_ALONE = 4
"""Prompts that are decoded one by one, to see what drafting takes then."""


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """What the command line says; `num_nodes` of the wide trees, `new_tokens` after each prompt."""

    model: str
    speculative_model: str
    num_speculative_tokens: int
    num_nodes: int
    new_tokens: int
    temperature: float
    engine: dict[str, Any]


def tune(options: TuneOptions, prompts: Sequence[str]) -> Tuned:
    """Runs the model and weighs what was found. Raises SpecPlusError."""
    if any(spec.name == "lookahead" for spec in parse_methods(options.speculative_model)):
        raise bad_option(
            "speculative_model",
            options.speculative_model,
            "weighs the rows of its window by itself",
            "leave speculative_tree out",
        )
    engine = tree_engine()
    measured = _measure(options, prompts, _longest_prompt(options))
    if not measured.ranks.by_row[0]:
        raise bad_option("prompts", len(prompts), "gave no drafts at all", "give more or others")
    return recommend(options, measured, engine.name)


@dataclass(frozen=True, slots=True)
class Measured:
    """ranks: of batches. drafted: the share of their rounds that had drafts. step_costs: rows ->
    ms. spec_ms: what drafting takes in a step of one request, and for each one of a batch.
    """

    ranks: RankCounts
    drafted: float
    step_costs: dict[int, float]
    spec_ms: tuple[float, float]

    def spec_ms_of(self, batch_size: int) -> float:
        """What drafting takes in a step: as for one request, or more if the requests' own work
        adds up to more."""
        alone, each = self.spec_ms
        return max(alone, batch_size * each)


def _longest_prompt(options: TuneOptions) -> int:
    """Tokens of a prompt behind which `new_tokens` and a whole tree fit."""
    model_config = engine_config(options.model, **options.engine).model_config
    longest = model_config.max_model_len - options.new_tokens - options.num_nodes
    if longest < 1:
        raise bad_option(
            "new_tokens",
            options.new_tokens,
            f"and nodes={options.num_nodes} leave no room for prompts in "
            f"max_model_len={model_config.max_model_len}",
            "lower one of them",
        )
    return int(longest)


def _measure(options: TuneOptions, prompts: Sequence[str], longest: int) -> Measured:
    """Decodes the prompts in batches, then some one by one; each is cut to `longest` tokens."""
    from vllm import LLM, SamplingParams

    tree = {
        "num_speculative_tokens": options.num_speculative_tokens,
        "speculative_tree": str(DynamicTree(options.num_nodes)),
        "speculative_step_costs": _FREE_ROWS,
    }
    llm: Any = LLM(
        options.model, speculative_model=options.speculative_model, **tree, **options.engine
    )
    params = SamplingParams(
        temperature=options.temperature, max_tokens=options.new_tokens, detokenize=False
    )

    def stats() -> tuple[float, ...]:
        counted = llm.collective_rpc("specplus_stats")[0]
        return 1e3 * counted["draft_seconds"], counted["num_rounds"], counted["num_drafts"]

    try:
        encode = llm.get_tokenizer().encode
        encoded = [{"prompt_token_ids": encode(prompt)[:longest]} for prompt in prompts]
        llm.collective_rpc("specplus_count_ranks")
        llm.generate(encoded, params, use_tqdm=False)
        draft_ms, rounds, drafts = stats()
        found = llm.collective_rpc("specplus_measured")[0]
        for prompt in encoded[:_ALONE]:
            llm.generate([prompt], params, use_tqdm=False)
        all_draft_ms, all_rounds, _ = stats()
    finally:
        llm.llm_engine.engine_core.shutdown()
    return Measured(
        RankCounts(found["by_rank"], found["by_row"]),
        drafts / rounds,
        {int(rows): float(ms) for rows, ms in found["step_ms"]},
        ((all_draft_ms - draft_ms) / (all_rounds - rounds), draft_ms / rounds),
    )


def recommend(options: TuneOptions, measured: Measured, engine: str) -> Tuned:
    """The best tree for each batch size, from what was measured."""
    depth, num_nodes = options.num_speculative_tokens, options.num_nodes
    rates, dynamic = measured.ranks.rates(depth), measured.ranks.accepted(num_nodes)
    optimal = OptimalTrees(rates, num_nodes)
    recommended: dict[int, Recommended] = {}
    for batch_size in BATCH_SIZES:
        of_static = _speedups(measured, batch_size, optimal.expected)
        of_dynamic = _speedups(measured, batch_size, np.asarray(dynamic))
        is_static = of_static.max() > of_dynamic.max()
        speedups = of_static if is_static else of_dynamic
        nodes = int(speedups.argmax()) if speedups.max() > 1 + MARGIN else 0
        tree: StaticTree | DynamicTree | None = None
        if nodes:
            paths = tuple(optimal.paths(nodes))
            tree = StaticTree(paths) if is_static else DynamicTree(nodes)
            nodes = len(paths) if is_static else nodes
        recommended[batch_size] = Recommended(
            speculative_tree=None if tree is None else str(tree),
            num_nodes=nodes,
            num_accepted=float(optimal.expected[nodes]) if is_static else dynamic[nodes],
            speedup=float(speedups[nodes]),
        )
    return Tuned(
        engine=engine,
        model=options.model,
        speculative_model=options.speculative_model,
        num_speculative_tokens=depth,
        temperature=options.temperature,
        rates=rates,
        accepted=dynamic,
        drafted=measured.drafted,
        step_costs=measured.step_costs,
        spec_ms={size: measured.spec_ms_of(size) for size in BATCH_SIZES},
        recommended=recommended,
    )


def _speedups(measured: Measured, batch_size: int, accepted: np.ndarray) -> np.ndarray:
    """Tokens per time against plain decoding with trees of 0, 1, 2, ... nodes: [num_nodes + 1].

    All rounds look for drafts, and a share of them has some. accepted: tokens, by nodes.
    """
    nodes, cost = np.arange(len(accepted)), CostModel(measured.step_costs)
    plain, wide = cost.step_ms(batch_size), cost.step_ms(batch_size * (1 + nodes))
    ms = plain + measured.drafted * (wide - plain) + measured.spec_ms_of(batch_size) * (nodes > 0)
    return (1 + measured.drafted * accepted) * plain / ms
