"""Trees that stand for others: `optimal:N` and `tuned:FILE`, put in place before options are read.

Both end as a static or dynamic tree, so nothing behind this knows of them. `optimal:N` takes the
acceptance that the row budget assumes without measurement (core/width.py); `tuned:FILE` what
`vllm-specplus tune` has measured, with its depth and its step costs where none are given.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_specplus.config import METHODS, parse_methods
from vllm_specplus.core.growth import NUM_CHILDREN
from vllm_specplus.core.optimal import OptimalTrees, prior_rates
from vllm_specplus.core.width import MOST_REQS, Schedule, prior_rate
from vllm_specplus.errors import bad_option
from vllm_specplus.shapes import MAX_NODES, Chain, StaticTree
from vllm_specplus.startup.host import CPU_ENGINE, wanted_engine

logger = logging.getLogger("vllm.specplus")
WIDTHS = "num_speculative_tokens_per_batch_size"
"""vLLM's key of speculative_config."""


class Recommended(BaseModel):
    """What is best at one batch size: a tree or none, and what is expected of it.

    num_accepted: tokens accepted of a tree. speedup: against decoding without drafts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    speculative_tree: str | None
    num_nodes: int
    num_accepted: float
    speedup: float


class Tuned(BaseModel):
    """The file of `vllm-specplus tune`.

    engine: that measured. rates: [depth][rank], see core/optimal.py. accepted: tokens of the first
    n nodes of a dynamic tree, n from 0. drafted: the share of rounds that had drafts. step_costs:
    rows -> ms. spec_ms: what drafting takes in a step, by batch size, as is recommended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    model: str
    speculative_model: str
    num_speculative_tokens: int
    temperature: float
    rates: list[list[float]]
    accepted: list[float]
    drafted: float
    step_costs: dict[int, float]
    spec_ms: dict[int, float]
    recommended: dict[int, Recommended]

    def best(self, max_num_reqs: int) -> Recommended | None:
        """The widest tree among those of batches that can be, as both engines narrow trees in
        larger batches; None where no drafts pay in any."""
        sizes = [size for size in sorted(self.recommended) if size <= max_num_reqs]
        trees = [self.recommended[size] for size in sizes or [min(self.recommended)]]
        return max(
            (t for t in trees if t.speculative_tree), key=lambda t: t.num_nodes, default=None
        )

    def widths(self, max_num_reqs: int) -> Schedule:
        """How many nodes are recommended at which batch size, up to the next one in the file."""
        sizes = sorted(self.recommended)
        sizes = [sizes[0], *(size for size in sizes[1:] if size <= max_num_reqs)]
        nodes = [self.recommended[size].num_nodes for size in sizes]
        lasts = [*(size - 1 for size in sizes[1:]), max_num_reqs]
        return list(zip([1, *sizes[1:]], lasts, nodes, strict=True))


def is_derived(tree: Any) -> bool:
    """Whether a tree's text stands for another."""
    return isinstance(tree, str) and tree.partition(":")[0].strip() in ("optimal", "tuned")


def derive(keys: Mapping[str, Any], model: str, max_num_reqs: int | None) -> dict[str, Any]:
    """The keys of speculative_config with the tree that is meant. Raises OptionError.

    model, max_num_reqs: EngineArgs' own, the latter None if it is not given.
    """
    tree = keys.get("tree")
    if not is_derived(tree):
        return dict(keys)
    kind, _, rest = str(tree).partition(":")
    if kind.strip() == "tuned":
        return _tuned(keys, str(tree), rest.strip(), model, max_num_reqs or MOST_REQS)
    return dict(keys) | {"tree": _optimal(keys, str(tree), rest.strip())}


def _methods(keys: Mapping[str, Any]) -> list[str]:
    return str(keys.get("method") or "draft").split("+")


def _optimal(keys: Mapping[str, Any], tree: str, rest: str) -> str:
    if not re.fullmatch(r"\d{1,3}", rest) or not 1 <= int(rest) <= MAX_NODES:
        reason = f"is out of range: a tree has 1 to {MAX_NODES} nodes"
        raise bad_option("speculative_tree", tree, reason, "write for example 'optimal:12'")
    methods = _methods(keys)
    defaults = [METHODS[name].default_depth for name in methods if name in METHODS]
    depth = keys.get("num_speculative_tokens") or next(filter(None, defaults), None)
    if not isinstance(depth, int) or not 1 <= depth <= MAX_NODES:
        return str(Chain())  # the option's own check says what is wrong
    rates = prior_rates(prior_rate(methods), NUM_CHILDREN, depth)
    return str(StaticTree(tuple(OptimalTrees(rates, int(rest)).paths(int(rest)))))


def _tuned(
    keys: Mapping[str, Any], tree: str, file: str, model: str, max_num_reqs: int
) -> dict[str, Any]:
    tuned = _load(tree, Path(file).expanduser())
    specs = parse_methods(tuned.speculative_model)
    if {spec.name for spec in specs} != set(_methods(keys)):
        reason = f"was measured with {tuned.speculative_model!r}, not with this method"
        raise bad_option("speculative_tree", tree, reason, "measure this one with its --method")
    drafter = next((spec.model for spec in specs if spec.model), None)
    for measured, meant in ((tuned.model, model), (drafter, keys.get("model"))):
        if not _same(measured, meant):
            logger.warning(
                "speculative_tree=%r was measured with %r, and this is %r: unless they are the "
                "same, measure this one with `vllm-specplus tune`.",
                tree,
                measured,
                meant,
            )
    best = tuned.best(max_num_reqs)
    if best is None:
        reason = f"says that no drafts of {tuned.speculative_model!r} pay on this machine"
        raise bad_option("speculative_tree", tree, reason, "decode without them")
    given = {key: value for key, value in keys.items() if value is not None}
    shape = {"num_speculative_tokens": tuned.num_speculative_tokens}
    return shape | _costs(tuned, tree, keys, max_num_reqs) | given | {"tree": best.speculative_tree}


def _costs(tuned: Tuned, tree: str, keys: Mapping[str, Any], max_num_reqs: int) -> dict[str, Any]:
    """What was measured of the engine, in the words of the one that runs."""
    engine = wanted_engine()
    if tuned.engine != engine.name:
        logger.warning(
            "speculative_tree=%r was measured in the engine %s, and this is %s: its tree is used, "
            "its step costs are not.",
            tree,
            tuned.engine,
            engine.name,
        )
        return {}
    if engine is not CPU_ENGINE:
        given = keys.get("step_costs") or keys.get(WIDTHS)
        return {} if given else {WIDTHS: tuned.widths(max_num_reqs)}
    costs = ",".join(f"{rows}:{ms}" for rows, ms in tuned.step_costs.items())
    return {"step_costs": costs}


def _same(one: Any, other: Any) -> bool:
    """Whether two paths or ids are written for the same thing."""
    paths = [Path(path or "").expanduser().resolve() for path in (one, other)]
    return one == other or (bool(one and other) and paths[0] == paths[1])


def _load(tree: str, file: Path) -> Tuned:
    try:
        tuned = Tuned.model_validate_json(file.read_text(encoding="utf-8"))
        if tuned.recommended:
            return tuned
    except (OSError, ValidationError, UnicodeDecodeError):
        pass
    reason = "is no file that `vllm-specplus tune` has written"
    raise bad_option("speculative_tree", tree, reason, "write it with its --out") from None
