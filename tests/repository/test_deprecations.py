"""What tests/support/deprecations.py promises: no deprecation of a library goes unseen."""

from __future__ import annotations

import warnings

import pytest
from transformers.utils import logging

from tests.support.deprecations import LIBRARIES, Log
from tests.support.processes import python


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_logged_deprecation_is_noted(name: str, no_deprecation_is_logged: Log) -> None:
    logger = logging.get_logger(f"{name}.some.module")
    logger.warning("everything is fine")
    assert not no_deprecation_is_logged.messages
    logger.warning("`old` is deprecated and will be removed in the next release")
    assert [message.split(":")[0] for message in no_deprecation_is_logged.messages] == [f"{name}.some.module"]
    no_deprecation_is_logged.messages.clear()


@pytest.mark.parametrize("category", ["DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"])
def test_a_deprecation_ends_another_process(category: str) -> None:
    script = f"import warnings; warnings.warn('old', {category})"
    result = python("-c", script, timeout=60)
    assert result.returncode == 1
    assert f"{category}: old" in result.stderr


def test_a_deprecation_ends_a_test() -> None:
    with pytest.raises(DeprecationWarning):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
