"""Messages need a run to belong to; tiny tensors need one thread."""

from collections.abc import Iterator

import pytest
import torch
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from client.data.store import Site
from common.study import Study
from tests.client.hospitals import prepared, tiny_study


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let messages be made outside of Flower."""
    for name, value in {"run_id": 1, "node_id": SUPERLINK_NODE_ID, "task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


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
