"""What crosses the wire from a hospital: D numbers, two scalars, and a fixed frame around them."""

import json

import numpy as np
import pytest
from flwr.app import Array, MetricRecord
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import get_object_body

from client.data.episodes import draw
from client.data.store import Site
from client.session import open_session
from common.contract import TRAIN, Vector, check_reply
from common.study import Study
from simulations.engines.inprocess import transmit
from tests.client.hospitals import ask, instruct, objects, prepared, tiny_study, wire_bytes


@pytest.fixture(scope="module")
def wide() -> Study:
    """A study with more numbers, so that a share of them weighs something."""
    study = tiny_study({"model.width": 32})
    prepared(study)
    return study


def expected_vector(study: Study, site: int) -> Vector:
    """Return the meta-gradient of a site's first round, computed here."""
    session = open_session(study.run_config(), {"partition-id": site})
    generator = session.site.generator("train", study.digest, 1)
    spec = study.episodes
    episodes = draw(session.site, session.training_pool(), spec, spec.per_round, generator, augment=True)
    vector: Vector = session.engine.meta_gradient(session.theta, episodes).gradient.numpy()
    return vector


def test_a_train_reply_is_the_meta_gradient_and_nothing_else(wide: Study) -> None:
    instruction, theta = instruct(wide, "train")
    assert theta is not None
    reply = ask(wide, 1, instruction, theta)
    found = objects(reply)

    total = sum(len(part) for parts in found.values() for part in parts)
    declared = 8 * (len(TRAIN) + 1)  # the scalars and the token
    assert total <= 4 * theta.size + declared + max(0.02 * 4 * theta.size, 4096)

    # One object of each type: no second record, no second array.
    assert {kind: len(parts) for kind, parts in found.items()} == {
        "Message": 1, "RecordDict": 1, "MetricRecord": 1, "ArrayRecord": 1, "Array": 1, "ArrayChunk": 1,
    }  # fmt: skip
    vector = expected_vector(wide, 1)
    assert vector.dtype == np.float32
    assert wire_bytes(reply).count(vector.tobytes()) == 1
    body = bytes(get_object_body(found["ArrayChunk"][0], ArrayChunk))
    assert body.endswith(vector.tobytes())
    header = body.removesuffix(vector.tobytes())
    assert len(header) == 128  # npy's, padded with blanks
    assert header.rstrip() == (
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }" % theta.size
    )
    array = json.loads(get_object_body(found["Array"][0], Array))
    assert array == {"dtype": "float32", "shape": [theta.size], "stype": "numpy.ndarray", "arraychunk_ids": [0]}
    scalars = reply.content["scalars"]
    assert isinstance(scalars, MetricRecord)
    assert set(scalars) == {"token", "loss", "accuracy"}
    checked = check_reply(reply.content, instruction, size=theta.size, dtype="float32")
    assert checked.vector is not None
    assert checked.vector.tobytes() == vector.tobytes()


@pytest.mark.parametrize("kind", ["join", "evaluate"])
def test_other_replies_hold_scalars_only(study: Study, sites: list[Site], kind: str) -> None:
    instruction, theta = instruct(study, kind, scratch=True)
    reply = ask(study, 1, instruction, theta)
    found = objects(reply)
    assert {name: len(parts) for name, parts in found.items()} == {"Message": 1, "RecordDict": 1, "MetricRecord": 1}
    assert sum(len(part) for parts in found.values() for part in parts) < 2048


def test_the_size_of_a_reply_does_not_depend_on_the_site(study: Study, sites: list[Site]) -> None:
    instruction, theta = instruct(study, "train")
    sizes = {transmit(ask(study, site, instruction, theta))[1] for site in range(3)}
    # Protocol buffers leave out what is zero; nothing else may differ.
    assert max(sizes) - min(sizes) <= 4
