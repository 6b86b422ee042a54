"""The drafting methods by name: one dict and one decorator.

Methods that draft one tree together have one entry, under `SpecPlusConfig.method`.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_specplus.config import METHODS, Method, SpecPlusConfig
from vllm_specplus.errors import not_built
from vllm_specplus.proposers.base import Proposer

PROPOSERS: dict[str, type[Proposer]] = {}


def register(*names: str) -> Callable[[type[Proposer]], type[Proposer]]:
    """Class decorator that makes a proposer available as these methods. A new one is drafted
    without a model; on V2 if its proposer reads no hidden states (`absorb`)."""

    def bind(cls: type[Proposer]) -> type[Proposer]:
        for name in "+".join(names).split("+"):
            METHODS.setdefault(name, Method(None, "none"))
        PROPOSERS.update(dict.fromkeys(names, cls))
        return cls

    return bind


def create(config: SpecPlusConfig) -> Proposer:
    """The proposer of the configured method; raises NotBuiltError where there is none."""
    if proposer := PROPOSERS.get(config.method):
        return proposer(config)
    raise not_built(
        "speculative_model",
        config.speculative_model,
        "has no trees of its own yet",
        f"available with trees: {', '.join(f'[{name}]' for name in sorted(PROPOSERS))}",
    )
