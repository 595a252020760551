"""Released thetas, kept by their digest: where a study's network may start, trained on data that are nobody's secret.

A study names the file's SHA-256 in ``model.arguments``, so its approval covers every number in it. The coordinator and
every site put the file, which is no part of the bundle, into their own folder.
"""

import hashlib
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from common.errors import ModelError
from common.paths import home

__all__ = ["keep", "load_body", "released_path"]


def released_path(digest: str) -> Path:
    """Return where the file of a digest lies: ``released/DIGEST.safetensors`` in the folder of `common.paths.home`."""
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ModelError(f"model.arguments: start is the SHA-256 of a theta.safetensors in hex, not {digest!r}")
    return home() / "released" / f"{digest}.safetensors"


def keep(file: Path) -> str:
    """Copy a ``theta.safetensors`` to where studies look for it, and return its digest.

    Raises
    ------
    ModelError
        It cannot be read, or has no body.
    """
    try:
        data = file.read_bytes()
    except OSError:
        raise ModelError(f"{file} cannot be read: it must be the theta.safetensors of a run") from None
    _body(data, str(file))
    digest = hashlib.sha256(data).hexdigest()
    path = released_path(digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return digest


def load_body(digest: str) -> dict[str, Tensor]:
    """Return the body's tensors of a released theta, by name.

    Raises
    ------
    ModelError
        The file is not there, is not the one that the digest names, or has no body.
    """
    path = released_path(digest)
    try:
        data = path.read_bytes()
    except OSError:
        raise ModelError(
            f"the study starts from the released theta {digest[:12]}, which is not here: put its theta.safetensors at "
            f"{path}"
        ) from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise ModelError(f"{path} is not the theta that its name says: it was changed; fetch it again")
    return _body(data, str(path))


def _body(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        body = {key: t for key, t in load(data).items() if key.startswith("body.")}
    except SafetensorError:
        raise ModelError(f"{name} is no theta.safetensors: fetch it again") from None
    if not body:
        raise ModelError(f"{name} holds no body: a head alone is nothing to start from")
    return body
