"""`wardround-site adapt`; registered in ``client/cli.py``."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from client.data.keys import keyed, load_key
from common.console import plain_errors
from common.errors import DataError
from common.paths import home

if TYPE_CHECKING:
    from client.adapt.images import Labelled
    from client.adapt.run import Outcome
    from client.adapt.trained import Trained

__all__ = ["adapt"]


@plain_errors
def adapt(
    model: Annotated[Path, typer.Option(help="Folder of a run, or of an export: study.json and theta.safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapted model; it must stay at this site.")],
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="Folders of images, with --labels.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="Classes to tell apart, comma-separated.", show_default="all labels there are")
    ] = "",
    labels: Annotated[Path | None, typer.Option(help="CSV file with the labels of the images under DIR.")] = None,
    rename: Annotated[
        list[str] | None, typer.Option("--map", help="A column of the labels file, as in 'lesion_id=patient'.")
    ] = None,
    each_a_patient: Annotated[
        bool, typer.Option("--each-a-patient", help="A picture that names no patient is a patient of its own.")
    ] = False,
    shots: Annotated[
        int | None,
        typer.Option(min=1, help="Adapt on K patients of a class, judge on all others.", show_default="up to 20"),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Adapt on all patients, judge by folds.")] = False,
    coverage: Annotated[float, typer.Option(min=0.5, max=0.99, help="Of the conformal sets.")] = 0.9,
    took_part: Annotated[
        bool,
        typer.Option("--took-part", help="Theta was trained at this site too: judge on its test patients alone."),
    ] = False,
    site: Annotated[
        Path | None, typer.Option("--site", help="The site's own folder.", show_default="$WARDROUND_HOME/site")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Adapt a trained theta to this site's labelled images, and say whether the result may be used.

    Images come from the site's catalogue (--task), or from folders with a labels file (--labels labels.csv DIR...).
    Nothing leaves the site, and no network is needed. The report in OUT puts the adapted theta beside training from
    scratch and beside simple features, on patients that none of them saw.

    Exit codes: 0 may be used. 10 no gain over a baseline is shown. 11 a class has too few patients. 12 the images are
    not what theta was trained on. 13 it may be chance. Of several, the highest of 12, 11, 13, 10 in this order.
    1 nothing could be read or written. 2 the model's study is damaged.
    """
    from client.adapt.folder import write_adapted
    from client.adapt.report import markdown, verdict
    from client.adapt.run import Plan
    from client.adapt.run import adapt as run
    from client.adapt.trained import read_trained
    from common.study import names

    if (labels is None) != (not folders):
        raise DataError("give folders and --labels together; without both, the site's catalogue is used")
    if shots is not None and everything:
        raise DataError("--shots and --all are two ways to choose: give one")
    trained, place = read_trained(model), site or home() / "site"
    with (
        _progress(as_json) as say,
        _images(trained, place, folders, labels, rename, names(task), each_a_patient, took_part) as found,
    ):
        key = load_key(place / "site.key")
        seed = keyed(key, "adapt", f"{trained.theta_digest} {shots} {everything}")
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(seed, "big")))
        outcome: Outcome = run(trained, found, Plan(shots, everything, coverage), generator, say)
    text = markdown(outcome.report)
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        if outcome.model is not None:
            write_adapted(out, outcome.model, outcome.report, text, outcome.patients)
        else:
            (out / "report.json").write_text(json.dumps(outcome.report, indent=1), encoding="utf-8")
            (out / "report.md").write_text(text, encoding="utf-8")
    except OSError:
        raise DataError("the adapted model cannot be written there: check its folder and permissions") from None
    code = _code(outcome)
    if as_json:
        print(json.dumps({"usable": code == 0, "exit": code, **outcome.report}, indent=1))
    else:
        Console(markup=False, emoji=False, highlight=False, soft_wrap=True).print(text)
        print(verdict(outcome.report))
    if code:
        raise SystemExit(code)


def _code(outcome: "Outcome") -> int:
    from client.adapt.verdict import Exit

    codes = {refusal.code for refusal in outcome.refusals}
    order = (Exit.UNFAMILIAR, Exit.TOO_FEW, Exit.CHANCE, Exit.NO_GAIN)
    return int(next((code for code in order if code in codes), Exit.USABLE))


@contextmanager
def _images(
    trained: "Trained",
    site: Path,
    folders: Sequence[Path] | None,
    labels: Path | None,
    rename: list[str] | None,
    classes: Sequence[str],
    each_a_patient: bool,
    took_part: bool,
) -> Iterator["Labelled"]:
    from client.adapt.images import from_folders, from_site
    from client.data.image import Recipe
    from client.data.labels import Labels

    recipe = Recipe.of(trained.study.model)
    if labels is None or folders is None:
        yield from_site(site, recipe, classes, took_part=took_part)
        return
    columns = {}
    for pair in rename or []:
        theirs, equals, ours = pair.partition("=")
        if not equals or not theirs or not ours:
            raise DataError("--map takes THEIRS=OURS, as in 'lesion_id=patient'")
        columns[theirs] = ours
    source = Labels(labels, columns)
    with from_folders(folders, source, recipe, classes, site=site, each_a_patient=each_a_patient) as (images, _):
        yield images


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show what is being fitted."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed} fits"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task("reading", total=None)
        yield lambda what: progress.update(task, description=what, advance=1)
