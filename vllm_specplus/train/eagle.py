"""An EAGLE head for training: its units, its start, its loss, and its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from vllm_specplus.errors import bad_option
from vllm_specplus.proposers.heads.eagle import EagleHead
from vllm_specplus.proposers.heads.eagle_checkpoint import (
    EagleCheckpoint,
    EagleConfig,
    save_eagle,
)
from vllm_specplus.proposers.heads.files import check_fits, embedding_sha256
from vllm_specplus.train.corpus import Corpus
from vllm_specplus.train.regression import Regression, some_samples
from vllm_specplus.train.teacher import Teacher

_FEATURE_WEIGHT = 1.0
"""Of the regression of hidden states beside the KL."""


class EagleInUnits(nn.Module):
    """A head whose weights are kept in units of what they multiply and of what they give.

    Features of a target's hidden states differ in size by up to 1000 (Gemma's final norm), and one
    learning rate has to fit them all. size, spread: float32 [hidden_size], root mean square and
    standard deviation of each feature; embedding_size: of the table's entries.
    """

    size: Tensor
    spread: Tensor
    embedding_size: Tensor

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        self.head = EagleHead(config)
        self.register_buffer("size", torch.ones(config.hidden_size))
        self.register_buffer("spread", torch.ones(config.hidden_size))
        self.register_buffer("embedding_size", torch.ones(()))

    def units(self) -> dict[str, Tensor]:
        """What the weights are to be multiplied with, by the names of `head_shapes`."""
        inputs = torch.cat([self.embedding_size.expand_as(self.size), self.size])
        return {
            "fc.weight": self.spread[:, None] / inputs,
            "self_attn.qkv_proj.weight": 1 / self.size,
            "self_attn.o_proj.weight": self.spread[:, None],
            "post_attention_layernorm.weight": self.size.square().mean().sqrt() / self.size,
            "mlp.gate_up_proj.weight": torch.ones_like(self.size),
            "mlp.down_proj.weight": self.spread[:, None],
        }

    def served(self) -> dict[str, Tensor]:
        """The weights that the engine computes with."""
        weights = dict(self.head.named_parameters())
        return {name: weights[name] * unit for name, unit in self.units().items()}

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """As EagleHead's, but embeddings are as the target scales them."""
        table_rows = embeddings / self.config.embed_scale
        return functional_call(self.head, self.served(), (hidden, table_rows))


class Eagle:
    """One head over the target's own embedding and head; `start`: a head to go on from."""

    drafts_all_tokens = True

    def __init__(
        self, teacher: Teacher, *, num_depths: int = 3, start: EagleCheckpoint | None = None
    ) -> None:
        self.teacher, self.start, self.num_depths = teacher, start, num_depths
        sizes = teacher.sizes()
        about = dict(
            target=teacher.name,
            embedding_sha256=embedding_sha256(teacher.embedding),
            vocab_size=teacher.config.vocab_size,
            max_position_embeddings=teacher.config.max_position_embeddings,
            embed_scale=sizes["embed_scale"],
        )
        if start is None:
            config = EagleConfig(**about, **{name: sizes[name] for name in _FROM_TARGET})
        else:
            check_fits(start, sizes["hidden_size"], len(teacher.head))
            if start.config.embedding_sha256 not in (None, about["embedding_sha256"]):
                reason = "was trained for a target with another embedding"
                raise bad_option("start", start.path, reason, "give a head of this target, or none")
            config = start.config.model_copy(update=about)
        self.module = EagleInUnits(config)
        self.module.to(teacher.device)

    def identity(self) -> dict[str, Any]:
        config = self.module.config.model_dump(exclude={"training", "target"})
        return config | {"depths": self.num_depths}

    def own_loss(self, outputs: Tensor, hidden: Tensor) -> Tensor:
        """Smooth L1 in units of the features' spread."""
        away = (outputs.float() - hidden.float()) / self.module.spread
        return _FEATURE_WEIGHT * functional.smooth_l1_loss(away, torch.zeros_like(away))

    @torch.no_grad()
    def initialise(self, corpus: Corpus) -> None:
        """The projection by ridge regression of the next hidden state on [embedding, hidden state],
        chained; the layer adds nothing at first."""
        self._measure(corpus)
        weights = dict(self.module.head.named_parameters())
        if self.start is not None:
            for name, unit in self.module.units().items():
                weights[name].copy_(self.start.tensors[name] / unit)
            return
        size = self.module.config.hidden_size
        generator = torch.Generator().manual_seed(0)
        for name in ("self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"):
            noise = torch.randn(weights[name].shape, generator=generator)
            weights[name].copy_(noise * size**-0.5)
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            weights[name].zero_()
        regression = Regression(2 * size, size, self.teacher.device)
        for depth in range(self.num_depths):
            weights["fc.weight"].copy_(regression.fit(self._rows(corpus, depth)))

    def _measure(self, corpus: Corpus) -> None:
        """Sets the units."""
        batches = list(some_samples(corpus))
        hidden = torch.cat([batch.hidden[0].float() for batch in batches])
        rows = torch.cat([corpus.embeddings(batch)[0].float() for batch in batches])
        module, scale = self.module, self.module.config.embed_scale
        module.size.copy_(hidden.square().mean(0).sqrt().clamp(min=1e-6))
        module.spread.copy_(hidden.std(0).clamp(min=1e-6))
        module.embedding_size.copy_(rows.square().mean().sqrt() / scale)

    def _rows(self, corpus: Corpus, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the projection of a depth takes, and what it should give, in units of both."""
        module, fc = self.module, self.module.head.fc
        for batch in some_samples(corpus):
            length = int(batch.lengths[0])
            previous = batch.hidden[0].float() / module.size
            embeddings = corpus.embeddings(batch)[0].float()
            embeddings = embeddings / (module.config.embed_scale * module.embedding_size)
            for before in range(depth + 1):
                features = torch.cat([embeddings[before : before + length], previous], dim=-1)
                previous = fc(features) * module.spread / module.size
            wanted = batch.hidden[0, depth + 1 :].float() / module.spread
            yield features[: length - depth - 1], wanted

    def save(self, folder: Path, draft_vocab: Tensor | None, training: dict[str, Any]) -> None:
        config = self.module.config.model_copy(update={"training": training})
        save_eagle(folder, config, self.module.served())


_FROM_TARGET = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "rms_norm_eps",
    "rope_theta",
)
