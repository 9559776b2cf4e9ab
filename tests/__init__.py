"""The tests: a folder for each room of the package, laws that go through all rooms, and support for both."""

import pytest

pytest.register_assert_rewrite("tests.support")
