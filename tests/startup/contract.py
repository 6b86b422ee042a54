"""What our engines count on in vLLM, checked in the text of one of its versions.

Everything is derived: names from the compat files, hooks from `startup/host.py`, overrides from the
engine's classes, calls from its source. Only the order of vLLM's calls is written down here.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from inspect import Parameter, Signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import wrapt

from tests.startup.sources import MissingNameError, Sources
from vllm_specplus import engine as engine_package
from vllm_specplus.engine.attention import GPU_BACKENDS
from vllm_specplus.engine.compat import AttentionBackendEnum
from vllm_specplus.startup import host

ENGINES = [engine for engine in vars(host).values() if isinstance(engine, host.Engine)]
ENGINE_FILES = sorted(Path(engine_package.__path__[0]).rglob("*.py"))
POSITIONAL = Parameter.POSITIONAL_OR_KEYWORD
V2_RUNNER = "vllm.v1.worker.gpu.model_runner"
V2_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
V2_VERIFIER = "vllm.v1.worker.gpu.spec_decode.rejection_sampler"
V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
V1_CPU_RUNNER = "vllm.v1.worker.cpu_model_runner"
V2_MODULES = "vllm.v1.worker.gpu.spec_decode.multi_module_mtp.speculator"
MIMO_V2 = "vllm.model_executor.models.mimo_v2_mtp"
ORDERS: dict[tuple[str, str], tuple[str, ...]] = {
    (MIMO_V2, "MiMoV2MultiTokenPredictor.__init__"): ("_MiMoV2MTPLayers",),
    (V2_RUNNER, "GPUModelRunner.__init__"): ("RequestState", "init_speculator"),
    (V2_RUNNER, "GPUModelRunner.load_model"): (
        "init_model_state",
        "self.model_state.custom_sampler",
    ),
    (V2_RUNNER, "GPUModelRunner.initialize_kv_cache"): (
        "BlockTables",
        "init_kv_cache",
        "self.model_state.initialize_kv_cache",
    ),
    (V2_RUNNER, "GPUModelRunner.execute_model"): (
        "self.add_requests",
        "self.prepare_inputs",
        "self.prepare_attn",
        "self.model_state.prepare_attn",
        "self.model_state.prepare_inputs",
        "self.cudagraph_manager.run_fullgraph",
        "ExecuteModelState",
    ),
    (V2_RUNNER, "GPUModelRunner.sample"): (
        "self.model.compute_logits",
        "self.structured_outputs_worker.apply_grammar_bitmask",
        "self.rejection_sampler",
    ),
    (V2_RUNNER, "GPUModelRunner.sample_tokens"): (
        "self.sample",
        "self.postprocess_sampled",
        "self.speculator.propose",
        "self.draft_tokens_handler.set_draft_tokens",
    ),
    (V2_GRAPHS, "ModelCudaGraphManager.capture"): (
        "model_state.prepare_dummy_inputs",
        "prepare_inputs_to_capture",
    ),
    (V2_GRAPHS, "prepare_inputs_to_capture"): (
        "block_table_provider.get_dummy_slot_mappings",
        "model_state.prepare_attn",
    ),
    (V2_VERIFIER, "RejectionSampler._verify_in_chunks"): (
        "self._verify",
        "self._get_logprobs_tensors",
    ),
    (V2_MODULES, "MultiModuleMTPSpeculator.propose"): (
        "self._prepare_inputs",
        "self.block_tables.compute_slot_mappings",
        "pad_trailing_draft_slots",
        "self._build_attn_metadata",
        "self._generate_drafts",
    ),
    (V2_MODULES, "MultiModuleMTPSpeculator._generate_drafts"): ("cache_inputs", "self._run_model"),
    (V1_RUNNER, "GPUModelRunner.execute_model"): (
        "self._update_states",
        "self._prepare_inputs",
        "self._build_attention_metadata",
        "self._model_forward",
    ),
    (V1_RUNNER, "GPUModelRunner.sample_tokens"): ("self._sample", "self._bookkeeping_sync"),
    (V1_CPU_RUNNER, "CPUModelRunner.load_model"): (
        "self.drafter.load_model",
        "self._setup_eagle3_aux_hidden_state_outputs",
    ),
}
"""Calls in vLLM's functions that must stand in this order."""
PACKED = "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)"
"""How backends find keys and values in the cache of a GPU."""
INSTANCES = {
    "input_batch": "InputBatch",
    "req_states": "RequestState",
    "sampler": "Sampler",
}
"""The V2 engine's names of objects of vLLM, and their classes."""
CALLERS = sorted({module for module, _ in ORDERS})
"""Where vLLM calls what we override."""


def engine_modules() -> list[str]:
    """The modules in `ENGINE_FILES`."""
    package = Path(engine_package.__path__[0])
    parts = [file.relative_to(package).with_suffix("").parts for file in ENGINE_FILES]
    return [".".join((engine_package.__name__, *part)) for part in parts]


def imports(engine: host.Engine) -> dict[str, str]:
    """Module of every vLLM name in the engine's compat files."""
    return {name: m for file in engine.compat for name, m in host._compat_imports(file)}


def engine_of(text: str) -> host.Engine:
    """The engine to which a file belongs, by the compat file that it imports from."""
    last = (e for e in reversed(ENGINES) if f"engine.{Path(e.compat[-1]).stem} import" in text)
    return next(last, ENGINES[0])


def hook_problems(sources: Sources, engine: host.Engine) -> Iterator[str]:
    """Names that are gone, and parameters that are gone or in another order."""
    modules = imports(engine)
    for path, parameters in {**dict.fromkeys(modules, ""), **engine.hooks}.items():
        try:
            found = sources.find(modules[path.partition(".")[0]], path)
            if not parameters:
                continue
            names = list(sources.signature(found).parameters)
        except (MissingNameError, KeyError) as missing:
            yield f"{path}: {missing}"
            continue
        wanted = parameters.split()
        if [name for name in names if name in wanted] != wanted:
            yield f"{path}: its parameters are {' '.join(names)}; wanted {parameters}"


def overrides(module: str) -> Iterator[tuple[str, str, Signature]]:
    """(module, path) of every vLLM function that a module's classes override, and our signature.

    A proxy overrides the hooks that its methods are named like.
    """
    ours = import_module(module)
    engine = engine_of(inspect.getsource(ours))
    for cls in vars(ours).values():
        if not isinstance(cls, type) or cls.__module__ != module:
            continue
        for name in dir(cls):
            function = getattr(cls, name)
            if not _is_ours(function) or name == "__init__":
                continue
            mro = [c for c in cls.__mro__ if name in vars(c)]
            theirs = next((c for c in mro if c.__module__.startswith("vllm.")), None)
            if theirs is not None:
                path = f"{theirs.__qualname__}.{name}"
                yield theirs.__module__, path, inspect.signature(function)
            elif issubclass(cls, wrapt.ObjectProxy):
                for path in engine.hooks:
                    if path.endswith(f".{name}"):
                        owner = imports(engine).get(path.partition(".")[0], "")
                        yield owner, path, inspect.signature(function)


def _is_ours(function: Any) -> bool:
    is_function = inspect.isfunction(function) or inspect.ismethod(function)
    return is_function and function.__module__.startswith("vllm_specplus.")


def override_problems(sources: Sources, module: str) -> Iterator[str]:
    """Overrides with vLLM's parameters in other places, and those that cannot be called in every
    way that vLLM's function can, nor in all the ways in which it is called."""
    for theirs_module, path, ours in overrides(module):
        try:
            theirs = sources.signature(sources.find(theirs_module, path))
            problem = misplaced(ours, theirs)
            if problem is None and (problem := refuses(ours, theirs)) is not None:
                calls = list(_calls_of(sources, theirs_module, path))
                if calls and all(isinstance(_bound(ours, c, 1), list) for c in calls):
                    problem = None
        except MissingNameError as missing:
            problem = str(missing)
        if problem is not None:
            yield f"{path}: {problem}"


def _calls_of(sources: Sources, home: str, path: str) -> Iterator[ast.Call]:
    """The runners' calls of a method, on objects that are named like its class: `self.model_state`
    for ModelState and DefaultModelState, `self` in the class's own module."""
    cls, _, name = path.rpartition(".")
    words = re.sub("(?<!^)(?=[A-Z])", "_", cls).lower()
    for module in CALLERS:
        for called, call in sources.calls(module):
            owner, _, method = called.rpartition(".")
            receiver = owner.rpartition(".")[2] or "nothing"
            if method == name and (words.endswith(receiver) or (owner, module) == ("self", home)):
                yield call


def misplaced(ours: Signature, theirs: Signature) -> str | None:
    """Parameters that both name, but at different places."""
    places = [
        {p.name: i for i, p in enumerate(s.parameters.values()) if p.kind is POSITIONAL}
        for s in (ours, theirs)
    ]
    moved = [n for n in places[0].keys() & places[1].keys() if places[0][n] != places[1][n]]
    return f"{', '.join(sorted(moved))} stands elsewhere in {theirs}" if moved else None


def refuses(ours: Signature, theirs: Signature) -> str | None:
    """Why a caller of `theirs` may not call `ours`; None if it may."""
    named = [p for p in theirs.parameters.values() if p.kind is POSITIONAL]
    only = [p for p in theirs.parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    first, rest = named[:1], [*named[1:], *only]
    required = [p for p in rest if p.default is Parameter.empty]
    try:
        ours.bind(*named, **{p.name: p for p in only})
        ours.bind(*first, **{p.name: p for p in rest})
        ours.bind(*first, **{p.name: p for p in required})
    except TypeError as error:
        return f"{error} in {ours}; vLLM's is {theirs}"
    return None


def call_problems(sources: Sources, known: Sources, text: str) -> Iterator[str]:
    """Calls in a file of ours that vLLM's functions do not take, or take otherwise than in the
    known version.

    Seen are calls of what a compat file imports and of methods that are named like a hook, where
    one of the hooks of that name must take the call. Which engine's hooks count depends on the
    compat file that the text imports from.
    """
    engine = engine_of(text)
    modules = imports(engine)
    paths: dict[str, list[str]] = {name: [name] for name in modules}
    for path in engine.hooks:
        if "." in path:
            paths.setdefault(f".{path.rpartition('.')[2]}", []).append(path)
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        match call.func:
            case ast.Name(id=name):
                candidates = paths.get(name, [])
            case ast.Attribute(attr=name):
                candidates = paths.get(f".{name}", [])
            case _:
                continue
        wanted = [_bound_by(known, modules, path, call) for path in candidates]
        found = [_bound_by(sources, modules, path, call) for path in candidates]
        pairs = zip(wanted, found, strict=True)
        if candidates and not any(isinstance(w, list) and w == f for w, f in pairs):
            yield f"{ast.unparse(call)[:80]} binds {found[0]}; wanted {wanted[0]}"


def _bound_by(
    sources: Sources, modules: Mapping[str, str], path: str, call: ast.Call
) -> list[str] | str:
    try:
        found = sources.find(modules[path.partition(".")[0]], path)
        on_object = "." in path and ast.unparse(call.func) != path
        return _bound(sources.signature(found, called_on_object=on_object), call)
    except (MissingNameError, KeyError) as missing:
        return f"{path}: {missing}"


def _bound(signature: Signature, call: ast.Call, num_hidden: int = 0) -> list[str] | str:
    """The parameters that a call fills, or why it cannot. num_hidden: parameters, such as `self`,
    that the call does not show."""
    shown = [a for a in call.args if not isinstance(a, ast.Starred)]
    keywords = {k.arg: None for k in call.keywords if k.arg is not None}
    starred = len(shown) < len(call.args) or len(keywords) < len(call.keywords)
    bind = signature.bind_partial if starred else signature.bind
    try:
        return sorted(bind(*[None] * num_hidden, *shown, **keywords).arguments)
    except TypeError as error:
        return str(error)


def attribute_problems(sources: Sources, module: str) -> Iterator[str]:
    """What our classes read off `self` that neither they nor their bases in vLLM have."""
    for cls in vars(import_module(module)).values():
        if not isinstance(cls, type) or cls.__module__ != module:
            continue
        theirs = next((c for c in cls.__mro__ if c.__module__.startswith("vllm.")), None)
        if theirs is None:
            continue
        ours = [c for c in cls.__mro__ if c.__module__.startswith("vllm_specplus.")]
        trees = [ast.parse(inspect.getsource(c)) for c in ours]
        known = {name for c in (*ours, object) for name in dir(c)} - set(dir(theirs))
        known |= {name for tree in trees for name in set_on(tree, "self")}
        known |= {name for c in ours for name in inspect.get_annotations(c)}
        read = {name for tree in trees for name in read_off(tree, "self")}
        yield from _unknown(sources, theirs.__module__, theirs.__qualname__, read - known)


def instance_problems(sources: Sources, text: str) -> Iterator[str]:
    """What a file reads off the objects of `INSTANCES` that they do not have."""
    modules, tree = imports(engine_of(text)), ast.parse(text)
    everywhere = [ast.parse(file.read_text(encoding="utf-8")) for file in ENGINE_FILES]
    for name, cls in INSTANCES.items():
        if cls in modules:
            ours = {attribute for engine in everywhere for attribute in set_on(engine, name)}
            yield from _unknown(sources, modules[cls], cls, read_off(tree, name) - ours)


def _unknown(sources: Sources, module: str, cls: str, names: set[str]) -> Iterator[str]:
    try:
        there = sources.attributes(sources.find(module, cls))
    except MissingNameError as missing:
        yield f"{cls}: {missing}"
        return
    if absent := sorted(names - there):
        yield f"{cls} has no {', '.join(absent)}"


def read_off(tree: ast.AST, owner: str) -> set[str]:
    """Attributes that are read of a variable or attribute of that name."""
    return {node.attr for node in _attributes_of(tree, owner) if isinstance(node.ctx, ast.Load)}


def set_on(tree: ast.AST, owner: str) -> set[str]:
    """Attributes that are assigned to a variable or attribute of that name."""
    return {node.attr for node in _attributes_of(tree, owner) if isinstance(node.ctx, ast.Store)}


def _attributes_of(tree: ast.AST, owner: str) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _last_word(node.value) == owner:
            yield node


def _last_word(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2].lstrip("_")


def cache_problems(sources: Sources) -> Iterator[str]:
    """Backends that do not split their KV cache as `packed_kv_views` does."""
    for name in GPU_BACKENDS:
        module = AttentionBackendEnum[name].value.rpartition(".")[0]
        if PACKED not in (ast.unparse(call) for _, call in sources.calls(module)):
            yield f"{name} does not read its cache by {PACKED}"


def order_problems(sources: Sources) -> Iterator[str]:
    """Calls of `ORDERS` that are gone or stand in another order."""
    for (module, path), wanted in ORDERS.items():
        try:
            calls = [name for name, _ in sources.calls(module, path)]
        except MissingNameError as missing:
            yield f"{path}: {missing}"
            continue
        if absent := [name for name in wanted if name not in calls]:
            yield f"{path} does not call {', '.join(absent)}"
            continue
        last = {name: index for index, name in enumerate(calls)}
        for before, after in pairwise(wanted):
            if last[before] > calls.index(after):
                yield f"{path} calls {after} before {before}"
