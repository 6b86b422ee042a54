"""Names and signatures of a package, found in its source text without importing it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef
CACHES = ("cache", "lru_cache")
ANYTHING = Signature(
    [Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)]
)
"""Of what lies outside the package."""


class MissingNameError(LookupError):
    """A name that the sources do not have; the message says where it was looked for."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a name stands for. node: None for what lies outside the package. owner: its class."""

    module: str
    node: ast.AST | None
    owner: ast.ClassDef | None = None


class Sources:
    """A package as text. read: a file's text by its path from the package's parent, or None."""

    def __init__(self, package: str, read: Callable[[str], str | None]) -> None:
        self._package, self._read = package, read
        self._modules: dict[str, tuple[ast.Module, bool] | None] = {}

    def find(self, module: str, path: str) -> Found:
        """`path` in `module`, e.g. a class and its method, through imports and base classes.

        Raises MissingNameError.
        """
        found = Found(module, self._module(module)[0])
        for name in path.split("."):
            found = self._member(found, name)
        return found

    def signature(self, found: Found, called_on_object: bool = False) -> Signature:
        """As `inspect.signature` gives it of the imported thing; of a method without `self` where
        it is called on an object. Raises MissingNameError for what is no function and no class."""
        if isinstance(found.node, ast.ClassDef):
            try:
                return self.signature(self._member(found, "__init__"), called_on_object=True)
            except MissingNameError:
                return Signature(list(self._fields(found)))
        if found.node is None:
            return ANYTHING
        if not isinstance(found.node, Function):
            raise MissingNameError(f"{found.module}: {ast.dump(found.node)[:60]} has no signature")
        parameters = list(_parameters(found.node.args))
        decorators = _decorators(found.node)
        bound = "classmethod" in decorators or called_on_object
        if found.owner is not None and bound and "staticmethod" not in decorators:
            parameters = parameters[1:]
        return Signature(parameters)

    def attributes(self, found: Found) -> set[str]:
        """What a class and its bases define, and what their methods assign to `self`."""
        names: set[str] = set()
        for cls in self._bases_first_to_last(found):
            assert isinstance(cls.node, ast.ClassDef)
            for node in ast.walk(cls.node):
                match node:
                    case ast.FunctionDef() | ast.AsyncFunctionDef() if node in cls.node.body:
                        names.add(node.name)
                    case ast.Name(ctx=ast.Store()):
                        names.add(node.id)
                    case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                        names.add(node.attr)
        return names

    def calls(self, module: str, path: str = "") -> list[tuple[str, ast.Call]]:
        """Every call in a module, or in a function of it, with the dotted name of what is called,
        in source order."""
        node = self.find(module, path).node if path else self._module(module)[0]
        assert node is not None
        found = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
        found.sort(key=lambda call: (call.func.end_lineno or 0, call.func.end_col_offset or 0))
        return [(ast.unparse(call.func), call) for call in found]

    def _module(self, name: str) -> tuple[ast.Module, bool]:
        """The module and whether it is a package."""
        if name not in self._modules:
            self._modules[name] = None
            for file, is_package in ((".py", False), ("/__init__.py", True)):
                text = self._read(name.replace(".", "/") + file)
                if text is not None:
                    self._modules[name] = ast.parse(text), is_package
        found = self._modules[name]
        if found is None:
            raise MissingNameError(f"there is no module {name}")
        return found

    def _member(self, found: Found, name: str) -> Found:
        node = found.node
        if isinstance(node, ast.Module):
            return self._global(found.module, name)
        if isinstance(node, ast.ClassDef):
            for cls in self._bases_first_to_last(found):
                assert isinstance(cls.node, ast.ClassDef)
                for statement in _bindings(cls.node.body, name):
                    return Found(cls.module, statement, cls.node)
            raise MissingNameError(f"{found.module}.{node.name} has no {name}")
        if isinstance(node, Function) and name == "cache_clear" and _decorators(node) & {*CACHES}:
            return Found("functools", None)
        raise MissingNameError(f"{name} is asked of something in {found.module} that is no class")

    def _global(self, module: str, name: str) -> Found:
        tree, is_package = self._module(module)
        problem = MissingNameError(f"{module} has no {name}")
        for statement in _bindings(tree.body, name):
            try:
                return self._followed(module, is_package, statement, name)
            except MissingNameError as missing:
                problem = missing
        try:
            return Found(f"{module}.{name}", self._module(f"{module}.{name}")[0])
        except MissingNameError:
            raise problem from None

    def _followed(self, module: str, is_package: bool, statement: ast.stmt, name: str) -> Found:
        """What a statement binds `name` to; imports are followed inside the package."""
        if isinstance(statement, ast.ImportFrom):
            base = statement.module or ""
            if statement.level:
                parents = module.split(".")
                kept = len(parents) - statement.level + is_package
                base = ".".join([*parents[:kept], *filter(None, [base])])
            original = next(a.name for a in statement.names if name in (a.asname, a.name))
            if base.split(".")[0] != self._package:
                return Found(base, None)
            return self._global(base, original)
        if isinstance(statement, ast.Import):
            target = next(a.name for a in statement.names if name in (a.asname, a.name))
            outside = target.split(".")[0] != self._package
            return Found(target, None if outside else self._module(target)[0])
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
            return self._global(module, statement.value.id)
        return Found(module, statement)

    def _bases_first_to_last(self, cls: Found) -> Iterator[Found]:
        """The class and its bases in the package, depth first."""
        yield cls
        assert isinstance(cls.node, ast.ClassDef)
        for base in cls.node.bases:
            path = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            try:
                found = self.find(cls.module, path)
            except MissingNameError:
                continue  # a builtin, or something of another package's module
            if isinstance(found.node, ast.ClassDef):
                yield from self._bases_first_to_last(found)

    def _fields(self, cls: Found) -> Iterator[Parameter]:
        """What the generated `__init__` of a data class takes."""
        fields: dict[str, Parameter] = {}
        for found in reversed(list(self._bases_first_to_last(cls))):
            assert isinstance(found.node, ast.ClassDef)
            for statement in found.node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    if "ClassVar" in ast.unparse(statement.annotation):
                        continue
                    name, default = statement.target.id, statement.value is not None
                    fields[name] = _parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default)
        keyword_only = {n: p for n, p in fields.items() if p.default is not Parameter.empty}
        yield from (p for n, p in fields.items() if n not in keyword_only)
        yield from keyword_only.values()


def _bindings(body: list[ast.stmt], name: str) -> Iterator[ast.stmt]:
    """The statements that bind `name`, also inside `if`, `try` and `with`."""
    for statement in body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                if statement.name == name and "overload" not in _decorators(statement):
                    yield statement
                continue
            case ast.Import() | ast.ImportFrom():
                bound = [alias.asname or alias.name for alias in statement.names]
            case ast.Assign():
                bound = [t.id for t in statement.targets if isinstance(t, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=target)):
                bound = [target]
            case _:
                bound = []
        if name in bound:
            yield statement
        for block in ("body", "handlers", "orelse", "finalbody"):
            yield from _bindings(getattr(statement, block, []), name)


def _decorators(node: Function | ast.ClassDef) -> set[str]:
    """The last words of its decorators' names."""
    plain = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return {ast.unparse(decorator).split(".")[-1] for decorator in plain}


def _parameters(arguments: ast.arguments) -> Iterator[Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    for index, arg in enumerate(positional):
        only = index < len(arguments.posonlyargs)
        kind = Parameter.POSITIONAL_ONLY if only else Parameter.POSITIONAL_OR_KEYWORD
        yield _parameter(arg.arg, kind, index >= first_default)
    if arguments.vararg:
        yield _parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL)
    for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(arg.arg, Parameter.KEYWORD_ONLY, default is not None)
    if arguments.kwarg:
        yield _parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD)


def _parameter(name: str, kind: Any, default: bool = False) -> Parameter:
    return Parameter(name, kind, default=None if default else Parameter.empty)
