"""A draft model made of a function, over KV slots that remember positions and tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from vllm_specplus.proposers.levels import HiddenStates, Outputs, RequestRows


class FunctionModel:
    """`DraftModel` that knows the target, a function of the last two tokens, by heart.

    The token before the last it has from the slots that a row sees and, if it reads hidden states,
    from these too: that of a position is its token. A row must see one slot for each position from
    its first one on.
    """

    num_caches, block_size = 1, 8

    def __init__(
        self,
        target: Callable[[Sequence[int]], int],
        num_levels: int,
        hidden_state_from: HiddenStates,
    ) -> None:
        self.num_levels, self.hidden_state_from = num_levels, hidden_state_from
        self.state_size = int(hidden_state_from is not None)
        self._target = target
        self._slots: dict[int, dict[int, tuple[int, int]]] = defaultdict(dict)

    def forward(self, level: int, requests: Sequence[RequestRows]) -> Outputs:
        """What `best_tokens` takes is a row's last two tokens."""
        pairs = [pair for rows in requests for pair in self._pairs(rows)]
        return torch.tensor(pairs), torch.tensor(pairs)[:, 1:].float()

    def _pairs(self, rows: RequestRows) -> list[list[int]]:
        kept, start = self._slots[rows.index], rows.start
        kept |= dict(
            enumerate(zip(rows.positions().tolist(), rows.tokens, strict=True), start=start)
        )
        pairs: list[list[int]] = []
        for window in rows.windows():
            for mask in window.masks:
                bits = [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
                known = window.context_len + rows.first
                slots = [*range(rows.first, known), *(known + bit for bit in bits)]
                seen = dict(kept[slot] for slot in slots)
                assert sorted(seen) == list(range(rows.first, rows.first + len(slots)))
                before, token = ([0, *(seen[position] for position in sorted(seen))])[-2:]
                if self.state_size:
                    state = int(rows.hidden_states[len(pairs), 0])
                    assert before == state or len(slots) == 1
                    before = state
                pairs.append([before, token])
        return pairs

    def best_tokens(self, level: int, pairs: torch.Tensor, num: int) -> list[dict[int, float]]:
        """The target's token and another one."""
        right = [self._target(pair) for pair in pairs.tolist()]
        return [{token: 0.8, token + 100: 0.1} for token in right]
