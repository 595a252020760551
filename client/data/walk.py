"""Every file under a folder, always in the same order, never out of it."""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Found", "walk"]


@dataclass(frozen=True)
class Found:
    """A file that was found.

    Attributes
    ----------
    folder, path : Path
        The folder that is walked, and the file in it.
    name : str
        The path relative to the folder, with ``/``.
    size, changed : int
        Bytes; time of the last change, in nanoseconds.
    """

    folder: Path
    path: Path
    name: str
    size: int
    changed: int


def walk(folder: Path, *, skip: Path, links: Callable[[], None] = lambda: None) -> Iterator[Found]:
    """Yield the regular files under a folder, or the file that it is, in the order of their names.

    Symbolic links are not followed, so that nothing outside the folder is read and no loop entered. A folder that
    cannot be opened is yielded itself, as a file that cannot be read.

    Parameters
    ----------
    folder : Path
        Where to begin.
    skip : Path
        A folder that is left out: the site's own may lie among the images.
    links : callable
        Called for every link.
    """
    if folder.is_file():
        status = folder.stat()
        yield Found(folder, folder, folder.name, status.st_size, status.st_mtime_ns)
        return
    # Below the folder no link is followed, so that names say where one is.
    avoided, top = skip.resolve(), folder.resolve()
    left_out = str(folder / avoided.relative_to(top)) if avoided.is_relative_to(top) else None
    start = len(os.path.join(folder, ""))
    pending = [str(folder)]
    while pending:
        here = pending.pop()
        if here == left_out:
            continue
        try:
            with os.scandir(here) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        except OSError:
            yield Found(folder, Path(here), Path(here).relative_to(folder).as_posix(), 0, 0)
            continue
        inside = []
        for name in names:
            path = os.path.join(here, name)
            try:
                status = os.lstat(path)
            except OSError:
                continue
            if stat.S_ISLNK(status.st_mode):
                links()
            elif stat.S_ISDIR(status.st_mode):
                inside.append(path)
            elif stat.S_ISREG(status.st_mode):
                yield Found(folder, Path(path), path[start:], status.st_size, status.st_mtime_ns)
        pending += reversed(inside)
