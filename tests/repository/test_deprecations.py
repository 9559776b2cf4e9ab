"""What tests/support/deprecations.py promises: no deprecation of a library goes unseen."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from transformers.utils import logging

from tests.support.deprecations import LIBRARIES, Log
from tests.support.forking import EXAMPLES, STOCK, TRANSFORMERS, Parent, run_code
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


@pytest.mark.parametrize("parent", [TRANSFORMERS, STOCK, EXAMPLES], ids=["transformers", "stock", "examples"])
def test_a_warning_ends_what_is_forked_from_a_strict_process(parent: Parent, tmp_path: Path) -> None:
    """The processes that scripts are forked from are forked from one another."""
    for warning, ends in (("UserWarning", parent.strict), ("DeprecationWarning", True), ("FutureWarning", True)):
        code = f"import warnings; warnings.warn('old', {warning})"
        result = run_code(code, folder=tmp_path, parent=parent)
        assert (result.returncode, f"{warning}: old" in result.stderr) == (int(ends), True)
    known = "import warnings; warnings.warn('`is_gradient_checkpointing` is deprecated', FutureWarning)"
    assert run_code(known, folder=tmp_path, parent=parent).returncode == 0


def test_stock_users_have_not_imported_this_package(tmp_path: Path) -> None:
    for parent, expected in ((TRANSFORMERS, []), (STOCK, ["peft"]), (EXAMPLES, ["peft", "plasticity_peft"])):
        code = "import sys; print([name for name in ('peft', 'plasticity_peft') if name in sys.modules])"
        assert run_code(code, folder=tmp_path, parent=parent).stdout == f"{expected}\n"


def test_a_deprecation_ends_a_test() -> None:
    with pytest.raises(DeprecationWarning):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
