"""The house: few rooms, no circles, short functions, and every argument with a type."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from tests.support.counting import PACKAGE, House, arguments, body_lines

HOUSE = House(PACKAGE)
MOST_ROOMS = 8
SHORT, MOST_LINES = 17, 40
"""Nine in ten function bodies have at most so many lines, docstrings left out, and none has more than the other."""


def test_there_are_few_rooms() -> None:
    assert 5 <= len(HOUSE.rooms) <= MOST_ROOMS, HOUSE.rooms


@pytest.mark.parametrize("room", HOUSE.rooms)
def test_a_room_hands_on_one_to_four_names(room: str) -> None:
    module = importlib.import_module(f"plasticity_peft.{room}")
    names = module.__all__
    assert 1 <= len(names) <= 4, f"{room} hands on {names}"
    assert all(hasattr(module, name) for name in names)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert not HOUSE.circle, " -> ".join(HOUSE.circle)
    assert HOUSE.floors > 5, "the imports were not seen"


def test_no_module_is_a_drawer_for_everything() -> None:
    names = {part for source in HOUSE.sources for part in source.module.split(".")}
    assert not names & {"utils", "util", "helpers", "common", "misc", "tools"}


def test_functions_are_short() -> None:
    lengths = {f"{source.path}:{function.lineno}": body_lines(function) for source, function in HOUSE.functions}
    assert len(lengths) > 300
    assert not {place: lines for place, lines in lengths.items() if lines > MOST_LINES}
    assert np.mean([lines <= SHORT for lines in lengths.values()]) >= 0.9


def test_every_argument_has_a_type() -> None:
    bare = {
        f"{source.module}.{function.name}: {one.arg}"
        for source, function in HOUSE.functions
        for one in arguments(function, starred=True)
        if one.annotation is None
    }
    assert not bare
    assert sum(len(arguments(function)) for _, function in HOUSE.functions) > 500


# ---- that the counting can fail


SOURCES = {
    "house/__init__.py": '"""Front."""',
    "house/low.py": "import os\nX = 1\n",
    "house/room/__init__.py": '"""A room."""\nfrom .high import f\n',
    "house/room/high.py": '''
"""High."""
from house import low


def f(self, a: int, b, *c, **d: int):
    """Says what.

    And more.
    """
    x = [
        a,
    ]
    return x


async def g():
    def inner(): return 1
    pass
''',
}


@pytest.fixture
def house(tmp_path: Path) -> House:
    for name, text in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return House(tmp_path / "house")


def test_lines_and_arguments_are_counted(house: House) -> None:
    functions = {function.name: function for _, function in house.functions}
    assert {name: body_lines(function) for name, function in functions.items()} == {"f": 4, "g": 2, "inner": 1}
    assert [one.arg for one in arguments(functions["f"])] == ["a", "b"]
    assert [one.arg for one in arguments(functions["f"], starred=True)] == ["a", "b", "c", "d"]
    assert sum(source.docstring_lines for source in house.sources) == 7


def test_imports_circles_and_floors_are_found(house: House) -> None:
    assert house.rooms == ["room"]
    assert house.imports == {
        "house": set(), "house.low": set(), "house.room": {"house.room.high"}, "house.room.high": {"house.low"},
    }  # fmt: skip
    assert (house.circle, house.floors) == ([], 3)
    for text in ("from house.room import f", "import house.room.high", "def later():\n    from .room import high"):
        (house.folder / "low.py").write_text(text)
        circle = House(house.folder).circle
        assert circle[0] == circle[-1]
        assert {"house.low", "house.room.high"} <= set(circle)
    (house.folder / "low.pyi").write_text("from .room.high import f as f")
    (house.folder / "low.py").write_text("")
    assert House(house.folder).circle
