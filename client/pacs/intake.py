"""The folder that images arrive in: files whole or not there, under names that say nothing about a patient."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydicom.uid import UID

from client.files import flush_folder
from common.errors import DataError

__all__ = ["MAX_BYTES", "Intake", "holds_pixels", "open_intake"]

MAX_BYTES = 1 << 30
"""Largest image that is taken in (bytes)."""

_PIXELS_WITHOUT_IMAGE_IN_THE_NAME = {
    "EnhancedUSVolumeStorage",
    "OphthalmicThicknessMapStorage",
    "ParametricMapStorage",
    "RTDoseStorage",
    "SegmentationStorage",
}


def holds_pixels(sop_class: str) -> bool:
    """Say whether a SOP class is one of images; reports, PDFs and waveforms are never needed, so never taken."""
    keyword = UID(sop_class).keyword
    return "ImageStorage" in keyword or keyword in _PIXELS_WITHOUT_IMAGE_IN_THE_NAME


@dataclass(frozen=True)
class Intake:
    """An intake folder that this process alone writes into; made by :func:`open_intake`.

    Attributes
    ----------
    folder : Path
        Where images end up. Unfinished ones lie in ``folder/.partial``.
    """

    folder: Path

    @property
    def partial(self) -> Path:
        """The folder of unfinished files; on the same file system, so that finishing one is a rename."""
        return self.folder / ".partial"

    def path(self, *uids: str) -> Path:
        """Return where an image belongs: one folder for each UID but the last, each a plain SHA-256 hash.

        A plain hash says nothing about a patient, yet can be recognised by whoever knows the UID. The file
        beside the name holds the UID anyway, so a key would protect nothing; the same image gets the same name
        on every run, which is what makes a pull resumable.
        """
        *folders, last = (hashlib.sha256(uid.encode()).hexdigest()[:32] for uid in uids)
        return self.folder.joinpath(*folders, f"{last}.dcm")

    @contextmanager
    def writing(self, path: Path) -> Iterator[BinaryIO]:
        """Open a file for writing that appears at ``path`` whole, durably, or not at all."""
        descriptor, name = tempfile.mkstemp(dir=self.partial)
        os.close(descriptor)
        try:
            with open(name, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(name, path)
            flush_folder(path.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def open_intake(folder: Path) -> Iterator[Intake]:
    """Make an intake folder if it is missing, lock it, and clear what a killed process left unfinished.

    Raises
    ------
    DataError
        The folder cannot be used, or another process is writing into it.
    """
    intake = Intake(folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{folder} cannot be used as a folder: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another pull or receive is writing into {folder}: wait for it, or use another folder"
            ) from None
        try:
            shutil.rmtree(intake.partial, ignore_errors=True)
            intake.partial.mkdir(mode=0o700)
        except OSError as error:
            raise DataError(f"{folder} cannot be written to: {error.strerror}") from None
        try:
            yield intake
        finally:
            shutil.rmtree(intake.partial, ignore_errors=True)
    finally:
        os.close(lock)
