"""What a proposer of Lookahead is told of the rows that were verified."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_specplus.core.growth import Candidates
from vllm_specplus.proposers import lookahead


def watch_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """(tokens so far, path, the target's token behind it) of everything that was verified."""
    seen: list[tuple[list[int], int]] = []
    propose, observe = lookahead.LookaheadProposer._propose, lookahead.LookaheadProposer.observe
    text: dict[str, list[int]] = {}

    def proposing(self: Any, request: Any, ngrams: Candidates) -> Candidates:
        text[request.req_id] = request.token_ids.tolist()
        return propose(self, request, ngrams)

    def observing(self: Any, req_id: str, tree: Any, accepted_rows: Any, row_tokens: Any) -> None:
        paths = [(), *Candidates(tree.tokens, tree.parents).paths()]
        if (known := text.pop(req_id, None)) is not None:
            seen.extend(([*known, *p], t) for p, t in zip(paths, row_tokens, strict=True))
        observe(self, req_id, tree, accepted_rows, row_tokens)

    monkeypatch.setattr(lookahead.LookaheadProposer, "_propose", proposing)
    monkeypatch.setattr(lookahead.LookaheadProposer, "observe", observing)
    return seen


def rows_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is told what the target said after the rows of another node."""
    observe = lookahead.LookaheadProposer.observe

    def shifted(self: Any, req_id: str, tree: Any, accepted_rows: Any, row_tokens: Any) -> None:
        observe(self, req_id, tree, accepted_rows, [*row_tokens[1:], row_tokens[0]])

    monkeypatch.setattr(lookahead.LookaheadProposer, "observe", shifted)
