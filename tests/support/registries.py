"""What users register belongs to the test that registers it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from plasticity_peft.components.layouts import LAYOUTS
from plasticity_peft.criteria.registry import CRITERIA


@pytest.fixture(autouse=True)
def only_built_in() -> Iterator[None]:
    """Removes the architectures and criteria that a test registers, and those that a doctest left."""
    for registry in (LAYOUTS, CRITERIA):
        registry.maps[0].clear()
    yield
    for registry in (LAYOUTS, CRITERIA):
        registry.maps[0].clear()
