"""The user's options, validated in one place: methods and `SpecPlusConfig`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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
from vllm_specplus.shapes import (
    MAX_NODES,
    Chain,
    DynamicTree,
    LookaheadShape,
    StaticTree,
    TreeSpec,
    parse_tree,
)

DEFAULT_LOOKUP = (1, 5)
"""Shortest and longest n-gram to look up, as vLLM documents its own defaults."""

DEFAULT_WARM_UP = 2048
"""Tokens of the prompt that fill the pool of [lookahead]."""

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

    @property
    def is_draft_model(self) -> bool:
        """Whether its model is of a draft model class of vLLM's."""
        return self.native is not None and self.model == "required"


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


def split_models(text: str) -> list[str]:
    """The parts of "[a]MODEL+[b]MODEL", which have a model each."""
    return re.split(r"\+\s*(?=\[)", text)


def parse_methods(text: str) -> tuple[MethodSpec, ...]:
    """Reads `speculative_model`.

    "[method]", "[method]MODEL" and "[a+b]MODEL" (the model belongs to the one that needs it) name
    methods, "[draft]A+[draft]B" two draft models; text without brackets is the draft model of
    method "draft". Raises OptionError.
    """

    def wrong(reason: str, way_out: str) -> OptionError:
        return bad_option("speculative_model", text, reason, way_out)

    parts = split_models(text)
    if len(parts) > 1:
        specs = tuple(spec for part in parts for spec in parse_methods(part))
        if [spec.name for spec in specs] != ["draft", "draft"]:
            raise not_built(
                "speculative_model",
                text,
                "gives several methods a model of their own, which only two draft models may have",
                "write '[draft]A+[draft]B', or '[a+b]MODEL', where one of them takes the model",
            )
        return specs
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
        description="drafting method: '[method]', '[method]PATH_OR_ID', '[a+b]', "
        "'[draft]A+[draft]B', or the path or id of a draft model; methods: "
        f"{', '.join(METHODS)}"
    )
    num_speculative_tokens: StrictInt = Field(
        ge=1, le=MAX_NODES, description=f"depth K of the draft, an integer from 1 to {MAX_NODES}"
    )
    tree: Annotated[TreeSpec, PlainValidator(parse_tree), PlainSerializer(str)] = Field(
        default=Chain(),
        description="shape of the draft: 'chain', 'static:[(0,),(0,0),(1,)]' (one path of ranks "
        f"per node), 'dynamic:N' (the N likeliest nodes of each step, at most {MAX_NODES}), "
        "'optimal:N' (the best static tree of N nodes, by assumed acceptance) or 'tuned:FILE' "
        "(what `vllm-specplus tune` found best); "
        "default: 'chain', and for [lookahead] what its window and its candidates take",
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
    lookahead_window: StrictInt = Field(
        default=LookaheadShape.window,
        ge=1,
        le=32,
        description="columns of the window in which [lookahead] guesses, an integer from 1 to 32",
    )
    lookahead_ngram: StrictInt = Field(
        default=LookaheadShape.ngram,
        ge=2,
        le=8,
        description="tokens of the n-grams that [lookahead] collects, an integer from 2 to 8",
    )
    lookahead_candidates: StrictInt = Field(
        default=LookaheadShape.candidates,
        ge=1,
        le=32,
        description="n-grams that [lookahead] keeps for each first token and tries in a step, an "
        "integer from 1 to 32",
    )
    lookahead_prompt_tokens: StrictInt = Field(
        default=DEFAULT_WARM_UP,
        ge=0,
        description="tokens at the end of the prompt whose n-grams [lookahead] starts with, an "
        "integer from 0 (none) on",
    )
    step_costs: Annotated[
        dict[int, float] | None, PlainValidator(parse_step_costs), PlainSerializer(_costs_text)
    ] = Field(
        default=None,
        description="ms of a step by its total rows, as '1:5.1,8:5.2,64:7.9': how many nodes pay "
        "at which batch size follows from them (default: measured at start-up)",
    )

    revision: str | None = Field(default=None, description="that of heads on the Hugging Face hub")

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
    def _fill_in(cls, options: Any) -> Any:
        """A static tree knows its depth, a method may have a default, and a window is a shape."""
        if not isinstance(options, dict):
            return options
        specs = parse_methods(str(options.get("speculative_model", "")))
        window = LookaheadShape.of(options) if _looks_ahead(specs) else None
        if window is not None and options.get("tree") is None:
            options = {**options, "tree": window.tree}
        if options.get("num_speculative_tokens") is not None:
            return options
        tree = parse_tree(options.get("tree", Chain()))
        depth = tree.depth if isinstance(tree, StaticTree) else window and window.depth
        for spec in specs:
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
        self._check_lookahead()
        if self.step_costs is not None and isinstance(self.tree, Chain):
            text, reason = _costs_text(self.step_costs), "belongs to a tree, and this is a chain"
            raise bad_option("speculative_step_costs", text, reason, "leave it out")
        return self

    def _check_lookahead(self) -> None:
        """The window is a tree, and fits; without one nothing is said of it."""
        window = LookaheadShape.of(dict(self))
        if not _looks_ahead(self.methods):
            if (window, self.lookahead_prompt_tokens) != (LookaheadShape(), DEFAULT_WARM_UP):
                raise bad_option(
                    "lookahead_*",
                    window,
                    f"belongs to [lookahead], not to speculative_model={self.speculative_model!r}",
                    "leave it out",
                )
            return
        if not isinstance(self.tree, DynamicTree) or self.tree.max_nodes < window.num_rows:
            raise bad_option(
                "speculative_tree",
                str(self.tree),
                f"has no room for the {window.num_rows} nodes of the lookahead window",
                f"leave it out or write for example '{window.tree}'"
                if window.num_rows <= MAX_NODES
                else "make lookahead_window or lookahead_ngram smaller",
            )
        if self.num_speculative_tokens < window.depth:
            raise bad_option(
                "num_speculative_tokens",
                self.num_speculative_tokens,
                f"is less than the depth {window.depth} of the lookahead window",
                "leave it out or make lookahead_window smaller",
            )


def _looks_ahead(specs: Iterable[MethodSpec]) -> bool:
    return any(spec.name == "lookahead" for spec in specs)


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
