"""`wardround-study`: the coordinator's command."""

import json
from pathlib import Path
from typing import Annotated

import typer

from common.console import plain_errors
from common.errors import StudyError
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
from server.record import write_atomic

__all__ = ["app", "read_study"]

app = typer.Typer(
    help="Write, check and sign federated studies.", no_args_is_help=True, pretty_exceptions_show_locals=False
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
    plan, episodes = study.study, study.episodes
    more = f", {episodes.train_ways} ways in training" if episodes.train_ways else ""
    print(f"{plan.id}: {plan.title}")
    print(f"  digest     {study.digest}")
    print(f"  algorithm  {study.algorithm.name} on {study.model.name}, {plan.rounds} rounds")
    print(f"  episodes   {episodes.labels} labels, {episodes.ways} ways, {episodes.shots} shots{more}")
    print(f"  classes    {episodes.classes}")
    print(f"  new        {episodes.held_out or '-'}")
    print(f"  sites      quorum {study.sites.quorum}, never train: {study.sites.held_out or '-'}")
    print("  privacy    no formal guarantee (privacy.mechanism = 'none')")


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
