"""Where the last n-grams of a token sequence stood before.

Per n-gram length, every position links to the latest earlier position whose n-gram hashes alike, as
in LZ77's hash chains: adding a token costs one table slot per length, and looking the end of the
sequence up is walking its own links. Hashes may collide, so matches are measured on the tokens.
"""

from __future__ import annotations

import numpy as np

LONGEST_MATCH = 32
"""Matches are measured up to this many tokens."""
_FACTOR = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
_TAIL = 16
_MOST_SINGLE = 256


class NgramIndex:
    """Hash chains over one request's tokens, which may only grow; anything else starts it anew.

    n-grams of min_len to max_len tokens are linked, at most LONGEST_MATCH. Memory per token is 40
    bytes, and 12 to 24 per n-gram length: 3 to 5 MB for 32k tokens and 5 lengths.
    """

    def __init__(self, min_len: int, max_len: int) -> None:
        self.tokens: list[int] = []
        self._min_len = min(min_len, LONGEST_MATCH)
        self._max_len = min(max_len, LONGEST_MATCH)
        self._links = np.empty((0, 0), dtype=np.int32)

    def update(self, token_ids: np.ndarray) -> list[int]:
        """Takes in what was appended and returns it; returns nothing where it starts anew.

        token_ids: int32 [num_tokens], the whole sequence.
        """
        start, end = len(self.tokens), len(token_ids)
        known = token_ids[max(start - _TAIL, 0) : start].tolist()
        fits = end <= self._links.shape[1] and end - start <= _MOST_SINGLE
        if not fits or known != self.tokens[-_TAIL:]:
            self.tokens = token_ids.tolist()
            self._link_all(token_ids)
            return []
        appended = token_ids[start:].tolist()
        self.tokens += appended
        for position in range(start, end):
            self._link(position)
        return appended

    def matches(self, limit: int) -> list[tuple[int, int]]:
        """(position, length) of earlier matches of the sequence's end, longest n-grams first.

        The `length` tokens up to and including the position equal the last `length` tokens.
        """
        last = len(self.tokens) - 1
        found: dict[int, int] = {}
        for links in reversed(self._links):
            position = links.item(last)
            while position >= 0 and len(found) < limit:
                if position not in found:
                    found[position] = self._match_len(position)
                position = links.item(position)
        return [match for match in found.items() if match[1] >= self._min_len]

    def _match_len(self, position: int) -> int:
        tokens, last = self.tokens, len(self.tokens) - 1
        start = position + 1 - LONGEST_MATCH
        if start >= 0 and tokens[start : position + 1] == tokens[-LONGEST_MATCH:]:
            return LONGEST_MATCH
        length = 0
        while length <= position and tokens[position - length] == tokens[last - length]:
            length += 1
        return length

    def _link(self, position: int) -> None:
        code = 0
        for length in range(1, min(self._max_len, position + 1) + 1):
            code = (code + self.tokens[position - length + 1] + 1) * _FACTOR & _WORD
            if length >= self._min_len:
                row, slot = length - self._min_len, code >> self._shift
                self._links[row, position] = self._heads[row, slot]
                self._heads[row, slot] = position

    def _link_all(self, token_ids: np.ndarray) -> None:
        """`_link` for all positions at once, with room for more."""
        num_tokens = len(token_ids)
        bits = max(2 * num_tokens, 1024).bit_length()
        num_rows = self._max_len - self._min_len + 1
        self._shift = 64 - bits
        self._links = np.full((num_rows, 1 << bits - 1), -1, dtype=np.int32)
        self._heads = np.full((num_rows, 1 << bits), -1, dtype=np.int32)
        tokens = token_ids.astype(np.uint64) + np.uint64(1)
        codes = np.zeros(num_tokens, dtype=np.uint64)
        for length in range(1, min(self._max_len, num_tokens) + 1):
            codes[length - 1 :] += tokens[: num_tokens - length + 1]
            codes *= np.uint64(_FACTOR)
            if length >= self._min_len:
                self._link_row(length, codes[length - 1 :] >> np.uint64(self._shift))

    def _link_row(self, length: int, slots: np.ndarray) -> None:
        """slots: uint64 [num_positions], from position `length - 1` on."""
        row = length - self._min_len
        order = np.argsort(slots, kind="stable")
        positions, slots = order + length - 1, slots[order]
        repeated = slots[1:] == slots[:-1]
        self._links[row, positions[1:][repeated]] = positions[:-1][repeated]
        final = np.append(~repeated, True)
        self._heads[row, slots[final]] = positions[final]
