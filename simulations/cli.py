"""`wardround-lab`: the researcher's command."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from client.data.store import Site
from common.console import plain_errors
from common.errors import RoundError, StudyError
from common.privacy.statement import guarantee
from common.study import RUN_KEYS, Study
from server.cli import read_study
from server.record import run_folder
from simulations.tables import summary

__all__ = ["app"]

app = typer.Typer(
    help="Federated meta-learning on virtual hospitals.", no_args_is_help=True, pretty_exceptions_show_locals=False
)

StudyFile = Annotated[
    Path | None, typer.Argument(metavar="[STUDY]", help="A study file; without one, the default study.")
]
Change = Annotated[
    list[str] | None,
    typer.Option("--set", "-c", help="Change a value, as in -c study.rounds=5 (repeatable)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read, progress to stderr.")]
Engine = Annotated[
    Literal["in-process", "flower"],
    typer.Option(help="Where the apps run: in this process, or through `flwr run` on Ray. The numbers are the same."),
]

_progress = Console(stderr=True)


@app.command(epilog="Example: wardround-lab demo")
@plain_errors
def demo(as_json: Json = False) -> None:
    """Watch four phantom hospitals meta-learn through Flower, and what it gives one that never took part."""
    study = Study()
    began = time.monotonic()
    if not as_json:
        _introduce(study)
    result, folder = _on_flower(study)
    _show(study, result, folder, as_json=as_json)
    if not as_json:
        seconds = time.monotonic() - began
        print(f"{seconds:.0f} s in all. Next: wardround-lab simulate --help, or the README.")


@app.command(epilog="Example: wardround-lab simulate simulations/studies/skin.toml -c study.rounds=20")
@plain_errors
def simulate(
    study: StudyFile = None,
    change: Change = None,
    engine: Engine = "in-process",
    resume: Annotated[int | None, typer.Option(help="Go on with this run from its last complete round.")] = None,
    as_json: Json = False,
) -> None:
    """Prepare a study's virtual hospitals and run it."""
    from server.runs import find_run, recorded_study
    from simulations.engines.inprocess import run_in_process

    if resume is not None and (study or change):
        raise StudyError("--resume goes on with the run's own study: leave STUDY and -c out")
    plan = _plan(study, change) if resume is None else recorded_study(find_run(str(resume)))
    if engine == "flower":
        result, folder = _on_flower(plan, resume)
    else:
        _prepare(plan)
        with redirect_stdout(sys.stderr):  # the ServerApp prints a line a round
            run_id, _ = run_in_process(plan, resume=resume)
        folder = run_folder(run_id)
        result = json.loads((folder / "result.json").read_text())
    _show(plan, result, folder, as_json=as_json)


@app.command(epilog="Example: wardround-lab prepare simulations/studies/skin.toml --picture who-has-what.png")
@plain_errors
def prepare(
    study: StudyFile = None,
    change: Change = None,
    picture: Annotated[Path | None, typer.Option(help="Draw who has what (PNG).")] = None,
    as_json: Json = False,
) -> None:
    """Write the folders of a study's virtual hospitals; `flwr run` finds them there."""
    from simulations.figures.partition import draw_partition
    from simulations.prepare import census

    plan = _plan(study, change)
    sites = _prepare(plan)
    counts, classes = census(plan, sites)
    names = [site.name for site in sites]
    if picture is not None:
        draw_partition(counts, names, classes, picture, title=plan.study.title)
    if as_json:
        rows = {n: dict(zip(classes, map(int, row), strict=True)) for n, row in zip(names, counts, strict=True)}
        print(json.dumps({"folder": str(sites[0].folder.parent), "images": rows}, indent=1))
        return
    for site, row in zip(sites, counts, strict=True):
        print(
            f"{site.name}: {len(site.labels)} images of {site.patients.max() + 1} patients, {(row > 0).sum()} classes"
        )
    print(f"in {sites[0].folder.parent}")


@app.command(epilog="Example: wardround-lab localnet --sites 3")
@plain_errors
def localnet(
    study: StudyFile = None,
    change: Change = None,
    sites: Annotated[
        int, typer.Option(min=2, help="Hospitals, where no STUDY says how many there are.", show_default="3")
    ] = 3,
    keep: Annotated[
        Path | None, typer.Option(help="Leave keys, logs and the run in this folder.", show_default="nowhere")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a study on a whole consortium on the loopback, and compare its theta with that of an in-process run.

    An authority, certificates and a signed manifest; nginx as the edge with Flower's SuperLink behind it; at every site
    a gateway that has approved the bundle and the study, a worker with the images, and a SuperNode that reaches nothing
    but its gateway. nginx must be installed. Without STUDY it is three rounds of the demo.

    Exit code 1: a process did not start, the run failed, or theta is not the same.
    """
    from simulations.engines.inprocess import run_in_process
    from simulations.localnet import letters, place
    from simulations.localnet import localnet as consortium

    plan = _plan(study, [*([] if study else _small(sites)), *(change or [])])
    began = time.monotonic()
    data = _prepare(plan)
    with place(keep) as folder, consortium(folder, plan, data, say=_progress.print) as net:
        up = time.monotonic()
        with _bar(plan) as update:
            run = net.run(plan, update)
        took = time.monotonic() - up
        left = {name: letters(site) for name, site in net.sites.items()}
        theta = (run / "theta.safetensors").read_bytes()
        result = json.loads((run / "result.json").read_text())
    seconds = time.monotonic() - began
    with redirect_stdout(sys.stderr):
        here, _ = run_in_process(plan)
    if theta != (run_folder(here) / "theta.safetensors").read_bytes():
        raise RoundError("theta is not that of the in-process run: please report this")
    if as_json:
        report = {**result, "left": left, "seconds": seconds, "seconds_of_the_run": took}
        print(json.dumps(report, indent=1, sort_keys=True))
        return
    for name, count in left.items():
        print(f"{name}: {count} answers left through its gateway, each a signed line of its audit log")
    print(f"theta is that of the in-process run, byte for byte: {plan.study.rounds} rounds, {len(data)} sites")
    print(f"{seconds:.0f} s in all, {took:.0f} s of it the run, {took / plan.study.rounds:.1f} s a round")


def _small(sites: int) -> list[str]:
    """Return what makes the demo small, and one in which every site trains."""
    values = {"study.id": "localnet", "study.rounds": 3, "sites.held-out": '""', "sites.quorum": sites}
    values |= {"episodes.test-episodes": 4, "data.sites": sites, "data.patients-per-class": 5}
    return [f"{key}={value}" for key, value in values.items()]


@app.command(epilog="Example: wardround-lab compare simulations/studies/cells.toml --algorithms maml,fedavg --seeds 3")
@plain_errors
def compare(
    study: StudyFile = None,
    algorithms: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "maml,fomaml,protonet,reptile,fedavg,local-only",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each algorithm.")] = 3,
    change: Change = None,
    out: Annotated[Path, typer.Option(help="Folder for comparison.json, comparison.md and curves.png.")] = Path("."),
    as_json: Json = False,
) -> None:
    """Run several algorithms on the same virtual hospitals and put them side by side, with 95 % intervals."""
    from common.study import names
    from server.files import write_atomic
    from simulations.compare import compare as run_comparison
    from simulations.figures.curves import draw_curves

    plan = _plan(study, change)
    _prepare(plan)
    comparison = run_comparison(plan, names(algorithms), seeds, progress=_progress.print)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(comparison.json(), indent=1, sort_keys=True)
    write_atomic(out / "comparison.json", text.encode())
    write_atomic(out / "comparison.md", comparison.markdown().encode())
    draw_curves(comparison, out / "curves.png")
    print(text if as_json else f"{comparison.markdown()}\nin {out}: comparison.json, comparison.md, curves.png")


@app.command(epilog="Example: wardround-lab redteam -c study.rounds=10 --page redteam.html")
@plain_errors
def redteam(
    study: StudyFile = None,
    change: Change = None,
    settings: Annotated[
        str, typer.Option(help="Networks and learners, separated by ';'.", show_default="all six")
    ] = "",
    defences: Annotated[str, typer.Option(help="Comma-separated.")] = "none,episode-clip,patient-clip",
    clip: Annotated[float, typer.Option(min=0, help="privacy.clip of the mechanisms.")] = 1.0,
    noise: Annotated[float, typer.Option(min=0, help="privacy.noise of the mechanisms.")] = 1.1,
    sampling: Annotated[float, typer.Option(min=0, max=1, help="privacy.sampling of the mechanisms.")] = 0.3,
    runs: Annotated[
        int,
        typer.Option(min=0, help="Runs with random halves of the patients, to attack their theta: 8 or more, or 0."),
    ] = 8,
    page: Annotated[
        Path | None, typer.Option(help="Write a page with the reconstructed images beside the originals (HTML).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Attack what sites send and what a run publishes, with and without a mechanism; each figure beside its bound.

    Then a malicious coordinator plays its tricks to one of the sites.

    The study runs with the real apps on copies of its virtual hospitals, its network and learner changed to each of the
    settings, and every message is recorded. The Conv4 of first order also runs with other halves of the patients
    (--runs), to tell by theta alone who was there. Without STUDY, three small phantom hospitals are attacked.

    Exit code 1: an attack is proven to be above the bound that the guarantee puts on it, or a trick is not refused.
    That is a bug in wardround.
    """
    from common.study import names
    from simulations.redteam.page import write_page
    from simulations.redteam.settings import SETTINGS, attacked, built_in
    from simulations.redteam.table import as_tree, table, tricks_table
    from simulations.redteam.team import attack_study
    from simulations.redteam.tricks import play

    chosen = [part.strip() for part in settings.split(";") if part.strip()] or list(SETTINGS)
    plan = _plan(study, change, built_in())
    results = attack_study(
        plan,
        chosen,
        names(defences),
        clip=clip,
        noise=noise,
        sampling=sampling,
        runs=runs,
        say=_progress.print,
    )
    _progress.print("a malicious coordinator")
    tricks = play(attacked(plan, chosen[0], "episode-clip", clip, noise, sampling))
    if page is not None:
        write_page(page, _title(plan, built_in()), results, tricks)
    if as_json:
        told = [asdict(trick) for trick in tricks]
        print(json.dumps({"results": [as_tree(result) for result in results], "tricks": told}, indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(table(results), tricks_table(tricks))
    if missed := [trick.name for trick in tricks if not trick.refused]:
        raise RoundError("a coordinator's trick is not refused, please report this:\n  " + "\n  ".join(missed))
    if broken := [sentence for result in results for sentence in result.broken]:
        raise RoundError("an attack is above its bound, please report this:\n  " + "\n  ".join(broken))


@app.command(epilog="Example: wardround-lab privacy --epsilon 1,3,8,inf --seeds 5 --picture frontier.png")
@plain_errors
def privacy(
    study: Annotated[
        Path | None, typer.Option(help="A study file with fixed labels; without one, small phantoms.")
    ] = None,
    wanted: Annotated[
        str,
        typer.Option("--epsilon", help="Comma-separated, of the whole study; inf is no mechanism, 0 no round."),
    ] = "0,1,3,8,inf",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every setting.")] = 5,
    mechanisms: Annotated[str, typer.Option(help="Comma-separated.")] = "episode-clip,patient-clip",
    learners: Annotated[str, typer.Option(help="Comma-separated: first and second order.")] = "fomaml,maml",
    parts: Annotated[
        str, typer.Option(help="Comma-separated: all of the network, its last layer over a fixed body.")
    ] = "full,head",
    start: Annotated[
        list[Path] | None,
        typer.Option(
            help="Start bodies from this theta.safetensors of other, public data (repeatable: seed by seed, in turn)."
        ),
    ] = None,
    clip: Annotated[float, typer.Option(min=1e-9, help="privacy.clip.")] = 1.0,
    sampling: Annotated[float, typer.Option(min=1e-9, max=1, help="privacy.sampling.")] = 0.2,
    delta: Annotated[float, typer.Option(min=1e-15, max=0.1, help="privacy.delta.")] = 1e-5,
    attacked: Annotated[int, typer.Option(min=1, help="Attack the answers of so many rounds, the last ones.")] = 5,
    runs: Annotated[
        Path, typer.Option(help="Append a line a run to this file (JSON); what it holds is not run again.")
    ] = Path("frontier.jsonl"),
    picture: Annotated[Path | None, typer.Option(help="Draw the frontier (PNG).")] = None,
    change: Change = None,
    as_json: Json = False,
) -> None:
    """Measure what privacy costs: accuracy and attacks by epsilon, mechanism, learner and part of the network.

    Signal to noise is said before anything runs. Exit code 1: an attack is proven to be above the bound of the
    guarantee. That is a bug in wardround.
    """
    from common.models.released import keep
    from common.study import names
    from simulations.experiments import frontier
    from simulations.experiments.frontier_table import recalls, rows, table, tree
    from simulations.figures.frontier import draw_frontier

    plan = _plan(study, change, frontier.built_in())
    _prepare(plan)
    setting = frontier.Setting(sampling, clip, delta, [keep(one) for one in start or []], attacked)
    chosen = frontier.Choice(
        names(mechanisms), names(learners), names(parts), tuple(map(_epsilon, names(wanted))), seeds
    )
    todo = frontier.plans(plan, setting, chosen)
    for sentence in frontier.forecast(todo):
        _progress.print(sentence)
    known, done = frontier.read(runs), []
    with _count("runs", len(todo)) as step:
        for one, run in frontier.measure(todo, attacked, known):
            done.append((one, run))
            if run not in known:
                with runs.open("a") as lines:
                    lines.write(frontier.line(run))
            step(frontier.name_of(one))
    found, title = rows(done), _title(plan, frontier.built_in())
    if picture is not None:
        draw_frontier(found, picture, title)
    if as_json:
        print(json.dumps(tree(found), indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(table(found, f"{title}: {plan.study.rounds} rounds, {seeds} seed(s)"))
        console.print(recalls(found))
    if broken := [frontier.name_of(one) for one, run in done if any(f["broken"] for f in run.attack.values())]:
        raise RoundError("an attack is above its bound, please report this:\n  " + "\n  ".join(broken))


def _epsilon(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise StudyError(f"--epsilon takes numbers from 0 to inf, separated by commas (it was {text!r})")
    return value


def _plan(file: Path | None, changes: list[str] | None, default: Study | None = None) -> Study:
    study = (default or Study()) if file is None else read_study(file)
    given: dict[str, bool | int | float | str] = {}
    for change in changes or []:
        key, equals, text = change.partition("=")
        if not equals:
            raise StudyError(f"--set takes KEY=VALUE, as in study.rounds=5 (it was {change!r})")
        if key.strip() in RUN_KEYS:
            raise StudyError(f"{key.strip()} is of a run of `flwr run` and no part of a study: leave it out here")
        given[key.strip()] = _value(text.strip())
    return study.override(given) if given else study


def _value(text: str) -> bool | int | float | str:
    """Read a value as TOML does; what is no TOML value is a string without quotes."""
    import tomllib

    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


def _title(study: Study, built_in: Study) -> str:
    """Return a study's title; where it still has that of another one, with other images or classes, say what it has."""
    from common.study import names

    title, about = study.study.title, (study.data, study.episodes.classes)
    default = title == Study().study.title and study.data.source != "phantoms"
    changed = title == built_in.study.title and about != (built_in.data, built_in.episodes.classes)
    if not (default or changed):
        return title
    images = ", ".join(source.rpartition("/")[2] for source in names(study.data.source))
    return f"{study.data.sites} virtual hospitals with images from {images}"


def _introduce(study: Study) -> None:
    classes, new = study.episodes.class_names, study.episodes.held_out_names
    print(
        f"{study.data.sites} phantom hospitals, one scanner each, {len(classes)} lesion types to learn from.\n"
        f"{study.sites.held_out} never takes part; {len(new)} lesion types are kept for the end: {', '.join(new)}.\n"
        "Each round every other hospital sends one meta-gradient and nothing else; a Flower server steps theta."
    )


def _prepare(study: Study) -> list[Site]:
    from simulations.prepare import prepare

    with _progress.status("preparing virtual hospitals"):
        return prepare(study, progress=_progress.print)


def _on_flower(study: Study, resume: int | None = None) -> tuple[dict[str, Any], Path]:
    from simulations.engines.flower import run_on_flower, superlink

    with superlink() as link:
        _prepare(study)
        with _bar(study) as update:
            folder = run_folder(run_on_flower(study, link, progress=update, resume=resume))
    return json.loads((folder / "result.json").read_text()), folder


def _progress_of(field: str) -> Progress:
    """Return a progress bar that ends with one of its task's fields."""
    ends = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn(f"{{task.fields[{field}]}}"))
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *ends, console=_progress)


@contextmanager
def _bar(study: Study) -> Iterator[Any]:
    """Show rounds as they end."""
    with _progress_of("figures") as progress:
        task = progress.add_task("starting Flower", total=study.study.rounds, figures="")

        def update(line: dict[str, Any]) -> None:
            sites = line["sites"].values()
            loss = sum(s["loss"] for s in sites) / len(sites)
            hits = sum(s["accuracy"] for s in sites) / len(sites)
            last = line["round"] == study.study.rounds
            withheld = study.privacy.figures == "withheld"
            progress.update(
                task,
                completed=line["round"],
                description="evaluating" if last else "rounds",
                figures="" if withheld else f"loss {loss:.2f}, accuracy {hits:.2f}",
            )

        yield update


@contextmanager
def _count(what: str, total: int) -> Iterator[Any]:
    """Show how many of some long tasks are done, and for how long the rest will take."""
    with _progress_of("last") as progress:
        task = progress.add_task(what, total=total, last="")
        yield lambda last: progress.update(task, advance=1, last=last)


def _show(study: Study, result: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**result, "folder": str(folder)}, indent=1, sort_keys=True))
        return
    sent = result["numbers_up_per_reply"]
    if study.privacy.figures == "withheld":
        print("No site said how good theta is there: the study withholds figures (privacy.figures = 'withheld').")
        print(f"Every reply held {sent} numbers, no loss and no accuracy, and nothing else.")
    else:
        Console().print(summary(study, result["evaluations"][-1]["sites"]))
        print(f"Every reply held {sent} numbers, a loss and an accuracy, and nothing else.")
    print(f"Privacy: {guarantee(study)}.")
    print(f"theta.safetensors, result.json, history.jsonl: {folder}")
