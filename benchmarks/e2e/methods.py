"""How a drafting method is spelled on the command line, and the `LLM` arguments it stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PLAIN = "plain"
NATIVE_NGRAM = "native-ngram"
NATIVE_METHODS = {NATIVE_NGRAM: "ngram", "native-ngram-gpu": "ngram_gpu"}
"""vLLM's own n-gram drafters; that on the device is the one of its V2 runner."""
DEFAULT_DEPTH = 5
NATIVE_LOOKUP = {"prompt_lookup_max": 5, "prompt_lookup_min": 2}
SYNTAX = (
    "plain | native-ngram[-gpu][:K=5][:max=5][:min=2] | MODEL[:K=5][:tree=TREE][:verify=RULE]"
    "[:max=N][:min=N][:W=5][:N=4][:G=5], where MODEL is a speculative_model such as [ngram] or "
    "[mtp3+ngram]PATH"
)

_OPTION = re.compile(r":(?=(?:K|tree|verify|max|min|W|N|G)=)")
_FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "K": ("num_speculative_tokens", int),
    "tree": ("speculative_tree", str),
    "verify": ("speculative_verify", str),
    "max": ("ngram_prompt_lookup_max", int),
    "min": ("ngram_prompt_lookup_min", int),
    "W": ("lookahead_window", int),
    "N": ("lookahead_ngram", int),
    "G": ("lookahead_candidates", int),
}


@dataclass(frozen=True, slots=True)
class Method:
    """A drafting method: its spelling (the label in every report) and its `LLM` arguments."""

    label: str
    engine_kwargs: Mapping[str, Any]

    @property
    def uses_plugin(self) -> bool:
        """Whether this is ours; the baselines run stock vLLM with all plugins switched off."""
        return "speculative_model" in self.engine_kwargs


def parse_method(text: str) -> Method:
    """Parse one spelling, see `SYNTAX`; ValueError names what is wrong with it."""
    name, *options = _OPTION.split(text)
    if not name:
        raise ValueError(f"method {text!r}: the name is empty; allowed: {SYNTAX}")
    given = dict(_parse_option(text, option) for option in options)
    if name == PLAIN:
        if given:
            raise ValueError(f"method {text!r}: plain takes no options; write plain")
        return Method(text, {})
    kwargs = ({} if "lookahead" in name else {"num_speculative_tokens": DEFAULT_DEPTH}) | given
    if name in NATIVE_METHODS:
        config = _native_ngram(text, NATIVE_METHODS[name], kwargs)
        return Method(text, {"speculative_config": config})
    return Method(text, {"speculative_model": name} | kwargs)


def parse_methods(texts: Sequence[str]) -> tuple[Method, ...]:
    """Parse all spellings; `plain` is put first, it is the baseline of every ratio."""
    if len(set(texts)) < len(texts):
        raise ValueError(f"methods {list(texts)}: one is named twice; name each once")
    return tuple(parse_method(label) for label in dict.fromkeys((PLAIN, *texts)))


def _parse_option(text: str, option: str) -> tuple[str, Any]:
    key, _, value = option.partition("=")
    field, convert = _FIELDS[key]
    try:
        return field, convert(value)
    except ValueError:
        raise ValueError(f"method {text!r}: {key}={value!r} must be a whole number") from None


def _native_ngram(text: str, method: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's own n-gram drafter; by default it matches the last 5 down to 2 tokens."""
    config: dict[str, Any] = {"method": method, **NATIVE_LOOKUP}
    for field, value in kwargs.items():
        if field in ("speculative_tree", "speculative_verify"):
            raise ValueError(f"method {text!r}: native-ngram takes K, max and min, not {field}")
        config[field.removeprefix("ngram_")] = value
    return config
