"""tree_rejection in plain torch, request by request, the rules as their papers state them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from specplus_kernels.sampling import noise, trees
from specplus_kernels.sampling.trees import Batch, Verified

TINY = 1e-30  # instead of a sum that rounding has emptied
Walked = tuple[
    int, torch.Tensor
]  # the path's last row and the measure that the bonus token follows


def tree_rejection(
    rule: str,
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    batch: Batch,
    epsilon: float,
    delta: float,
) -> Verified:
    """See the package's docstring."""
    walks: dict[str, Callable[[Tree], Walked]] = {
        "recursive": _recursive,
        "traversal": lambda tree: _traversal(tree, 0, 1.0) or (0, tree.target[0]),
        "typical": lambda tree: _typical(tree, epsilon, delta),
    }
    return verify_each(walks[rule], logits, None if rule == "typical" else draft_logits, batch)


def verify_each(
    walk: Callable[[Tree], Walked],
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    batch: Batch,
) -> Verified:
    """Walks every request's tree, then draws its bonus token."""
    paths: list[list[int]] = [[] for _ in range(batch.num_reqs)]
    emitted: list[list[int]] = [[] for _ in paths]
    root = batch.cu_num_rows[:-1].long().repeat_interleave(batch.cu_num_rows.diff())
    local = torch.arange(len(root), device=root.device) - root
    coins = noise.coin(batch.seeds[root], batch.positions[root], local)
    parents = local - 1 if batch.parents is None else batch.parents
    kinds = local >= 0 if batch.is_sampled is None else batch.is_sampled
    for req, (start, end) in enumerate(pairwise(batch.cu_num_rows.tolist())):
        if start == end:
            continue
        rows = slice(start, end)
        tree = _tree(
            logits[rows],
            None if draft_logits is None else draft_logits[rows],
            batch.draft_tokens[rows].tolist(),
            parents[rows].tolist(),
            kinds[rows].tolist(),
            batch.temperature[rows],
            coins[rows].tolist(),
        )
        node, measure = walk(tree)
        last = start + node
        if measure.sum() <= 0:  # rounding has left nothing
            measure = tree.target[node]
        keys = batch.temperature[last], batch.seeds[last], batch.positions[last]
        bonus = _sample(measure, *keys)
        while node >= 0:
            paths[req].insert(0, node)
            node = tree.parents[node]
        emitted[req] = [*(tree.tokens[row] for row in paths[req][1:]), bonus]
    return trees.stack(batch, paths, emitted)


@dataclass(frozen=True, slots=True)
class Tree:
    """One request; `children` leaves out placeholders and the children of rows that hold NaN."""

    target: torch.Tensor  # [num_rows, vocab_size], p
    draft: torch.Tensor | None  # [num_rows, vocab_size], q of each row's drawn children
    tokens: list[int]
    parents: list[int]
    children: list[list[int]]
    is_sampled: list[bool]
    coins: list[float]

    def proposal(self, node: int, rest: torch.Tensor | None) -> torch.Tensor:
        """The distribution that `node` came from; `rest` is q without the node's elders."""
        if self.is_sampled[node] and rest is not None:
            return rest
        return _point(self.tokens[node], self.target[0])

    def without(self, node: int, rest: torch.Tensor | None) -> torch.Tensor | None:
        """Draws without replacement: q for the younger siblings of `node`."""
        if rest is None:
            return None
        rest = rest.clone()
        rest[self.tokens[node]] = 0.0
        return rest / rest.sum().clamp(min=TINY)


def _recursive(tree: Tree) -> Walked:
    """Accept a child with min(1, m(x) / q(x)), else go on with the residual."""
    node, done = 0, False
    while not done:
        measure = tree.target[node]
        rest = None if tree.draft is None else tree.draft[node]
        done = True
        for child in tree.children[node]:
            proposal, token = tree.proposal(child, rest), tree.tokens[child]
            if tree.coins[child] * proposal[token] < measure[token]:
                node, done = child, False
                break
            measure = (measure - proposal).clamp(min=0.0)
            measure = measure / measure.sum().clamp(min=TINY)
            rest = tree.without(child, rest)
    return node, measure


def _traversal(tree: Tree, node: int, weight: float) -> Walked | None:
    """Ends at `node` or below it with probability `weight`, then following the target."""
    measure = weight * tree.target[node]
    rest = None if tree.draft is None else tree.draft[node]
    for child in tree.children[node]:
        proposal, token = tree.proposal(child, rest), tree.tokens[child]
        left, drawn = float(measure[token]), float(proposal[token])
        if left > 0.0:
            found = _traversal(tree, child, left / drawn if left < drawn else 1.0)
            if found is not None:
                return found
        mass, measure = measure.sum(), (measure - proposal).clamp(min=0.0)
        measure = measure / (1.0 - mass + measure.sum()).clamp(min=TINY)
        rest = tree.without(child, rest)
    if node == 0 or tree.coins[node] < measure.sum():
        return node, measure
    return None


def _typical(tree: Tree, epsilon: float, delta: float) -> Walked:
    """The longest path of tokens that are likely enough, the first of equals, depth first."""
    longest: list[int] = []
    stack = [[0]]
    while stack:
        path = stack.pop()
        longest = max(longest, path, key=len)
        probs = tree.target[path[-1]]
        entropy = torch.special.entr(probs).sum()
        threshold = min(epsilon, float(delta * torch.exp(-entropy)))
        likely = [c for c in tree.children[path[-1]] if float(probs[tree.tokens[c]]) > threshold]
        stack += [[*path, child] for child in reversed(likely)]
    return longest[-1], tree.target[longest[-1]]


def _sample(
    measure: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor, position: torch.Tensor
) -> int:
    """A token distributed as `measure`, whatever its sum, by Gumbel-max; argmax if greedy."""
    scores = measure.log()
    if temperature != 0:
        tokens = torch.arange(len(measure), device=measure.device)
        scores = scores + noise.gumbel(seed, position, tokens)
    return int(scores.argmax())


def _probabilities(logits: torch.Tensor, temperature: torch.Tensor | None = None) -> torch.Tensor:
    """softmax in double, a point mass on the first maximum at temperature 0.

    NaN counts as -inf; a row of nothing else has no mass.
    """
    largest = torch.finfo(torch.float32).max
    numbers = torch.nan_to_num(logits.float(), -torch.inf, largest, -torch.inf).double()
    top = numbers.amax(1, keepdim=True).clamp(min=-largest)
    weights = torch.exp(numbers - top)
    probs = weights / weights.sum(1, keepdim=True).clamp(min=TINY)
    if temperature is None:
        return probs
    greedy = torch.zeros_like(probs).scatter_(1, numbers.argmax(1, keepdim=True), 1.0)
    return torch.where((temperature == 0)[:, None], greedy, probs)


def _tree(
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: list[int],
    parents: list[int],
    is_sampled: list[bool],
    temperature: torch.Tensor,
    coins: list[float],
) -> Tree:
    if temperature[0] == 0:  # p is a point mass: every node is verified as a deterministic one
        draft_logits = None
    has_nan = logits.isnan().any(1)
    if draft_logits is not None:
        drawn_below = torch.zeros_like(has_nan)
        for parent, token, drawn in zip(parents, tokens, is_sampled, strict=True):
            if parent >= 0 and drawn and 0 <= token < logits.shape[1]:
                drawn_below[parent] = True
        has_nan = has_nan | (draft_logits.isnan().any(1) & drawn_below)
    blocked = has_nan.tolist()
    children: list[list[int]] = [[] for _ in tokens]
    for node in range(1, len(tokens)):
        if 0 <= tokens[node] < logits.shape[1] and not blocked[parents[node]]:
            children[parents[node]].append(node)
    return Tree(
        _probabilities(logits, temperature),
        None if draft_logits is None else _probabilities(draft_logits),
        tokens,
        parents,
        children,
        is_sampled,
        coins,
    )


def _point(token: int, like: torch.Tensor) -> torch.Tensor:
    point = torch.zeros_like(like)
    point[token] = 1.0
    return point
