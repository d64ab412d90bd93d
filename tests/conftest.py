"""Fixtures that every room's tests may use."""

import os
from pathlib import Path

import pytest
from clean_environment import clean_environment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: with a long one at the end, one test process works while the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real scans; tests that ask for it are skipped where it is missing, and fail in CI."""
    default = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("CT_MOE_TEST_DATA", default))
    if not (folder / "MANIFEST.md").is_file():
        reason = f"no test data in {folder}: set CT_MOE_TEST_DATA to the folder that holds MANIFEST.md"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A converted tiny base with the settings of a new model, to be read only."""
    from ct_moe.hub.conversion import convert_base
    from ct_moe.hub.tiny_base import build_tiny_base

    folder = tmp_path_factory.mktemp("tiny")
    convert_base(build_tiny_base(folder / "base"), folder / "model", parity=False, progress=False)
    return folder / "model"


@pytest.fixture(scope="session")
def python_without_package(tmp_path_factory) -> Path:
    """The interpreter of a new virtual environment with what a model card asks for, to be run only."""
    return clean_environment(tmp_path_factory.mktemp("without_package"), "torch", "transformers", "nibabel", "pillow")
