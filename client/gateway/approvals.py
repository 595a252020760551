"""What this site lets run: bundles by the SHA-256 of their bytes, studies by their digest. Everything else waits.

Both must also stand in the consortium's manifest, which the coordinator has signed. ::

    gateway/approvals/bundle-9f3c....json    what was decided
    gateway/bundles/9f3c....fab              the bytes that it was decided about
    gateway/studies/51ab....toml
"""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from client.files import write_whole
from client.gateway.bundle import read_bundle
from common.canonical import sha256_hex
from common.consortium import Manifest
from common.errors import ApprovalError, StudyError
from common.study import Study

__all__ = [
    "Item",
    "approved_study",
    "bundle_bytes",
    "decide",
    "find",
    "items",
    "last_approved_bundle",
    "must_be_approved",
    "note_bundle",
    "note_study",
    "study_must_be_approved",
]

Kind = Literal["bundle", "study"]
State = Literal["waiting", "approved", "rejected"]

#: Things of a kind that may wait at once.
_MOST_WAITING = 20


class Item(BaseModel):
    """A bundle or study that was asked for, and what the site decided.

    Attributes
    ----------
    kind : {"bundle", "study"}
        What it is.
    digest : str
        SHA-256 of a bundle's bytes; a study's digest.
    state : {"waiting", "approved", "rejected"}
        What was decided.
    seen, decided : str
        When, in UTC; ``decided`` is empty while it waits.
    size : int
        Bytes of a bundle; elements D of an approved study's theta.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    kind: Kind
    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    state: State
    seen: str
    decided: str = ""
    size: Annotated[int, Field(ge=0)] = 0


def note_bundle(site: Path, data: bytes, now: datetime) -> Item:
    """Keep a bundle and let it wait, unless it is known.

    Raises
    ------
    ApprovalError
        The bytes are no bundle, or too many wait already.
    """
    digest = sha256_hex(data)
    if known := _known(site, "bundle", digest):
        return known
    read_bundle(data)
    return _wait(site, "bundle", digest, data, len(data), now)


def note_study(site: Path, study: Study, now: datetime) -> Item:
    """Keep a study and let it wait, unless it is known.

    Raises
    ------
    ApprovalError
        Too many wait already.
    """
    return _known(site, "study", study.digest) or _wait(site, "study", study.digest, study.toml().encode(), 0, now)


def must_be_approved(site: Path, manifest: Manifest, bundle: str, study: Study, now: datetime) -> None:
    """Check that a study may run here, with a bundle.

    Raises
    ------
    ApprovalError
        The site or the coordinator has not approved one of them, or the study has expired; its ``why`` says which.
    """
    for kind, digest, listed in (("bundle", bundle, manifest.bundles), ("study", study.digest, manifest.studies)):
        _must_be_approved(site, kind, digest)
        if digest not in listed:
            raise ApprovalError(
                f"the {kind} {digest[:12]} is not in the manifest (epoch {manifest.epoch}) that this site has: the "
                "coordinator admits it, and the site runs `wardround-site update MANIFEST`",
                f"{kind}-not-admitted",
            )
    _must_not_be_over(study, now)


def study_must_be_approved(site: Path, study: Study, now: datetime) -> None:
    """Check that a study may run here, whatever the bundle: for a process that does not run the bundle's code.

    Raises
    ------
    ApprovalError
        The site has not approved it, or it has expired; its ``why`` says which.
    """
    _must_be_approved(site, "study", study.digest)
    _must_not_be_over(study, now)


def _must_be_approved(site: Path, kind: str, digest: str) -> None:
    item, short = _known(site, kind, digest), digest[:12]
    if item is None or item.state == "waiting":
        raise ApprovalError(
            f"the {kind} {short} waits for this site's approval: `wardround-site approvals`", f"{kind}-waiting"
        )
    if item.state == "rejected":
        raise ApprovalError(f"this site has rejected the {kind} {short}", f"{kind}-rejected")


def _must_not_be_over(study: Study, now: datetime) -> None:
    expires = study.study.expires
    if expires and f"{now:%Y-%m-%d}" > expires:
        raise ApprovalError(f"the study {study.digest[:12]} expired on {expires}", "study-expired")


def items(site: Path) -> list[Item]:
    """Return everything that was asked for, the oldest first.

    Raises
    ------
    ApprovalError
        A file of the site's store is damaged.
    """
    found = (_read(path) for path in _folder(site, "approvals").glob("*.json"))
    return sorted((item for item in found if item), key=lambda item: item.seen)


def find(site: Path, beginning: str) -> Item:
    """Return the one item whose digest begins so.

    Raises
    ------
    ApprovalError
        There is none, or more than one.
    """
    found = [item for item in items(site) if item.digest.startswith(beginning.lower())] if len(beginning) >= 8 else []
    if len(found) != 1:
        raise ApprovalError(
            f"no bundle or study, or more than one, begins with {beginning[:64]!r}: say at least 8 digits of one that "
            "`wardround-site approvals` shows",
            "unknown",
        )
    return found[0]


def decide(site: Path, item: Item, state: State, now: datetime, size: int = 0) -> Item:
    """Write down what the site decided about an item."""
    new = item.model_copy(update={"state": state, "decided": _utc(now), "size": size or item.size})
    _write(site, new)
    return new


def bundle_bytes(site: Path, digest: str) -> bytes:
    """Return a bundle that was kept.

    Raises
    ------
    ApprovalError
        It is not here, or was changed.
    """
    data = _kept(site, "bundle", digest)
    if sha256_hex(data) != digest:
        raise ApprovalError(f"the kept bytes of the bundle {digest[:12]} were changed: reject it", "damaged")
    return data


def approved_study(site: Path, digest: str) -> tuple[Study, int]:
    """Return a study that was kept, and the number of elements of its theta; 0 before it was approved.

    Raises
    ------
    ApprovalError
        It is not here, or was changed.
    """
    item = _known(site, "study", digest)
    try:
        study = Study.from_toml(_kept(site, "study", digest).decode())
    except (StudyError, UnicodeDecodeError):
        study = None
    if item is None or study is None or study.digest != digest:
        raise ApprovalError(f"the kept study {digest[:12]} was changed: reject it", "damaged")
    return study, item.size


def last_approved_bundle(site: Path, besides: str) -> Item | None:
    """Return the bundle that was approved last, leaving out one."""
    approved = [one for one in items(site) if (one.kind, one.state) == ("bundle", "approved") and one.digest != besides]
    return max(approved, key=lambda item: item.decided, default=None)


def _wait(site: Path, kind: Kind, digest: str, data: bytes, size: int, now: datetime) -> Item:
    if sum(1 for item in items(site) if (item.kind, item.state) == (kind, "waiting")) >= _MOST_WAITING:
        raise ApprovalError(
            f"{_MOST_WAITING} of kind {kind} wait for this site's approval, so no further one is kept: approve or "
            "reject some",
            "queue-full",
        )
    path = _path(site, kind, digest)
    write_whole(_made(path.parent) / path.name, data, 0o600)
    item = Item(kind=kind, digest=digest, state="waiting", seen=_utc(now), size=size)
    _write(site, item)
    return item


def _known(site: Path, kind: str, digest: str) -> Item | None:
    return _read(_folder(site, "approvals") / f"{kind}-{digest}.json")


def _read(path: Path) -> Item | None:
    try:
        item = Item.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ApprovalError(f"{path} cannot be read: {error.strerror}", "damaged") from None
    except ValidationError:
        item = None
    if item is None or path.name != f"{item.kind}-{item.digest}.json":
        raise ApprovalError(f"{path} was damaged: delete it, and what it was about waits anew", "damaged")
    return item


def _write(site: Path, item: Item) -> None:
    data = item.model_dump_json(indent=1).encode() + b"\n"
    # Its folder decides who may read it: a worker of another user may, where an administrator has made it so.
    write_whole(_made(_folder(site, "approvals")) / f"{item.kind}-{item.digest}.json", data)


def _kept(site: Path, kind: Kind, digest: str) -> bytes:
    try:
        return _path(site, kind, digest).read_bytes()
    except OSError as error:
        raise ApprovalError(f"the {kind} {digest[:12]} cannot be read: {error.strerror}", "damaged") from None


def _path(site: Path, kind: Kind, digest: str) -> Path:
    return (
        _folder(site, "bundles") / f"{digest}.fab" if kind == "bundle" else _folder(site, "studies") / f"{digest}.toml"
    )


def _folder(site: Path, name: str) -> Path:
    return site / "gateway" / name


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _utc(now: datetime) -> str:
    return f"{now:%Y-%m-%dT%H:%M:%S.%f}Z"
