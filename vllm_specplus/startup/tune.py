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
from vllm_specplus.core.cost import CostModel
from vllm_specplus.core.optimal import OptimalTrees
from vllm_specplus.core.rank_counts import RankCounts
from vllm_specplus.core.width import schedule
from vllm_specplus.errors import bad_option, not_built
from vllm_specplus.shapes import DynamicTree, StaticTree
from vllm_specplus.startup.derived import Recommended, Tuned
from vllm_specplus.startup.host import CPU_ENGINE, tree_engine

BATCH_SIZES = (1, 4, 16, 64)
_FREE_ROWS = "1:1000"
"""Step costs under which every node pays."""


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
    if tree_engine() is not CPU_ENGINE:
        raise not_built(
            "VLLM_USE_V2_MODEL_RUNNER", 1, "has no tune yet, only V1 on CPUs has", "tune there"
        )
    stats, measured = _measure(options, prompts)
    ranks = RankCounts(measured["by_rank"], measured["by_row"])
    if not ranks.by_row[0]:
        raise bad_option("prompts", len(prompts), "gave no drafts at all", "give more or others")
    return recommend(
        options,
        ranks,
        step_costs={int(rows): float(ms) for rows, ms in measured["step_ms"]},
        spec_ms=1e3 * stats["draft_seconds"] / stats["num_rounds"],
        drafted=stats["num_drafts"] / stats["num_rounds"],
    )


def _measure(options: TuneOptions, prompts: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Decodes the prompts; the counters of the rounds, and what the worker measured."""
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
    llm.generate(list(prompts), params, use_tqdm=False)
    (stats, *_), (measured, *_) = map(llm.collective_rpc, ("specplus_stats", "specplus_measured"))
    llm.llm_engine.engine_core.shutdown()
    return stats, measured


def recommend(
    options: TuneOptions,
    ranks: RankCounts,
    step_costs: dict[int, float],
    spec_ms: float,
    drafted: float,
) -> Tuned:
    """The best tree for each batch size, from what was measured."""
    depth, num_nodes = options.num_speculative_tokens, options.num_nodes
    rates, dynamic = ranks.rates(depth), ranks.accepted(num_nodes)
    optimal = OptimalTrees(rates, num_nodes)
    cost = CostModel(step_costs, spec_ms)
    recommended: dict[int, Recommended] = {}
    for curve, is_static in ((dynamic, False), (optimal.expected.tolist(), True)):
        plan = schedule(cost, curve, range(num_nodes + 1), max(BATCH_SIZES))
        for batch_size in BATCH_SIZES:
            nodes = next(width for first, last, width in plan if first <= batch_size <= last)
            tree = StaticTree(tuple(optimal.paths(nodes))) if nodes and is_static else None
            text = str(tree or DynamicTree(nodes)) if nodes else None
            speedup = _speedup(cost, batch_size, nodes, curve[nodes], drafted)
            found = Recommended(
                speculative_tree=text,
                num_nodes=nodes,
                num_accepted=curve[nodes],
                speedup=speedup,
            )
            best = recommended.setdefault(batch_size, found)
            if found.speedup > best.speedup:
                recommended[batch_size] = found
    return Tuned(
        model=options.model,
        speculative_model=options.speculative_model,
        num_speculative_tokens=depth,
        temperature=options.temperature,
        rates=rates,
        accepted=dynamic,
        drafted=drafted,
        step_costs=step_costs,
        spec_ms=spec_ms,
        recommended=recommended,
    )


def _speedup(
    cost: CostModel, batch_size: int, num_nodes: int, num_accepted: float, drafted: float
) -> float:
    """Tokens per time against plain decoding, where a share of the rounds has drafts."""
    plain, wide = cost.step_ms(np.array([batch_size, batch_size * (1 + num_nodes)]))
    drafting = drafted if num_nodes else 0.0
    ms = (1 - drafting) * plain + drafting * (wide + cost.spec_ms)
    return float((1 + drafting * num_accepted) * plain / ms)
