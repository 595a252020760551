"""A malicious ClientApp. It goes into a bundle of its own, and in every round tries another way to bring pixels out."""

import json
import socket
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from common.contract import Instruction, Vector, pack_reply

__all__ = ["LATE_SECONDS", "NUMBERS", "PIXELS", "TEXT", "TRICKS", "app", "low_bytes", "tried"]

#: What is not to get out, as bytes and as text. Neither stands in the bundle itself, which the coordinator has.
PIXELS = sha256(b"a patient").digest()
TEXT = PIXELS.hex()

#: Elements D of the vector that the study declares, and as many innocent numbers, of norm 4.7.
NUMBERS = np.linspace(-1, 1, 64, dtype=np.float32)

#: How long after a question its answer is made, where that is to say something.
LATE_SECONDS = 1.5

app = ClientApp()


@app.train()
def train(message: Message, _: Context) -> Message:
    """Do what the round's number says."""
    instruction = Instruction(**dict(message.content["instruction"]))  # type: ignore[arg-type]
    return list(TRICKS.values())[instruction.round - 1](message, instruction)


def tried(ways: Mapping[str, Any]) -> list[str]:
    """Try to hand the pixels over to somebody on this machine; return what seemed to work.

    Parameters
    ----------
    ways : mapping
        From a name to a kind of socket and its address, or to a file.
    """
    return [name for name, (kind, where) in ways.items() if _went(kind, where)]


def low_bytes(vector: Vector) -> bytes:
    """Return what the lowest bytes of float32 numbers ``[D]`` say."""
    return vector.astype("<f4").view(np.uint8)[::4].tobytes()


def _went(kind: str, where: Any) -> bool:
    try:
        if kind == "file":
            Path(where).write_bytes(PIXELS)
            return True
        family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as one:
            one.settimeout(3)
            one.connect(where if isinstance(where, str) else tuple(where))
            one.sendall(PIXELS)
        return True
    except OSError:
        return False


def _honest(instruction: Instruction, vector: Vector = NUMBERS, loss: float = 0.75) -> RecordDict:
    return pack_reply(instruction, {"loss": loss, "accuracy": 0.5}, vector)


def _array(data: bytes = PIXELS) -> Array:
    return Array(np.frombuffer(data, np.uint8))


def _hidden(vector: Vector) -> Vector:
    """Return a vector whose lowest bytes are the pixels; no number changes by more than 2^-15 of it."""
    found = vector.astype("<f4")
    found.view(np.uint8)[: 4 * len(PIXELS) : 4] = np.frombuffer(PIXELS, np.uint8)
    return found


def _another_array(message: Message, instruction: Instruction) -> Message:
    content = _honest(instruction)
    content["pixels"] = ArrayRecord({"pixels": _array()})
    return Message(content, reply_to=message)


def _array_beside(message: Message, instruction: Instruction) -> Message:
    content = _honest(instruction)
    content.array_records["meta_gradient"]["pixels"] = _array()
    return Message(content, reply_to=message)


def _name_of_an_array(message: Message, instruction: Instruction) -> Message:
    content = _honest(instruction)
    content["meta_gradient"] = ArrayRecord({TEXT: content.array_records["meta_gradient"]["meta_gradient"]})
    return Message(content, reply_to=message)


def _metric(message: Message, instruction: Instruction) -> Message:
    content = _honest(instruction)
    content["scalars"] = MetricRecord({**content.metric_records["scalars"], "pixels": list(map(int, PIXELS))})
    return Message(content, reply_to=message)


def _config(message: Message, instruction: Instruction) -> Message:
    content = _honest(instruction)
    content["note"] = ConfigRecord({"pixels": PIXELS, "name": TEXT})
    return Message(content, reply_to=message)


def _nan(message: Message, instruction: Instruction) -> Message:
    """Numbers that are none have 22 bits that no computation looks at."""
    content = _honest(instruction)
    words = np.frombuffer(PIXELS, "<u2").astype("<u4") | 0x7FC00000
    array = content.array_records["meta_gradient"]["meta_gradient"]
    array.data = array.data[: -words.nbytes] + words.tobytes()
    return Message(content, reply_to=message)


def _metadata(message: Message, instruction: Instruction) -> Message:
    reply = Message(_honest(instruction), reply_to=message)
    reply.metadata.group_id = TEXT
    return reply


def _error(message: Message, _: Instruction) -> Message:
    return Message(Error(104, f"no such file: {TEXT}"), reply_to=message)


def _exception(_: Message, __: Instruction) -> Message:
    raise ValueError(TEXT)


def _code(message: Message, _: Instruction) -> Message:
    """No code of anybody's: a number that says something."""
    return Message(Error(int.from_bytes(PIXELS[:2])), reply_to=message)


def _low_bits_too_long(message: Message, instruction: Instruction) -> Message:
    return Message(_honest(instruction, _hidden(10 * NUMBERS)), reply_to=message)


def _declared(message: Message, instruction: Instruction) -> Message:
    """Everything that nobody can tell from an honest answer: low bits, the digits of a figure, and the time."""
    time.sleep(max(0.0, message.metadata.created_at + LATE_SECONDS - time.time()))
    return Message(_honest(instruction, _hidden(NUMBERS), loss=float(PIXELS[0])), reply_to=message)


def _walls(message: Message, instruction: Instruction) -> Message:
    """Say with the loss, one bit for each way, what could be reached."""
    ways = json.loads(Path(__file__).with_name("ways.json").read_text())
    worked = tried(ways)
    return Message(
        _honest(instruction, loss=float(sum(2**i for i, n in enumerate(ways) if n in worked))), reply_to=message
    )


TRICKS: Mapping[str, Callable[[Message, Instruction], Message]] = {
    "another array": _another_array,
    "an array beside the declared one": _array_beside,
    "the name of an array": _name_of_an_array,
    "another metric": _metric,
    "a config record": _config,
    "the payload of NaN": _nan,
    "metadata": _metadata,
    "low bits beyond the norm": _low_bits_too_long,
    "the text of an error": _error,
    "an exception": _exception,
    "a code of its own": _code,
    "the declared numbers": _declared,
    "walls": _walls,
}
