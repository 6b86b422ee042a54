"""ngram_match: against a search through Python lists, and against what a tree must be.

Seen to fail: the oldest match first, the shortest first, a match that ends at the last token, one
that runs past the history's start, a continuation past its end, min_n exclusive, the histories of
another request, the parts after the first left out, all matches below the first, a match one row
too high, the nodes cut at one too many, nothing told from an equal token past a continuation's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from specplus_kernels.ngram_match import ngram_match
from specplus_kernels.tree_grow import TreeRows

from tests.kernels.tree_case import Tree, assert_rows

OPTIONS: dict[str, Any] = {
    "min_n": 1,
    "max_n": 3,
    "num_nodes": 17,
    "max_depth": 4,
    "max_matches": 8,
}


def search(
    history: list[int], min_n: int, max_n: int, num_nodes: int, max_depth: int, max_matches: int
) -> Tree:
    """Tries the lengths from the longest, at each the places from the last."""
    found: list[int] = []
    for n in range(max_n, min_n - 1, -1):
        suffix = history[len(history) - n :]
        for start in range(len(history) - n - 1, -1, -1):
            if history[start : start + n] == suffix and start + n not in found:
                found.append(start + n)
    paths: list[tuple[int, ...]] = []
    for begin in found[:max_matches]:
        after = history[begin : begin + max_depth]
        paths += [tuple(after[:depth]) for depth in range(1, len(after) + 1)]
    distinct = list(dict.fromkeys(paths))[:num_nodes]
    row_of = {path: row for row, path in enumerate(distinct, start=1)} | {(): 0}
    return Tree([path[-1] for path in distinct], [row_of[path[:-1]] for path in distinct])


def check(histories: Sequence[list[int]], dtype: torch.dtype = torch.int32, **options) -> TreeRows:
    options = OPTIONS | options
    longest = max(map(len, histories))
    padded = [[*history, *[history[0] if history else 0] * 3] for history in histories]
    tokens = torch.tensor([(row + [0] * longest)[: longest + 3] for row in padded], dtype=dtype)
    rows = ngram_match(tokens, torch.tensor([*map(len, histories)], dtype=dtype), **options)
    assert_rows(rows, [search(history, **options) for history in histories], options["num_nodes"])
    return rows


def random_histories(num_reqs: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    lens = [num_tokens, *torch.randint(0, num_tokens, (num_reqs - 1,)).tolist()]
    return [torch.randint(0, vocab_size, (n,)).tolist() for n in lens]


@pytest.mark.parametrize("num_nodes", [0, 1, 2, 17, 63, 64, 127])
@pytest.mark.parametrize("vocab_size", [1, 2, 3, 8])
def test_random_histories(gpu_provider: str, vocab_size: int, num_nodes: int) -> None:
    histories = random_histories(4, 90, vocab_size)
    check(histories, num_nodes=num_nodes, max_depth=12)
    check(histories, num_nodes=num_nodes, min_n=2, max_n=5, max_matches=3, dtype=torch.int64)


def test_worked_example(gpu_provider: str) -> None:
    """After 1 2: once 3 4, most recently 3 5; the shorter match of 2 alone was followed by 9."""
    rows = check([[1, 2, 3, 4, 2, 9, 1, 2, 3, 5, 1, 2]], max_depth=2)
    assert rows.tokens[0, :5].tolist() == [-1, 3, 5, 4, 9]
    assert rows.parents[0, :6].tolist() == [-1, 0, 1, 1, 0, 4]


def test_short_histories(gpu_provider: str) -> None:
    check([[], [5], [5, 5], [5, 6], [5, 6, 5], [5, 5, 5]])
    check([[7] * 3, [7, 8] * 2], min_n=3, max_n=6)


def test_parts_of_a_long_history(gpu_provider: str) -> None:
    """Matches of one length in all of three parts, at their borders; and one short history."""
    history = [9] * 5000
    for end in (2, 700, 2046, 2047, 2048, 4095, 4990):
        history[end - 2 : end + 2] = [1, 2, 3, end]
    history[-2:] = [1, 2]
    check([history, [1, 2, 3, 1, 2], []], min_n=2, max_depth=3, num_nodes=30)


def test_slots(gpu_provider: str) -> None:
    """Requests pick their histories; columns may be apart."""
    histories = [torch.randint(0, 2, (20,)).tolist() for _ in range(5)]
    tokens = torch.tensor(histories, dtype=torch.int32).T.contiguous().T
    lens = torch.tensor([20, 3, 20, 11, 0])
    slots = torch.tensor([3, 0, 4], dtype=torch.int32)
    rows = ngram_match(tokens, lens, slots, **OPTIONS)
    assert_rows(rows, [search(histories[s][: lens[s]], **OPTIONS) for s in (3, 0, 4)], 17)
    assert ngram_match(tokens, lens, slots[:0], **OPTIONS).tokens.shape == (0, 18)


def test_every_path_followed_a_match(gpu_provider: str) -> None:
    history = random_histories(1, 300, 3)[0]
    rows = check([history], min_n=2, max_n=4, num_nodes=40, max_depth=6)
    assert rows.num_nodes.item() > 20
    for row in range(1, 1 + int(rows.num_nodes)):
        path: list[int] = []
        while row:
            path.insert(0, int(rows.tokens[0, row]))
            row = int(rows.parents[0, row])
        wanted = [*history[-2:], *path]
        starts = range(len(history) - len(wanted) + 1)
        assert any(history[at : at + len(wanted)] == wanted for at in starts)


def test_the_first_rows_are_prompt_lookup(gpu_provider: str) -> None:
    history = [1, 2, 3, 9, 8, 7, 6, 2, 3, 4, 5, 6, 1, 2, 3]
    rows = check([history], max_depth=4)
    assert rows.tokens[0, 1:5].tolist() == [9, 8, 7, 6]
    assert rows.parents[0, 1:5].tolist() == [0, 1, 2, 3]


def test_errors(gpu_provider: str) -> None:
    tokens, lens = torch.zeros(2, 9, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="lens"):
        ngram_match(tokens, lens[:1], **OPTIONS)
    with pytest.raises(ValueError, match="idx_mapping"):
        ngram_match(tokens, lens, lens[None], **OPTIONS)
    with pytest.raises(ValueError, match="int32 or int64"):
        ngram_match(tokens.float(), lens, **OPTIONS)
    for wrong in (
        {"min_n": 0},
        {"max_n": 17},
        {"min_n": 4},
        {"max_matches": 17},
        {"num_nodes": 128},
        {"max_depth": 0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
            ngram_match(tokens, lens, **OPTIONS | wrong)
