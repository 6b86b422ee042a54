"""Imports go one way: plugin, cli, startup and train, engine, round, proposers, core, kernels."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    ("plugin",),
    ("cli",),
    ("startup", "train"),  # beside each other: neither imports the other
    ("engine",),
    ("host_drafts",),
    ("round",),
    ("proposers",),
    ("core",),
    ("specplus_kernels",),
)
LAYERS = {layer: height for height, layers in enumerate(ORDER) for layer in layers}
VLLM_IMPORTERS = ("startup", "engine", "train.target")
LEAVES = ("errors", "medusa_trees", "shapes", "config")  # each may import those before it
KERNEL_IMPORTS = {*sys.stdlib_module_names, "torch", "triton", "specplus_kernels"}


def find_violations(root: Path) -> list[str]:
    """Returns one line per import under root that breaks the rule, as `file:line: what`."""
    return [
        f"{path.relative_to(root)}:{line}: {problem}"
        for package in (root / "vllm_specplus", root / "kernels/specplus_kernels")
        for path in sorted(package.rglob("*.py"))
        for line, target in _imports(path, package)
        if (problem := _problem(_module_name(path, package), target))
    ]


def _module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) of every import, those written as calls included."""
    module = _module_name(path, package)
    here = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                base = _absolute(here, node.module, node.level)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def _absolute(here: str, module: str | None, level: int) -> str:
    parents = here.split(".")[: len(here.split(".")) - level + 1] if level else []
    return ".".join([*parents, *([module] if module else [])])


def _layer(module: str) -> str:
    """The layer of a dotted name: the part below vllm_specplus, or the top-level package."""
    top, *rest = module.split(".")
    return rest[0] if top == "vllm_specplus" and rest else top


def _problem(source: str, target: str) -> str | None:
    """Says what is wrong with source importing target, or None."""
    top, own, other = target.split(".")[0], _layer(source), _layer(target)
    if own == "specplus_kernels":
        return None if top in KERNEL_IMPORTS else f"kernels may not import {top}"
    if top == "vllm":
        allowed = own in VLLM_IMPORTERS or source.removeprefix("vllm_specplus.") in VLLM_IMPORTERS
        return None if allowed else f"only {', '.join(VLLM_IMPORTERS)} may import vllm"
    if own == "vllm_specplus" or top not in ("vllm_specplus", "specplus_kernels"):
        return None
    if own not in (*LAYERS, *LEAVES):
        return f"{own} has no place in the layers: give it one in {Path(__file__).name}"
    if own in LEAVES:
        allowed = other in LEAVES and LEAVES.index(other) <= LEAVES.index(own)
        return None if allowed else f"the leaf {own} may not import {other}"
    if other in LAYERS and other != own and LAYERS[other] <= LAYERS[own]:
        return f"{own} may not import {other}"
    return None


def find_folders_without_init(root: Path) -> list[str]:
    """Returns the package folders with modules but no __init__.py: a wheel would leave them out."""
    return [
        str(folder.relative_to(root))
        for package in (root / "vllm_specplus", root / "kernels/specplus_kernels")
        for folder in sorted({path.parent for path in package.rglob("*.py")})
        if not (folder / "__init__.py").exists()
    ]


def test_imports_go_one_way() -> None:
    assert find_violations(ROOT) == []


def find_strangers(root: Path) -> list[str]:
    """Returns the engine's modules that touch nothing of vLLM's: they belong further down."""
    engine = root / "vllm_specplus/engine"
    compat = "vllm_specplus.engine.compat"
    return [
        str(path.relative_to(root))
        for path in sorted(engine.rglob("*.py"))
        if path.stem != "__init__" and not path.stem.startswith("compat")
        if not any(name.startswith(compat) for _, name in _imports(path, root / "vllm_specplus"))
    ]


def test_the_engine_is_what_touches_vllm() -> None:
    assert find_strangers(ROOT) == []


def test_an_engine_module_without_vllm_is_found(tmp_path: Path) -> None:
    _plant(tmp_path, "vllm_specplus/engine/compat_x.py", "import vllm")
    _plant(tmp_path, "vllm_specplus/engine/a.py", "from vllm_specplus.engine.compat_x import vllm")
    _plant(tmp_path, "vllm_specplus/engine/drafters/b.py", "import torch")
    assert find_strangers(tmp_path) == ["vllm_specplus/engine/drafters/b.py"]


def test_every_package_folder_is_a_package() -> None:
    assert find_folders_without_init(ROOT) == []


def test_kernels_folder_is_not_a_package() -> None:
    """A top-level package named kernels would shadow the one that transformers imports."""
    assert not (ROOT / "kernels/__init__.py").exists()


def _plant(root: Path, file: str, line: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{line}\n")


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        ("vllm_specplus/core/tree.py", "import vllm", "only startup, engine"),
        ("vllm_specplus/cli.py", "from vllm.config import VllmConfig", "only startup, engine"),
        ("vllm_specplus/plugin.py", "importlib.import_module('vllm')", "only startup, engine"),
        ("vllm_specplus/train/corpus.py", "import vllm", "only startup, engine, train.target"),
        ("vllm_specplus/train/a.py", "from ..startup import host", "train may not import startup"),
        ("vllm_specplus/startup/a.py", "from .. import train", "startup may not import train"),
        ("vllm_specplus/core/a/b.py", "from ...engine import v1", "core may not import engine"),
        ("vllm_specplus/core/__init__.py", "from ..cli import main", "core may not import cli"),
        ("vllm_specplus/core/tree.py", "from vllm_specplus import proposers", "import proposers"),
        ("vllm_specplus/engine/v1.py", "import vllm_specplus.plugin", "engine may not import plug"),
        ("vllm_specplus/config.py", "import vllm_specplus.core.tree", "leaf config may not import"),
        ("vllm_specplus/errors.py", "from vllm_specplus import config", "leaf errors may not"),
        ("vllm_specplus/extra.py", "import vllm_specplus.core", "extra has no place"),
        ("kernels/specplus_kernels/a/k.py", "import numpy", "kernels may not import numpy"),
        ("kernels/specplus_kernels/k.py", "import vllm_specplus", "kernels may not import vllm_sp"),
        ("kernels/specplus_kernels/k.py", "def f():\n    import vllm", "kernels may not import vl"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str, problem: str) -> None:
    _plant(tmp_path, file, line)
    [found] = find_violations(tmp_path)
    assert found.startswith(f"{file}:") and problem in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("vllm_specplus/engine/v1.py", "from vllm.v1 import worker\nfrom ..core import tree"),
        ("vllm_specplus/engine/v1.py", "from vllm_specplus import config, __version__, errors"),
        ("vllm_specplus/train/target.py", "from vllm import LLM\nfrom ..engine import v1"),
        ("vllm_specplus/cli.py", "from vllm_specplus.train.command import train"),
        ("vllm_specplus/core/tree.py", "import torch\nfrom specplus_kernels import kv_commit"),
        ("vllm_specplus/config.py", "import pydantic\nfrom vllm_specplus.errors import X"),
        ("vllm_specplus/__init__.py", "from vllm_specplus.plugin import arm"),
        ("kernels/specplus_kernels/a/k.py", "import math, torch\nfrom .. import dispatch"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, file: str, line: str) -> None:
    _plant(tmp_path, file, line)
    assert find_violations(tmp_path) == []


def test_a_folder_without_init_is_found(tmp_path: Path) -> None:
    _plant(tmp_path, "vllm_specplus/__init__.py", "")
    _plant(tmp_path, "vllm_specplus/core/tree.py", "")
    assert find_folders_without_init(tmp_path) == ["vllm_specplus/core"]
