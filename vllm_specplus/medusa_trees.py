"""The sparse trees that the authors of Medusa published, by name.

Facts taken from medusa/model/medusa_choices.py of github.com/FasterDecoding/Medusa (Apache-2.0),
which lists the paths; here is, level by level, how many children each node has, best first. Each
has 63 nodes and is four heads deep at most, the stages being Medusa-1 and Medusa-2 (Cai et al.
2024, arXiv 2401.10774).
"""

from __future__ import annotations

Path = tuple[int, ...]
_CHILDREN = {
    "mc_sim_7b_63": "10 10 7 3 2 1 1 1 1 1 1 10 3 2 1 1 1 1 1 0 0 2 0 0 0 0 0 0 1 0 0 0 0 0 0 0 0 "
    "0 0 2",
    "vicuna_7b_stage1": "10 10 7 4 3 2 2 1 1 1 1 9 3 2 1 1 1 0 0 0 0 2 0 0 0 0 0 0 1 0 0 0 0 0 0 0 "
    "0 0 0 0 0 0 0 1",
    "vicuna_7b_stage2": "10 10 5 2 2 1 1 1 1 0 0 9 4 2 1 1 1 0 0 0 0 3 1 0 0 0 1 0 0 0 0 0 0 0 4 1 "
    "1 0 0 0 0 0 0 1",
    "vicuna_13b_stage1": "10 10 7 4 2 2 1 1 1 1 0 10 4 2 1 1 1 0 0 0 0 2 1 0 0 0 0 0 1 0 0 0 0 0 0 "
    "0 0 0 0 0 1",
    "vicuna_13b_stage2": "10 10 4 2 1 1 1 0 0 0 0 10 4 2 1 1 1 0 0 0 0 3 1 0 0 1 0 1 0 0 4 2 1 0 0 "
    "0 0 0 0 0 1 0 0 0 0 0 0 0 0 1",
    "vicuna_33b_stage1": "10 10 8 5 3 2 2 1 1 1 1 9 3 2 1 1 0 0 0 0 0 2 0 0 0 0 0 0 0 1",
    "vicuna_33b_stage2": "10 10 5 3 2 1 1 1 1 0 0 10 4 2 1 1 1 0 0 0 0 3 1 0 0 0 1 0 0 0 0 0 0 0 0 "
    "3 1 0 0 0 0 0 0 0 0 1",
    "zephyr_stage2": "10 10 6 4 2 2 1 1 1 0 0 10 4 2 1 1 1 0 0 0 0 2 1 0 0 0 0 1 0 0 0 0 0 0 0 0 0 "
    "0 2 1",
}


def _paths(children: str) -> tuple[Path, ...]:
    """
    >>> _paths("2 1")
    ((0,), (1,), (0, 0))
    """
    paths: list[Path] = [()]
    for path, num in zip(paths, map(int, children.split()), strict=False):
        paths += [(*path, rank) for rank in range(num)]
    return tuple(paths[1:])


MEDUSA_TREES = {name: _paths(children) for name, children in _CHILDREN.items()}
"""Name -> the rank of a candidate on every level of the way to a node."""
