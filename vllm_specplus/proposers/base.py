"""What a drafting method must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.growth import Candidates, Path, chain_paths
from vllm_specplus.core.tree import Tree
from vllm_specplus.shapes import Chain, StaticTree


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """One request that may get drafts in the next step.

    token_ids: int32 [num_tokens], prompt and output so far; the last one is the root. It is a view
    of the host's buffer, valid during the call only.
    max_depth, max_nodes: bounds for this request in this step (length limits included).
    chain_only: its candidates will be cut to a chain (structured output).
    min_prob: nodes less probable than this cannot pay in this step and need not be proposed.
    token_ms: what an accepted token is worth, in milliseconds of the engine's time.
    index: the request's row in the engine's batch. num_slots: KV slots that it owns, from its first
    position on; drafting may write those behind the committed ones.
    """

    req_id: str
    token_ids: np.ndarray
    max_depth: int
    max_nodes: int
    chain_only: bool = False
    min_prob: float = 0.0
    token_ms: float = inf
    index: int = 0
    num_slots: int = 0


class Proposer(ABC):
    """Grows candidate trees. One instance serves all requests of an engine."""

    def __init__(self, config: SpecPlusConfig) -> None:
        self.config = config
        self._chain = frozenset(chain_paths(config.num_speculative_tokens))
        self._paths = frozenset(config.tree.paths) if isinstance(config.tree, StaticTree) else None

    def paths(self, request: DraftRequest) -> Collection[Path] | None:
        """The static paths that the request's tree is cut to; None if it grows freely."""
        chain = request.chain_only or isinstance(self.config.tree, Chain)
        return self._chain if chain else self._paths

    @abstractmethod
    def propose(self, requests: Sequence[DraftRequest]) -> list[Candidates]:
        """Candidates per request, best first, within its bounds; empty where nothing is known.

        Must be fast enough to be called every step, and must depend on the arguments and on what
        was granted, observed and measured only. On V1 the workers of a tensor parallel group may
        propose differently, as each has a clock of its own: what the first one proposes is sent to
        all and verified. On V2 each verifies what it proposes, so nothing there may depend on a
        clock.
        """

    def absorb(self, req_id: str, start: int, hidden_states: torch.Tensor) -> None:
        """Takes the target's hidden states of committed positions `start`, `start + 1`, ...

        hidden_states: [num_positions, hidden_size], after the target's final norm; the engine's
        own buffer, valid during the call. They come in order, every step, drafts or not; a request
        that starts anew (preemption) or behind cached positions comes with another `start`.
        """

    def granted(self, drafts: Sequence[Candidates]) -> None:
        """Hears, after every `propose`, what the row budget left of it: of each request's draft,
        cut to its static paths, the first nodes, perhaps none."""

    def observe(
        self, req_id: str, tree: Tree, accepted_rows: Sequence[int], row_tokens: Sequence[int]
    ) -> None:
        """Learns from a verified tree.

        accepted_rows: of its accepted path, root excluded. row_tokens: [num_nodes + 1], the token
        that the target said after each row, accepted or not.
        """

    def forget(self, req_id: str) -> None:
        """Drops all state of a finished request."""
