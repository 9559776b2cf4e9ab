"""The size and the shape of a package, counted in its source.

    python -m tests.support.counting [FOLDER ...]

prints a table of this package, or of others: files and their lines, functions and the lines of their bodies without
docstrings, docstrings as a share of all lines, arguments (but for `*args` and `**kwargs`) with a type, rooms (packages
inside), and floors (the longest chain of modules of which each imports the next).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

Function = ast.FunctionDef | ast.AsyncFunctionDef
PACKAGE = Path(__file__).parents[2] / "plasticity_peft"


@dataclass(frozen=True)
class Source:
    """One file of a package."""

    path: Path
    module: str
    """Its name, as in an import."""

    @cached_property
    def text(self) -> str:
        """What it contains."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        """The same, parsed."""
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        """How many lines it has."""
        return len(self.text.splitlines())

    @property
    def functions(self) -> list[Function]:
        """All functions and methods, those inside others included."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    @property
    def docstring_lines(self) -> int:
        """How many lines are docstrings of the module, classes and functions."""
        documented = (ast.Module, ast.ClassDef, *Function.__args__)
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, documented) and node.body]
        return sum(_lines(node.body[0]) for node in nodes if _is_docstring(node.body[0]))


@dataclass(frozen=True)
class House:
    """A package."""

    folder: Path

    @cached_property
    def sources(self) -> list[Source]:
        """Its files."""
        above = self.folder.parent
        found = []
        for path in sorted(self.folder.rglob("*.py")):
            parts = path.relative_to(above).with_suffix("").parts
            found.append(Source(path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
        return found

    @cached_property
    def functions(self) -> list[tuple[Source, Function]]:
        """All functions, each with its file."""
        return [(source, function) for source in self.sources for function in source.functions]

    @property
    def rooms(self) -> list[str]:
        """The packages that lie directly inside."""
        return sorted(path.parent.name for path in self.folder.glob("*/__init__.py"))

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Which modules each module imports, at its top or inside functions, or hands on by a stub beside it.

        That the package itself is imported, the front door that hands on names of all rooms, does not count.
        """
        known = {source.module for source in self.sources} - {self.folder.name}
        found = {}
        for source in self.sources:
            trees = [source.tree]
            stub = source.path.with_suffix(".pyi")
            if stub.exists():
                trees.append(ast.parse(stub.read_text(encoding="utf-8")))
            package = source.path.name == "__init__.py"
            names = {name for tree in trees for name in imported(tree, source.module, package=package)}
            found[source.module] = {_within(known, name) for name in names} - {"", source.module}
        return found

    @property
    def circle(self) -> list[str]:
        """Modules of which each imports the next, and the last the first; empty if there are none."""
        done: set[str] = set()
        for start in self.imports:
            found = _circle_from(start, self.imports, done, [])
            if found:
                return found
        return []

    @property
    def floors(self) -> int:
        """How many modules are in the longest chain of imports. There must be no circle."""
        heights: dict[str, int] = {}

        def height(module: str) -> int:
            if module not in heights:
                heights[module] = 1 + max(map(height, self.imports[module]), default=0)
            return heights[module]

        return max(map(height, self.imports))


def imported(tree: ast.Module, module: str, *, package: bool = False) -> Iterator[str]:
    """Yields the names of all modules, and of what may be one, that a file imports.

    Args:
        tree: the file.
        module: its own name.
        package: whether it is an `__init__`, to which a relative import is relative.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                own = module.split(".")
                base = own[: len(own) - node.level + package]
                start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def _within(known: set[str], name: str) -> str:
    """Returns the module among `known` that is imported by this name: itself, or the one that it is in."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def _circle_from(module: str, imports: dict[str, set[str]], done: set[str], path: list[str]) -> list[str]:
    if module in path:
        return [*path[path.index(module) :], module]
    if module in done:
        return []
    for other in sorted(imports[module]):
        found = _circle_from(other, imports, done, [*path, module])
        if found:
            return found
    done.add(module)
    return []


def body_lines(function: Function) -> int:
    """Returns how many lines the body of a function has, without its docstring."""
    rest = function.body[1:] if _is_docstring(function.body[0]) else function.body
    if not rest:
        return 0
    return (rest[-1].end_lineno or 0) - rest[0].lineno + 1


def arguments(function: Function, *, starred: bool = False) -> list[ast.arg]:
    """Returns the arguments of a function, without `self` and `cls`; `starred` adds `*args` and `**kwargs`."""
    own = function.args
    found = [*own.posonlyargs, *own.args, *own.kwonlyargs]
    found += [one for one in (own.vararg, own.kwarg) if one and starred]
    return [one for one in found if one.arg not in ("self", "cls")]


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


def row(house: House) -> list[str]:
    """Returns what the table says of a package."""
    lines = [source.lines for source in house.sources]
    bodies = [body_lines(function) for _, function in house.functions]
    all_arguments = [one for _, function in house.functions for one in arguments(function)]
    typed = sum(one.annotation is not None for one in all_arguments)
    documented = sum(source.docstring_lines for source in house.sources)
    return [
        house.folder.name,
        str(len(lines)),
        f"{np.median(lines):.0f} / {max(lines)}",
        str(len(bodies)),
        f"{np.median(bodies):.0f} / {np.percentile(bodies, 90):.0f} / {max(bodies)}",
        f"{100 * documented / sum(lines):.0f} %",
        f"{typed}/{len(all_arguments)}",
        str(len(house.rooms)),
        "-" if house.circle else str(house.floors),
    ]


HEAD = ["", "files", "lines median / max", "functions", "body median / p90 / max", "docstrings", "annotated", "rooms",
        "floors"]  # fmt: skip


def main() -> None:
    """Prints the table."""
    folders = [Path(name) for name in sys.argv[1:]] or [PACKAGE]
    for cells in (HEAD, ["---"] * len(HEAD), *(row(House(folder.resolve())) for folder in folders)):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
