"""The commands of `wardround-site` that fetch images from a PACS; registered in ``client/cli.py``."""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.console import plain_errors
from common.errors import DataError

if TYPE_CHECKING:
    from client.pacs.dicomweb import PullReport

__all__ = ["pull", "receive"]

Into = Annotated[Path, typer.Option(help="Intake folder; file names in it say nothing about patients.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read, progress to stderr.")]
MegaBytes = Annotated[int, typer.Option(min=1, help="Largest image, in MB.")]
_LOG_SECONDS = 60.0


@plain_errors
def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="Root of the DICOMweb service of the PACS.")],
    into: Into,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Only what matches KEY=VALUE, as in Modality=CT, StudyDate=20200101- (repeatable)."),
    ] = None,
    rate: Annotated[float, typer.Option(help="Most images per second.")] = 50.0,
    patience: Annotated[float, typer.Option(help="Seconds that the PACS may stay away before giving up.")] = 300.0,
    largest: MegaBytes = 1024,
    token_file: Annotated[Path | None, typer.Option(help="File with a bearer token.")] = None,
    user_file: Annotated[Path | None, typer.Option(help="File with NAME:PASSWORD.")] = None,
    ca: Annotated[Path | None, typer.Option(help="Certificates (PEM) to trust for the PACS.")] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Allow http to another machine: anyone on the network can read it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch images from a PACS over DICOMweb; what is there already is not fetched again.

    Exit code 0 says that everything wanted is there.
    """
    with _extra():
        from client.pacs import dicomweb
    source = dicomweb.Source(url, _token(token_file), _user(user_file), ca, plain_http)
    with _bar() as progress:
        report = dicomweb.pull(
            source,
            into,
            where=_filters(where or []),
            rate=rate,
            patience=patience,
            max_bytes=largest * 1_000_000,
            progress=progress,
        )
    if as_json:
        print(json.dumps({**asdict(report), "complete": report.complete}, indent=1))
    else:
        print(f"{report.studies} studies: {report.new} images new, {report.there} already there")
        _print_reasons("not wanted", report.left_out)
        _print_reasons("failed", report.failed)
    if not report.complete:
        print("not everything is there: run the same command again for what failed", file=sys.stderr)
        raise SystemExit(1)


@plain_errors
def receive(
    into: Into,
    aet: Annotated[str, typer.Option(help="AE title of this receiver.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")],
    allow: Annotated[str, typer.Option(help="AE titles that may send, comma-separated.")],
    bind: Annotated[str, typer.Option(help="Address to listen on; the PACS must reach it.")] = "127.0.0.1",
    largest: MegaBytes = 1024,
    tls_cert: Annotated[Path | None, typer.Option(help="This receiver's certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="Only senders certified by these (PEM) may connect.")] = None,
    as_json: Json = False,
) -> None:
    """Receive images that a PACS sends (C-STORE), until Ctrl-C or SIGTERM."""
    with _extra():
        from client.pacs import receiver as service
    if (tls_cert is None) != (tls_key is None) or (tls_ca is not None and tls_cert is None):
        raise DataError("TLS needs both --tls-cert and --tls-key")
    tls = None if tls_cert is None or tls_key is None else service.Tls(tls_cert, tls_key, tls_ca)
    if tls_ca is None:
        _say("senders are not authenticated (no --tls-ca): let only the PACS reach this port")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    titles = [title for title in (part.strip() for part in allow.split(",")) if title]
    limit = largest * 1_000_000
    with service.receiver(into, aet=aet, allow=titles, port=port, bind=bind, tls=tls, max_bytes=limit) as running:
        _say(f"listening on {bind} port {running.port}")
        said = running.report
        while not stop.wait(_LOG_SECONDS):
            if running.report != said:
                said = running.report
                _say(_received(said))
        _say("ending")
    if as_json:
        print(json.dumps(asdict(running.report), indent=1))
    else:
        print(_received(running.report))


def _received(report: object) -> str:
    counts = asdict(report)  # type: ignore[call-overload]
    refused = "".join(f", {count} {reason}" for reason, count in sorted(counts["refused"].items()))
    return f"{counts['new']} images new, {counts['same']} the same, {counts['replaced']} replaced{refused}"


def _say(line: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _print_reasons(what: str, reasons: Mapping[str, int]) -> None:
    for reason, count in sorted(reasons.items()):
        print(f"  {what}: {count} ({reason})")


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise DataError(f"{error.name} is missing: pip install 'wardround[pacs]'") from None


def _secret(file: Path) -> str:
    try:
        secret = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{file} cannot be read") from None
    if not secret or not secret.isprintable():
        raise DataError(f"{file} must hold one line")
    return secret


def _token(file: Path | None) -> str | None:
    return None if file is None else _secret(file)


def _user(file: Path | None) -> tuple[str, str] | None:
    if file is None:
        return None
    name, colon, password = _secret(file).partition(":")
    if not colon:
        raise DataError(f"{file} must hold NAME:PASSWORD")
    return name, password


def _filters(where: list[str]) -> dict[str, str]:
    filters: dict[str, str] = {}
    for condition in where:
        key, _, value = condition.partition("=")
        if not value or key in filters:
            raise DataError("--where takes KEY=VALUE, each key once, as in Modality=CT or StudyDate=20200101-")
        filters[key] = value
    return filters


@contextmanager
def _bar() -> Iterator[Callable[["PullReport"], None]]:
    """Show studies as they are done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    words = {"searching": "searching", "fetching": "studies", "waiting": "waiting for the PACS", "ended": "studies"}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("searching", total=None, figures="")
        began = time.monotonic()

        def update(report: "PullReport") -> None:
            speed = report.new / max(time.monotonic() - began, 1e-9)
            progress.update(
                task,
                description=words[report.state],
                total=report.studies or None,
                completed=report.studies_done,
                figures=f"{report.new} new ({speed:.1f}/s), {report.there} there, {sum(report.failed.values())} failed",
            )

        yield update
