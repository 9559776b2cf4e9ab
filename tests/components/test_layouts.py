"""Names of architectures that users register."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from plasticity_peft import BlockLayout, find_components, register_architecture
from plasticity_peft.components.layouts import LAYOUTS
from plasticity_peft.errors import ConfigError, ModelError
from tests.support.models import tiny_model

LAYOUT = BlockLayout(
    blocks="layers.*", LN1="first", MHA="a", projections=("a.qkv", "a.o"), LN2="second", FC1="up", FC2="down"
)
OTHER = replace(LAYOUT, blocks="blocks.*")


def test_several_calls_add_up() -> None:
    register_architecture("mine", LAYOUT)
    register_architecture("mine", OTHER)
    register_architecture("mine", LAYOUT)  # a cell of a notebook is run twice
    assert LAYOUTS["mine"] == (LAYOUT, OTHER)


def test_a_mistake_can_be_corrected() -> None:
    register_architecture("mine", replace(LAYOUT, LN1="third"), OTHER)
    register_architecture("mine", LAYOUT, replace=True)
    assert LAYOUTS["mine"] == (LAYOUT,)


def test_a_built_in_model_type_keeps_its_own_names() -> None:
    built_in = LAYOUTS["vit"]
    before = find_components(tiny_model())
    register_architecture("vit", LAYOUT)
    assert LAYOUTS["vit"] == (*built_in, LAYOUT)
    assert find_components(tiny_model()) == before


def test_a_built_in_model_type_can_be_replaced_and_restored() -> None:
    before = find_components(tiny_model())
    built_in = LAYOUTS["vit"]
    register_architecture("vit", LAYOUT, replace=True)
    assert LAYOUTS["vit"] == (LAYOUT,)
    with pytest.raises(ModelError, match=r"expected to have the layers first, a\.qkv"):
        find_components(tiny_model())
    swapped = [replace(layout, LN1=layout.LN2, LN2=layout.LN1) for layout in built_in]
    register_architecture("vit", *swapped, replace=True)
    paths = {part.id: part.path for part in before}
    assert {part.id: part.path for part in find_components(tiny_model())} == {
        **paths, "0.LN1": paths["0.LN2"], "0.LN2": paths["0.LN1"], "1.LN1": paths["1.LN2"], "1.LN2": paths["1.LN1"],
    }  # fmt: skip
    del LAYOUTS["vit"]
    assert LAYOUTS["vit"] == built_in
    assert find_components(tiny_model()) == before


@pytest.mark.parametrize("model_type", ["", None, 3, ["vit"]])
@pytest.mark.parametrize("options", [{}, {"replace": True}], ids=str)
def test_a_model_type_is_a_name(model_type: Any, options: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match="model_type must be a name"):
        register_architecture(model_type, LAYOUT, **options)


@pytest.mark.parametrize("options", [{}, {"replace": True}], ids=str)
def test_what_is_not_a_layout_is_refused_and_changes_nothing(options: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match="at least one BlockLayout"):
        register_architecture("vit", **options)
    with pytest.raises(ConfigError, match=r"A layout must be a BlockLayout\. Got 3"):
        register_architecture("vit", LAYOUT, 3, **options)  # type: ignore[arg-type]
    assert not LAYOUTS.maps[0]


@pytest.mark.parametrize("time", ["first", "second"])
def test_what_a_test_registers_is_gone_in_the_next(time: str) -> None:
    assert "of one test" not in LAYOUTS
    register_architecture("of one test", LAYOUT)
