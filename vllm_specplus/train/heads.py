"""What the trainer asks of a kind of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from vllm_specplus.train.corpus import Corpus


class Heads(Protocol):
    """A kind of heads. `module` holds its weights, in float32.

    Called as `module(hidden, embeddings)` it gives [num_depths, B, T, hidden_size]: at depth k and
    row t the hidden state from which the target's head draws token t+k+2. hidden: [B, T,
    hidden_size]; embeddings: [B, T + num_depths - 1, hidden_size], row i that of token i+1.
    """

    num_depths: int
    drafts_all_tokens: bool
    """Whether the engine drafts from the whole vocabulary, whatever part of it the loss is over."""

    @property
    def module(self) -> nn.Module: ...

    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed, shapes included."""

    def own_loss(self, outputs: Tensor, hidden: Tensor) -> Tensor | float:
        """What is added to the loss of one depth, for rows of outputs and the target's hidden
        states there, [num_rows, hidden_size]."""

    def initialise(self, corpus: Corpus) -> None:
        """Sets the weights to where training begins."""

    def save(self, folder: Path, draft_vocab: Tensor | None, training: dict[str, Any]) -> None:
        """Writes the files that the engine serves; `training` is provenance."""
