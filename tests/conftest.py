"""What all tests share: the helper modules beside this file, and generators that are seeded by the test's own name."""

import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def rng(request):
    """A generator that gives each test, with its parameters, numbers of its own: the same on every run."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
