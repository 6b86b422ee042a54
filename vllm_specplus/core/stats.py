"""How well drafts do: plain counters, named as vLLM's SpecDecodingStats names them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class SpecStats:
    """Counters of one engine.

    num_rounds: requests verified, drafts or not. num_drafts: those that had drafts.
    num_accepted_tokens_per_pos: [max_depth], drafts accepted at depth i + 1.
    """

    max_depth: int
    num_rounds: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.num_accepted_tokens_per_pos = [0] * self.max_depth

    def observe(self, num_nodes: int, num_accepted: int) -> None:
        """Counts one verified tree of `num_nodes` drafts whose accepted path has `num_accepted`."""
        self.num_rounds += 1
        self.num_drafts += num_nodes > 0
        self.num_draft_tokens += num_nodes
        for depth in range(num_accepted):
            self.num_accepted_tokens_per_pos[depth] += 1

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.num_accepted_tokens_per_pos)

    @property
    def acceptance_length(self) -> float:
        """Tokens per draft, the bonus token included; 1.0 before the first draft."""
        return 1 + self.num_accepted_tokens / max(self.num_drafts, 1)

    @property
    def acceptance_rates(self) -> list[float]:
        """Per depth, the share of drafts that were accepted at least that far: [max_depth]."""
        return [n / max(self.num_drafts, 1) for n in self.num_accepted_tokens_per_pos]
