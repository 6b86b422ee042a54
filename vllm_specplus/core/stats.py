"""How well drafts do: plain counters, named as vLLM's SpecDecodingStats names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, field

FALLBACKS = (
    "structured_outputs",
    "penalties",
    "bad_words",
    "thinking_budget",
    "logits_processors",
    "does_not_pay",
)
"""Why a request gets less than its tree: a chain, or nothing. The last is counted per round."""
STATS_KEY = "specplus"
"""What the counters are called where they travel beside those of others."""


@dataclass(slots=True)
class SpecStats:
    """Counters of one engine.

    num_rounds: requests verified, drafts or not. num_drafts: those that had drafts.
    num_accepted_tokens_per_pos: drafts accepted at depth i + 1, at least `max_depth` places.
    draft_seconds, verify_seconds: time of the steps' phases (engine/metrics.py says which).
    fallbacks: requests by why they were not drafted a tree; `does_not_pay` counts rounds.
    """

    max_depth: InitVar[int]
    num_rounds: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(init=False)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    fallbacks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FALLBACKS, 0))

    def __post_init__(self, max_depth: int) -> None:
        self.num_accepted_tokens_per_pos = [0] * max_depth

    def observe(self, num_nodes: int, num_accepted: int) -> None:
        """Counts one verified tree of `num_nodes` drafts whose accepted path has `num_accepted`."""
        self.num_rounds += 1
        self.num_drafts += num_nodes > 0
        self.num_draft_tokens += num_nodes
        per_pos = self.num_accepted_tokens_per_pos
        per_pos.extend([0] * (num_accepted - len(per_pos)))
        for depth in range(num_accepted):
            per_pos[depth] += 1

    def counts(self) -> dict[str, float]:
        """Every counter by its name; one of several as `name/position` or `name/reason`."""
        flat: dict[str, float] = {"num_accepted_tokens": self.num_accepted_tokens}
        for name, value in asdict(self).items():
            if isinstance(value, list):
                value = dict(enumerate(value))
            if isinstance(value, dict):
                flat |= {f"{name}/{label}": count for label, count in value.items()}
            else:
                flat[name] = value
        return flat

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.num_accepted_tokens_per_pos)

    @property
    def acceptance_length(self) -> float:
        """Tokens per draft, the bonus token included; 1.0 before the first draft."""
        return 1 + self.num_accepted_tokens / max(self.num_drafts, 1)

    @property
    def acceptance_rates(self) -> list[float]:
        """Per depth, the share of drafts that were accepted at least that far."""
        return [n / max(self.num_drafts, 1) for n in self.num_accepted_tokens_per_pos]


def summary(counts: Mapping[str, float]) -> str:
    """The line for the log at the end, from `SpecStats.counts`; lists leave out what is zero."""
    rounds, drafts = counts["num_rounds"], counts["num_drafts"]

    def of(name: str) -> list[tuple[str, float]]:
        return [(k.partition("/")[2], n) for k, n in counts.items() if k.startswith(f"{name}/")]

    rates = [f"{n / max(drafts, 1):.3f}" for _, n in of("num_accepted_tokens_per_pos") if n]
    fallbacks = [f"{reason} {n:.0f}" for reason, n in of("fallbacks") if n]
    return (
        f"Speculative decoding by vllm_specplus: {rounds:.0f} rounds, {drafts:.0f} with drafts, "
        f"acceptance length {1 + counts['num_accepted_tokens'] / max(drafts, 1):.2f} "
        f"(per depth: {' '.join(rates) or 'none'}), "
        f"{counts['num_draft_tokens'] / max(rounds, 1):.2f} nodes per round, "
        f"draft {counts['draft_seconds']:.3f} s, verify {counts['verify_seconds']:.3f} s, "
        f"fallbacks: {', '.join(fallbacks) or 'none'}"
    )
