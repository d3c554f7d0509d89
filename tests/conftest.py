"""Settings for every test."""

import os
from pathlib import Path

import hypothesis
import pytest

import twofold

# A busy machine is no failure: examples have no deadline, tests have a timeout.
hypothesis.settings.register_profile("twofold", deadline=None)
hypothesis.settings.load_profile("twofold")


def pytest_sessionstart(session: pytest.Session) -> None:
    """With TWOFOLD_EXPECT_PACKAGES_UNDER set (tests of the wheel), refuse to test any other copy of the packages."""
    expected = os.environ.get("TWOFOLD_EXPECT_PACKAGES_UNDER")
    found = Path(twofold.__file__).resolve()
    if expected and not found.is_relative_to(Path(expected).resolve()):
        pytest.exit(f"the tests import twofold from {found}, not from {expected}", returncode=3)
