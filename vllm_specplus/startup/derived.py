"""Trees that stand for others: `optimal:N` and `tuned:FILE`, put in place before options are read.

Both end as a static or dynamic tree, so nothing behind this knows of them. `optimal:N` takes the
acceptance that the row budget assumes without measurement (core/width.py); `tuned:FILE` what
`vllm-specplus tune` has measured, with its depth and its step costs where none are given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_specplus.config import METHODS, parse_methods
from vllm_specplus.core.growth import NUM_CHILDREN
from vllm_specplus.core.optimal import OptimalTrees, prior_rates
from vllm_specplus.core.width import prior_rate
from vllm_specplus.errors import bad_option
from vllm_specplus.shapes import MAX_NODES, Chain, StaticTree


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

    rates: [depth][rank], see core/optimal.py. accepted: tokens of the first n nodes of a dynamic
    tree, n from 0. drafted: the share of rounds that had drafts. step_costs: rows -> ms. spec_ms:
    what drafting takes. recommended: by batch size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    speculative_model: str
    num_speculative_tokens: int
    temperature: float
    rates: list[list[float]]
    accepted: list[float]
    drafted: float
    step_costs: dict[int, float]
    spec_ms: float
    recommended: dict[int, Recommended]


def is_derived(tree: Any) -> bool:
    """Whether a tree's text stands for another."""
    return isinstance(tree, str) and tree.partition(":")[0].strip() in ("optimal", "tuned")


def derive(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of speculative_config with the tree that is meant. Raises OptionError."""
    tree = keys.get("tree")
    if not is_derived(tree):
        return dict(keys)
    kind, _, rest = str(tree).partition(":")
    if kind.strip() == "tuned":
        return _tuned(keys, str(tree), rest.strip())
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


def _tuned(keys: Mapping[str, Any], tree: str, file: str) -> dict[str, Any]:
    tuned = _load(tree, Path(file).expanduser())
    measured = {spec.name for spec in parse_methods(tuned.speculative_model)}
    if measured != set(_methods(keys)):
        reason = f"was measured with {tuned.speculative_model!r}, not with this method"
        raise bad_option("speculative_tree", tree, reason, "measure this one with its --method")
    best = tuned.recommended[min(tuned.recommended)]
    if best.speculative_tree is None:
        reason = f"says that no drafts of {tuned.speculative_model!r} pay on this machine"
        raise bad_option("speculative_tree", tree, reason, "decode without them")
    given = {key: value for key, value in keys.items() if value is not None}
    costs = ",".join(f"{rows}:{ms}" for rows, ms in tuned.step_costs.items())
    shape = {"num_speculative_tokens": tuned.num_speculative_tokens, "step_costs": costs}
    return shape | given | {"tree": best.speculative_tree}


def _load(tree: str, file: Path) -> Tuned:
    try:
        tuned = Tuned.model_validate_json(file.read_text(encoding="utf-8"))
        if tuned.recommended:
            return tuned
    except (OSError, ValidationError, UnicodeDecodeError):
        pass
    reason = "is no file that `vllm-specplus tune` has written"
    raise bad_option("speculative_tree", tree, reason, "write it with its --out") from None
