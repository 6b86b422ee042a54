"""The drafting methods by name: one dict and one decorator."""

from __future__ import annotations

from collections.abc import Callable

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.errors import not_built
from vllm_specplus.proposers.base import Proposer

PROPOSERS: dict[str, type[Proposer]] = {}


def register(name: str) -> Callable[[type[Proposer]], type[Proposer]]:
    """Class decorator that makes a proposer available as method `name`."""

    def bind(cls: type[Proposer]) -> type[Proposer]:
        PROPOSERS[name] = cls
        return cls

    return bind


def create(config: SpecPlusConfig) -> Proposer:
    """The proposer of the configured method; raises NotBuiltError where there is none."""
    names = [spec.name for spec in config.methods]
    if len(names) == 1 and names[0] in PROPOSERS:
        return PROPOSERS[names[0]](config)
    raise not_built(
        "speculative_model",
        config.speculative_model,
        "asks for several methods at once" if len(names) > 1 else "has no trees of its own yet",
        f"available with trees: {', '.join(f'[{name}]' for name in sorted(PROPOSERS))}",
    )
