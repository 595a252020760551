"""`wardround-study`: the coordinator's command."""

import json
from pathlib import Path
from typing import Annotated

import typer

from common.console import plain_errors
from common.errors import StudyError
from common.privacy.statement import guarantee
from common.signing import (
    generate_key,
    load_private_key,
    load_public_key,
    private_pem,
    public_pem,
    sign,
    verify,
)
from common.study import Study
from server import plan
from server.consortium import cli as consortium
from server.consortium.up import up
from server.export import Format, export_run
from server.files import write_atomic
from server.resume import resume_on_flower
from server.runs import find_run, recorded_study
from server.watching import report, status

__all__ = ["app", "read_study"]

app = typer.Typer(
    help="Write, check and sign federated studies; watch their runs.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

File = Annotated[Path, typer.Argument(help="A study file (TOML).", metavar="FILE")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def read_study(file: Path) -> Study:
    """Read a study file.

    Raises
    ------
    StudyError
        The file cannot be read or is not a valid study.
    """
    try:
        return Study.from_toml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{file} cannot be read: {error}") from None


app.command(epilog="Example: wardround-study status latest --watch")(status)
app.command(epilog="Example: wardround-study report latest")(report)

app.command("found", epilog="Example: wardround-study found lung-north --edge wardround.example.org:8443")(
    consortium.found_command
)
app.command(epilog="Example: wardround-study enrol st-mary.request.json --fingerprint '9c1e 04d7 ...'")(
    consortium.enrol
)
app.command(epilog="Example: wardround-study renew st-mary")(consortium.renew)
app.command(epilog="Example: wardround-study revoke st-mary")(consortium.revoke)
app.command(epilog="Example: wardround-study admit --study skin.toml --bundle wardround.fab")(consortium.admit)
app.command(epilog="Example: wardround-study withdraw 3f5a...")(consortium.withdraw)
app.command(epilog="Example: wardround-study sites")(consortium.sites)
app.command(epilog="Example: wardround-study edge --superlink 127.0.0.1:8000")(consortium.edge)
app.command(epilog="Example: wardround-study up --listen 0.0.0.0:8443")(up)
app.command(epilog="Example: wardround-study heads st-mary --to st-mary.heads")(consortium.heads)


@app.callback()
def main() -> None:
    """Keep sub-commands even while there is only one."""


@app.command(epilog="Example: wardround-study check simulations/studies/skin.toml")
@plain_errors
def check(file: File, as_json: Json = False) -> None:
    """Say whether a study is valid, and what is wrong where it is not (exit code 2)."""
    study = read_study(file)
    if as_json:
        print(json.dumps({"digest": study.digest, "study": study.run_config()}, indent=1))
        return
    about, episodes = study.study, study.episodes
    more = f", {episodes.train_ways} ways in training" if episodes.train_ways else ""
    print(f"{about.id}: {about.title}")
    print(f"  digest     {study.digest}")
    print(f"  algorithm  {study.algorithm.name} on {study.model.name}, {about.rounds} rounds")
    print(f"  episodes   {episodes.labels} labels, {episodes.ways} ways, {episodes.shots} shots{more}")
    print(f"  classes    {episodes.classes}")
    print(f"  new        {episodes.held_out or '-'}")
    print(f"  sites      quorum {study.sites.quorum}, never train: {study.sites.held_out or '-'}")
    print(f"  privacy    {guarantee(study)}")


@app.command("plan", epilog="Example: wardround-study plan study.toml --epsilon 3 --patients 400")
@plain_errors
def plan_command(
    file: File,
    wanted: Annotated[
        list[float] | None,
        typer.Option("--epsilon", min=1e-3, help="Say which noise this needs (repeatable).", show_default="1, 3, 8"),
    ] = None,
    patients: Annotated[
        int | None, typer.Option(min=1, help="Training patients of a site: how full episodes will be.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a study will cost its patients, and what its noise leaves of the signal, before anything runs."""
    study = read_study(file)
    facts = plan.facts_of(study, wanted or (1.0, 3.0, 8.0), patients)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for line in plan.in_words(study, facts):
        print(line)


@app.command(epilog="Example: wardround-study resume 7141206735270432915 --superlink consortium")
@plain_errors
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, the path of its folder, or latest.")],
    superlink: Annotated[str, typer.Option(help="A connection of Flower's configuration.")] = "local",
    app_folder: Annotated[Path, typer.Option("--app", help="The folder with wardround's pyproject.toml.")] = Path("."),
    federation_config: Annotated[
        str | None,
        typer.Option(help="As for `flwr run`; without it, on `local`, the study's number of virtual sites."),
    ] = None,
) -> None:
    """Go on with a run that was interrupted, from its last complete round; the outcome has the same bits.

    Exit code 1: it did not end with a result this time either. Exit code 2: there is no such run.
    """
    folder = find_run(run)
    if federation_config is None and superlink == "local":
        sites = recorded_study(folder).data.sites
        federation_config = f"num-supernodes={sites} client-resources-num-cpus=1"
    resume_on_flower(folder, app=app_folder, superlink=superlink, federation=federation_config)
    print(f"the run has its result: {folder}")


@app.command(epilog="Example: wardround-study keygen coordinator")
@plain_errors
def keygen(name: Annotated[Path, typer.Argument(help="Writes NAME.key (secret) and NAME.pub.")]) -> None:
    """Make an Ed25519 key pair for signing studies."""
    secret, public = name.with_suffix(".key"), name.with_suffix(".pub")
    if secret.exists() or public.exists():
        raise StudyError(f"{secret} or {public} exists already: choose another name")
    key = generate_key()
    secret.touch(mode=0o600)
    secret.write_bytes(private_pem(key))
    write_atomic(public, public_pem(key.public_key()))
    print(f"wrote {secret} (keep it secret) and {public}")


@app.command("sign", epilog="Example: wardround-study sign study.toml --key coordinator.key")
@plain_errors
def sign_study(file: File, key: Annotated[Path, typer.Option(help="The coordinator's secret key (PEM).")]) -> None:
    """Sign a study; the signature covers every value, defaults included, and goes beside the file."""
    study = read_study(file)
    signature = sign(load_private_key(key.read_bytes()), "study", study.run_config())
    out = file.with_suffix(".sig")
    write_atomic(out, signature.hex().encode() + b"\n")
    print(f"signed {study.digest} in {out}")


@app.command("verify", epilog="Example: wardround-study verify study.toml --key coordinator.pub")
@plain_errors
def verify_study(file: File, key: Annotated[Path, typer.Option(help="The coordinator's public key (PEM).")]) -> None:
    """Check a study's signature (exit code 1 where it does not verify)."""
    study = read_study(file)
    signature = bytes.fromhex(file.with_suffix(".sig").read_text())
    verify(load_public_key(key.read_bytes()), "study", study.run_config(), signature)
    print(f"the signature of {study.digest} is good")


@app.command(epilog="Example: wardround-study export 7348205413 --to lesions --format torch --format onnx")
@plain_errors
def export(
    run: Annotated[str, typer.Argument(help="A finished run: its folder, or its number.", metavar="RUN")],
    to: Annotated[Path | None, typer.Option(help="Folder to write. [default: RUN's folder/export]")] = None,
    formats: Annotated[list[Format], typer.Option("--format", help="May be given several times.")] = [*Format],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Export a run's theta: safetensors with the study, a MONAI bundle, a PyTorch program, ONNX.

    Every format is loaded again and compared with the run's network before anything takes its place.
    """
    folder = find_run(run)
    done = export_run(folder, to or folder / "export", formats)
    if as_json:
        figures = {"differences": done.differences, "float32": done.rounding}
        print(json.dumps({"folder": str(done.folder), **figures, **done.facts}, indent=1))
        return
    print(f"exported theta {done.facts['theta'][:12]} of the study {done.facts['study']['id']} to {done.folder}")
    for name, differences in done.differences.items():
        output, difference = [*differences.items()][-1]
        loss = f" (float32 itself costs {done.rounding[output]:.1e})" if difference > 1e-5 else ""
        print(f"  {name:<12} loaded again, {output} differ by at most {difference:.1e}{loss}")
    if done.facts["needs_adaptation"]:
        print("theta is a starting point: its outputs mean nothing before adaptation (README.md there)")
