"""The commands that an engineer runs before a site takes part."""

import json
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from client.files import write_whole
from client.finding import as_dicts, lines, worst
from client.gateway.commands import HEALTH
from client.worker.cli import socket_of
from common.console import plain_errors
from common.errors import StudyError
from common.paths import home
from common.privacy.statement import guarantee
from common.study import Study

__all__ = ["doctor", "preview", "read_study"]

SiteFolder = Annotated[
    Path | None, typer.Option("--site", help="The site's own folder.", show_default="$WARDROUND_HOME/site")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


class Answer(StrEnum):
    """The messages that a site answers."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    JOIN = "join"


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises
    ------
    StudyError
        It cannot be read, or is not a valid study.
    """
    try:
        return Study.from_toml(path.read_text(encoding="utf-8"))
    except OSError:
        raise StudyError(f"{path}: there is no such study file, or it cannot be opened; check its path") from None
    except UnicodeDecodeError:
        raise StudyError(f"{path} is no study file: it is not text in UTF-8") from None


@plain_errors
def doctor(
    site: SiteFolder = None,
    study: Annotated[
        list[Path] | None, typer.Option(help="A study that this site means to take part in (repeatable).")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not connect to the edge.")] = False,
    health: Annotated[str, typer.Option(help="Where the gateway is asked for its health.")] = HEALTH,
    socket: Annotated[
        Path | None, typer.Option(help="Where the worker is.", show_default="worker/socket in the site's folder")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine, keys, the way to the edge, clock, gateway, worker, images, and a study's episodes.

    One line each: ok, warn or fail, and the remedy. Exit code 1: something fails. Exit code 2: a bad study file.
    """
    from client.checking.doctor import diagnose  # imports torch

    plans = [read_study(path) for path in study or []]
    folder = (site or home() / "site").resolve()
    where = (socket or socket_of(folder)).absolute()
    findings = list(diagnose(folder, plans, datetime.now(UTC), health=health, socket=where, connect=not offline))
    print(json.dumps(as_dicts(findings), indent=1) if as_json else "\n".join(lines(findings)))
    raise typer.Exit(worst(findings) == "fail")


@plain_errors
def preview(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="A study file (TOML).")],
    site: SiteFolder = None,
    answer: Annotated[Answer, typer.Option(help="To which message.")] = Answer.TRAIN,
    to: Annotated[
        Path | None, typer.Option("--to", help="Write every object that would be sent into this folder, as it is.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run one local round and show exactly what would be sent. Nothing is sent.

    It is round 1 at the study's first theta, by the same code as in a run. Exit code 1: the site would answer with an
    error, or what it would send may not leave. Exit code 2: a bad study file.
    """
    from client.checking.preview import preview as run  # imports torch

    plan = read_study(study)
    found = run(plan, (site or home() / "site").resolve(), answer.value)
    passed, reply = found.passed, found.reply
    kinds = {name: data.split(b" ", 1)[0].decode() for name, data in passed.objects.items()}
    if to is not None:
        to.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, data in passed.objects.items():
            write_whole(to / f"{kinds[name]}-{name}", data, 0o600)
    vector = None if reply.vector is None else {"numbers": reply.vector.size, "type": str(reply.vector.dtype)}
    if as_json:
        about = {"study": plan.digest, "answer": passed.kind, "bytes": passed.size, "seconds": round(found.seconds, 3)}
        about |= {"scalars": dict(reply.scalars), "vector": vector and vector | {"norm": passed.norm}}
        about["objects"] = [
            {"kind": kinds[name], "sha256": name, "bytes": len(data)} for name, data in passed.objects.items()
        ]
        print(json.dumps(about, indent=1))
        return
    print(f"the answer to `{passed.kind}` in round 1 of {plan.study.id}: {passed.size} bytes, nothing was sent")
    for name, value in reply.scalars.items():
        print(f"  {name:<24} {value:g}")
    print("  token                    binds the answer to the message")
    if vector is not None:
        print(f"  meta_gradient            {vector['numbers']} numbers ({vector['type']}), norm {passed.norm:.4g}")
    print("in these objects of Flower's:")
    for name, data in passed.objects.items():
        print(f"  {kinds[name]:<12} {len(data):>10} bytes  {name}")
    print(f"the round took {found.seconds:.1f} s; privacy: {guarantee(plan)}")
