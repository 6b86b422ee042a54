"""A target's own MTP modules, all of them, built and loaded as vLLM's draft model.

A draft that is deeper than the checkpoint has modules goes on with the last one: 1, 2, 2 for three
tokens of two modules. Every step has an attention layer of its own, so each has a KV cache of its
own; the layers that the checkpoint does not have take the last module's weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from vllm_specplus.core.mtp_models import MTP_MODELS, NEXTN, HiddenStateFrom
from vllm_specplus.engine.compat import (
    VllmConfig,
    base_loader,
    disable_mtp_completeness_check,
    mimo_v2_mtp,
    scoped,
)

Weights = Iterable[tuple[str, torch.Tensor]]


def has_several_modules(options: Any) -> bool:
    """Whether a SpeculativeConfig is for several MTP modules of the target's own."""
    draft = options.draft_model_config
    return hasattr(getattr(draft, "hf_config", None), "specplus_num_modules")


def hidden_state_from(options: Any) -> HiddenStateFrom:
    """Whose hidden state the modules after the first of a SpeculativeConfig read."""
    if not has_several_modules(options):
        return "previous"
    row = MTP_MODELS[options.draft_model_config.hf_config.model_type]
    return row.hidden_state_from or "previous"


def load_modules(load: Callable[[], nn.Module], options: Any) -> Any:
    """What `load` loads of a SpeculativeConfig: if for several modules, with as many layers as the
    draft is deep. Its attribute `spec_step` is the step that it runs next."""
    several = has_several_modules(options)
    with all_modules(options) if several else nullcontext():
        model: Any = run_uncompiled(load())
    model.spec_step = 0
    if several and "spec_step_idx" not in inspect.signature(type(model).forward).parameters:
        hand_on_the_step(model, model.model)
    return model


def run_uncompiled(model: nn.Module) -> nn.Module:
    """Keeps vLLM from compiling a model: compiled code would keep the first step's module."""
    compiled: list[Any] = [part for part in model.modules() if hasattr(part, "do_not_compile")]
    for part in compiled:
        part.do_not_compile = True
    return model


@contextmanager
def all_modules(options: Any) -> Iterator[None]:
    """While several modules of a SpeculativeConfig are loaded."""
    config = options.draft_model_config.hf_config
    field = MTP_MODELS[config.model_type].field
    num_modules, num_layers = config.specplus_num_modules, config.n_predict
    initialize_model, layers = base_loader.initialize_model, mimo_v2_mtp._MiMoV2MTPLayers

    def mimo_v2_layers(**kwargs: Any) -> nn.Module:
        """The class builds one layer, whatever its config counts (vLLM issue 52688)."""
        return layers(**kwargs | {"num_mtp_layers": num_layers})

    def initialize(vllm_config: VllmConfig, **kwargs: Any) -> nn.Module:
        with (
            counting(vllm_config.model_config, {NEXTN, field}, num_layers),
            scoped(mimo_v2_mtp, "_MiMoV2MTPLayers", mimo_v2_layers),
        ):
            model = initialize_model(vllm_config=vllm_config, **kwargs)
        if isinstance(model.model, mimo_v2_mtp.MiMoV2MultiTokenPredictor):
            model.model.num_mtp_layers = num_layers
        repeat_last_module(model, num_modules, num_layers)
        return model

    with scoped(base_loader, "initialize_model", initialize):
        yield


def hand_on_the_step(model: Any, inner: Any) -> None:
    """For classes whose inner model chooses by a step that the outer one does not hand on."""
    forward = inner.forward
    inner.forward = lambda *args, **kwargs: forward(*args, **kwargs, spec_step_idx=model.spec_step)


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
