"""A target's own MTP modules, run level by level: what grows chains and trees of them on the CPU
engine."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from vllm_specplus.engine.attention import TreeRowsMixin
from vllm_specplus.engine.compat import Attention, VllmConfig
from vllm_specplus.engine.compat_cpu import (
    AttentionLayerBase,
    load_eagle_model,
    set_forward_context,
)
from vllm_specplus.engine.drafters.modules import (
    has_several_modules,
    hidden_state_from,
    load_modules,
)
from vllm_specplus.engine.drafters.paged import PagedLayers, likeliest
from vllm_specplus.errors import NotBuiltError
from vllm_specplus.proposers.levels import RequestRows


class PagedModules(PagedLayers):
    """vLLM's draft model for MTP modules beside its target: `DraftModel` on vLLM's V1 runner.

    Several modules draft a level each, over a KV cache of its own; one is unrolled over its own.
    """

    def __init__(self, target: Any, vllm_config: VllmConfig, num_levels: int) -> None:
        options = vllm_config.speculative_config
        layers = vllm_config.compilation_config.static_forward_context
        targets, self._several = set(layers), has_several_modules(options)
        self._model = load_modules(partial(load_eagle_model, target, vllm_config), options)
        self.num_levels = num_levels
        self.num_caches = num_levels if self._several else 1
        self.hidden_state_from = hidden_state_from(options)
        own = [layer for name, layer in layers.items() if name not in targets]
        super().__init__([layer for layer in own if attends(layer)], vllm_config)
        if not vllm_config.model_config.enforce_eager:
            self._warm_up(vllm_config.model_config)

    @torch.inference_mode()
    def _warm_up(self, config: Any) -> None:
        """Has vLLM compile the modules' operations now: a level must not seem to take that long.

        One row is compiled apart, the second of more than one for all numbers.
        """
        gc.collect()  # what now is the target's: it cannot be freed while vLLM compiles
        for level, num_rows in product(range(self.num_caches), (1, 2, 3)):
            rows = torch.arange(num_rows)
            hidden_states = torch.zeros(num_rows, config.get_hidden_size(), dtype=config.dtype)
            with set_forward_context(None, self._vllm_config, num_rows):
                self._run(level, rows, rows, hidden_states)

    def forward(self, level: int, requests: Sequence[RequestRows]) -> torch.Tensor:
        """See `DraftModel`."""
        tokens = torch.tensor([token for rows in requests for token in rows.tokens])
        positions = torch.cat([rows.positions() for rows in requests])
        with self.running(requests):
            above = torch.cat([rows.hidden_states for rows in requests])
            return self._run(level, tokens, positions, above)

    def _run(
        self, level: int, tokens: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        self._model.spec_step = level
        hidden: torch.Tensor = self._model(
            input_ids=tokens,
            positions=positions,
            hidden_states=hidden_states,
            **self._step(level),
        )
        return hidden

    def best_tokens(
        self, level: int, hidden_states: torch.Tensor, num: int
    ) -> list[dict[int, float]]:
        """See `DraftModel`."""
        return likeliest(self._model.compute_logits(hidden_states, **self._step(level)), num)

    def _step(self, level: int) -> dict[str, int]:
        """How classes of several modules are told which one to run; others may not ask."""
        return {"spec_step_idx": level} if self._several else {}


def attends(layer: Any) -> bool:
    """Whether a layer of a draft model keeps keys and values. Raises NotBuiltError if they, or what
    else it keeps, cannot be a tree's."""
    if not isinstance(layer, AttentionLayerBase):
        return False
    if not (isinstance(layer, Attention) and isinstance(layer.impl, TreeRowsMixin)):
        raise NotBuiltError(
            f"The model's MTP modules have {type(layer).__name__}, and on vLLM's V1 runner modules "
            "are built for plain attention; use heads, '[mtp3]DIR', or vLLM's own chain, "
            "speculative_config={'method': 'mtp', 'num_speculative_tokens': 1}."
        )
    return True
