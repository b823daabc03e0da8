"""What the tests of visual tasks share."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def pixels():
    """The functions of `pixels.py`; files of tests cannot import each other."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("pixels.py"))))
