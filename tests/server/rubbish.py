"""What a hostile or broken site may send in the place of a meta-gradient, and the word for what is wrong with it."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from common.contract import Instruction, Vector, pack_reply
from common.errors import DataError

__all__ = ["CASES", "PATIENT", "Case", "Change", "records", "scalars"]

#: Stands in every reply that can hold a text; nothing of it may come through.
PATIENT = "Kowalska^Zofia"

#: Makes a hostile reply of a good one.
Change = Callable[[Instruction, RecordDict, Message], RecordDict | Message]


@dataclass(frozen=True)
class Case:
    """A hostile reply, and the word and code of its rejection."""

    why: str
    change: Change
    code: int = 102


def vector(change: Callable[[Vector], NDArray[Any]]) -> Change:
    """Send another vector."""
    return arrays(lambda good: {"meta_gradient": Array(change(good))})


def arrays(make: Callable[[Vector], dict[str, Array]]) -> Change:
    """Send other arrays in the record of the vector."""

    def apply(instruction: Instruction, content: RecordDict, _: Message) -> RecordDict:
        good = content.array_records["meta_gradient"]["meta_gradient"].numpy()
        content["meta_gradient"] = ArrayRecord(make(good))
        return content

    return apply


def raw(make: Callable[[Array, Vector], Array]) -> Change:
    """Send an array whose bytes are not what it says."""
    return arrays(lambda good: {"meta_gradient": make(Array(good), good)})


def scalars(**changes: Any) -> Change:
    """Send other scalars."""

    def apply(instruction: Instruction, content: RecordDict, _: Message) -> RecordDict:
        content.metric_records["scalars"].update(changes)
        return content

    return apply


def records(change: Callable[[RecordDict], object]) -> Change:
    """Send other records."""

    def apply(instruction: Instruction, content: RecordDict, _: Message) -> RecordDict:
        change(content)
        return content

    return apply


def text_for(name: str) -> Change:
    """Send text in the place of a record."""

    def change(content: RecordDict) -> None:
        del content[name]
        content[name] = ConfigRecord({name: PATIENT})

    return records(change)


def answers(**other: Any) -> Change:
    """Answer another instruction, in the best of forms."""

    def apply(instruction: Instruction, content: RecordDict, _: Message) -> RecordDict:
        good = content.array_records["meta_gradient"]["meta_gradient"].numpy()
        return pack_reply(replace(instruction, **other), {"loss": 1.0, "accuracy": 0.5}, good)

    return apply


def error(code: int, reason: str) -> Change:
    return lambda instruction, content, message: Message(Error(code, reason), reply_to=message)


def one(value: float) -> Callable[[Vector], Vector]:
    """Return what puts a value in the place of one number."""

    def change(good: Vector) -> Vector:
        out = good.copy()
        out[len(out) // 2] = value
        return out

    return change


def renamed(content: RecordDict) -> None:
    content[PATIENT] = content.pop("meta_gradient")


class Unpickled:
    """Says so when somebody is careless enough."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a reply was unpickled",)


CASES: dict[str, Case] = {
    "NaN": Case("not-finite", vector(one(np.nan))),
    "infinite": Case("not-finite", vector(one(-np.inf))),
    "1e30": Case("norm", vector(one(1e30))),
    "the largest numbers": Case("norm", vector(lambda v: np.full_like(v, 3e38))),
    "zeros": Case("zero", vector(np.zeros_like)),
    "an array of another name": Case("arrays", arrays(lambda v: {PATIENT: Array(v)})),
    "a record of another name": Case("records", records(renamed)),
    "no vector": Case("records", records(lambda content: content.pop("meta_gradient"))),
    "no array": Case("arrays", arrays(lambda _: {})),
    "an array more": Case("arrays", arrays(lambda v: {"meta_gradient": Array(v), PATIENT: Array(v)})),
    "two records of arrays": Case(
        "records", records(lambda content: content.update({PATIENT: content["meta_gradient"]}))
    ),
    "notes": Case("records", records(lambda content: content.update(notes=ConfigRecord({"patient": PATIENT})))),
    "text for arrays": Case("arrays", text_for("meta_gradient")),
    "an empty reply": Case("records", records(RecordDict.clear)),
    "one number, to be broadcast": Case("shape", vector(lambda v: v[:1])),
    "a number without a shape": Case("shape", vector(lambda v: np.array(v[0]))),
    "a row": Case("shape", vector(lambda v: v.reshape(1, -1))),
    "a number too many": Case("shape", vector(lambda v: np.append(v, np.float32(1)))),
    "ten times the size": Case("shape", vector(lambda v: np.tile(v, 10))),
    "float64": Case("shape", vector(lambda v: v.astype(np.float64))),
    "int": Case("shape", vector(lambda v: np.ones(v.shape, np.int32))),
    "bytes of another type": Case(
        "shape", raw(lambda a, v: Array(a.dtype, a.shape, a.stype, Array(v.astype(np.float64)).data))
    ),
    "bytes after the numbers": Case(
        "shape", raw(lambda a, _: Array(a.dtype, a.shape, a.stype, a.data + PATIENT.encode()))
    ),
    "bytes before the numbers": Case(
        "shape", raw(lambda a, _: Array(a.dtype, a.shape, a.stype, a.data.replace(b"     ", b"Zofia", 1)))
    ),
    "a pickle": Case("shape", raw(lambda a, _: Array(a.dtype, a.shape, a.stype, pickle.dumps(Unpickled())))),
    "another kind of array": Case("shape", raw(lambda a, _: Array(a.dtype, a.shape, PATIENT, a.data))),
    "a weight of its own": Case("scalars", scalars(weight=1e9)),
    "a count of patients": Case("scalars", scalars(**{"num-examples": 12})),
    "no scalars": Case("scalars", records(lambda content: content.update(scalars=MetricRecord()))),
    "text for scalars": Case("scalars", text_for("scalars")),
    "a list of losses": Case("scalar-type", scalars(loss=[1.0, 2.0])),
    "a loss that is NaN": Case("scalar-range", scalars(loss=float("nan"))),
    "an accuracy beyond one": Case("scalar-range", scalars(accuracy=1.5)),
    "no token": Case("scalars", records(lambda content: content.metric_records["scalars"].pop("token"))),
    "another token": Case("other-instruction", scalars(token=1)),
    "a reply for another round": Case("other-instruction", answers(round=1)),
    "a reply for another attempt": Case("other-instruction", answers(attempt=2)),
    "a reply for another theta": Case("other-instruction", answers(theta="0" * 64)),
    "a reply for another study": Case("other-instruction", answers(study="0" * 64)),
    "an error of 10 MB": Case("error", error(DataError.code, f"{PATIENT} " * 700_000), DataError.code),
    "an error of many lines": Case("error", error(DataError.code, f"incident 0123abcd\n{PATIENT}"), DataError.code),
    "an error of no known code": Case("error", error(-(2**31), PATIENT), -(2**31)),
}
