"""The kill switch: a file that says whether anything may leave. It is read before every piece that goes out."""

from pathlib import Path

from client.files import write_whole

__all__ = ["pause", "paused", "prepare_switch", "resume"]

_OPEN, _PAUSED = b"open\n", b"paused\n"


def pause(site: Path) -> None:
    """Let nothing leave from now on, also nothing that is on its way."""
    _write(site, _PAUSED)


def resume(site: Path) -> None:
    """Let things leave again."""
    _write(site, _OPEN)


def paused(site: Path) -> bool:
    """Say whether nothing may leave; so too where the file is missing, damaged or cannot be read."""
    try:
        return _path(site).read_bytes() != _OPEN
    except OSError:
        return True


def prepare_switch(site: Path) -> None:
    """Make the file of a site that has none."""
    if not _path(site).exists():
        resume(site)


def _write(site: Path, state: bytes) -> None:
    _path(site).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(_path(site), state, 0o600)


def _path(site: Path) -> Path:
    return site / "gateway" / "switch"
