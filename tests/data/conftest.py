import pytest
from sounds import write_class_folders, write_ramps


@pytest.fixture
def clips(tmp_path) -> list[str]:
    return write_ramps(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return write_class_folders(tmp_path / "clips")
