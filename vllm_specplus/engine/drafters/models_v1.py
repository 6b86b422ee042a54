"""vLLM's draft models, run level by level: what grows trees of them on the CPU engine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from vllm_specplus.engine.attention import TreeRowsMixin
from vllm_specplus.engine.compat import Attention, VllmConfig
from vllm_specplus.engine.compat_cpu import (
    AttentionLayerBase,
    get_model,
    load_eagle_model,
    replace,
    set_forward_context,
)
from vllm_specplus.engine.drafters.modules import (
    has_several_modules,
    hidden_state_from,
    load_modules,
    run_uncompiled,
)
from vllm_specplus.engine.drafters.paged import PagedLayers
from vllm_specplus.errors import NotBuiltError
from vllm_specplus.proposers.base import Proposer
from vllm_specplus.proposers.by_level import LevelProposer
from vllm_specplus.proposers.levels import HiddenStates, Outputs, likeliest


class PagedModel(PagedLayers):
    """A model of vLLM's over layers of its own beside the target's: `DraftModel` on vLLM's V1
    runner. One model is unrolled over its own KV cache."""

    num_caches = 1
    hidden_state_from: HiddenStates = "previous"

    def __init__(
        self,
        load: Callable[[], Any],
        vllm_config: VllmConfig,
        num_levels: int,
        state_size: int,
        max_len: int,
    ) -> None:
        layers = vllm_config.compilation_config.static_forward_context
        targets = set(layers)
        self._model: Any = run_uncompiled(load())
        self.num_levels, self.state_size = num_levels, state_size
        own = [layer for name, layer in layers.items() if name not in targets]
        super().__init__([layer for layer in own if attends(layer)], vllm_config, max_len)
        if not vllm_config.model_config.enforce_eager:
            self._warm_up(vllm_config.model_config.dtype)

    @torch.inference_mode()
    def _warm_up(self, dtype: torch.dtype) -> None:
        """Has vLLM compile the model's operations now: a level must not seem to take that long.

        One row is compiled apart, the second of more than one for all numbers.
        """
        gc.collect()  # what now is the target's: it cannot be freed while vLLM compiles
        for level, num_rows in product(range(self.num_caches), (1, 2, 3)):
            rows = torch.arange(num_rows)
            hidden_states = torch.zeros(num_rows, self.state_size, dtype=dtype)
            with set_forward_context(None, self._vllm_config, num_rows):
                self._run(level, rows, rows, hidden_states)

    def _run(
        self, level: int, tokens: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> Outputs:
        states = {"hidden_states": hidden_states} if self.state_size else {}
        out = self._model(input_ids=tokens, positions=positions, **states, **self._step(level))
        return out if isinstance(out, tuple) else (out, out)

    def best_tokens(
        self, level: int, hidden_states: torch.Tensor, num: int
    ) -> list[dict[int, float]]:
        """See `DraftModel`."""
        return likeliest(self._model.compute_logits(hidden_states, **self._step(level)), num)

    def combine(self, aux_hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """EAGLE-3's hidden states, [num_rows, state_size], of those of several target layers."""
        rows = torch.cat([*aux_hidden_states], -1)
        states: torch.Tensor = self._model.combine_hidden_states(rows)
        return states

    def _step(self, level: int) -> dict[str, int]:
        """How the model is told which module to run."""
        return {}


class PagedModules(PagedModel):
    """A target's own MTP modules: several draft a level each, over a KV cache of its own."""

    def __init__(self, target: Any, vllm_config: VllmConfig, num_levels: int) -> None:
        options, size = vllm_config.speculative_config, vllm_config.model_config.get_hidden_size()
        self._several = has_several_modules(options)
        self.num_caches = num_levels if self._several else 1
        self.hidden_state_from = hidden_state_from(options)
        load = partial(load_modules, partial(load_eagle_model, target, vllm_config), options)
        max_len = vllm_config.model_config.max_model_len
        super().__init__(load, vllm_config, num_levels, size, max_len)

    def _run(self, level: int, *rows: torch.Tensor) -> Outputs:
        self._model.spec_step = level
        return super()._run(level, *rows)

    def _step(self, level: int) -> dict[str, int]:
        """Classes of one module may not ask."""
        return {"spec_step_idx": level} if self._several else {}


class PagedDraftModel(PagedModel):
    """The model of a SpeculativeConfig, which drafts by tokens alone and shares nothing with its
    target. name: of its layers."""

    hidden_state_from = None

    def __init__(self, vllm_config: VllmConfig, options: Any, num_levels: int, name: str) -> None:
        config = replace(
            vllm_config,
            model_config=options.draft_model_config,
            parallel_config=options.draft_parallel_config,
            quant_config=None,  # which is the target's
        )
        load = partial(get_model, vllm_config=config, prefix=name)
        max_len = options.draft_model_config.max_model_len
        super().__init__(load, vllm_config, num_levels, 0, max_len)


def paged_eagle(target: Any, vllm_config: VllmConfig, num_levels: int) -> PagedModel:
    """A head of EAGLE or EAGLE-3 on its target's embedding and, without its own, on its head."""
    size = vllm_config.speculative_config.draft_model_config.get_hidden_size()
    max_len = vllm_config.model_config.max_model_len  # which vLLM makes its positions reach to
    load = partial(load_eagle_model, target, vllm_config)
    return PagedModel(load, vllm_config, num_levels, size, max_len)


def reads_aux_hidden_states(proposer: Proposer, vllm_config: VllmConfig) -> bool:
    """Whether a proposer drafts with an EAGLE-3 head that starts from hidden states of several
    target layers, as these do unless their config says otherwise."""
    if not (isinstance(proposer, LevelProposer) and proposer.drafter.name == "eagle3"):
        return False
    draft = vllm_config.speculative_config.draft_model_config.hf_config
    return bool((getattr(draft, "eagle_config", None) or {}).get("use_aux_hidden_state", True))


def attends(layer: Any) -> bool:
    """Whether a layer of a draft model keeps keys and values. Raises NotBuiltError if they, or what
    else it keeps, cannot be a tree's."""
    if not isinstance(layer, AttentionLayerBase):
        return False
    if not (isinstance(layer, Attention) and isinstance(layer.impl, TreeRowsMixin)):
        raise NotBuiltError(
            f"The draft's layers have {type(layer).__name__}, and on vLLM's V1 runner trees and "
            "MTP modules are built for plain attention; use another draft, heads ('[mtp3]DIR'), or "
            "vLLM's own chain, speculative_config={'method': ..., 'num_speculative_tokens': 1}."
        )
    return True
