"""Ridge regression over hidden states (Hoerl and Kennard 1970), where training begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from vllm_specplus.train.corpus import Batch, Corpus

_RIDGE = 1e-4
"""Weight decay of the regression, as a share of the features' mean square."""
_REGRESSION_TOKENS = 100_000


class Regression:
    """The matrix [num_wanted, num_features] that errs least on all rows so far."""

    def __init__(self, num_features: int, num_wanted: int, device: torch.device) -> None:
        self.gram = torch.zeros(num_features, num_features, device=device)
        self.cross = torch.zeros(num_features, num_wanted, device=device)

    def fit(self, rows: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Adds rows (features [n, num_features], wanted [n, num_wanted])."""
        for features, wanted in rows:
            self.gram += features.T @ features
            self.cross += features.T @ wanted
        ridge = _RIDGE * self.gram.diagonal().mean()
        matrix = self.gram + ridge * torch.eye(len(self.gram), device=self.gram.device)
        return torch.linalg.solve(matrix, self.cross).T


def some_samples(corpus: Corpus) -> Iterator[Batch]:
    """Training samples, one at a time, as many as a regression needs."""
    num_tokens = 0
    for index in corpus.training:
        batch = corpus.batch([index])
        num_tokens += int(batch.lengths[0])
        if num_tokens > _REGRESSION_TOKENS:
            break
        yield batch
