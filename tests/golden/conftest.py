import shutil

import pytest
from golden_folder import files

from refattn.golden import suite


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A suite of three cases; tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("small")
    suite.publish(folder, files())
    return folder


@pytest.fixture
def folder(small, tmp_path):
    return shutil.copytree(small, tmp_path / "suite")
