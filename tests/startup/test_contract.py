"""What the engines count on in vLLM holds in both versions: the installed one, and the CUDA wheel
of 0.33, whose text is read from the package index. It is the one test that needs a network, or what
an earlier run cached.

`SABOTAGES` are the changes of vLLM that the checks were seen to catch, in vLLM's own text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.wheel import Wheel
from tests.startup import contract
from tests.startup.sources import MissingNameError, Sources
from vllm_specplus.startup import host

CUDA_VERSION = "0.33.0"
MODULES = contract.engine_modules()


def read_installed(path: str) -> str | None:
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parents[1] / path
    return file.read_text(encoding="utf-8") if file.exists() else None


@cache
def sources(version: str) -> Sources:
    if version == "installed":
        return Sources("vllm", read_installed)
    wheel = Wheel(version)

    def read(path: str) -> str | None:
        try:
            return wheel.read(path)
        except OSError as error:
            pytest.skip(f"the wheel of vllm {version} is not cached and cannot be read: {error}")

    return Sources("vllm", read)


def problems(vllm: Sources) -> Iterator[str]:
    """Whatever any check has to say, its name first."""
    for engine in contract.ENGINES:
        yield from _named("hooks", contract.hook_problems(vllm, engine))
    for file, module in zip(contract.ENGINE_FILES, MODULES, strict=True):
        text = file.read_text(encoding="utf-8")
        yield from _named("overrides", contract.override_problems(vllm, module))
        yield from _named("attributes", contract.attribute_problems(vllm, module))
        yield from _named("instances", contract.instance_problems(vllm, text))
        yield from _named("calls", contract.call_problems(vllm, sources("installed"), text))
    yield from _named("order", contract.order_problems(vllm))
    yield from _named("cache", contract.cache_problems(vllm))


def _named(check: str, found: Iterator[str]) -> Iterator[str]:
    return (f"{check}: {problem}" for problem in found)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["installed", CUDA_VERSION])
def test_vllm_has_what_we_count_on(version: str) -> None:
    assert list(problems(sources(version))) == []


WORKER = "vllm/v1/worker/gpu/"
SABOTAGES: dict[str, tuple[str, str, str, str]] = {
    "a hook is renamed": (
        "vllm/v1/worker/gpu_model_runner.py",
        "def _bookkeeping_sync(",
        "def _bookkeeping(",
        "hooks: CPUModelRunner._bookkeeping_sync: vllm.v1.worker.cpu_model_runner.CPUModelRunner "
        "has no _bookkeeping_sync",
    ),
    "an imported class is renamed": (
        WORKER + "states.py",
        "class RequestState",
        "class RequestStates",
        "hooks: RequestState: vllm.v1.worker.gpu.states has no RequestState",
    ),
    "a parameter is removed": (
        WORKER + "sample/sampler.py",
        "        expanded_local_pos: torch.Tensor,\n        seq_lens_upper_bound_np",
        "        seq_lens_upper_bound_np",
        "hooks: Sampler.apply_sampling_params: its parameters are ",
    ),
    "parameters change places": (
        WORKER + "model_states/default.py",
        "        input_batch: InputBatch,\n        cudagraph_mode: CUDAGraphMode,\n",
        "        cudagraph_mode: CUDAGraphMode,\n        input_batch: InputBatch,\n",
        "overrides: DefaultModelState.prepare_attn",
    ),
    "vLLM hands one thing more to what we override": (
        WORKER + "model_runner.py",
        "                for_capture=dummy_run and batch_desc.cg_mode == CUDAGraphMode.FULL,\n"
        "            )\n\n        input_ids",
        "                for_capture=dummy_run, one_more=1,\n            )\n\n        input_ids",
        "overrides: DefaultModelState.prepare_attn",
    ),
    "vLLM's function has a new first parameter": (
        WORKER + "sample/logprob.py",
        "def compute_topk_scores(\n",
        "def compute_topk_scores(\n    one_more,\n",
        "calls: compute_topk_scores(logits[order], num_logprobs",
    ),
    "an attribute that we inherit is renamed": (
        WORKER + "model_states/interface.py",
        "self.max_num_reqs =",
        "self.num_reqs_max =",
        "attributes: DefaultModelState has no max_num_reqs",
    ),
    "a field is renamed": (
        WORKER + "input_batch.py",
        "    num_draft_tokens_per_req:",
        "    num_drafts_per_req:",
        "instances: InputBatch has no num_draft_tokens_per_req",
    ),
    "inputs are prepared before attention": (
        WORKER + "model_runner.py",
        "            attn_metadata = self.model_state.prepare_attn(",
        "            self.model_state.prepare_inputs(input_batch, self.req_states)\n"
        "            attn_metadata = self.model_state.prepare_attn(",
        "order: GPUModelRunner.execute_model calls self.model_state.prepare_inputs before "
        "self.model_state.prepare_attn",
    ),
    "drafts are proposed before sampling": (
        WORKER + "model_runner.py",
        "        sampler_output, num_sampled, num_rejected = self.sample(",
        "        self.speculator.propose(input_batch)\n"
        "        sampler_output, num_sampled, num_rejected = self.sample(",
        "order: GPUModelRunner.sample_tokens calls self.speculator.propose before "
        "self.postprocess_sampled",
    ),
    "the cache of a GPU is laid out otherwise": (
        "vllm/v1/attention/backends/flashinfer.py",
        "k_cache, v_cache = kv_cache.transpose(1, 2).split(",
        "k_cache, v_cache = kv_cache.split(",
        "cache: FLASHINFER does not read its cache by kv_cache.transpose(1, 2).split(",
    ),
    "a step of the order is gone": (
        WORKER + "model_runner.py",
        "sampler_output = self.rejection_sampler(",
        "sampler_output = self.verify(",
        "order: GPUModelRunner.sample does not call self.rejection_sampler",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SABOTAGES)
def test_a_change_of_vllm_is_named(name: str) -> None:
    path, before, after, said = SABOTAGES[name]

    def changed(asked: str) -> str | None:
        text = read_installed(asked)
        if asked != path or text is None:
            return text
        assert before in text
        return text.replace(before, after)

    check = said.partition(":")[0]
    found = [p for p in problems(Sources("vllm", changed)) if p.startswith(check)]
    assert any(problem.startswith(said) for problem in found), found


@pytest.mark.parametrize("engine", contract.ENGINES, ids=lambda engine: engine.name)
def test_text_and_import_agree_on_every_signature(engine: host.Engine) -> None:
    """What is read in the text is what Python finds when it imports the same vLLM."""
    modules = contract.imports(engine)
    compared = 0
    for path, parameters in engine.hooks.items():
        module = modules[path.partition(".")[0]]
        assert host.find_hook(path, module, path, parameters).missing is None
        if "cache_clear" not in path:
            vllm = sources("installed")
            read = vllm.signature(vllm.find(module, path))
            found = host._resolve(module, path)
            imported = inspect.signature(getattr(found, "fget", found))  # of a property its getter
            kinds = [(p.name, p.kind) for p in imported.parameters.values()]
            assert [(p.name, p.kind) for p in read.parameters.values()] == kinds, path
            compared += 1
    assert compared > 15


PACKAGE = {
    "host/__init__.py": "if True:\n    from .inner import Base as Renamed\n",
    "host/inner.py": "import functools\nfrom elsewhere import Foreign\n"
    "class Root:\n    first: int\n    def method(self, a, b=1, *, c): self.late = 1\n"
    "class Base(Root, Foreign):\n    second: int = 0\n    @classmethod\n    def make(cls, x): ...\n"
    "@functools.cache\ndef cached(x): ...\n",
    "host/sub/__init__.py": "",
    "host/sub/deep.py": "from host import inner\nfrom ..inner import cached\n"
    "class Local(inner.Base):\n    pass\n",
}


@pytest.mark.parametrize(
    ("module", "path", "signature"),
    [
        ("host", "Renamed.method", "(self, a, b=None, *, c)"),
        ("host", "Renamed.make", "(x)"),
        ("host", "Renamed", "(first, second=None)"),
        ("host", "sub.deep.Local.method", "(self, a, b=None, *, c)"),
        ("host.sub", "deep.cached", "(x)"),
        ("host.inner", "cached.cache_clear", "(*args, **kwargs)"),
        ("host.inner", "Foreign", "(*args, **kwargs)"),
    ],
)
def test_names_are_followed(module: str, path: str, signature: str) -> None:
    package = Sources("host", PACKAGE.get)
    assert str(package.signature(package.find(module, path))) == signature


@pytest.mark.parametrize("path", ["Absent", "sub.absent", "Renamed.absent", "sub.deep.cached.x"])
def test_missing_names_are_missed(path: str) -> None:
    with pytest.raises(MissingNameError, match=path.rpartition(".")[2]):
        Sources("host", PACKAGE.get).find("host", path)


def test_attributes_are_those_of_bases_too() -> None:
    package = Sources("host", PACKAGE.get)
    found = package.attributes(package.find("host.sub.deep", "Local"))
    assert found == {"first", "second", "method", "make", "late"}


@pytest.mark.parametrize(
    ("ours", "accepted"),
    [
        (lambda self, a, b=1, *, c=0: None, True),
        (lambda self, a, *args, **kwargs: None, True),
        (lambda *args, **kwargs: None, True),
        (lambda self, a: None, False),
        (lambda self, b, a=1, *, c=0: None, False),
        (lambda self, a, b, *, c=0: None, False),
        (lambda self, x, b=1, *, c=0: None, False),
        (lambda self, a, b=1: None, False),
    ],
)
def test_an_override_takes_what_the_overridden_takes(ours: Callable, accepted: bool) -> None:
    def theirs(self, a, b=1, *, c=0): ...

    both = inspect.signature(ours), inspect.signature(theirs)
    assert (contract.misplaced(*both) is None and contract.refuses(*both) is None) == accepted
