"""What may cross the wire: exactly these records, keys, types, shapes and ranges, on both ends.

Down goes theta with the round's public numbers. Up comes one vector and the declared scalars, nothing else: no
second record, no free text, no count, no buffer, not even a byte of array header that is not fixed by the study.
"""

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from common.canonical import canonical_json, sha256_hex
from common.errors import ContractError

__all__ = [
    "EVALUATION",
    "JOIN",
    "TRAIN",
    "Instruction",
    "Kind",
    "Range",
    "Reply",
    "Side",
    "Vector",
    "check_instruction",
    "check_reply",
    "pack_instruction",
    "pack_reply",
    "theta_digest",
]

Vector = NDArray[np.floating]
Kind = Literal["join", "train", "evaluate"]
Side = Literal["validation", "test"]


@dataclass(frozen=True)
class Range:
    """The values that a declared scalar may have, ends included."""

    low: float
    high: float
    integer: bool = False


_SHARE = Range(-1.0, 1.0)  # a share of 0 to 1; -1 says that the site cannot offer the figure
_LOSS = Range(-1.0, 1e6)

#: Declared scalars of each kind of reply, beside the token that binds a reply to its instruction.
JOIN: Mapping[str, Range] = {"site": Range(0, 2**31, integer=True)}
TRAIN: Mapping[str, Range] = {"loss": _LOSS, "accuracy": _SHARE}
#: Mean and standard error over meta-test episodes: accuracy before and after adaptation, from scratch and the gain
#: over it; then balanced accuracy, AUROC and expected calibration error of adapted theta.
EVALUATION: Mapping[str, Range] = {
    f"{pool}.{figure}.{part}": _SHARE
    for pool in ("known", "new")
    for figure in ("before", "after", "scratch", "gain", "balanced", "auroc", "ece")
    for part in ("mean", "error")
}
_SCALARS: Mapping[Kind, Mapping[str, Range]] = {"join": JOIN, "train": TRAIN, "evaluate": EVALUATION}
_TOKEN = Range(0, 2**63 - 1, integer=True)


@dataclass(frozen=True)
class Instruction:
    """What the coordinator asks of a site in one message.

    Attributes
    ----------
    kind : {"join", "train", "evaluate"}
        What to do.
    study, theta : str
        Digest of the study, and of theta (empty when joining).
    round, attempt : int
        Counted from 1; a retried round has the same theta and a higher attempt.
    scratch : bool
        Evaluate training from scratch too.
    side : {"validation", "test"}
        Which patients of a site that trains are evaluated on.
    """

    kind: Kind
    study: str
    round: int = 0
    attempt: int = 0
    theta: str = ""
    scratch: bool = False
    side: Side = "test"

    @property
    def token(self) -> int:
        """63 bits of a digest over every field: a reply that carries it answers this instruction alone."""
        return int(sha256_hex(canonical_json([*vars(self).values()]))[:16], 16) >> 1


@dataclass(frozen=True)
class Reply:
    """A reply that passed the contract: the vector (None unless training) and the declared scalars."""

    vector: Vector | None
    scalars: Mapping[str, float]


def theta_digest(vector: Vector, layout: Mapping[str, tuple[int, ...]]) -> str:
    """Return the SHA-256 over theta's names, shapes, type and values, in hex."""
    head = canonical_json([[n, list(s)] for n, s in layout.items()] + [vector.dtype.str])
    return hashlib.sha256(head + np.ascontiguousarray(vector).tobytes()).hexdigest()


def pack_instruction(instruction: Instruction, theta: Vector | None = None) -> RecordDict:
    """Return an instruction as a message's content."""
    content = RecordDict({"instruction": ConfigRecord(dict(vars(instruction)))})
    if theta is not None:
        content["theta"] = ArrayRecord({"theta": _pack(theta)})
    return content


def check_instruction(content: RecordDict, *, study: str, size: int, dtype: str) -> tuple[Instruction, Vector | None]:
    """Read an instruction at a site.

    Parameters
    ----------
    content : RecordDict
        The message's content.
    study : str
        Digest of the study that this site runs.
    size : int
        Number of elements D of theta.
    dtype : str
        The study's floating-point type.

    Raises
    ------
    ContractError
        The message is not one that this study sends, or belongs to another study.
    """
    # Not through `content.config_records`: Flower's view refers back to the content, and the cycle would keep theta in
    # memory until Python looks for cycles.
    record = content.get("instruction")
    fields = {"kind": str, "study": str, "round": int, "attempt": int, "theta": str, "scratch": bool, "side": str}
    if not isinstance(record, ConfigRecord) or set(record) != set(fields):
        raise ContractError("the message holds no instruction, or one of another version of wardround")
    if any(type(record[name]) is not kind for name, kind in fields.items()):
        raise ContractError("a field of the instruction has the wrong type")
    instruction = Instruction(**dict(record))  # type: ignore[arg-type]
    if instruction.study != study:
        raise ContractError(
            f"the message belongs to the study {instruction.study[:12]}, this site runs {study[:12]}: "
            "coordinator and site must use the same study file"
        )
    known = instruction.kind in _SCALARS and instruction.side in get_args(Side)
    if not known or min(instruction.round, instruction.attempt) < 0:
        raise ContractError("the instruction asks for something that no study can ask")
    expected = {"instruction"} if instruction.kind == "join" else {"instruction", "theta"}
    if set(content) != expected:
        raise ContractError(f"a message to {instruction.kind} holds exactly {sorted(expected)}")
    if instruction.kind == "join":
        return instruction, None
    theta = _unpack(content["theta"], "theta", size, dtype)
    if not np.isfinite(theta).all():
        raise ContractError("theta is not finite")
    return instruction, theta


def pack_reply(instruction: Instruction, scalars: Mapping[str, float], vector: Vector | None = None) -> RecordDict:
    """Return a reply as a message's content; it is checked by the same rules as at the other end.

    Raises
    ------
    ContractError
        The values are not what the study declares.
    """
    content = RecordDict({"scalars": MetricRecord({"token": instruction.token, **scalars})})
    if vector is not None:
        content["meta_gradient"] = ArrayRecord({"meta_gradient": _pack(vector)})
    size, dtype = (0, "float32") if vector is None else (vector.size, str(vector.dtype))
    check_reply(content, instruction, size=size, dtype=dtype)
    return content


def check_reply(content: RecordDict, instruction: Instruction, *, size: int, dtype: str) -> Reply:
    """Read a reply; it holds exactly what the instruction's kind declares.

    Parameters
    ----------
    content : RecordDict
        The reply's content.
    instruction : Instruction
        What the reply answers.
    size : int
        Number of elements D of the meta-gradient.
    dtype : str
        The study's floating-point type.

    Raises
    ------
    ContractError
        Anything is missing, added, of another type or shape, not finite, out of range, or answers another
        instruction; its ``why`` says which.
    """
    expected = {"scalars", "meta_gradient"} if instruction.kind == "train" else {"scalars"}
    if set(content) != expected:
        raise ContractError(f"a reply to {instruction.kind} holds exactly {sorted(expected)}", "records")
    record = content["scalars"]
    ranges = {"token": _TOKEN, **_SCALARS[instruction.kind]}
    if not isinstance(record, MetricRecord) or set(record) != set(ranges):
        raise ContractError(f"the scalars of a reply to {instruction.kind} are exactly {sorted(ranges)}", "scalars")
    for name, allowed in ranges.items():
        value = record[name]
        if type(value) is not (int if allowed.integer else float):
            raise ContractError(f"the scalar {name} has the wrong type", "scalar-type")
        if not math.isfinite(value) or not allowed.low <= value <= allowed.high:
            raise ContractError(f"the scalar {name} is not within {allowed.low} to {allowed.high}", "scalar-range")
    if record["token"] != instruction.token:
        raise ContractError("the reply answers another instruction", "other-instruction")
    scalars = {name: float(record[name]) for name in _SCALARS[instruction.kind]}  # type: ignore[arg-type]
    if instruction.kind != "train":
        return Reply(None, scalars)
    vector = _unpack(content["meta_gradient"], "meta_gradient", size, dtype)
    if not np.isfinite(vector).all():
        raise ContractError("the meta-gradient is not finite", "not-finite")
    if not vector.any():
        raise ContractError("the meta-gradient is zero everywhere: it says nothing", "zero")
    return Reply(vector, scalars)


@cache
def _header(size: int, dtype: str) -> bytes:
    """Return the one byte string that may stand before a vector's numbers."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": (size,)}
    )
    return out.getvalue()


def _pack(vector: Vector) -> Array:
    dtype = str(vector.dtype)
    numbers = np.ascontiguousarray(vector, dtype=np.dtype(dtype).newbyteorder("<"))
    return Array(dtype, (vector.size,), "numpy.ndarray", _header(vector.size, dtype) + numbers.tobytes())


def _unpack(record: object, name: str, size: int, dtype: str) -> Vector:
    if not isinstance(record, ArrayRecord) or set(record) != {name}:
        raise ContractError(f"the record {name} holds exactly one array of that name", "arrays")
    array = record[name]
    header = _header(size, dtype)
    if (array.dtype, tuple(array.shape), array.stype) != (dtype, (size,), "numpy.ndarray"):
        raise ContractError(f"the array {name} is not a vector of {size} {dtype} numbers", "shape")
    if len(array.data) != len(header) + size * np.dtype(dtype).itemsize or not array.data.startswith(header):
        raise ContractError(f"the bytes of the array {name} are not a vector of {size} {dtype} numbers", "shape")
    return np.frombuffer(array.data, np.dtype(dtype).newbyteorder("<"), offset=len(header))
