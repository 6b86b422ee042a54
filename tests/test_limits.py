"""Size limits of files and functions (CONTRIBUTING.md), checked over the whole repository."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("vllm_specplus", "kernels", "tests", "benchmarks", "tools")
MAX_FILE_LINES = 400
MAX_KERNEL_FILE_LINES = 600  # modules with Triton kernels, and C++
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120  # one Triton kernel
MAX_ENGINE_LINES = 1500  # both runners: code, without blank lines, comments, docstrings
MAX_DRAFTER_LINES = 1000  # engine/drafters, what drafts in both runners: the same


def find_violations(root: Path) -> list[str]:
    """Returns one line per file or function under root that is too long."""
    python = [*root.glob("*.py"), *(p for f in FOLDERS for p in (root / f).rglob("*.py"))]
    cpp = [p for f in FOLDERS for p in (root / f).rglob("*") if p.suffix in (".cpp", ".h", ".cu")]
    return [
        *(problem for path in sorted(python) for problem in _python_problems(path, root)),
        *(problem for path in sorted(cpp) for problem in _too_long_file(path, root, True)),
    ]


def _python_problems(path: Path, root: Path) -> Iterator[str]:
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(), str(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    yield from _too_long_file(path, root, any(map(_is_kernel, functions)))
    for node in functions:
        limit = MAX_KERNEL_LINES if _is_kernel(node) else MAX_FUNCTION_LINES
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if num_lines > limit:
            yield (
                f"{path.relative_to(root)}:{node.lineno}: {node.name} has {num_lines} lines, "
                f"the limit is {limit}"
            )


def _is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the function is decorated with triton.jit, with or without arguments."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def _too_long_file(path: Path, root: Path, is_kernel: bool) -> Iterator[str]:
    limit = MAX_KERNEL_FILE_LINES if is_kernel else MAX_FILE_LINES
    num_lines = len(path.read_text().splitlines())
    if num_lines > limit:
        yield f"{path.relative_to(root)}: {num_lines} lines, the limit is {limit}"


def test_sizes() -> None:
    assert find_violations(ROOT) == []


def code_lines(source: str) -> int:
    """Lines that hold a token of code: no blank lines, comments or docstrings."""
    docstrings = {
        node.value.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_code = token.type not in _NO_CODE and token.start[0] not in docstrings
        lines.update(range(token.start[0], token.end[0] + 1) if is_code else ())
    return len(lines)


_NO_CODE = {
    getattr(tokenize, name)
    for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER")
}


def test_code_lines() -> None:
    source = '"""Two\nlines."""\n\nx = 1  # one\n# none\ny = (\n    2\n)\n'
    assert code_lines(source) == 4


def test_the_engine_stays_small() -> None:
    engine = ROOT / "vllm_specplus/engine"
    limits = {engine: MAX_ENGINE_LINES, engine / "drafters": MAX_DRAFTER_LINES}
    for folder, limit in limits.items():
        assert sum(code_lines(file.read_text()) for file in folder.glob("*.py")) < limit, folder


def _function(num_lines: int, decorator: str = "") -> str:
    return f"{decorator}def f():\n" + "    pass\n" * (num_lines - 1)


JIT = "@triton.jit\n"
JIT_CALL = "@triton.jit(do_not_specialize=['n'])\n"
METHOD = "class C:\n    async def f(self):\n" + "        pass\n"


@pytest.mark.parametrize(
    ("file", "limit_text", "too_long_text"),
    [
        ("vllm_specplus/a/b.py", "\n" * 400, "\n" * 401),
        ("setup.py", "\n" * 400, "\n" * 401),
        ("tests/core/test_a.py", "\n" * 400, "\n" * 401),
        ("kernels/specplus_kernels/reference.py", "\n" * 400, "\n" * 401),
        ("kernels/specplus_kernels/k.py", f"{JIT}{_function(2)}" + "\n" * 597, JIT + "\n" * 600),
        ("kernels/specplus_kernels/op/cpu.cpp", "\n" * 600, "\n" * 601),
        ("kernels/specplus_kernels/op/simd.h", "\n" * 600, "\n" * 601),
        ("benchmarks/b.py", _function(60), _function(61)),
        ("benchmarks/m.py", METHOD + "        pass\n" * 58, METHOD + "        pass\n" * 59),
        ("kernels/k.py", _function(120, JIT), _function(121, JIT)),
        ("kernels/k.py", _function(120, JIT_CALL), _function(121, JIT_CALL)),
    ],
)
def test_a_planted_violation_is_found(
    tmp_path: Path, file: str, limit_text: str, too_long_text: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(limit_text)
    assert find_violations(tmp_path) == []
    if too_long_text.startswith(JIT + "\n"):  # a decorator needs its function
        too_long_text = JIT + _function(2) + too_long_text[len(JIT) :]
    path.write_text(too_long_text)
    [found] = find_violations(tmp_path)
    assert found.startswith(file)
