"""vLLM's chain of a target's own MTP modules, with all modules and the hidden states they expect.

A draft that is deeper than the checkpoint has modules goes on with the last one: 1, 2, 2 for three
tokens of two modules. Every step has an attention layer of its own, so each has a KV cache of its
own; the layers that the checkpoint does not have take the last module's weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from vllm_specplus.core.mtp_models import MTP_MODELS, NEXTN
from vllm_specplus.engine.compat import VllmConfig, scoped
from vllm_specplus.engine.compat_v2 import (
    GPUModelRunner,
    MultiModuleMTPSpeculator,
    base_loader,
    disable_mtp_completeness_check,
    init_speculator,
    mimo_v2_mtp,
    model_runner,
)

Weights = Iterable[tuple[str, torch.Tensor]]


class ModulesSpeculator(MultiModuleMTPSpeculator):
    """vLLM's speculator for several MTP modules."""

    def load_draft_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        config = self.draft_model_config.hf_config
        row = MTP_MODELS[config.model_type]
        self._from_target = row.hidden_state_from == "target"
        self._step = 0
        num_modules, num_layers = config.specplus_num_modules, config.n_predict
        initialize_model, layers = base_loader.initialize_model, mimo_v2_mtp._MiMoV2MTPLayers

        def mimo_v2_layers(**kwargs: Any) -> nn.Module:
            """The class builds one layer, whatever its config counts (vLLM issue 52688)."""
            return layers(**kwargs | {"num_mtp_layers": num_layers})

        def initialize(vllm_config: VllmConfig, **kwargs: Any) -> nn.Module:
            with (
                counting(vllm_config.model_config, {NEXTN, row.field}, num_layers),
                scoped(mimo_v2_mtp, "_MiMoV2MTPLayers", mimo_v2_layers),
            ):
                model = initialize_model(vllm_config=vllm_config, **kwargs)
            if isinstance(model.model, mimo_v2_mtp.MiMoV2MultiTokenPredictor):
                model.model.num_mtp_layers = num_layers
            repeat_last_module(model, num_modules, num_layers)
            return model

        with scoped(base_loader, "initialize_model", initialize):
            model = super().load_draft_model(*args, **kwargs)
        for module in model.modules():  # compiled code would keep the first step's module
            if hasattr(module, "do_not_compile"):
                module.do_not_compile = True
        if "spec_step_idx" not in inspect.signature(type(model).forward).parameters:
            self._hand_on_the_step(model.model)
        return model

    def _hand_on_the_step(self, inner: nn.Module) -> None:
        """For classes whose inner model chooses by a step that the outer one does not hand on."""
        forward = inner.forward
        inner.forward = lambda *args, **kwargs: forward(*args, **kwargs, spec_step_idx=self._step)

    def _run_model(
        self, *args: Any, spec_module_idx: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(last hidden states to choose tokens from, hidden states for the next module)."""
        self._step = spec_module_idx
        last, hidden_states = super()._run_model(*args, spec_module_idx=spec_module_idx, **kwargs)
        return last, self.hidden_states[: len(last)] if self._from_target else hidden_states


@contextmanager
def counting(target: Any, fields: set[str], num_layers: int) -> Iterator[None]:
    """While a draft model is built: some classes read the count in the target's config."""
    with ExitStack() as stack:
        for config in (target.hf_config, target.hf_text_config):
            for field in fields & vars(config).keys():
                stack.enter_context(scoped(config, field, num_layers))
        yield


def repeat_last_module(model: Any, num_modules: int, num_layers: int) -> None:
    """Has `model`, built with `num_layers` MTP layers, load the last of `num_modules` into those
    beyond."""
    if num_layers == num_modules:
        return
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleDict | nn.ModuleList))
    layers = next(part for part in lists if len(part) == num_layers)
    modules = list(layers.values() if isinstance(layers, nn.ModuleDict) else layers)
    load_weights = model.load_weights

    def load(weights: Weights) -> set[str]:
        with disable_mtp_completeness_check():
            loaded = load_weights(weights)
        last = modules[num_modules - 1].state_dict()
        for module in modules[num_modules:]:
            module.load_state_dict(last)
        repeated = {id(part) for module in modules[num_modules:] for part in module.parameters()}
        return loaded | {name for name, part in model.named_parameters() if id(part) in repeated}

    model.load_weights = load


def has_several_modules(options: Any) -> bool:
    """Whether a SpeculativeConfig is for several MTP modules of the target's own."""
    draft = options.draft_model_config
    return hasattr(getattr(draft, "hf_config", None), "specplus_num_modules")


def init_chain(vllm_config: VllmConfig, *args: Any) -> Any:
    """vLLM's `init_speculator`, but for several MTP modules of the target's own."""
    if has_several_modules(vllm_config.speculative_config):
        return ModulesSpeculator(vllm_config, args[0])
    return init_speculator(vllm_config, *args)


class ModulesRunner(GPUModelRunner):
    """vLLM's V2 runner with `ModulesSpeculator`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        with scoped(model_runner, "init_speculator", init_chain):
            super().__init__(vllm_config, device)
