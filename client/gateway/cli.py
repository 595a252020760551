"""Commands about what left this site."""

import json
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict, ValidationError

from client.files import write_whole
from client.gateway.audit import Entry, Head, check, read_lines
from client.membership.store import identity
from common.console import plain_errors
from common.consortium import fingerprint
from common.errors import AuditError
from common.paths import home
from common.signing import load_public_key, public_pem

__all__ = ["audit", "audit_path"]

audit = typer.Typer(help="Show, check and export the record of what left this site.", no_args_is_help=True)

SiteFolder = Annotated[
    Path | None, typer.Option("--site", help="The site's own folder.", show_default="$WARDROUND_HOME/site")
]
Heads = Annotated[
    list[str] | None, typer.Option("--head", metavar="NUMBER:SHA256", help="A head that was seen (repeatable).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


class _Export(BaseModel):
    """A log that can be checked without the site: its lines, and the public key that signed them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    identity: str
    lines: list[str]


def audit_path(site: Path) -> Path:
    """Return where a site keeps its audit log."""
    return site / "audit" / "log.jsonl"


@audit.command(epilog="Example: wardround-site audit show --last 20")
@plain_errors
def show(
    site: SiteFolder = None,
    last: Annotated[int, typer.Option(min=1, help="How many lines.")] = 20,
    refused: Annotated[bool, typer.Option("--refused", help="Only what was refused.")] = False,
    as_json: Json = False,
) -> None:
    """Show the last lines, checked. Exit code 1: there is no log, or it was changed."""
    folder = site or home() / "site"
    lines, _ = read_lines(audit_path(folder))
    entries = [entry for entry, _ in check(lines, identity(folder).public_key())]
    shown = [entry for entry in entries if not refused or entry.event.outcome == "refused"][-last:]
    if as_json:
        print(json.dumps([entry.model_dump(exclude={"signature"}) for entry in shown], indent=1))
        return
    for entry in shown:
        print(_line(entry))
    print(f"{len(shown)} of {len(entries)} lines")


@audit.command("verify", epilog="Example: wardround-site audit verify --head 412:9f3c...")
@plain_errors
def verify_command(
    site: SiteFolder = None,
    export_file: Annotated[
        Path | None, typer.Option("--export", help="Check this export, without a site's folder.")
    ] = None,
    heads: Heads = None,
    heads_file: Annotated[
        Path | None, typer.Option("--heads", help="A file of heads, as `wardround-study heads SITE` writes it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every line: that none was changed, left out, moved, or made by somebody else.

    That lines were cut from the end shows only against a head that somebody else has kept: the coordinator keeps those
    that came with answers. Exit code 1: something is wrong, and it says with which line.
    """
    witnessed = [Head.parse(text) for text in [*(heads or []), *_lines(heads_file)]]
    if export_file is not None:
        export = _read(export_file)
        key, lines, torn = load_public_key(export.identity.encode()), [line.encode() for line in export.lines], False
    else:
        folder = site or home() / "site"
        key = identity(folder).public_key()
        lines, torn = read_lines(audit_path(folder))
    head = Head(0, "")
    for _, head in check(lines, key, witnessed):  # noqa: B007 (the last one is wanted)
        pass
    # The same text as in the manifest and at the other end: who signed.
    who = fingerprint({"identity": public_pem(key).decode()})
    if as_json:
        print(json.dumps({"lines": head.seq, "head": str(head), "identity": who, "unfinished": torn}, indent=1))
        return
    print(f"{head.seq} lines are as they were written")
    print(f"  head      {head}")
    print(f"  identity  {who}")
    if torn:
        print("  a line is being written, or was not finished; what it is about did not leave")


@audit.command(epilog="Example: wardround-site audit export --to audit-2026.json")
@plain_errors
def export(to: Annotated[Path, typer.Option("--to", help="The file to write.")], site: SiteFolder = None) -> None:
    """Write the checked log into one file, which `audit verify --export` checks anywhere. It holds no patient data.

    Exit code 1: there is no log, or it was changed.
    """
    folder = site or home() / "site"
    key = identity(folder).public_key()
    lines, _ = read_lines(audit_path(folder))
    head = Head(0, "")
    for _, head in check(lines, key):  # noqa: B007 (the last one is wanted)
        pass
    file = _Export(identity=public_pem(key).decode(), lines=[line.decode() for line in lines])
    write_whole(to, file.model_dump_json(indent=1).encode() + b"\n", 0o600)
    print(f"wrote {head.seq} lines to {to}, head {head}")


def _read(path: Path) -> _Export:
    try:
        return _Export.model_validate_json(path.read_bytes())
    except OSError as error:
        raise AuditError(f"{path} cannot be read: {error.strerror}", "missing") from None
    except ValidationError:
        raise AuditError(f"{path} is not an export of an audit log", "format") from None


def _lines(path: Path | None) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split() if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise AuditError(f"{path} cannot be read as a file of heads ({type(error).__name__})", "head") from None


def _line(entry: Entry) -> str:
    event = entry.event
    about = f"{event.outcome:<8} {event.kind:<9} run {event.run} round {event.round}  {event.size} bytes"
    norm = f"  norm {event.norm:.4g}" if event.norm else ""
    why = f"  because {event.why}" if event.why else ""
    return f"{entry.seq:>6}  {entry.at[:19]}Z  {about}{norm}{why}  {event.digest[:12]}"
