"""A file of records, CSV or JSON lines, that grows by whole batches and goes on where it ended."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import DataError

__all__ = ["KINDS", "Table"]

#: What a record holds of every class: its probability, and the interval's ends.
KINDS = ("p", "low", "high")


@dataclass
class Table:
    """A file of records that grows by whole batches, all of one model.

    Attributes
    ----------
    model : str
        Digest of the model.
    files : set of bytes
        Hashes of the names that have records.

    Raises
    ------
    DataError
        The file holds something else, or what another model said.
    """

    path: Path
    classes: tuple[str, ...]
    model: str
    first: tuple[str, ...] = ("file", "frame", "patient")
    files: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.path.suffix not in {".csv", ".jsonl"}:
            raise DataError("--out takes a file that ends in .csv or .jsonl")
        kinds = [f"{kind} {name}" for kind in KINDS for name in self.classes]
        self.columns = [*self.first, "class", "set", *kinds, "unlike", "reason", "model"]
        try:
            if self.path.exists():
                self._look()  # before anything is changed
                self._mend()
                self.files = {self._known(record) for record in self.records()}
            else:
                self._write(
                    "" if self.path.suffix == ".jsonl" else ",".join(map(_quoted, self.columns)) + "\n", new=True
                )
        except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError):
            raise DataError(
                "the file of --out cannot be written, or holds something else: name another one, or remove it"
            ) from None

    def has(self, file: str) -> bool:
        """Whether a file has its records."""
        return _short(file) in self.files

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield what is in the file."""
        with self.path.open(encoding="utf-8", newline="") as file:
            if self.path.suffix == ".jsonl":
                yield from map(json.loads, file)
            else:
                yield from csv.DictReader(file)

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records, durably."""
        lines = []
        for record in records:
            row = {column: record.get(column, "") for column in self.columns} | {"model": self.model}
            if self.path.suffix == ".jsonl":
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                lines.append(",".join(_quoted(str(value)) for value in row.values()) + "\n")
        self._write("".join(lines))

    def _write(self, text: str, *, new: bool = False) -> None:
        flags = os.O_WRONLY | os.O_APPEND | (os.O_CREAT if new else 0)
        with open(os.open(self.path, flags, 0o600), "ab") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())

    def _known(self, record: dict[str, Any]) -> bytes:
        if record["model"] != self.model:
            raise DataError("the file of records holds what another model said: name another one for this model")
        return _short(record["file"])

    def _look(self) -> None:
        """Refuse a file whose first line is not one of these records, or their header."""
        with self.path.open(encoding="utf-8", newline="") as file:
            line = file.readline()
        if line.endswith("\n"):
            jsonl = self.path.suffix == ".jsonl"
            found = list(json.loads(line)) if jsonl else next(csv.reader([line]))
            if found != self.columns:
                raise DataError("the file of --out holds something else: name another one")
        elif self.path.suffix != ".jsonl" or line[:1] not in ("", "{"):
            raise DataError("the file of --out holds something else: name another one")

    def _mend(self) -> None:
        """Cut off a last line without an end: a batch that was being written when the machine stopped."""
        size = self.path.stat().st_size
        with self.path.open("rb+") as file:
            while size:
                start = max(0, size - 65536)
                file.seek(start)
                end = file.read(size - start).rfind(b"\n")
                if end >= 0:
                    size = start + end + 1
                    break
                size = start
            file.truncate(size)


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text


def _short(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:16]
