"""An extension of griffe: the attributes of a class are a list below its docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pkgutil import resolve_name
from typing import Any

import griffe

Node = ast.AST | griffe.ObjectNode


class Attributes(griffe.Extension):
    """Lists the documented attributes of a class, inherited ones included.

    The text of a dataclass field without a docstring is `help` in its metadata. It
    may be computed, so it is read from the class itself.
    """

    def on_attribute_instance(
        self, *, node: Node, attr: griffe.Attribute, **_: Any
    ) -> None:
        """Takes docstring and default from `name: type = field(default=..., ...)`."""
        value = getattr(node, "value", None)
        if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "field"):
            return
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        attr.value = ast.unparse(given["default"]) if "default" in given else None
        if attr.docstring is None and "metadata" in given:
            text = help_of(attr)
            attr.docstring = griffe.Docstring(text, parent=attr, lineno=attr.lineno)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Moves the docstrings of attributes into a section of their classes."""
        found = {cls: list(documented(cls)) for cls in classes(pkg) if cls.docstring}
        for cls, attributes in found.items():
            sections = cls.docstring.parsed
            if attributes:
                first = bool(sections) and sections[0].kind.value == "text"
                sections.insert(int(first), as_section(attributes))
        for attributes in found.values():
            for one in attributes:
                one.docstring = None


def help_of(attr: griffe.Attribute) -> str:
    """Returns `help` in the metadata of the dataclass field that `attr` describes."""
    try:
        cls = resolve_name(f"{attr.module.path}:{attr.parent.name}")
    except ImportError as error:  # of which griffe would leave out the module
        raise RuntimeError(f"{attr.path} cannot be imported: {error}") from error
    found = {each.name: each.metadata["help"] for each in fields(cls) if each.metadata}
    return str(found[attr.name])


def as_section(
    attributes: list[griffe.Attribute],
) -> griffe.DocstringSectionAttributes:
    """Returns the list of attributes, with their defaults."""
    rows = []
    for one in attributes:
        default = "" if one.value is None else f" Default: `{one.value}`."
        text = one.docstring.value.rstrip() + default
        row = griffe.DocstringAttribute(
            one.name, annotation=one.annotation, description=text
        )
        rows.append(row)
    return griffe.DocstringSectionAttributes(rows)


def classes(module: griffe.Module) -> Iterator[griffe.Class]:
    """Yields the public classes of a module and of its submodules."""
    for member in module.members.values():
        if member.is_alias:
            continue
        if member.is_module:
            yield from classes(member)
        elif member.is_class and not member.name.startswith("_"):
            yield member


def documented(cls: griffe.Class) -> Iterator[griffe.Attribute]:
    """Yields the public attributes of a class that have a docstring."""
    for one in cls.all_members.values():
        target = one.final_target if one.is_alias else one
        if target.is_attribute and target.docstring and not one.name.startswith("_"):
            yield target
