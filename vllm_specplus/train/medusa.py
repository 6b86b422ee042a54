"""Medusa heads for training: their start, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_specplus.errors import bad_option
from vllm_specplus.proposers.heads.files import check_fits, embedding_sha256
from vllm_specplus.proposers.heads.medusa import MedusaHeads
from vllm_specplus.proposers.heads.medusa_checkpoint import (
    MedusaCheckpoint,
    MedusaConfig,
    save_medusa,
)
from vllm_specplus.train.corpus import Corpus
from vllm_specplus.train.teacher import Teacher


class Medusa:
    """Heads over the target's own matrix of the vocabulary; `start`: heads to go on from."""

    drafts_all_tokens = False

    def __init__(
        self,
        teacher: Teacher,
        *,
        num_heads: int = 4,
        num_layers: int = 1,
        start: MedusaCheckpoint | None = None,
    ) -> None:
        self.start = start
        if start is None:
            config = MedusaConfig(
                target=teacher.name,
                embedding_sha256=embedding_sha256(teacher.embedding),
                vocab_size=teacher.config.vocab_size,
                num_heads=num_heads,
                num_layers=num_layers,
                hidden_size=teacher.config.hidden_size,
                has_bias=True,
                shares_head=True,
            )
            self.module = MedusaHeads(config)
        else:
            check_fits(start, teacher.config.hidden_size, len(teacher.head))
            if start.num_lm_heads:
                reason = "have matrices over the vocabulary of their own, and training has none"
                raise bad_option("start", start.path, reason, "give heads without, or none")
            self.module = MedusaHeads.from_checkpoint(start).float().requires_grad_(True)
        self.num_depths = self.module.config.num_heads
        self.module.to(teacher.device)

    def identity(self) -> dict[str, Any]:
        return self.module.config.model_dump(exclude={"training", "target"})

    def own_loss(self, outputs: Tensor, hidden: Tensor) -> float:
        return 0.0

    @torch.no_grad()
    def initialise(self, corpus: Corpus) -> None:
        """Every head as the target's own, as the paper has it."""
        if self.start is None:
            for weight in self.module.parameters():
                weight.zero_()

    def save(self, folder: Path, draft_vocab: Tensor | None, training: dict[str, Any]) -> None:
        size = None if draft_vocab is None else len(draft_vocab)
        changes = {"draft_vocab_size": size, "training": training}
        tensors = {name: t.bfloat16() for name, t in self.module.state_dict().items()}
        save_medusa(folder, self.module.config.model_copy(update=changes), tensors, draft_vocab)
