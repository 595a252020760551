"""Messages need a run to belong to; tiny tensors need one thread."""

from collections.abc import Iterator

import pytest
import torch

from client.data.store import Site
from common.study import Study
from tests.client.hospitals import enter_run, prepared, tiny_study


@pytest.fixture(scope="package", autouse=True)
def in_a_run() -> None:
    enter_run()


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def study() -> Study:
    return tiny_study()


@pytest.fixture(scope="session")
def sites(study: Study) -> list[Site]:
    """The prepared hospitals of the study."""
    return prepared(study)
