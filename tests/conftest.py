"""Fixtures that all tests share, and the environment of all tests. What they import lies in tests/support."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# Before any library looks: no test may reach for the network.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from tests.support.deprecations import IN_OTHER_PROCESSES, no_deprecation_is_logged  # noqa: F401

os.environ["PYTHONWARNINGS"] = IN_OTHER_PROCESSES

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from tests.support.models import ARCHITECTURES, tiny_model
from tests.support.registries import only_built_in  # noqa: F401

torch.set_num_threads(1)

REFUSED = "version of PEFT you are using is not compatible"
"""What transformers 5.24 says of every released peft in its own methods for adapters, whatever the config."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skips a test that calls such a method where transformers asks for a peft that is not installed."""
    try:
        return (yield)
    except (ValueError, AssertionError, pytest.fail.Exception) as error:
        if REFUSED in str(error):
            pytest.skip(f"transformers {transformers.__version__}: {error}")
        raise


def pytest_collection_finish() -> None:
    """Excludes what is imported from garbage collection, which would go through all of it again and again."""
    given(st.none())(lambda _: None)()  # Hypothesis seeks who holds its generator, and must see it
    gc.collect()
    gc.freeze()


@pytest.fixture(params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A small model of each architecture in turn."""
    return tiny_model(request.param)


@pytest.fixture
def vit() -> PreTrainedModel:
    return tiny_model("vit")
