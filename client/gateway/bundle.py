"""A Flower App Bundle, read without unpacking it anywhere: what is in it, and what changed since another one."""

import difflib
import io
import stat
import tomllib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from common.errors import ApprovalError

if TYPE_CHECKING:
    from flwr.app.user_config import UserConfig

__all__ = ["LARGEST_BUNDLE", "difference", "read_bundle", "run_config"]

#: Bytes of a bundle: Flower itself takes 10 MB.
LARGEST_BUNDLE = 12 * 2**20

_LARGEST_WHOLE = 64 * 2**20
_MOST_FILES = 2000
#: Bytes of a file whose lines are compared.
_LARGEST_TEXT = 2**20


def read_bundle(data: bytes) -> dict[str, bytes]:
    """Return the files of a bundle, by name.

    Raises
    ------
    ApprovalError
        The bytes are not a bundle, or one that no honest coordinator makes: too large, too many files, a name twice,
        a name that leads out of its folder or cannot be shown, a link.
    """
    if len(data) > LARGEST_BUNDLE:
        raise _bad(f"it has {len(data)} bytes, and a bundle at most {LARGEST_BUNDLE}")
    files: dict[str, bytes] = {}
    left = _LARGEST_WHOLE
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > _MOST_FILES:
                raise _bad(f"it has {len(entries)} files, and a bundle at most {_MOST_FILES}")
            for entry in entries:
                _must_be_plain(entry, files)
                with archive.open(entry) as file:  # what the archive says about a file's size may be a lie
                    files[entry.filename] = file.read(left + 1)
                left -= len(files[entry.filename])
                if left < 0:
                    raise _bad(f"unpacked it has more than {_LARGEST_WHOLE} bytes")
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, NotImplementedError):
        raise _bad("it is not a zip archive that can be read") from None
    return files


def run_config(files: Mapping[str, bytes], override: "UserConfig") -> "UserConfig":
    """Return the run configuration that Flower makes of a bundle's own and a run's.

    Raises
    ------
    ApprovalError
        The bundle's ``pyproject.toml`` has none.
    """
    from flwr.common.config import flatten_dict, fuse_dicts  # takes a while, and most commands have no use for it

    try:
        app: dict[str, Any] = tomllib.loads(files["pyproject.toml"].decode())["tool"]["flwr"]["app"]
        return fuse_dicts(flatten_dict(app.get("config", {})), override)
    except (KeyError, ValueError, TypeError, AttributeError):
        raise _bad("its pyproject.toml is no configuration of an app, or does not know the run's keys") from None


def difference(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> Iterator[str]:
    """Yield the lines that show what changed between two bundles: first the names, then the text.

    Nothing in them can move a terminal's cursor or reverse its writing: what cannot be printed is written out.
    """
    names = sorted({name for name in (*old, *new) if old.get(name) != new.get(name)})
    yield f"{len(names)} of {len({*old, *new})} files differ"
    for name in names:
        word = "added  " if name not in old else "removed" if name not in new else "changed"
        yield f"  {word}  {name}  {len(new.get(name, b''))} bytes"
    for name in names:
        yield ""
        yield from _text(name, old.get(name, b""), new.get(name, b""))


def _text(name: str, old: bytes, new: bytes) -> Iterator[str]:
    try:
        if max(len(old), len(new)) > _LARGEST_TEXT:
            raise ValueError
        before, after = (data.decode().split("\n") for data in (old, new))
    except ValueError:
        yield f"{name} is not shown: it is no text in UTF-8, or has more than {_LARGEST_TEXT} bytes"
        return
    for line in difflib.unified_diff(before, after, f"approved/{name}", f"new/{name}", lineterm=""):
        yield "".join(_shown(letter) for letter in line)


def _shown(letter: str) -> str:
    return letter if letter.isprintable() or letter == "\t" else f"<U+{ord(letter):04X}>"


def _must_be_plain(entry: zipfile.ZipInfo, known: Mapping[str, bytes]) -> None:
    name = entry.filename
    parts = name.split("/")
    odd = not name.isprintable() or "\\" in name or ":" in name or {"", ".", ".."} & set(parts)
    if odd or name in known or len(name) > 500:
        raise _bad("a file in it has a name that leads elsewhere, stands twice, or cannot be shown")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise _bad("a file in it is a link")


def _bad(what: str) -> ApprovalError:
    return ApprovalError(f"this is no bundle that a site can look at: {what}", "bundle-format")
