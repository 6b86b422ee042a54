"""What Lookahead decoding keeps of one request: the window that makes n-grams, and their pool.

(Fu et al. 2024, arXiv 2402.02057.) Both are bounded by the options, however long the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vllm_specplus.core.growth import Path

MAX_FIRST_TOKENS = 1024
"""First tokens whose n-grams a pool keeps: those that were added to last."""


class Window:
    """N - 1 levels of W guesses: level j, column i is a guess for position root + i + j.

    A guess of a column was made after those above it in the column, the guesses of level 0 in the
    columns before, and the text. So columns are paths of a token tree: level 0 is a chain behind
    the root, which is its column 0, and the other levels of a column hang below its place there.
    """

    def __init__(self, width: int, ngram: int) -> None:
        self._width, self._ngram = width, ngram
        self._reach = width + ngram - 2
        self._levels: list[list[int]] = [[]]

    def columns(self, token_ids: np.ndarray) -> list[Path]:
        """Per column the path from the root to its last level.

        token_ids: int32 [num_tokens], the last one is the root. Where there is no guess yet, it is
        the text that was there a window before.
        """
        for level, guesses in enumerate(self._levels):
            missing = np.arange(len(guesses), self._width) + level - self._reach
            guesses += token_ids[missing % len(token_ids)].tolist()
        chain, *levels = self._levels
        chain[0] = int(token_ids[-1])
        return [
            (*chain[1 : column + 1], *(guesses[column] for guesses in levels))
            for column in range(self._width)
        ]

    def advance(self, tokens: Sequence[int], num_emitted: int) -> list[Path]:
        """Takes what the target said after the first columns, which is their next level.

        The text has grown by `num_emitted` tokens. Returns the n-grams that are complete, whose
        first level leaves the window. A column that the target was not asked about starts anew.
        """
        levels = [*(guesses[: len(tokens)] for guesses in self._levels), list(tokens)]
        ngrams: list[Path] = []
        if len(levels) == self._ngram:
            ngrams = list(zip(*levels, strict=True))
            levels, num_emitted = levels[1:], num_emitted - 1
        self._levels = [guesses[num_emitted:] for guesses in levels]
        return ngrams


class Pool:
    """The latest n-grams by their first token, `capacity` for each."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rests: dict[int, dict[Path, bool]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._rests.values()))

    def add(self, ngram: Path, given: bool) -> None:
        """given: it stands in the prompt; that is remembered if it is found again."""
        rests = self._rests.pop(ngram[0], {})
        given = rests.pop(ngram[1:], given)
        if len(rests) >= self._capacity:
            del rests[next(iter(rests))]
        if len(self._rests) >= MAX_FIRST_TOKENS:
            del self._rests[next(iter(self._rests))]
        self._rests[ngram[0]] = rests | {ngram[1:]: given}

    def after(self, token: int) -> Iterator[tuple[Path, bool]]:
        """What followed a token, the latest first, and whether it is from the prompt."""
        return reversed(self._rests.get(token, {}).items())
