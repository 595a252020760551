"""The wire contract: whatever is added, missing or changed is refused, at both ends."""

import gc
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast, get_args

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.contract import (
    EVALUATION,
    JOIN,
    TRAIN,
    Instruction,
    Kind,
    Range,
    Vector,
    check_instruction,
    check_reply,
    pack_instruction,
    pack_reply,
    theta_digest,
)
from common.errors import ContractError

STUDY = "ab" * 32
SCALARS: Mapping[Kind, Mapping[str, Range]] = {"join": JOIN, "train": TRAIN, "evaluate": EVALUATION}
KINDS = st.sampled_from(get_args(Kind))
DTYPES = st.sampled_from(["float32", "float64"])
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)

Draw = Callable[[st.SearchStrategy[Any]], Any]
#: Changes a message's content into one that must be refused.
Mutation = Callable[[RecordDict, Draw], None]


def instruction(kind: Kind) -> Instruction:
    return Instruction(kind, STUDY, 3, 1, "cd" * 32)


@st.composite
def vectors(draw: st.DrawFn, dtype: str) -> Vector:
    return np.array(draw(st.lists(FINITE, min_size=1, max_size=6)), dtype)


@st.composite
def answers(draw: st.DrawFn, kind: Kind) -> dict[str, float]:
    """Draw values that the study declares."""
    return {
        name: draw(st.integers(int(r.low), int(r.high)) if r.integer else st.floats(r.low, r.high))
        for name, r in SCALARS[kind].items()
    }


def scalars_of(content: RecordDict) -> dict[str, Any]:
    """Return the scalars to be changed, past Flower's own checks."""
    return cast(dict[str, Any], content["scalars"].__dict__["_data"])


def array_of(content: RecordDict, name: str) -> Array:
    return cast(ArrayRecord, content[name])[name]


# What can be wrong with a vector, under the name that it has in a message.


def _changed(name: str, field: str, values: Callable[[Any], st.SearchStrategy[Any]]) -> Mutation:
    def change(content: RecordDict, draw: Draw) -> None:
        array = array_of(content, name)
        before = getattr(array, field)
        setattr(array, field, draw(values(before).filter(lambda value: value != before)))

    return change


def _header_size(data: bytes) -> int:
    return 10 + int.from_bytes(data[8:10], "little")


def _not_finite(name: str) -> Mutation:
    def change(content: RecordDict, draw: Draw) -> None:
        array = array_of(content, name)
        start = _header_size(array.data)
        numbers = np.frombuffer(array.data[start:], array.dtype).copy()
        numbers[draw(st.integers(0, len(numbers) - 1))] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        array.data = array.data[:start] + numbers.tobytes()

    return change


def _other_header(name: str) -> Mutation:
    def change(content: RecordDict, draw: Draw) -> None:
        array = array_of(content, name)
        data = bytearray(array.data)
        data[draw(st.integers(0, _header_size(array.data) - 1))] ^= draw(st.integers(1, 255))
        array.data = bytes(data)

    return change


def _second_array(name: str) -> Mutation:
    def change(content: RecordDict, draw: Draw) -> None:
        record = cast(ArrayRecord, content[name])
        record[draw(st.text().filter(lambda text: text != name))] = record[name]

    return change


def _renamed_array(name: str) -> Mutation:
    def change(content: RecordDict, draw: Draw) -> None:
        array = array_of(content, name)
        content[name] = ArrayRecord({draw(st.text().filter(lambda text: text != name)): array})

    return change


def _other_record(name: str) -> Mutation:
    def change(content: RecordDict, draw: Draw) -> None:
        other = [ConfigRecord({name: "text"}), MetricRecord({name: 1.0}), ArrayRecord()]
        content[name] = draw(st.sampled_from(other))

    return change


def _without(name: str) -> Mutation:
    def change(content: RecordDict, draw: Draw) -> None:
        del content[name]

    return change


def _extra_record(content: RecordDict, draw: Draw) -> None:
    records = [ConfigRecord({"note": "text"}), MetricRecord({"patients": 12}), ArrayRecord(), ConfigRecord()]
    content[draw(st.text(min_size=1).filter(lambda text: text not in content))] = draw(st.sampled_from(records))


def of_vector(name: str) -> dict[str, Mutation]:
    types, wrong = st.sampled_from(["float16", "<f4", "float64", "float32"]), st.text()
    return {
        "bytes behind": _changed(name, "data", lambda data: st.binary(min_size=1, max_size=9).map(lambda b: data + b)),
        "bytes cut": _changed(name, "data", lambda data: st.integers(0, len(data) - 1).map(lambda size: data[:size])),
        "dtype": _changed(name, "dtype", lambda _: st.one_of(types, wrong)),
        "shape": _changed(name, "shape", lambda s: st.sampled_from([(), (1,), (1, *s), (*s, 1), (s[0] + 1,), (0,)])),
        "stype": _changed(name, "stype", lambda _: st.text()),
        "numbers": _not_finite(name),
        "header": _other_header(name),
        "second array": _second_array(name),
        "renamed array": _renamed_array(name),
        "other record": _other_record(name),
        "no record": _without(name),
    }


# What can be wrong with the scalars of a reply.


def _pick(content: RecordDict, draw: Draw, kind: Kind) -> tuple[str, Range]:
    name = draw(st.sampled_from(sorted(SCALARS[kind])))
    return name, SCALARS[kind][name]


def of_scalars(kind: Kind) -> dict[str, Mutation]:
    def not_finite(content: RecordDict, draw: Draw) -> None:
        name, _ = _pick(content, draw, kind)
        scalars_of(content)[name] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))

    def out_of_range(content: RecordDict, draw: Draw) -> None:
        name, allowed = _pick(content, draw, kind)
        step = 1 if allowed.integer else 1e-9 * max(1.0, allowed.high)
        value = draw(st.sampled_from([allowed.low - step, allowed.high + step]))
        scalars_of(content)[name] = int(value) if allowed.integer else float(value)

    def other_type(value: Any) -> Mutation:
        def change(content: RecordDict, draw: Draw) -> None:
            name, allowed = _pick(content, draw, kind)
            scalars_of(content)[name] = (0.0 if allowed.integer else 0) if value is int else value

        return change

    def missing(content: RecordDict, draw: Draw) -> None:
        del scalars_of(content)[draw(st.sampled_from(sorted(scalars_of(content))))]

    def extra(content: RecordDict, draw: Draw) -> None:
        known = scalars_of(content)
        known[draw(st.text().filter(lambda text: text not in known))] = 0.5

    def renamed(content: RecordDict, draw: Draw) -> None:
        known = scalars_of(content)
        name = draw(st.sampled_from(sorted(known)))
        value = known.pop(name)
        known[draw(st.text().filter(lambda text: text != name and text not in known))] = value

    def other_token(content: RecordDict, draw: Draw) -> None:
        known = scalars_of(content)
        known["token"] = draw(st.integers(-(2**63), 2**63 - 1).filter(lambda token: token != known["token"]))

    def token_as_float(content: RecordDict, draw: Draw) -> None:
        scalars_of(content)["token"] = float(scalars_of(content)["token"])

    def as_config(content: RecordDict, draw: Draw) -> None:
        content["scalars"] = ConfigRecord({**scalars_of(content)})

    types = {f"the type of {v!r}": other_type(v) for v in (True, [0.5], [1], [], "text", b"bytes", None, int)}
    own = (not_finite, out_of_range, missing, extra, renamed, other_token, token_as_float, as_config, _extra_record)
    return {**types, **{change.__name__: change for change in own}, "no scalars": _without("scalars")}


REPLIES: list[tuple[Kind, str, Mutation]] = [
    *((kind, what, change) for kind in get_args(Kind) for what, change in of_scalars(kind).items()),
    *(("train", what, change) for what, change in of_vector("meta_gradient").items()),
]


@settings(max_examples=50)
@given(KINDS, DTYPES, st.data())
def test_a_reply_as_declared_arrives_as_it_was(kind: Kind, dtype: str, data: st.DataObject) -> None:
    vector = data.draw(vectors(dtype).filter(np.any)) if kind == "train" else None
    scalars = data.draw(answers(kind))
    size = 0 if vector is None else vector.size
    reply = check_reply(pack_reply(instruction(kind), scalars, vector), instruction(kind), size=size, dtype=dtype)
    assert reply.scalars == scalars
    if vector is None:
        assert reply.vector is None
    else:
        assert reply.vector is not None
        assert reply.vector.tobytes() == vector.tobytes()
        assert reply.vector.dtype == vector.dtype


@pytest.mark.parametrize(("kind", "what", "change"), REPLIES, ids=lambda v: v if isinstance(v, str) else "")
@settings(max_examples=8)
@given(dtype=DTYPES, data=st.data())
def test_a_changed_reply_is_always_refused(
    kind: Kind, what: str, change: Mutation, dtype: str, data: st.DataObject
) -> None:
    vector = data.draw(vectors(dtype).filter(np.any)) if kind == "train" else None
    content = pack_reply(instruction(kind), data.draw(answers(kind)), vector)
    change(content, data.draw)
    with pytest.raises(ContractError):
        check_reply(content, instruction(kind), size=0 if vector is None else vector.size, dtype=dtype)


@pytest.mark.parametrize("kind", ["join", "evaluate"])
def test_only_training_has_a_vector(kind: Kind) -> None:
    scalars = {name: 0 if allowed.integer else 0.0 for name, allowed in SCALARS[kind].items()}
    with pytest.raises(ContractError, match="holds exactly"):
        pack_reply(instruction(kind), scalars, np.zeros(3, np.float32))
    with pytest.raises(ContractError, match="holds exactly"):
        pack_reply(instruction("train"), {"loss": 0.0, "accuracy": 0.0})


def test_a_site_does_not_send_what_the_other_end_would_refuse() -> None:
    train = instruction("train")
    with pytest.raises(ContractError, match="not finite"):
        pack_reply(train, {"loss": 0.0, "accuracy": 0.0}, np.array([1, np.nan], np.float32))
    with pytest.raises(ContractError, match="zero everywhere"):
        pack_reply(train, {"loss": 0.0, "accuracy": 0.0}, np.array([0, -0.0], np.float32))
    with pytest.raises(ContractError, match="loss"):
        pack_reply(train, {"loss": math.nan, "accuracy": 0.0}, np.ones(2, np.float32))
    with pytest.raises(ContractError, match="exactly"):
        pack_reply(train, {"loss": 0.0, "accuracy": 0.0, "patients": 12.0}, np.ones(2, np.float32))


def test_no_scalar_counts_anything() -> None:
    names = {name for ranges in SCALARS.values() for name in ranges}
    assert names == {"site", "loss", "accuracy", *EVALUATION}
    assert len(EVALUATION) == 2 * 7 * 2
    assert {"known.after.mean", "new.gain.error", "known.balanced.mean", "new.auroc.error", "known.ece.mean"} <= names
    assert all((r.low, r.high, r.integer) == (-1, 1, False) for r in EVALUATION.values())


def test_a_reply_to_another_instruction_is_refused() -> None:
    mine = instruction("train")
    content = pack_reply(mine, {"loss": 0.0, "accuracy": 0.0}, np.ones(2, np.float32))
    others = [
        replace(mine, round=4),
        replace(mine, attempt=2),
        replace(mine, study="ef" * 32),
        replace(mine, theta="12" * 32),
        replace(mine, scratch=True),
    ]
    for other in others:
        assert other.token != mine.token
        with pytest.raises(ContractError, match="another instruction"):
            check_reply(content, other, size=2, dtype="float32")
    assert instruction("evaluate").token != mine.token


# Instructions, as a site reads them.


def field(name: str, value: Any) -> Mutation:
    def change(content: RecordDict, draw: Draw) -> None:
        cast(dict[str, Any], content["instruction"].__dict__["_data"])[name] = value

    return change


def _missing_field(content: RecordDict, draw: Draw) -> None:
    record = cast(ConfigRecord, content["instruction"])
    del record[draw(st.sampled_from(sorted(record)))]


def _extra_field(content: RecordDict, draw: Draw) -> None:
    record = cast(ConfigRecord, content["instruction"])
    record[draw(st.text().filter(lambda text: text not in record))] = "text"


WRONG: dict[str, tuple[Any, ...]] = {
    "kind": ("", "query", "train.default", "TRAIN", 1, True, None),
    "study": ("", STUDY[:-1], "ef" * 32, 1, b"bytes"),
    "round": (-1, 1.0, True, "1", None),
    "attempt": (-1, 1.0, True, "1"),
    "theta": (1, b"bytes", None),
    "scratch": (0, 1, "", None),
}
INSTRUCTIONS: dict[str, Mutation] = {
    **{f"{name} {value!r}": field(name, value) for name, values in WRONG.items() for value in values},
    "missing field": _missing_field,
    "extra field": _extra_field,
    "extra record": _extra_record,
    "other record": _other_record("instruction"),
    "no record": _without("instruction"),
}


@settings(max_examples=50)
@given(KINDS, DTYPES, st.data())
def test_an_instruction_arrives_as_it_was(kind: Kind, dtype: str, data: st.DataObject) -> None:
    theta = data.draw(vectors(dtype))
    content = pack_instruction(instruction(kind), None if kind == "join" else theta)
    received, vector = check_instruction(content, study=STUDY, size=theta.size, dtype=dtype)
    assert received == instruction(kind)
    assert received.token == instruction(kind).token
    assert (vector is None) == (kind == "join")
    assert vector is None or vector.tobytes() == theta.tobytes()


@pytest.mark.parametrize("change", INSTRUCTIONS.values(), ids=INSTRUCTIONS)
@settings(max_examples=4)
@given(kind=KINDS, data=st.data())
def test_a_changed_instruction_is_always_refused(change: Mutation, kind: Kind, data: st.DataObject) -> None:
    content = pack_instruction(instruction(kind), None if kind == "join" else np.ones(3, np.float32))
    change(content, data.draw)
    with pytest.raises(ContractError):
        check_instruction(content, study=STUDY, size=3, dtype="float32")


@pytest.mark.parametrize("change", of_vector("theta").values(), ids=of_vector("theta"))
@settings(max_examples=8)
@given(kind=st.sampled_from(["train", "evaluate"]), dtype=DTYPES, data=st.data())
def test_a_changed_theta_is_always_refused(change: Mutation, kind: Kind, dtype: str, data: st.DataObject) -> None:
    theta = data.draw(vectors(dtype))
    content = pack_instruction(instruction(kind), theta)
    change(content, data.draw)
    with pytest.raises(ContractError):
        check_instruction(content, study=STUDY, size=theta.size, dtype=dtype)


def test_joining_carries_no_theta_and_everything_else_does() -> None:
    theta = np.zeros(2, np.float32)
    with pytest.raises(ContractError, match="holds exactly"):
        check_instruction(pack_instruction(instruction("join"), theta), study=STUDY, size=2, dtype="float32")
    for kind in ("train", "evaluate"):
        with pytest.raises(ContractError, match="holds exactly"):
            check_instruction(pack_instruction(instruction(kind)), study=STUDY, size=2, dtype="float32")


def test_another_study_is_named() -> None:
    with pytest.raises(ContractError, match="abababababab, this site runs efefefefefef"):
        check_instruction(pack_instruction(instruction("join")), study="ef" * 32, size=2, dtype="float32")


def test_theta_digest_sees_names_shapes_type_values_and_their_order() -> None:
    theta = np.arange(6, dtype=np.float32)
    layout = {"a": (2, 2), "b": (2,)}
    digests = {
        theta_digest(theta, layout),
        theta_digest(theta, {"a": (4,), "b": (2,)}),
        theta_digest(theta, {"a": (2, 2), "c": (2,)}),
        theta_digest(theta, {"b": (2,), "a": (2, 2)}),
        theta_digest(theta.astype(np.float64), layout),
        theta_digest(theta[::-1], layout),
        theta_digest(np.where(theta == 0, -0.0, theta).astype(np.float32), layout),
    }
    assert len(digests) == 7
    strided = np.repeat(theta, 2)[::2]
    assert theta_digest(strided, layout) == theta_digest(theta, layout)


def test_what_was_checked_is_freed_at_once() -> None:
    instruction, vector = Instruction("train", "s", 1, 1, "t"), np.ones(3, np.float32)
    down = pack_instruction(instruction, vector)
    up = pack_reply(instruction, {"loss": 1.0, "accuracy": 0.5}, vector)
    alive = [weakref.ref(down), weakref.ref(up)]
    gc.disable()  # vectors are large: none may wait until Python looks for cycles
    try:
        check_instruction(down, study="s", size=3, dtype="float32")
        check_reply(up, instruction, size=3, dtype="float32")
        del down, up
        assert [content() for content in alive] == [None, None]
    finally:
        gc.enable()
