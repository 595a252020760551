"""What a site builds once per study: whose images, which pools, which engines."""

from pathlib import Path

import pytest
import torch

from client import devices
from client.data.store import Site
from client.session import open_session, virtual_site
from common.errors import ModelError, NotPreparedError, StudyError
from common.meta.local_only import LocalOnly
from common.paths import home
from common.study import Study
from server.rounds import initial_theta
from tests.client.hospitals import prepared, tiny_study


def test_a_virtual_site_is_found_by_its_partition_and_a_real_one_by_its_folder(study: Study, sites: list[Site]) -> None:
    config = study.run_config()
    virtual = open_session(config, {"partition-id": 2, "num-partitions": 4})
    assert virtual.site.name == "hospital-2"
    assert virtual.site.folder == virtual_site(study, 2)
    assert virtual_site(study, 2).is_relative_to(home())
    real = open_session(config, {"site": str(sites[1].folder)})
    assert real.site.name == "hospital-1"
    both = open_session(config, {"site": str(sites[1].folder), "partition-id": 2})
    assert both.site.name == "hospital-1"  # a hospital's own folder comes first


def test_a_session_is_built_once(study: Study, sites: list[Site]) -> None:
    config = study.run_config()
    one, two = (open_session(dict(config), {"partition-id": 0}) for _ in range(2))
    assert one is two
    other = open_session({**config, "outer.rate": 0.5}, {"partition-id": 0})
    assert other.study.digest != one.study.digest
    neighbour = open_session(config, {"partition-id": 1})
    assert neighbour.engine is one.engine  # the network is the study's, not the site's
    assert neighbour.site is not one.site


def test_sites_and_server_start_at_the_same_theta(study: Study, sites: list[Site]) -> None:
    for dtype in ("float32", "float64"):
        plan = study.override({"wire.dtype": dtype})
        theta, start = open_session(plan.run_config(), {"partition-id": 0}).theta, initial_theta(plan)
        assert list(theta) == list(start)
        for name, value in start.items():
            assert theta[name].dtype == getattr(torch, dtype)
            assert torch.equal(theta[name], value)


def test_pools_of_a_training_site_part_its_patients(study: Study, sites: list[Site]) -> None:
    session = open_session(study.run_config(), {"partition-id": 1})
    assert not session.held_out
    site = session.site
    train, known, new = (
        session.training_pool(),
        session.evaluation_pool("test", new=False),
        session.evaluation_pool("test", new=True),
    )
    sides = []
    for pool, test in ((train, False), (known, True), (new, True)):
        slots = [slot for images in pool.images for slot in images.slots.tolist()]
        assert slots
        assert (site.split[slots] == (2 if test else 0)).all()
        sides.append(set(site.patients[slots].tolist()))
    assert not sides[0] & (sides[1] | sides[2])
    assert set(train.classes) | set(known.classes) <= {0, 1, 2, 3}
    assert set(new.classes) == {4, 5}
    for pool in (train, known, new):
        for place, images in zip(pool.classes, pool.images, strict=True):
            names = {site.label_names[site.labels[slot]] for slot in images.slots}
            assert names == {"abcdef"[place]}


def test_all_patients_of_a_held_out_site_are_new(study: Study, sites: list[Site]) -> None:
    session = open_session(study.run_config(), {"partition-id": 3})
    assert session.held_out
    pool = session.evaluation_pool("test", new=False)
    slots = {slot for images in pool.images for slot in images.slots.tolist()}
    site = session.site
    assert slots == {s for s in range(len(site.labels)) if site.label_names[site.labels[s]] in "abcd"}


def test_training_from_scratch_has_a_fresh_network_of_the_tasks_size(study: Study, sites: list[Site]) -> None:
    plan = study.override({"algorithm.name": "fedavg", "episodes.scratch-rate": 0.25})
    session = open_session(plan.run_config(), {"partition-id": 0})
    assert session.theta["head.bias"].shape == (4,)  # one classifier over all classes
    assert session.scratch_theta["head.bias"].shape == (3,)
    assert isinstance(session.scratch.learner, LocalOnly)
    assert session.scratch.learner.test_rate == 0.25


def test_what_is_wrong_is_said(study: Study, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"outer\.rate"):
        open_session({"outer.rate": "fast"}, {"partition-id": 0})
    with pytest.raises(NotPreparedError, match="wardround-lab prepare"):
        open_session(study.run_config(), {"site": str(tmp_path)})
    prepared(study)
    bad = tiny_study({"model.name": "conv5"})
    with pytest.raises(ModelError, match="conv5"):
        open_session(bad.run_config(), {"partition-id": 0})


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.cpu_cores() >= 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.local_devices(torch.float32) == (torch.device("mps"),)
    assert devices.local_devices(torch.float64) == (torch.device("cpu"),)  # Apple's GPU has none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.local_devices(torch.float64) == (torch.device("cuda", 0), torch.device("cuda", 1))
