"""A study of which the head alone learns: what is on the wire, in the plan, at the gateway, and left of it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from client.adapt.trained import read_trained
from client.gateway.commands import _elements
from client.session import open_session
from server.export.source import read_run
from server.plan import facts_of
from server.record import run_folder
from simulations.engines.inprocess import run_in_process
from tests.client.hospitals import prepared, tiny_study

CHANGES: dict[str, bool | int | float | str] = {
    "model.name": "head:conv4",
    "model.norm": "group",
    "algorithm.name": "maml",
    "episodes.labels": "fixed",
    "episodes.held-out": "",
    "episodes.per-round": 1,
}
PRIVATE: dict[str, bool | int | float | str] = {
    "privacy.mechanism": "patient-clip",
    "privacy.clip": 0.5,
    "privacy.noise": 1.0,
    "privacy.sampling": 0.8,
    "privacy.delta": 1e-5,
    "privacy.figures": "withheld",
}
SIZE = 4 * 4 + 4  # the head of width 4 at 16 x 16 pixels, over four classes


@pytest.mark.parametrize("more", [{}, PRIVATE, {**PRIVATE, "privacy.mechanism": "episode-clip"}])
def test_only_the_head_is_sent(more: dict[str, bool | int | float | str]) -> None:
    # A seed of its own for each kind of more: what a ledger answered once it answers again.
    study = tiny_study({**CHANGES, **more, "study.seed": 100 + len(str(more))})
    prepared(study)
    run, grid = run_in_process(study)
    folder = run_folder(run)
    theta = load_file(folder / "theta.safetensors")
    assert {name: tuple(t.shape) for name, t in theta.items()} == {"head.weight": (4, 4), "head.bias": (4,)}
    assert json.loads((folder / "result.json").read_text())["numbers_up_per_reply"] == SIZE == _elements(study)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert {line["bytes_up"] for line in lines if "round" in line and "bytes_up" in line} == {3 * 4 * SIZE}
    assert {kind for _, kind, _, _ in grid.traffic} >= {"train"}
    if more:
        assert facts_of(study, [])["numbers"] == SIZE
    initial = open_session(study.run_config(), {"partition-id": 0}).theta
    assert not torch.equal(theta["head.weight"], initial["head.weight"])
    trained = read_trained(folder)
    assert list(trained.theta) == ["head.weight", "head.bias"]
    source = read_run(folder)  # an export is whole: the fixed body and the head
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(source.network(x), trained.network.logits(theta, x))


def test_from_scratch_means_all_of_the_network() -> None:
    study = tiny_study(CHANGES)
    prepared(study)
    session = open_session(study.run_config(), {"partition-id": 0})
    assert len(session.theta) == 2
    assert len(session.scratch_theta) == 14
