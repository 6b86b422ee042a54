"""Trained MTP modules as a draft model of vLLM's, which its multi-module speculator drafts chains
with on the V2 runner."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from vllm_specplus.engine.compat import (
    Attention,
    LogitsProcessor,
    VllmConfig,
    VocabParallelEmbedding,
    init_logger,
)
from vllm_specplus.proposers.heads.checkpoint import load_heads
from vllm_specplus.proposers.heads.files import Checkpoint, check_fits, embedding_sha256
from vllm_specplus.proposers.heads.mtp import MTPHeads

logger = init_logger(__name__)


class SpecPlusMTP(nn.Module):
    """A heads checkpoint; vLLM gives it the target's embedding and head when it is loaded.

    The modules are whole on every rank of a tensor parallel group.
    """

    model: Any
    lm_head: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        options, target = vllm_config.speculative_config, vllm_config.model_config
        draft = options.draft_model_config
        self.checkpoint = checkpoint = load_heads(draft.model, draft.revision)
        self.config = checkpoint.config
        check_fits(checkpoint, target.get_hidden_size(), target.get_vocab_size())
        self.vocab_size = target.get_vocab_size()
        heads = MTPHeads.from_checkpoint(checkpoint).to(target.dtype)
        self.model = nn.Module()  # where vLLM puts the target's `embed_tokens`
        depths = range(options.num_speculative_tokens)
        self._modules_at = nn.ModuleList(heads.at(depth) for depth in depths)
        first = target.get_total_num_hidden_layers()
        cache_config = copy(vllm_config.cache_config)
        cache_config.sliding_window = None  # which may be the target's
        self._attention = nn.ModuleList(
            Attention(
                self.config.num_attention_heads,
                self.config.head_dim,
                self.config.head_dim**-0.5,
                self.config.num_key_value_heads,
                cache_config=cache_config,
                prefix=f"specplus.mtp.{first + depth}.attn",
            )
            for depth in depths
        )
        self.draft_vocab = checkpoint.draft_vocab
        if self.draft_vocab is not None:
            self.draft_vocab = self.draft_vocab.to(next(heads.parameters()).device)
        self.logits_processor = LogitsProcessor(self.vocab_size)
        self._head: Callable[[torch.Tensor], torch.Tensor] | None = None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """All are loaded when the model is built, which checks them."""
        return {name for name, _ in self.named_parameters()}

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] -> [num_tokens, hidden_size], as the target scales them."""
        return self.model.embed_tokens(input_ids) * self.config.embed_scale

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states of depth `spec_step_idx`, and those that the next depth takes: both
        [num_tokens, hidden_size] like those above.

        input_ids: [num_tokens], the tokens behind the positions' own by the depth, plus one.
        """
        attention = self._attention[spec_step_idx]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q.flatten(1), k.flatten(1), v.flatten(1)).view_as(q)

        module = self._modules_at[spec_step_idx]
        output = module(hidden_states, self.embed_input_ids(input_ids), positions, attend)
        from_target = self.config.hidden_state_from == "target"
        return output, hidden_states if from_target else output

    def compute_logits(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor:
        """[num_rows, vocab_size]; -inf outside the draft vocabulary."""
        if self._head is None:
            first_rows = torch.arange(self.vocab_size, device=hidden_states.device)[:256]
            warn_of_another_target(self.checkpoint, self.model.embed_tokens(first_rows))
            whole = partial(self.logits_processor, self.lm_head)
            self._head = draft_head(whole, self.lm_head, self.draft_vocab)
        drafted = self._head(hidden_states)
        if self.draft_vocab is None:
            return drafted
        logits = drafted.new_full((len(drafted), self.vocab_size), -torch.inf)
        return logits.index_copy_(1, self.draft_vocab, drafted)


def draft_head(
    whole: Callable[[torch.Tensor], torch.Tensor], lm_head: Any, vocab: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits of the draft vocabulary, or of all tokens if there is none.

    whole: hidden states -> logits of all tokens, by the target's `lm_head`.
    """
    if vocab is None:
        return whole
    try:
        weight = VocabParallelEmbedding.forward(lm_head, vocab)
    except NotImplementedError:  # a quantized head, whose rows cannot be looked up
        return lambda hidden_states: whole(hidden_states)[:, vocab]
    return partial(nn.functional.linear, weight=weight)


def language_model(target: Any) -> Any:
    """The part of a target that has the embedding and the head."""
    return target.get_language_model() if hasattr(target, "get_language_model") else target


def warn_of_another_target(checkpoint: Checkpoint, embedding: torch.Tensor) -> None:
    """embedding: [256 or more, hidden_size], the first rows of the target's."""
    config = checkpoint.config
    if config.embedding_sha256 not in (None, embedding_sha256(embedding)):
        logger.warning_once(
            "The heads %s were trained for %s, and this model's embedding is another: drafts may "
            "be worse, the text stays the model's.",
            checkpoint.path,
            config.target,
        )
