"""Fixtures that all tests share, and the environment of all tests. What they import lies in tests/support."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Before any library looks: no test may reach for the network, and each of several processes has one thread.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from tests.support.deprecations import IN_OTHER_PROCESSES, no_deprecation_is_logged  # noqa: F401

os.environ["PYTHONWARNINGS"] = IN_OTHER_PROCESSES

import pytest

from tests.support.registries import only_built_in  # noqa: F401

# Nothing heavier is imported here: pytest-xdist's first process reads this file, and waits for it, without testing.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFUSED = "version of PEFT you are using is not compatible"
"""What transformers 5.24 says of every released peft in its own methods for adapters, whatever the config."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skips a test that calls such a method where transformers asks for a peft that is not installed."""
    try:
        return (yield)
    except (ValueError, AssertionError, pytest.fail.Exception) as error:
        if REFUSED in str(error):
            import transformers

            pytest.skip(f"transformers {transformers.__version__}: {error}")
        raise


SHARED = ("tests.support.forking", "tests.support.hub_client", "tests.support.stock", "tests.support.round_trips")
"""Whoever uses these needs a process that takes ten seconds to start, and that all tests in one worker share."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests that share processes first, so that these are started once.

    pytest-xdist gives the first half of the tests to the first worker. The other one, when it has done the second
    half, takes over what the first would do last.
    """
    sharing: dict[object, bool] = {}
    for item in items:
        module = getattr(item, "module", None)
        if module not in sharing:
            used = {getattr(value, "__module__", None) for value in vars(module).values()} if module else set()
            sharing[module] = not used.isdisjoint(SHARED)
    items.sort(key=lambda item: not sharing[getattr(item, "module", None)])


def pytest_collection_finish() -> None:
    """Excludes what is imported from garbage collection, which would go through all of it again and again."""
    from hypothesis import given
    from hypothesis import strategies as st

    given(st.none())(lambda _: None)()  # Hypothesis seeks who holds its generator, and must see it
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["deit", "dinov2", "vit"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A small model of each architecture in turn, of those in tests/support/models.py."""
    from tests.support.models import tiny_model

    return tiny_model(request.param)


@pytest.fixture
def vit() -> PreTrainedModel:
    from tests.support.models import tiny_model

    return tiny_model("vit")
