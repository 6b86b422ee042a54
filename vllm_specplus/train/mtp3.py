"""MTP heads for training: their start, and their files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_specplus.proposers.heads.checkpoint import HeadsCheckpoint, HeadsConfig, save_heads
from vllm_specplus.proposers.heads.files import check_fits, embedding_sha256
from vllm_specplus.proposers.heads.mtp import MTPHeads, RMSNorm
from vllm_specplus.train.corpus import Corpus
from vllm_specplus.train.regression import Regression, some_samples
from vllm_specplus.train.teacher import Teacher

_LINEAR = 0.08
"""Size of what the layer adds to its input at first."""


class MTP3:
    """Three modules, tied or not; `start`: heads to go on from."""

    num_depths = 3
    drafts_all_tokens = False

    def __init__(
        self,
        teacher: Teacher,
        *,
        tied: bool = True,
        hidden_state_from: Literal["previous", "target"] = "previous",
        start: HeadsCheckpoint | None = None,
        int8: bool = False,
    ) -> None:
        self.teacher, self.int8, self.start = teacher, int8, start
        if start is None:
            config = HeadsConfig(
                target=teacher.name,
                embedding_sha256=embedding_sha256(teacher.embedding),
                vocab_size=teacher.config.vocab_size,
                num_modules=self.num_depths,
                tied=tied,
                hidden_state_from=hidden_state_from,
                **teacher.sizes(),
            )
            self.module = MTPHeads(config)
        else:
            check_fits(start, teacher.config.hidden_size, len(teacher.head))
            self.module = MTPHeads.from_checkpoint(start)
        self.module.to(teacher.device)

    def identity(self) -> dict[str, Any]:
        return self.module.config.model_dump(exclude={"training", "target"})

    def own_loss(self, outputs: Tensor, hidden: Tensor) -> float:
        return 0.0

    @torch.no_grad()
    def initialise(self, corpus: Corpus) -> None:
        """The layer from the target's last one, near linear; the projections by ridge regression of
        the hidden state to predict on [norm(embedding), norm(hidden)], depth after depth."""
        if self.start is not None:
            return
        layer = self.teacher.last_layer(self.module.config)
        for module in map(self.module.at, range(self.module.config.num_stored)):
            module.load_state_dict(layer, strict=False)
            _set_gain(module.final_norm, self.teacher.norm_gain)
            if module.sandwich_norms:
                flat = torch.full_like(self.teacher.norm_gain, _LINEAR)
                _set_gain(module.post_attention_layernorm, flat)
                _set_gain(module.post_feedforward_layernorm, flat)
            else:
                for matrix in (module.self_attn.o_proj.weight, module.mlp.down_proj.weight):
                    matrix *= _LINEAR / matrix.norm(dim=1).mean()
        self._regress(corpus)

    def _regress(self, corpus: Corpus) -> None:
        """Tied weights fit all depths so far together."""
        heads, size = self.module, self.module.config.hidden_size
        for depth in range(self.num_depths):
            if depth == 0 or not heads.config.tied:
                regression = Regression(2 * size, size, self.teacher.device)
            heads.at(depth).eh_proj.weight.copy_(regression.fit(self._rows(corpus, depth)))

    def _rows(self, corpus: Corpus, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the projection of a depth takes, and what its hidden state should be."""
        gain = torch.where(self.teacher.norm_gain.abs() < 1e-3, 1.0, self.teacher.norm_gain)
        for batch in some_samples(corpus):
            length = int(batch.lengths[0]) - depth - 1
            hidden, embeddings = batch.hidden.float(), corpus.embeddings(batch).float()
            features = self._features(depth, hidden, embeddings)[0, :length]
            yield features, hidden[0, depth + 1 :] / gain

    def _features(self, depth: int, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """What the projection of a depth takes, given the depths before it."""
        length, previous = hidden.shape[1], hidden
        for before in range(depth):
            if self.module.config.hidden_state_from == "previous":
                previous = self.module.at(before)(previous, embeddings[:, before : before + length])
        return self.module.at(depth).inputs(previous, embeddings[:, depth : depth + length])

    def save(self, folder: Path, draft_vocab: Tensor | None, training: dict[str, Any]) -> None:
        size = None if draft_vocab is None else len(draft_vocab)
        changes = {"draft_vocab_size": size, "training": training}
        dtype = torch.float32 if self.int8 else torch.bfloat16
        modules = [
            {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
            for module in self.module.stored
        ]
        config = self.module.config.model_copy(update=changes)
        save_heads(folder, config, modules, draft_vocab, int8=self.int8)


def _set_gain(norm: RMSNorm, gain: Tensor) -> None:
    norm.weight.copy_(gain - norm.offset)
