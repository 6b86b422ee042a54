"""Medusa heads beside their target, on either runner; whole on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.engine.compat import LogitsProcessor, VllmConfig
from vllm_specplus.engine.drafters.heads import draft_head, language_model, warn_of_another_target
from vllm_specplus.proposers.heads.files import check_fits
from vllm_specplus.proposers.heads.medusa import Head, MedusaHeads
from vllm_specplus.proposers.heads.medusa_checkpoint import check_depth, load_medusa

HeadOf = Callable[[Any, torch.Tensor | None], Head]
"""The target's `lm_head` and a draft vocabulary -> logits of its tokens, of all if it is None."""


def load_beside(
    config: SpecPlusConfig,
    target: Any,
    vllm_config: VllmConfig,
    device: torch.device,
    head_of: HeadOf | None = None,
) -> MedusaHeads:
    """The heads that the options name, with the target's own where they have none.

    Raises OptionError where they do not fit the target or the depth.
    """
    model, language = vllm_config.model_config, language_model(target)
    vocab_size = model.get_vocab_size()
    [path] = [str(spec.model) for spec in config.methods if spec.name == "medusa"]
    checkpoint = load_medusa(path)
    check_fits(checkpoint, model.get_hidden_size(), vocab_size)
    if config.method == "medusa":  # what is deeper is left to n-grams
        check_depth(checkpoint, config.num_speculative_tokens)
    if checkpoint.config.embedding_sha256 is not None:
        first_rows = torch.arange(min(256, vocab_size), device=device)
        warn_of_another_target(checkpoint, language.model.embed_tokens(first_rows))
    heads = MedusaHeads.from_checkpoint(checkpoint).to(device, model.dtype)
    if not heads.lm_heads and head_of is not None:
        heads.shared = head_of(language.lm_head, heads.draft_vocab)
    elif not heads.lm_heads:
        whole = partial(LogitsProcessor(vocab_size), language.lm_head)
        heads.shared = draft_head(whole, language.lm_head, heads.draft_vocab)
    return heads
