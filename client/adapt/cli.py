"""`wardround-site adapt`, `predict` and `worklist`; registered in ``client/cli.py``."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from client.data.keys import keyed, load_key
from client.data.walk import walk
from common.console import plain_errors
from common.errors import DataError
from common.paths import home

if TYPE_CHECKING:
    from client.adapt.images import Labelled
    from client.adapt.run import Outcome
    from client.adapt.trained import Trained
    from client.data.labels import Labels
    from client.data.outcome import Outcomes
    from client.predict import Counts

__all__ = ["adapt", "predict", "worklist"]


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
    outcome: Annotated[
        Path | None,
        typer.Option(help="CSV file of patient, date and outcome: predict it from images taken long before."),
    ] = None,
    ahead: Annotated[
        str | None, typer.Option("--horizon", help="With --outcome: how long before at least, as in 365d.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=1, help="Adapt on K patients of a class, judge on all others.", show_default="up to 20"),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Adapt on all patients, judge by folds.")] = False,
    coverage: Annotated[float, typer.Option(min=0.5, max=0.99, help="Of the conformal sets.")] = 0.9,
    prevalence: Annotated[
        str,
        typer.Option(
            help="Each class's share of the patients to be predicted, as in 'mel=0.05,nv=0.95'.",
            show_default="as many of each as support the model",
        ),
    ] = "",
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

    A support set has as many patients of every class, or the site's labelled ones; patients to come have not. With
    --prevalence, the model's probabilities, intervals and sets are for patients among whom classes have these shares.

    With --outcome and --horizon the label is what became of a patient later, and the labels file has a column `date`,
    the day of an image, in place of `label`. All patients are used, as by --all, in their own mix.

    Exit codes: 0 may be used. 10 no gain over a baseline is shown. 11 a class has too few patients. 12 the images are
    not what theta was trained on. 13 it may be chance. 14 no file is an image with a label and a patient. Of several,
    the first of 12, 11, 13, 10.
    1 nothing could be read or written. 2 the model's study is damaged.
    """
    from client.adapt.folder import write_adapted
    from client.adapt.report import markdown, verdict
    from client.adapt.risk import follow
    from client.adapt.run import Plan
    from client.adapt.run import adapt as run
    from client.adapt.trained import read_trained
    from client.data.labels import Labels
    from client.data.outcome import OUTCOMES
    from common.study import names

    if (labels is None) != (not folders):
        raise DataError("give folders and --labels together; without both, the site's catalogue is used")
    if shots is not None and everything:
        raise DataError("--shots and --all are two ways to choose: give one")
    trained, place = read_trained(model), site or home() / "site"
    source = None if labels is None else Labels(labels, _columns(rename), _outcomes(outcome, ahead))
    classes, followed = names(task), None
    if outcome is not None or ahead is not None:
        if source is None or shots is not None or classes:
            raise DataError("--outcome and --horizon go with --labels and folders, and without --shots and --task")
        classes, everything = OUTCOMES, True
        followed = follow(source, np.random.default_rng(0))
    with (
        _nothing(),
        _progress(as_json) as say,
        _images(trained, place, folders, source, classes, each_a_patient, took_part) as found,
    ):
        key = load_key(place / "site.key")
        seed = keyed(key, "adapt", f"{trained.theta_digest} {shots} {everything}")
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(seed, "big")))
        plan = Plan(shots, everything, coverage, followed, _mix(prevalence, found.classes))
        result: Outcome = run(trained, found, plan, generator, say)
    text = markdown(result.report)
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        if result.model is not None:
            write_adapted(out, result.model, result.report, text, result.patients)
        else:
            (out / "report.json").write_text(json.dumps(result.report, indent=1), encoding="utf-8")
            (out / "report.md").write_text(text, encoding="utf-8")
    except OSError:
        raise DataError("the adapted model cannot be written there: check its folder and permissions") from None
    code = _code(result)
    if as_json:
        print(json.dumps({"usable": code == 0, "exit": code, **result.report}, indent=1))
    else:
        Console(markup=False, emoji=False, highlight=False, soft_wrap=True).print(text)
        print(verdict(result.report))
    if code:
        raise SystemExit(code)


@plain_errors
def predict(
    model: Annotated[Path, typer.Option(help="Folder of an adapted model.")],
    out: Annotated[
        Path,
        typer.Option(
            help="File of records, .csv or .jsonl, which goes on where it ended; or a page of pictures, .html."
        ),
    ],
    paths: Annotated[list[Path], typer.Argument(metavar="DIR_OR_FILE...", help="What to predict.")],
    anyway: Annotated[bool, typer.Option("--anyway", help="Also with a model that says DO NOT USE.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read.", show_default="all cores")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Longest time for one file.")] = 60.0,
    site: Annotated[
        Path | None, typer.Option("--site", help="The site's own folder.", show_default="$WARDROUND_HOME/site")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Predict any number of images: a record for every image, then one for every patient beside it.

    A record holds each class's calibrated probability with an interval, the conformal set, and whether the image is
    unlike those that the model was adapted to; of a file that cannot be read, the reason. Records name files and stay
    at this site; patients are keyed hashes. Ctrl-C keeps what is done, and the same command goes on. A page (.html)
    shows the first 200 images with their probabilities, and which part of each its class comes from. Structured
    reports (.sr, a folder) are unverified Comprehensive SRs that reference the source instance: DICOM files only.

    Exit codes: 0 done. 10 the model says DO NOT USE, and --anyway was not given. 1 nothing could be read or written.
    """
    import torch

    from client.adapt.folder import read_adapted
    from client.devices import cpu_cores, local_devices
    from client.predict import Counts, write_patients
    from client.predict import predict as run

    adapted = read_adapted(model)
    if adapted.refusals and not anyway:
        print(f"DO NOT USE: {'; '.join(adapted.refusals)}. --anyway predicts all the same.", file=sys.stderr)
        raise SystemExit(10)
    if not all(path.exists() for path in paths):
        raise DataError("a folder or file to predict does not exist: check its path")
    place = site or home() / "site"
    key = load_key(place / "site.key")
    adapted = adapted.to(local_devices(torch.float32)[0])
    if out.suffix == ".html":
        from client.gallery import LARGEST, write_gallery
        from client.predict import pictures

        found = pictures(adapted, key, paths, skip=place, most=LARGEST, workers=workers or cpu_cores(), seconds=seconds)
        write_gallery(out, adapted, found)
        print(json.dumps({"images": len(found)}) if as_json else f"{len(found)} images in {out.name}")
        return
    columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=as_json) as progress:
        total = sum(1 for path in paths for _ in walk(path, skip=place))
        bar = progress.add_task("predicting", total=total, rate="")

        def update(counts: Counts) -> None:
            speed = progress.tasks[0].speed
            progress.update(bar, completed=counts.before + counts.done, rate=f"{speed:.0f} files/s" if speed else "")

        write = run
        if out.suffix == ".sr":
            write = _reports()
        counts = write(
            adapted, key, paths, out, skip=place, workers=workers or cpu_cores(), seconds=seconds, progress=update
        )
    written = [out] if out.suffix == ".sr" else [out, write_patients(out, adapted)]
    if counts.before + counts.done - counts.refused == 0:
        raise DataError(f"none of {counts.done} files is an image: the reasons are in the records")
    report = {**vars(counts), "usable": not adapted.refusals}
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print(f"{counts.images} images of {counts.done} files predicted, {counts.refused} files refused,", end=" ")
        print(f"{counts.before} done before: {', '.join(path.name for path in written)}")


@plain_errors
def worklist(
    records: Annotated[Path, typer.Argument(metavar="RECORDS", help="As `predict` wrote them with this model.")],
    model: Annotated[Path, typer.Option(help="Folder of the adapted model.")],
    top: Annotated[int, typer.Option(min=1, help="How many patients.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Say which patients to label next: those of whom the model is least sure, by the entropy of its probabilities.

    Patients that supported the model are left out; images unlike those come last. What is printed names files: it stays
    at this site.
    """
    from client.adapt.folder import read_adapted
    from client.worklist import worklist as rank

    found = rank(records, read_adapted(model), model / "patients.json")[:top]
    if as_json:
        print(json.dumps([vars(candidate) for candidate in found], indent=1))
        return
    for candidate in found:
        note = "  unlike the others: look first" if candidate.unlike else ""
        print(f"{candidate.entropy:.2f}  {candidate.images} images  {candidate.file}{note}")


def _reports() -> Callable[..., "Counts"]:
    try:
        import highdicom  # noqa: F401
    except ModuleNotFoundError:
        raise DataError("highdicom is missing: pip install 'wardround[sr]'") from None
    from client.predict import reports

    return reports


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
    labels: "Labels | None",
    classes: Sequence[str],
    each_a_patient: bool,
    took_part: bool,
) -> Iterator["Labelled"]:
    from client.adapt.images import from_folders, from_site
    from client.data.image import Recipe

    recipe = Recipe.of(trained.study.model)
    if labels is None or folders is None:
        yield from_site(site, recipe, classes, took_part=took_part)
        return
    with from_folders(folders, labels, recipe, classes, site=site, each_a_patient=each_a_patient) as (images, _):
        yield images


def _columns(rename: list[str] | None) -> dict[str, str]:
    columns = {}
    for pair in rename or []:
        theirs, equals, ours = pair.partition("=")
        if not equals or not theirs or not ours:
            raise DataError("--map takes THEIRS=OURS, as in 'lesion_id=patient'")
        columns[theirs] = ours
    return columns


def _mix(text: str, classes: Sequence[str]) -> tuple[float, ...] | None:
    """Return each class's share."""
    if not text:
        return None
    try:
        shares = {name.strip(): float(share) for name, share in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise DataError("--prevalence takes CLASS=SHARE of every class, as in 'mel=0.05,nv=0.95'") from None
    if sorted(shares) != sorted(classes):
        raise DataError(f"--prevalence names every class once: {', '.join(classes)}")
    if not all(share > 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 0.01:
        raise DataError("the shares of --prevalence are above zero, and their sum is one")
    return tuple(shares[name] / sum(shares.values()) for name in classes)


def _outcomes(path: Path | None, ahead: str | None) -> "Outcomes | None":
    from client.data.outcome import horizon, read_outcomes

    if (path is None) != (ahead is None):
        raise DataError("give --outcome and --horizon together")
    return None if path is None or ahead is None else read_outcomes(path, horizon(ahead))


@contextmanager
def _nothing() -> Iterator[None]:
    """Give an empty folder an exit code of its own."""
    from client.adapt.images import NoImagesError
    from client.adapt.verdict import Exit

    try:
        yield
    except NoImagesError as error:
        print(f"DO NOT USE: {error}", file=sys.stderr)
        raise SystemExit(int(Exit.NO_IMAGES)) from None


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
