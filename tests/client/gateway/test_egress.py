"""What leaves a site: every honest answer passes, and a bundle that wants to carry something out does not."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import strategies as st

from client.app import app
from client.gateway.audit import Event
from client.gateway.egress import Asked, Passed, examine
from common.contract import EVALUATION, Instruction, Vector, pack_instruction, pack_reply
from common.errors import DataError, EgressError, explain
from common.study import Study
from tests.client.hospitals import SITES, enter_run, instruct, prepared, tiny_study

D = 50
STUDY = Study.from_run_config({})
TYPES = {"join": "query.join", "train": "train", "evaluate": "evaluate"}
Objects = dict[str, bytes]


def question(
    kind: Any, theta: Vector | None = None, instruction: Instruction | None = None
) -> tuple[Message, Instruction]:
    enter_run()
    instruction = instruction or Instruction(kind, STUDY.digest, 3, 1, "a" * 64)
    message = Message(pack_instruction(instruction, theta), 1001, TYPES[kind], group_id="3")
    message.metadata.__dict__["_message_id"] = "e" * 64
    return message, instruction


def deflated(message: Message) -> tuple[str, Objects]:
    return message.object_id, {name: value.deflate() for name, value in get_all_nested_objects(message).items()}


def scalars(kind: str) -> dict[str, float]:
    if kind == "evaluate":
        return dict.fromkeys(EVALUATION, 0.25)
    if kind == "join":
        return {"site": 2}
    return {"loss": 0.75, "accuracy": 0.5}


def vector(size: int = D) -> Vector:
    return np.linspace(-1, 1, size, dtype=np.float32)


def answer(kind: str = "train", **change: Any) -> tuple[Asked, str, Objects]:
    """Return an answer: an honest one, or with another content."""
    asked, instruction = question(kind)
    honest = pack_reply(instruction, scalars(kind), vector() if kind == "train" else None)
    reply = Message(change.get("error") or change.get("content") or honest, reply_to=asked)
    for name, value in change.get("metadata", {}).items():
        reply.metadata.__dict__[f"_{name}"] = value
    return Asked(asked.metadata, instruction, D), *deflated(reply)


def passed(asked: Asked, root: str, objects: Mapping[str, bytes], study: Study = STUDY, later: float = 1.0) -> Passed:
    return examine(study, asked, root, objects, asked.metadata.created_at + later)


def refused(asked: Asked, root: str, objects: Mapping[str, bytes], study: Study = STUDY) -> str:
    with pytest.raises(EgressError) as error:
        passed(asked, root, objects, study)
    Event(outcome="refused", kind="train", why=error.value.why)  # the audit log has a place for it
    return error.value.why


@pytest.mark.parametrize("kind", ["join", "train", "evaluate"])
def test_an_honest_answer_passes_unchanged(kind: str) -> None:
    asked, root, objects = answer(kind)
    found = passed(asked, root, objects)
    assert found == Passed(kind, root, objects, sum(map(len, objects.values())), found.norm)
    assert found.norm == pytest.approx(float(np.linalg.norm(vector())) if kind == "train" else 0)


@pytest.mark.parametrize("kind", ["join", "train", "evaluate"])
def test_what_the_real_site_answers_passes(kind: str) -> None:
    study = tiny_study()
    prepared(study)
    instruction, theta = instruct(study, kind)
    message, _ = question(kind, theta, instruction)
    context = Context(1, 1001, {"partition-id": 1, "num-partitions": SITES}, RecordDict(), study.run_config())
    reply = app(message, context)
    assert reply.has_content()
    size = 0 if theta is None else theta.size
    root, objects = deflated(reply)
    assert passed(Asked(message.metadata, instruction, size), root, objects, study, 600).kind == kind


def test_large_vectors_of_several_chunks_pass() -> None:
    size = 3 * 2**20
    asked, instruction = question("train")
    content = pack_reply(instruction, scalars("train"), vector(size))
    root, objects = deflated(Message(content, reply_to=asked))
    assert len(objects) > 6
    assert passed(Asked(asked.metadata, instruction, size), root, objects).size > 4 * size
    # The first chunk twice: equal bytes, another order.
    zeros = np.zeros(size, np.float32)
    zeros[-1] = 1
    root, objects = deflated(Message(pack_reply(instruction, scalars("train"), zeros), reply_to=asked))
    assert passed(Asked(asked.metadata, instruction, size), root, objects).norm == 1


def with_records(**more: Any) -> RecordDict:
    _, instruction = question("train")
    return RecordDict({**pack_reply(instruction, scalars("train"), vector()), **more})


def arrays(**named: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in named.items()})


def metrics(**change: Any) -> MetricRecord:
    _, instruction = question("train")
    return MetricRecord({"token": instruction.token, **scalars("train"), **change})


NAN = np.float32("nan")
PIXELS = np.full(60, 17, np.float32)
SMUGGLED: dict[str, tuple[dict[str, Any], str]] = {
    "another array record": ({"content": with_records(pixels=arrays(x=PIXELS))}, "records"),
    "another array": ({"content": with_records(meta_gradient=arrays(meta_gradient=vector(), x=PIXELS))}, "arrays"),
    "text as an array's name": ({"content": with_records(meta_gradient=arrays(DOE_JANE=vector()))}, "arrays"),
    "another shape": ({"content": with_records(meta_gradient=arrays(meta_gradient=vector(D + 1)))}, "shape"),
    "another type": ({"content": with_records(meta_gradient=arrays(meta_gradient=vector().astype(float)))}, "shape"),
    "another metric": ({"content": with_records(scalars=metrics(pixel=0.5))}, "scalars"),
    "a list as a metric": ({"content": with_records(scalars=metrics(loss=[0.5] * 9))}, "scalar-type"),
    "a huge metric": ({"content": with_records(scalars=metrics(loss=1e300))}, "scalar-range"),
    "a NaN payload as a metric": ({"content": with_records(scalars=metrics(loss=float("nan")))}, "scalar-range"),
    "another token": ({"content": with_records(scalars=metrics(token=7))}, "other-instruction"),
    "a config record": ({"content": with_records(note=ConfigRecord({"name": "DOE^JANE"}))}, "records"),
    "NaN payloads": ({"content": with_records(meta_gradient=arrays(meta_gradient=vector() * NAN))}, "not-finite"),
    "beyond the norm": ({"content": with_records(meta_gradient=arrays(meta_gradient=vector() * 1e7))}, "norm"),
    "text as the group": ({"metadata": {"group_id": "DOE^JANE"}}, "form"),
    "text as the kind": ({"metadata": {"message_type": "train.DOE"}}, "form"),
    "text as the message answered": ({"metadata": {"reply_to_message_id": "DOE"}}, "form"),
    "another receiver": ({"metadata": {"dst_node_id": 77}}, "form"),
    "another run": ({"metadata": {"run_id": 77}}, "form"),
    "a number as the time to live": ({"metadata": {"ttl": 12345.678}}, "form"),
    "a number as the task": ({"metadata": {"dst_task_id": 77}}, "form"),
    "a number as the time": ({"metadata": {"created_at": 1234.5}}, "time"),
}  # fmt: skip


@pytest.mark.parametrize("name", SMUGGLED)
def test_what_a_bundle_adds_is_refused(name: str) -> None:
    change, why = SMUGGLED[name]
    assert refused(*answer("train", **change)) == why


def test_finer_times_than_a_clock_gives_are_refused() -> None:
    asked, _, _ = answer()
    assert refused(*answer(metadata={"created_at": asked.metadata.created_at + 1e-7 * 3})) == "time"


def renamed(root: str, objects: Objects, old: str, data: bytes) -> tuple[str, Objects]:
    """Return objects in which one has other bytes, with every name that depends on it changed accordingly."""
    out, names = dict(objects), {old: data}
    while names:
        name, new = names.popitem()
        del out[name]
        title = sha256(new).hexdigest()
        out[title] = new
        root = title if name == root else root
        for parent, body in list(out.items()):
            if name.encode() in body:
                names[parent] = body.replace(name.encode(), title.encode())
    return root, out


def body(data: bytes) -> tuple[bytes, bytes]:
    head, _, rest = data.partition(b"\0")
    return head, rest


def with_body(data: bytes, new: bytes) -> bytes:
    head, _ = body(data)
    return b" ".join([*head.split(b" ")[:2], str(len(new)).encode()]) + b"\0" + new


def of_kind(objects: Objects, kind: str) -> tuple[str, bytes]:
    (found,) = [(name, data) for name, data in objects.items() if data.startswith(kind.encode() + b" ")]
    return found


def with_metadata(data: bytes, **fields: Any) -> bytes:
    proto = ProtoMessage.FromString(body(data)[1])
    for name, value in fields.items():
        setattr(proto.metadata, name, value)
    return with_body(data, proto.SerializeToString(deterministic=True))


def reordered(data: bytes) -> bytes:
    return with_body(data, json.dumps(dict(reversed(json.loads(body(data)[1]).items()))).encode())


UNKNOWN = b"\xfa\x06\x03DOE"

#: What Flower's own parser takes without a word.
HIDDEN: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "blanks in JSON": ("Array", lambda data: with_body(data, body(data)[1].replace(b", ", b",  \t\n"))),
    "a field more in JSON": ("Array", lambda data: with_body(data, body(data)[1][:-1] + b', "x": "DOE"}')),
    "a key twice in JSON": ("Array", lambda data: with_body(data, b'{"dtype": "DOE", ' + body(data)[1][1:])),
    "another order of records": ("RecordDict", reordered),
    "a record's name twice": ("RecordDict", lambda data: with_body(data, b'{"scalars": "DOE", ' + body(data)[1][1:])),
    "an unknown field in the scalars": ("MetricRecord", lambda data: with_body(data, body(data)[1] + UNKNOWN)),
    "an unknown field in the message": ("Message", lambda data: with_body(data, body(data)[1] + UNKNOWN)),
    "the message's own id": ("Message", lambda data: with_metadata(data, message_id="DOE")),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_what_parsers_pass_over_is_refused(name: str) -> None:
    kind, change = HIDDEN[name]
    asked, root, objects = answer()
    old, data = of_kind(objects, kind)
    assert change(data) != data
    assert refused(asked, *renamed(root, objects, old, change(data))) == "form"


def test_heads_and_names_are_the_ones_that_flower_writes() -> None:
    asked, root, objects = answer()
    old, data = of_kind(objects, "MetricRecord")
    head, rest = body(data)
    for bad in (head + b" DOE\0" + rest, head[:-1] + b"9\0" + rest, head.replace(b"  ", b" DOE ") + b"\0" + rest):
        assert refused(asked, *renamed(root, objects, old, bad)) == "format"
    assert refused(asked, root, {**objects, "f" * 64: objects[root]}) == "object-id"
    assert refused(asked, old, objects) == "format"
    assert refused(asked, "f" * 64, objects) == "format"


def test_an_object_that_belongs_to_nothing_does_not_leave() -> None:
    asked, root, objects = answer()
    more = with_body(b"ArrayChunk  3\0abc", b"pixels")
    assert refused(asked, root, {**objects, sha256(more).hexdigest(): more}) == "form"
    without = {name: data for name, data in objects.items() if not data.startswith(b"ArrayChunk")}
    assert refused(asked, root, without) == "format"


def test_too_many_bytes_are_not_even_parsed() -> None:
    asked, root, objects = answer()
    more = with_body(b"ArrayChunk  3\0abc", bytes(2**20))
    assert refused(asked, root, {**objects, sha256(more).hexdigest(): more}) == "size"
    asked, root, objects = answer("evaluate")
    assert refused(asked, root, {**objects, sha256(more).hexdigest(): more}) == "size"


def test_the_answer_to_another_question_is_refused() -> None:
    asked, root, objects = answer()
    for change in ({"round": 4}, {"attempt": 2}, {"theta": "b" * 64}):
        other = replace(asked, instruction=replace(asked.instruction, **change))
        assert refused(other, root, objects) == "other-instruction"
    join, _, _ = answer("join")
    assert refused(join, root, objects) == "records"


def test_withheld_figures_stay() -> None:
    study = Study.from_run_config({"privacy.figures": "withheld"})
    assert refused(*answer(), study=study) == "figures"
    assert refused(*answer("evaluate"), study=study) == "figures"
    content = with_records(scalars=metrics(loss=-1.0, accuracy=-1.0))
    assert passed(*answer(content=content), study).kind == "train"
    assert passed(*answer("join"), study).kind == "join"


def test_an_error_leaves_as_a_code_without_its_text() -> None:
    text = "FileNotFoundError: /data/DOE^JANE_19700101.dcm"
    for code, leaves in ((DataError.code, DataError.code), (8, 8), (19700101, 100), (-3, 100)):
        asked, root, objects = answer(error=Error(code, text))
        found = passed(asked, root, objects)
        assert (found.kind, found.error) == ("error", leaves)
        assert found.root != root
        (data,) = found.objects.values()
        assert b"DOE" not in data
        assert ProtoMessage.FromString(body(data)[1]).error.code == leaves
        assert explain(found.error)
    asked, root, objects = answer(error=Error(104, ""))
    more = b"ArrayChunk  3\0DOE"
    assert refused(asked, root, {**objects, sha256(more).hexdigest(): more}) == "objects"


@given(st.data())
def test_any_change_of_a_byte_is_refused(data: st.DataObject) -> None:
    asked, root, objects = answer()
    name = data.draw(st.sampled_from(sorted(objects, key=lambda one: objects[one])))
    raw = bytearray(objects[name])
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    assert refused(asked, root, {**objects, name: bytes(raw)}) in ("object-id", "format")
    new_root, new = renamed(root, objects, name, bytes(raw))
    try:
        found = passed(asked, new_root, new)
    except EgressError:
        return
    # Another number in the vector, a scalar, or the time: within what is declared. Or an error's text, taken out.
    assert found.kind == "error" or raw.startswith((b"ArrayChunk", b"MetricRecord")) or name == root


@given(st.dictionaries(st.text(max_size=64), st.binary(max_size=80), max_size=5), st.text(max_size=64))
def test_any_bytes_are_refused_with_our_own_error(objects: Objects, root: str) -> None:
    asked, _, _ = answer()
    named = {sha256(data).hexdigest(): data for data in objects.values()}
    refused(asked, root, objects)
    refused(asked, next(iter(named), root), named)
