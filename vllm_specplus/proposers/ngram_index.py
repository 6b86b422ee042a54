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
        self._tables: list[tuple[memoryview, memoryview]] = []
        self._capacity = self._shift = 0

    def update(self, token_ids: np.ndarray) -> list[int]:
        """Takes in what was appended and returns it; returns nothing where it starts anew.

        token_ids: int32 [num_tokens], the whole sequence.
        """
        start, end = len(self.tokens), len(token_ids)
        known = token_ids[max(start - _TAIL, 0) : start].tolist()
        fits = end <= self._capacity and end - start <= _MOST_SINGLE
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
        for _, links in reversed(self._tables):
            position = links[last]
            while position >= 0 and len(found) < limit:
                if position not in found:
                    found[position] = self._match_len(position)
                position = links[position]
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
        first = position - self._min_len + 1
        for i in range(position, max(first, -1), -1):
            code = (code + self.tokens[i] + 1) * _FACTOR & _WORD
        for i, (heads, links) in zip(range(first, -1, -1), self._tables, strict=False):
            code = (code + self.tokens[i] + 1) * _FACTOR & _WORD
            slot = code >> self._shift
            links[position] = heads[slot]
            heads[slot] = position

    def _link_all(self, token_ids: np.ndarray) -> None:
        """`_link` for all positions at once, with room for more."""
        num_tokens = len(token_ids)
        bits = max(2 * num_tokens, 1024).bit_length()
        self._capacity, self._shift = 1 << bits - 1, 64 - bits
        self._tables = []
        tokens = token_ids.astype(np.uint64) + np.uint64(1)
        codes = np.zeros(num_tokens, dtype=np.uint64)
        for length in range(1, self._max_len + 1):
            start = min(length - 1, num_tokens)
            codes[start:] += tokens[: num_tokens - start]
            codes *= np.uint64(_FACTOR)
            if length >= self._min_len:
                self._add_table(codes[start:] >> np.uint64(self._shift), start)

    def _add_table(self, slots: np.ndarray, start: int) -> None:
        """slots: uint64 [num_positions], from position `start` on."""
        heads = np.full(2 * self._capacity, -1, dtype=np.int32)
        links = np.full(self._capacity, -1, dtype=np.int32)
        order = np.argsort(slots, kind="stable")
        positions, slots = order + start, slots[order]
        repeated = slots[1:] == slots[:-1]
        links[positions[1:][repeated]] = positions[:-1][repeated]
        final = np.append(~repeated, True)[: len(slots)]
        heads[slots[final]] = positions[final]
        self._tables.append((heads.data, links.data))
