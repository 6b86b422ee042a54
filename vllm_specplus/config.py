"""The user's options, validated in one place: methods, trees and `SpecPlusConfig`.

Trees have a text form that `parse_tree` reads and `str` writes back: `chain`,
`static:[(0,),(0,0),(1,)]` or `dynamic:12`; published ones have names, `medusa:mc_sim_7b_63`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from math import inf
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_specplus.errors import OptionError, bad_option, not_built
from vllm_specplus.medusa_trees import MEDUSA_TREES

MAX_NODES = 127
"""Nodes of one tree: with the root they are the 128 rows of an ancestor mask."""

DEFAULT_LOOKUP = (1, 5)
"""Shortest and longest n-gram to look up, as vLLM documents its own defaults."""

Path = tuple[int, ...]
Verify = Literal["auto", "match", "rejection", "block", "traversal", "typical"]


@dataclass(frozen=True, slots=True)
class Method:
    """What the options need to know of a drafting method.

    native: the name of vLLM's own method, which runs its chains; None if vLLM has none.
    model: whether a path or model id belongs to it.
    default_depth: `num_speculative_tokens` if not given; None if it must be given.
    heads: whether it drafts with trained heads, which are the path or id.
    """

    native: str | None
    model: Literal["required", "optional", "none"]
    default_depth: int | None = None
    heads: bool = False


METHODS: dict[str, Method] = {
    "ngram": Method("ngram", "none"),
    "mtp": Method("mtp", "optional", heads=True),
    "mtp3": Method(None, "optional", default_depth=3, heads=True),
    "medusa": Method(None, "required"),
    "eagle": Method("eagle", "required"),
    "eagle3": Method("eagle3", "required"),
    "lookahead": Method(None, "none"),
    "draft": Method("draft_model", "required"),
    "suffix": Method("suffix", "none", default_depth=24),
}


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """One method that the user named, with its model path or id, if any."""

    name: str
    model: str | None = None


def parse_methods(text: str) -> tuple[MethodSpec, ...]:
    """Reads `speculative_model`.

    "[method]", "[method]MODEL" and "[a+b]MODEL" (the model belongs to the one that needs it) name
    methods; text without brackets is the draft model of method "draft". Raises OptionError.
    """

    def wrong(reason: str, way_out: str) -> OptionError:
        return bad_option("speculative_model", text, reason, way_out)

    if re.search(r"\+\s*\[", text):
        raise not_built(
            "speculative_model",
            text,
            "gives several methods a model of their own, which is not available yet",
            "join methods as '[a+b]MODEL', where one of them takes the model",
        )
    brackets = re.fullmatch(r"\[([^][]+)\]([^][]*)", text.strip())
    if brackets is None:
        if "[" in text or "]" in text or not text.strip():
            raise wrong("cannot be read", "write '[method]', '[method]MODEL', '[a+b]' or a model")
        if text.strip() in METHODS:
            raise wrong("names a method like a model", f"write '[{text.strip()}]'")
        return (MethodSpec("draft", text.strip()),)
    names = [name.strip() for name in brackets[1].split("+")]
    model = brackets[2].strip() or None
    for name in names:
        if name not in METHODS:
            close = get_close_matches(name, METHODS, n=1)
            hint = f"did you mean {close[0]!r}" if close else "use one of them"
            raise wrong(f"has no method {name!r} among {', '.join(METHODS)}", hint)
    if len(set(names)) < len(names):
        raise wrong("names a method twice", "name each method once")
    takers = [name for name in names if METHODS[name].model == "required"]
    takers = takers or [name for name in names if METHODS[name].model == "optional"]
    if model is None:
        missing = [name for name in takers if METHODS[name].model == "required"]
        if missing:
            raise wrong(f"needs a model for {missing[0]!r}", f"write '[{brackets[1]}]MODEL'")
    elif len(takers) != 1:
        whom = " and ".join(takers) or "none of its methods"
        raise wrong(f"gives one model, which {whom} would take", "name one method that takes it")
    return tuple(MethodSpec(name, model if name in takers else None) for name in names)


@dataclass(frozen=True, slots=True)
class Chain:
    """One candidate per depth."""

    def __str__(self) -> str:
        return "chain"


@dataclass(frozen=True, slots=True)
class StaticTree:
    """A fixed shape: per node the ranks on its way from the root.

    (0, 1) is the second best child of the best candidate (Medusa, Cai et al. 2024, arXiv
    2401.10774). Siblings have the ranks 0, 1, 2, ... without a gap. The order in which paths are
    given means nothing; they are kept by sum of (rank + 1), so every prefix is a tree.
    """

    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        paths = set(self.paths)
        if not 1 <= len(paths) <= MAX_NODES:
            raise bad_option(
                "speculative_tree",
                str(self),
                f"has {len(paths)} nodes, but a tree has 1 to {MAX_NODES}",
                "give fewer paths" if paths else "give at least (0,)",
            )
        for path in sorted(paths):
            needed = (*path[:-1], path[-1] - 1) if path[-1] else path[:-1]
            if needed and needed not in paths:
                kin = "sibling of the rank before, " if path[-1] else "parent "
                raise bad_option(
                    "speculative_tree",
                    str(self),
                    f"has node {path} without its {kin}{needed}",
                    f"add {needed} or take {path} away",
                )
        ordered = sorted(paths, key=lambda path: (len(path) + sum(path), path))
        object.__setattr__(self, "paths", tuple(ordered))

    @property
    def depth(self) -> int:
        return max(map(len, self.paths))

    def __str__(self) -> str:
        return f"static:{list(self.paths)}".replace(" ", "")


@dataclass(frozen=True, slots=True)
class DynamicTree:
    """At most `max_nodes` nodes per step, placed where they are most likely to be accepted."""

    max_nodes: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_nodes <= MAX_NODES:
            raise bad_option(
                "speculative_tree",
                str(self),
                f"is out of range: a tree has 1 to {MAX_NODES} nodes",
                "write for example 'dynamic:12'",
            )

    def __str__(self) -> str:
        return f"dynamic:{self.max_nodes}"


TreeSpec = Chain | StaticTree | DynamicTree


def parse_tree(value: str | TreeSpec) -> TreeSpec:
    """Reads the text form of a tree; raises OptionError."""
    if isinstance(value, TreeSpec):
        return value
    kind, _, rest = str(value).strip().partition(":")
    if kind == "chain" and not rest:
        return Chain()
    if kind == "dynamic" and re.fullmatch(r"-?\d{1,9}", rest.strip()):
        return DynamicTree(int(rest))
    paths = _literal_paths(rest) if kind == "static" else None
    paths = MEDUSA_TREES.get(rest.strip()) if kind == "medusa" else paths
    if paths is not None:
        return StaticTree(paths)
    raise bad_option(
        "speculative_tree",
        value,
        "cannot be read",
        "write 'chain', 'dynamic:12', 'medusa:mc_sim_7b_63' or 'static:[(0,),(0,0),(1,)]', one "
        "path of ranks per node",
    )


def _literal_paths(text: str) -> tuple[Path, ...] | None:
    """The paths in a Python list of tuples of ranks, or None if it is not one."""
    try:
        paths = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(paths, (list, tuple)):
        return None
    for path in paths:
        if not isinstance(path, (list, tuple)) or not path:
            return None
        if not all(type(rank) is int and rank >= 0 for rank in path):
            return None
    return tuple(tuple(path) for path in paths)


def parse_step_costs(value: Any) -> dict[int, float] | None:
    """Reads `step_costs`, rows -> ms, a dict or its text '1:5.1,8:5.2'; raises OptionError."""
    if value is None:
        return None
    points = (point.split(":") for point in str(value).split(","))
    pairs = value.items() if isinstance(value, Mapping) else points
    try:
        costs = [(int(str(rows)), float(ms)) for rows, ms in pairs]
    except (ValueError, TypeError):
        costs = []
    rising = all(before < after for before, after in pairwise([0, *(rows for rows, _ in costs)]))
    if not costs or not rising or not all(0 < ms < inf for _, ms in costs):
        raise bad_option(
            "speculative_step_costs",
            value,
            "is no list of rows:ms with rising rows from 1 on and positive ms",
            "write for example '1:5.1,8:5.2,64:7.9', or leave it out and costs are measured",
        )
    return dict(costs)


def _costs_text(costs: dict[int, float] | None) -> str | None:
    return None if costs is None else ",".join(f"{rows}:{ms}" for rows, ms in costs.items())


class SpecPlusConfig(BaseModel):
    """All options of one engine. As JSON it travels in `additional_config["specplus"]`.

    Whoever holds one need not check anything again. Raises pydantic's ValidationError; use
    `from_options` for the one-sentence OptionError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    speculative_model: str = Field(
        description="drafting method: '[method]', '[method]PATH_OR_ID', '[a+b]', or the path "
        f"or id of a draft model; methods: {', '.join(METHODS)}"
    )
    num_speculative_tokens: StrictInt = Field(
        ge=1, le=MAX_NODES, description=f"depth K of the draft, an integer from 1 to {MAX_NODES}"
    )
    tree: Annotated[TreeSpec, PlainValidator(parse_tree), PlainSerializer(str)] = Field(
        default=Chain(),
        description="shape of the draft: 'chain', 'static:[(0,),(0,0),(1,)]' (one path of ranks "
        f"per node) or 'dynamic:N' (the N likeliest nodes of each step, at most {MAX_NODES})",
    )
    verify: Verify = Field(
        default="auto",
        description="acceptance rule: 'auto', 'match', 'rejection', 'block', 'traversal', or "
        "'typical', the only one that changes the distribution of the output",
    )
    ngram_prompt_lookup_min: StrictInt = Field(
        default=DEFAULT_LOOKUP[0],
        ge=1,
        description="shortest n-gram that [ngram] looks up, an integer from 1 on",
    )
    ngram_prompt_lookup_max: StrictInt = Field(
        default_factory=lambda data: max(
            DEFAULT_LOOKUP[1], data.get("ngram_prompt_lookup_min", DEFAULT_LOOKUP[0])
        ),
        ge=1,
        description="longest n-gram that [ngram] looks up, an integer from 1 on",
    )
    step_costs: Annotated[
        dict[int, float] | None, PlainValidator(parse_step_costs), PlainSerializer(_costs_text)
    ] = Field(
        default=None,
        description="ms of a step by its total rows, as '1:5.1,8:5.2,64:7.9': how many nodes pay "
        "at which batch size follows from them (default: measured at start-up)",
    )

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> SpecPlusConfig:
        """Validates fields by name; raises OptionError for the first that is wrong."""
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise _one_sentence(error) from None

    @property
    def methods(self) -> tuple[MethodSpec, ...]:
        return parse_methods(self.speculative_model)

    @property
    def method(self) -> str:
        """The methods' names in alphabetic order: "ngram", "mtp3+ngram"."""
        return "+".join(sorted(spec.name for spec in self.methods))

    @property
    def num_nodes(self) -> int:
        """Most draft nodes of a step: what vLLM calls `num_speculative_tokens`."""
        match self.tree:
            case StaticTree(paths):
                return len(paths)
            case DynamicTree(max_nodes):
                return max_nodes
        return self.num_speculative_tokens

    @field_validator("speculative_model")
    @classmethod
    def _readable(cls, text: str) -> str:
        parse_methods(text)
        return text

    @model_validator(mode="before")
    @classmethod
    def _fill_depth(cls, options: Any) -> Any:
        """A static tree knows its depth, and a method may have a default."""
        if not isinstance(options, dict) or options.get("num_speculative_tokens") is not None:
            return options
        tree = parse_tree(options.get("tree", Chain()))
        depth = tree.depth if isinstance(tree, StaticTree) else None
        for spec in parse_methods(str(options.get("speculative_model", ""))):
            depth = depth or METHODS[spec.name].default_depth
        if depth is None:
            raise bad_option(
                "num_speculative_tokens",
                None,
                "must be given: it is the depth of the draft",
                f"give an integer from 1 to {MAX_NODES}, for example 5",
            )
        return {**options, "num_speculative_tokens": depth}

    @model_validator(mode="after")
    def _check_together(self) -> SpecPlusConfig:
        if isinstance(self.tree, StaticTree) and self.tree.depth > self.num_speculative_tokens:
            raise bad_option(
                "num_speculative_tokens",
                self.num_speculative_tokens,
                f"is less than the depth {self.tree.depth} of speculative_tree",
                f"give at least {self.tree.depth}, or leave it out",
            )
        low, high = self.ngram_prompt_lookup_min, self.ngram_prompt_lookup_max
        if low > high:
            raise bad_option(
                "ngram_prompt_lookup_min",
                low,
                f"is more than ngram_prompt_lookup_max={high}",
                "give a range that is not empty",
            )
        if (low, high) != DEFAULT_LOOKUP and all(spec.name != "ngram" for spec in self.methods):
            raise bad_option(
                "ngram_prompt_lookup_min/max",
                (low, high),
                f"belongs to [ngram], not to speculative_model={self.speculative_model!r}",
                "leave it out",
            )
        if self.step_costs is not None and isinstance(self.tree, Chain):
            text, reason = _costs_text(self.step_costs), "belongs to a tree, and this is a chain"
            raise bad_option("speculative_step_costs", text, reason, "leave it out")
        return self


def _one_sentence(error: ValidationError) -> OptionError:
    """The first finding of pydantic as our kind of error."""
    found = error.errors()[0]
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, OptionError):
        return cause
    name = str(found["loc"][0])
    field = SpecPlusConfig.model_fields.get(name)
    if field is None:
        return bad_option(name, found["input"], "is no option", "leave it out")
    value = None if found["type"] == "missing" else found["input"]
    reason = found["msg"].lower().removeprefix("input ").removeprefix("field ")
    option = {"verify": "speculative_verify"}.get(name, name)
    return bad_option(option, value, f"is refused: it {reason}", f"give the {field.description}")
