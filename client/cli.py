"""`wardround-site`: the hospital's command."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from client.adapt import cli as adapting
from client.budget import budget
from client.checking import cli as checking
from client.data.cache import caches, evict, verify
from client.data.catalogue import Split, open_catalogue
from client.data.image import Recipe
from client.data.index import Counts, Plan, index
from client.data.labels import Labels
from client.data.lock import alone
from client.data.page import write_page
from client.data.picture import Reading, Reason
from client.data.report import ADVICE, contents, offer, statement
from client.data.store import SPLITS
from client.data.walk import walk
from client.devices import cpu_cores
from client.gateway import commands as door
from client.gateway.cli import audit
from client.membership import cli as membership
from client.pacs import cli as pacs
from client.thetas import thetas
from client.up import up
from client.worker.cli import worker
from common.console import plain_errors
from common.errors import DataError, NotPreparedError
from common.paths import home

__all__ = ["app"]

app = typer.Typer(
    help="A hospital's side: its images, its approval, its node.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,  # local variables hold file names, and file names can hold patients' names
)

SiteFolder = Annotated[
    Path | None, typer.Option("--site", help="The site's own folder.", show_default="$WARDROUND_HOME/site")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read, progress to stderr.")]

#: What may stand in a table, labels and the names of makers, comes from files: nothing in it is markup.
_plain = partial(Console, markup=False, emoji=False, highlight=False)
_progress = _plain(stderr=True)


app.command(epilog="Example: wardround-site pull https://pacs/dicom-web --into intake --where Modality=CT")(pacs.pull)
app.command(epilog="Example: wardround-site receive --into intake --aet WARDROUND --port 11112 --allow PACS1")(
    pacs.receive
)
app.command("budget", epilog="Example: wardround-site budget --epsilon 3 --delta 1e-5")(budget)
app.command(epilog="Example: wardround-site adapt --model run --task mel,nv --out skin-model")(adapting.adapt)
app.command(epilog="Example: wardround-site predict /data/new --model skin-model --out predictions.csv")(
    adapting.predict
)
app.command(epilog="Example: wardround-site worklist predictions.csv --model skin-model --top 10")(adapting.worklist)

app.command(epilog="Example: wardround-site init st-mary")(membership.init)
app.command(epilog="Example: wardround-site join st-mary.kit.json --fingerprint '4f0c 1be2 ...'")(membership.join)
app.command(epilog="Example: wardround-site update manifest.json")(membership.update)
app.command(epilog="Example: wardround-site rotate")(membership.rotate)
app.command(epilog="Example: wardround-site keys")(membership.keys)

app.command(epilog="Example: wardround-site doctor --study study.toml")(checking.doctor)
app.command(epilog="Example: wardround-site preview study.toml --to would-leave")(checking.preview)
app.command(epilog="Example: wardround-site up --proxy http://proxy.example:3128")(up)
app.command(epilog="Example: wardround-site gateway --proxy http://proxy.example:3128")(door.gateway)
app.command(epilog="Example: wardround-site worker --socket /run/wardround/worker/socket")(worker)
app.command(epilog="Example: wardround-site thetas 51ab0c2d --compare st-mary.txt")(thetas)
app.command(epilog="Example: wardround-site approvals")(door.approvals)
app.command(epilog="Example: wardround-site approve 9f3c51ab")(door.approve)
app.command(epilog="Example: wardround-site reject 9f3c51ab")(door.reject)
app.command(epilog="Example: wardround-site diff 9f3c51ab")(door.diff)
app.command(epilog="Example: wardround-site pause")(door.pause)
app.command(epilog="Example: wardround-site resume")(door.resume)
app.add_typer(audit, name="audit")


@app.command("index", epilog="Example: wardround-site index /data/ct --labels diagnoses.csv --study skin.toml")
@plain_errors
def index_command(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders, or npz files.")],
    site: SiteFolder = None,
    labels: Annotated[Path | None, typer.Option(help="CSV file; without it, the labels stay as they are.")] = None,
    rename: Annotated[
        list[str] | None, typer.Option("--map", help="A column of the labels file, as in 'lesion_id=patient'.")
    ] = None,
    study: Annotated[list[Path] | None, typer.Option(help="Prepare pixels for this study (repeatable).")] = None,
    frames: Annotated[
        str | None, typer.Option(help="Of files with several: all, middle, or K for every K-th.", show_default="all")
    ] = None,
    volumes: Annotated[bool, typer.Option("--volumes", help="A CT or MR series is one 3-D picture.")] = False,
    require_deidentified: Annotated[
        bool, typer.Option("--require-deidentified", help="Refuse files that may say who the patient is.")
    ] = False,
    leave_out_shared: Annotated[
        bool, typer.Option("--leave-out-shared", help="Set aside pictures that two patients have in common.")
    ] = False,
    each_a_patient: Annotated[
        bool, typer.Option("--each-a-patient", help="A picture that names no patient is a patient of its own.")
    ] = False,
    validation: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="Share of patients for calibration.", show_default="0.1")
    ] = None,
    test: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="Share of patients that never train.", show_default="0.2")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read.", show_default="all cores")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Longest time for one file.")] = 60.0,
    refused_list: Annotated[
        Path | None,
        typer.Option(
            help="Write the paths of the files that this run refuses here: for you, as paths can name people."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Catalogue images and labels, and prepare pixels. Run it again whenever there are new ones.

    DIR is a folder, or an npz file. Nothing is written there, and only new and changed files are read. Files that
    cannot be read rightly are set aside, with a reason, and the run goes on. How files are read and patients are split
    is fixed by the first run; later ones need not say it again.

    Exit code 1: a folder or the labels cannot be used, or the split leaks. Exit code 2: a bad study file.
    """
    folder = _site(site)
    made = _settings(folder)
    frames = frames or made.get("frames", "all")
    split = Split(
        float(made.get("validation", 0.1)) if validation is None else validation,
        float(made.get("test", 0.2)) if test is None else test,
    )
    _check(frames, split)
    plan = Plan(
        folder,
        folders,
        [_recipe(path) for path in study or []],
        _labels(labels, dict(_renamed(rename or []))),
        Reading(
            frames,
            volumes or made.get("volumes") == "yes",
            require_deidentified or made.get("deidentified") == "yes",
        ),
        split,
        leave_out_shared=leave_out_shared,
        each_a_patient=each_a_patient,
        workers=workers or cpu_cores(),
        seconds=seconds,
    )
    # The list first: that it cannot be written is better known before hours of reading.
    with _refused(refused_list) as refused, _bar(plan) as update:
        counts = index(plan, update, refused)
    with open_catalogue(plan.site / "catalogue.sqlite") as catalogue:
        report = {"run": _run(counts), **contents(catalogue), "prepared": len(caches(plan.site))}
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        _show_index(report)
    if counts.leaks:
        raise DataError(
            f"{counts.leaks} pictures or patients are on two sides of the split, so no episode will be drawn from this "
            "site: find out why two patients have the same picture, or set those pictures aside with --leave-out-shared"
        )


@app.command(epilog="Example: wardround-site stats --page offer.html")
@plain_errors
def stats(
    site: SiteFolder = None,
    page: Annotated[
        Path | None, typer.Option(help="Write one HTML page with thumbnails; it must stay at this site.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which classes, patients and scanners this site has, and which episodes it can give.

    The largest K is that of training episodes whose K support pictures of a class are of K patients.
    """
    folder = _site(site)
    with open_catalogue(folder / "catalogue.sqlite") as catalogue:
        figures = offer(catalogue)
        if page is not None:
            write_page(page, folder, catalogue, figures)
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        _show_offer(figures)


@app.command("verify", epilog="Example: wardround-site verify")
@plain_errors
def verify_command(site: SiteFolder = None, as_json: Json = False) -> None:
    """Check every prepared picture against its checksum. Exit code 1: some are damaged."""
    folder = _site(site)
    with open_catalogue(folder / "catalogue.sqlite") as catalogue:
        damaged = list(verify(folder, catalogue))
        checked = catalogue.database.execute("SELECT count(*) FROM cached").fetchone()[0]
    if as_json:
        print(json.dumps({"checked": checked, "damaged": len(damaged)}))
    else:
        print(f"prepared pictures checked: {checked}, damaged: {len(damaged)}")
    if damaged:
        recipes = ", ".join(sorted({recipe for recipe, _ in damaged}))
        raise DataError(
            f"prepared pictures of recipe {recipes} are damaged: run `wardround-site evict`, then "
            "`wardround-site index` with --study, and check the disk"
        )


@app.command("evict", epilog="Example: wardround-site evict --study skin.toml")
@plain_errors
def evict_command(
    study: Annotated[list[Path] | None, typer.Option(help="Of this study only (repeatable).")] = None,
    site: SiteFolder = None,
) -> None:
    """Delete prepared pixels, of all studies or of some; indexing with --study prepares them again."""
    folder = _site(site)
    wanted = {_recipe(path) for path in study or []}
    if not (folder / "catalogue.sqlite").exists():  # opening it to write would make one
        raise NotPreparedError("this site has no catalogue, so nothing is prepared: run `wardround-site index` first")
    chosen = [recipe for recipe in caches(folder) if not study or recipe in wanted]
    with alone(folder), open_catalogue(folder / "catalogue.sqlite", new={}) as catalogue:
        for recipe in chosen:
            evict(folder, catalogue, recipe)
    print(f"pixel caches deleted: {len(chosen)}")


def _site(given: Path | None) -> Path:
    return given or home() / "site"


def _recipe(path: Path) -> Recipe:
    return Recipe.of(checking.read_study(path).model)


def _labels(path: Path | None, columns: dict[str, str]) -> Labels | None:
    """Return the labels file, looked at now: it is read when all images have been, which can be hours later."""
    if path is None:
        if columns:
            raise DataError("--map is about the labels file: add --labels")
        return None
    if not os.access(path, os.R_OK) or not path.is_file():
        raise DataError("the labels file cannot be opened: check its path and permissions")
    return Labels(path, columns)


def _renamed(pairs: list[str]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        theirs, equals, ours = pair.rpartition("=")
        if not equals:
            raise DataError("--map takes COLUMN=NAME, as in 'lesion_id=patient'")
        yield theirs.strip(), ours.strip()


def _settings(site: Path) -> dict[str, str]:
    """Return what was fixed when a site was made; nothing where it is not made, or its making was interrupted."""
    with suppress(NotPreparedError, DataError), open_catalogue(site / "catalogue.sqlite") as catalogue:
        return {key: catalogue.setting(key) for key in ("frames", "volumes", "deidentified", "validation", "test")}
    return {}


def _check(frames: str, split: Split) -> None:
    if frames not in ("all", "middle") and not (frames.isdecimal() and int(frames) > 0):
        raise DataError("--frames is all, middle or a number: 5 takes every fifth")
    if split.validation + split.test >= 1:
        raise DataError("--validation and --test leave no patients to train with: their sum must be below 1")


@contextmanager
def _refused(path: Path | None) -> Iterator[Callable[[Path, Reason], None]]:
    """Write the files that are refused to a list that only its owner can read."""
    if path is None:
        yield lambda _path, _reason: None
        return
    try:
        path.touch(mode=0o600)
        path.chmod(0o600)
        lines = path.open("w", encoding="utf-8", errors="surrogateescape")
    except OSError:
        raise DataError("the list of refused files cannot be written there: check its folder and permissions") from None
    with lines:
        yield lambda file, reason: print(reason.value, file, sep="\t", file=lines)


@contextmanager
def _bar(plan: Plan) -> Iterator[Any]:
    """Show how far indexing is."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_progress) as progress:
        total = sum(1 for folder in plan.folders for _ in walk(folder, skip=plan.site))
        task = progress.add_task("indexing", total=total, rate="")

        def update(counts: Counts) -> None:
            speed = progress.tasks[0].speed
            rate = f"{speed:.0f} files/s, {counts.refused} refused" if speed else ""
            progress.update(task, completed=counts.files, rate=rate)

        yield update


def _run(counts: Counts) -> dict[str, int]:
    return {
        "read": counts.read,
        "unchanged": counts.unchanged,
        "refused": counts.refused,
        "gone": counts.gone,
        "links_not_followed": counts.links,
        "leaks": counts.leaks,
    }


def _show_index(report: dict[str, Any]) -> None:
    console, run = _plain(), report["run"]
    console.print(
        f"{run['read']} files read, {run['unchanged']} unchanged, {run['refused']} refused, {run['gone']} gone"
        + (f", {run['links_not_followed']} links not followed" if run["links_not_followed"] else "")
    )
    tables = {
        "files refused, and why": report["refused"],
        "pictures set aside, and why": report["aside"],
        "files by identifying attribute in their header": report["identifying"],
        "files by what their header says about identity": report["notes"],
    }
    for title, counts in tables.items():
        if counts:
            table = Table(title=title, title_justify="left", show_header=False, min_width=len(title))
            for name, number in counts.items():
                table.add_row(name, str(number), *([ADVICE[name]] if name in ADVICE else []))
            console.print(table)
    rows = report["labels"]
    console.print(
        f"labels: {rows['rows']} rows, {rows['repeated']} repeated, {rows['unmatched']} match no picture\n"
        f"{report['pictures']} pictures are ready for episodes"
    )
    if not report["prepared"]:
        console.print("No pixels are prepared yet: run it again with --study STUDY.")


def _show_offer(figures: dict[str, Any]) -> None:
    console = _plain()
    if figures["classes"]:
        columns = ("class", "pictures", *SPLITS, "largest K")
        table = Table(*columns, title="patients by class and split", title_justify="left")
        for name, about in figures["classes"].items():
            counts = (about["pictures"], *about["patients"].values(), about["largest_shots"])
            table.add_row(name, *map(str, counts))
        table.add_section()
        table.add_row("all", str(figures["pictures"]), *map(str, figures["patients"].values()), "")
        console.print(table)
        for title, counts in (("modality", figures["modalities"]), ("scanner", figures["scanners"])):
            table = Table(title, "pictures")
            for name, number in counts.items():
                table.add_row(name or "not said", str(number))
            console.print(table)
    for sentence in statement(figures):
        console.print(sentence)
