"""Indexing: from folders of files to a catalogue and pixel caches, again and again, reading only what is new."""

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

from client.data.cache import PixelCache, caches
from client.data.catalogue import Catalogue, Known, Split, open_catalogue
from client.data.image import Recipe
from client.data.keys import KEY_BYTES, keyed, load_key
from client.data.labels import Labels, check_labels, import_labels
from client.data.lock import alone
from client.data.picture import Reading, Reason
from client.data.pool import AHEAD, TOO_SLOW, Failure, run_in_workers
from client.data.walk import Found, walk
from client.data.worker import Entry, Task, Work, read, survey
from common.errors import DataError

__all__ = ["Counts", "Plan", "index"]

#: Refusals that `Counts` holds, so that memory does not grow with them.
_REMEMBERED = 100
#: Refusals for which a busy machine or a lack of memory may be to blame: the next run tries once more.
_PERHAPS_THE_MACHINE = frozenset({Reason.CRASHED.name, Reason.TOO_SLOW.name})
#: A transaction ends after so many files: what a kill can cost.
_BATCH = 64


@dataclass(frozen=True)
class Plan:
    """What to index, and how.

    Attributes
    ----------
    site : Path
        The site's own folder; it is made where missing.
    folders : sequence of Path
        Where the hospital's files lie. They are only read.
    recipes : sequence of Recipe
        What pixels are prepared for, besides the recipes that the site already has a cache for.
    labels : Labels or None
        Replaces the site's labels; None keeps them.
    reading, split, name, number
        Fixed when the site is made: how files are read, the shares of the splits, the site's name and its number
        among virtual sites.
    leave_out_shared, each_a_patient : bool
        Set pictures aside that two patients have in common; take every picture that names no patient for a patient of
        its own. Once set, they stay.
    key : bytes or None
        The secret key of a site that is made now; drawn where None.
    workers : int
        Processes that read.
    seconds : float
        Longest time that one file may take.
    """

    site: Path
    folders: Sequence[Path]
    recipes: Sequence[Recipe] = ()
    labels: Labels | None = None
    reading: Reading = field(default_factory=Reading)
    split: Split = field(default_factory=Split)
    name: str = "site"
    number: int = 0
    leave_out_shared: bool = False
    each_a_patient: bool = False
    key: bytes | None = None
    workers: int = 1
    seconds: float = 60.0


@dataclass
class Counts:
    """What an indexing run did, in files."""

    read: int = 0
    unchanged: int = 0
    refused: int = 0
    gone: int = 0
    links: int = 0
    leaks: int = 0
    #: The first hundred files that this run refused, and why.
    refusals: list[tuple[Path, Reason]] = field(default_factory=list)

    @property
    def files(self) -> int:
        """Files that are there."""
        return self.read + self.unchanged + self.refused


def index(
    plan: Plan,
    progress: Callable[[Counts], None] = lambda _: None,
    refused: Callable[[Path, Reason], None] = lambda _path, _reason: None,
) -> Counts:
    """Bring a site's catalogue and caches up to date with its folders and labels.

    It can be killed at any moment and run again: what was read is kept, the rest is done, and the outcome is the same.

    Parameters
    ----------
    plan : Plan
        What to index, and how.
    progress : callable
        Called after every file.
    refused : callable
        Called with the path of every file that this run refuses, which is kept nowhere, and why.

    Raises
    ------
    DataError
        A folder or the labels file cannot be used, the settings are not those of the site, or another program is
        indexing.
    """
    plan = replace(plan, folders=_folders(plan))
    if plan.labels is not None:
        check_labels(plan.labels)
    try:
        return _index(plan, progress, refused)
    except OSError as error:
        raise DataError(
            f"the site's folder cannot be written ({os.strerror(error.errno or 0)}): is there space, and are its "
            "permissions right? What was done until now is kept: run the command again"
        ) from None


def _index(plan: Plan, progress: Callable[[Counts], None], refused: Callable[[Path, Reason], None]) -> Counts:
    plan.site.mkdir(parents=True, exist_ok=True, mode=0o700)
    counts = Counts()
    with alone(plan.site), ExitStack() as stack:
        path = plan.site / "catalogue.sqlite"
        # Another key would make another patient of everybody: one that was lost is not drawn again.
        key = load_key(plan.site / "site.key", new=None if path.exists() else plan.key or os.urandom(KEY_BYTES))
        settings = _settings(plan, key)
        catalogue = stack.enter_context(open_catalogue(path, new=settings))
        _check_settings(catalogue, settings)
        recipes = list(dict.fromkeys([*caches(plan.site), *plan.recipes]))
        opened = [PixelCache.open(plan.site, recipe) for recipe in recipes]
        for cache in opened:
            stack.callback(cache.close)
            cache.check(catalogue)
        _Job(plan, key, catalogue, opened, counts, progress, refused).run()
        with catalogue.transaction():
            if plan.labels is not None:
                import_labels(catalogue, key, plan.labels)
            if plan.leave_out_shared:
                catalogue.note("leave_out_shared", "yes")
            if plan.each_a_patient:
                catalogue.note("each_a_patient", "yes")
            catalogue.settle(key)
            counts.leaks = catalogue.leaks(key)
            catalogue.note("leaks", str(counts.leaks))
            catalogue.note("recipes", _digests(opened))
    return counts


def _folders(plan: Plan) -> list[Path]:
    """Return the folders without links and dots: a file that is reached in two ways is one file."""
    folders = [folder.resolve() for folder in plan.folders]
    for at, folder in enumerate(folders):
        if not folder.exists():
            raise DataError("a folder to index does not exist: check its path")
        if any(folder.is_relative_to(other) for other in folders[:at] + folders[at + 1 :]):
            raise DataError("a folder to index is named twice, or lies in another one: name the outer one only")
    return folders


def _digests(opened: Sequence[PixelCache]) -> str:
    return ",".join(sorted(cache.recipe.digest for cache in opened))


@dataclass
class _Job:
    """One run, under the site's lock."""

    plan: Plan
    key: bytes
    catalogue: Catalogue
    caches: list[PixelCache]
    counts: Counts
    progress: Callable[[Counts], None]
    refused: Callable[[Path, Reason], None]

    def __post_init__(self) -> None:
        self.roots = {folder: keyed(self.key, "folder", str(folder)) for folder in self.plan.folders}
        # What may be otherwise by now although the file is the same.
        self.again = {Reason.NOT_READABLE.name}
        if self.catalogue.setting("recipes") != _digests(self.caches):
            self.again.add(Reason.NOT_FOR_STUDY.name)

    def run(self) -> None:
        with self.catalogue.transaction():
            number = self.catalogue.begin_run()
        if self.plan.reading.volumes:
            self._units(number)
        else:
            self._store(self._changed(number), number)
        with self.catalogue.transaction():
            self.counts.gone = self.catalogue.drop_files(self.roots.values(), number)
            self.catalogue.forget_orphans()
        self._clean()

    def _clean(self) -> None:
        """Overwrite the pixels of pictures that are in the catalogue no more, and cut off what never came to be."""
        while slots := self.catalogue.to_wipe():
            for cache in self.caches:
                for slot in slots:
                    cache.wipe(slot)
                cache.sync()
            with self.catalogue.transaction():
                self.catalogue.wiped(slots)
        for cache in self.caches:
            cache.trim(self.catalogue.last_slot())

    def _found(self) -> Iterator[Found]:
        for folder in self.plan.folders:
            yield from walk(folder, skip=self.plan.site, links=self._link)

    def _link(self) -> None:
        self.counts.links += 1

    def _changed(self, number: int) -> Iterator["_Unit"]:
        """Yield the files that must be read, and note the others."""
        for found in self._found():
            member = self._member(found)
            known = self.catalogue.known(member.file)
            current = known is not None and known.stamp == member.stamp
            if known is not None and current and not self._wanted(known):
                self.catalogue.seen(member.file, member.root, number)
                self.counts.unchanged += 1
                self.progress(self.counts)
            else:
                tries = known.tries if known is not None and current else 0
                task = Task((found.path,), found.name)
                yield _Unit(member.file, task, (member,), known=known is not None, same=current, tries=tries)

    def _wanted(self, known: Known) -> bool:
        """Whether a file that has not changed must be read all the same."""
        if known.reason is not None:
            return known.reason in self.again or (known.reason in _PERHAPS_THE_MACHINE and known.tries == 1)
        return any(cache.missing(self.catalogue, known.unit) for cache in self.caches)

    def _member(self, found: Found) -> "_Member":
        return _Member(
            keyed(self.key, "file", str(found.path)),
            self.roots[found.folder],
            keyed(self.key, "stamp", f"{found.size} {found.changed}"),
        )

    def _store(self, units: Iterable["_Unit"], number: int, *, ahead: int = AHEAD) -> None:
        """Read units in other processes, and store what they hold, some in each transaction."""
        told: deque[_Unit] = deque()

        def tasks() -> Iterator[Task]:
            for unit in units:
                told.append(unit)
                yield unit.task

        recipes = tuple(cache.recipe for cache in self.caches)
        results = run_in_workers(
            partial(read, Work(self.key, self.plan.reading, recipes)),
            tasks(),
            workers=self.plan.workers,
            seconds=self.plan.seconds,
            ahead=ahead,
            preload=[read.__module__],
        )
        done = -1
        with closing(results):
            while done:
                with self.catalogue.transaction():
                    done = 0
                    for done, (_, entries) in enumerate(islice(results, _BATCH), 1):  # noqa: B007
                        self._take(told.popleft(), entries, number)
                        self.progress(self.counts)
                    for cache in self.caches:
                        cache.sync()
                self._clean()

    def _take(self, unit: "_Unit", entries: Iterator[Entry | Reason | Failure], number: int) -> None:
        """Store one unit's pictures, or the reason why it has none."""
        database = self.catalogue.database
        database.execute("SAVEPOINT unit")
        kept = self.catalogue.contents(unit.key) if unit.same else []
        slots = self.catalogue.slots(unit.key) if unit.same else []
        caches = [cache for cache in self.caches if not slots or cache.missing(self.catalogue, unit.key)]
        if unit.known and not slots:
            self.catalogue.forget(unit.key)
        reason: Reason | None = None
        contents = []
        for entry in entries:
            if isinstance(entry, Failure):
                reason = Reason.TOO_SLOW if entry.kind == TOO_SLOW else Reason.CRASHED
            elif isinstance(entry, Reason):
                reason = entry
            elif reason is None:
                contents.append(entry.content)
                slot = slots[len(contents) - 1] if len(contents) <= len(slots) else self.catalogue.add(unit.key, entry)
                for cache, pixels in zip(self.caches, entry.pixels, strict=True):
                    if cache in caches:
                        cache.write(self.catalogue, slot, pixels)
        if reason is None and slots and contents != kept:
            reason = Reason.DAMAGED  # the same size and time of change, and other pixels
        if reason is not None:
            database.execute("ROLLBACK TO unit")
            self.catalogue.forget(unit.key)
        database.execute("RELEASE unit")
        for member in unit.members:
            now = Known(member.stamp, unit.key, reason and reason.name, unit.tries + 1)
            self.catalogue.remember(member.file, member.root, now, number)
        if reason is None:
            self.counts.read += len(unit.members)
        else:
            self._refuse(unit, reason)

    def _refuse(self, unit: "_Unit", reason: Reason) -> None:
        self.counts.refused += len(unit.members)
        for path in unit.task.paths:
            self.refused(path, reason)
            if len(self.counts.refusals) < _REMEMBERED:
                self.counts.refusals.append((path, reason))

    def _units(self, number: int) -> None:
        """Volumes: find out which series every new file belongs to, then read the series that have changed."""
        members: dict[bytes, list[tuple[Found, _Member]]] = defaultdict(list)
        fresh: set[bytes] = set()
        tried: set[bytes] = set()
        unknown: dict[Task, tuple[Found, _Member]] = {}
        with self.catalogue.transaction():
            for found in self._found():
                member = self._member(found)
                known = self.catalogue.known(member.file)
                if known is not None and known.stamp == member.stamp:
                    members[known.unit].append((found, member))
                    self.catalogue.seen(member.file, member.root, number)
                    if self._wanted(known):
                        fresh.add(known.unit)
                        tried.add(known.unit)
                else:
                    unknown[Task((found.path,), found.name)] = (found, member)
        looks = run_in_workers(
            partial(survey, Work(self.key, self.plan.reading, ())),
            iter(unknown),
            workers=self.plan.workers,
            seconds=self.plan.seconds,
            preload=[survey.__module__],
        )
        for task, answers in looks:
            found, member = unknown[task]
            series = [answer for answer in answers if isinstance(answer, bytes)]
            unit = series[0] if series else member.file
            members[unit].append((found, member))
            fresh.add(unit)
        fresh |= self.catalogue.incomplete(self.roots.values(), number) & members.keys()
        for unit, those in members.items():
            if unit not in fresh:
                self.counts.unchanged += len(those)
        chosen = sorted((min(f.path for f, _ in those), unit) for unit, those in members.items() if unit in fresh)
        units = (self._series(unit, members[unit], tries=int(unit in tried)) for _, unit in chosen)
        self._store(units, number, ahead=1)

    def _series(self, unit: bytes, members: list[tuple[Found, "_Member"]], *, tries: int) -> "_Unit":
        paths = tuple(sorted(found.path for found, _ in members))
        task = Task(paths, members[0][0].name)
        return _Unit(unit, task, tuple(member for _, member in members), known=True, same=False, tries=tries)


@dataclass(frozen=True)
class _Member:
    """A file in keyed hashes."""

    file: bytes
    root: bytes
    stamp: bytes


@dataclass(frozen=True)
class _Unit:
    """What is read at once: a file, or a series.

    ``known`` where the catalogue may hold pictures of it; ``same`` where only a cache of them is missing; ``tries`` is
    how often it was read as it is.
    """

    key: bytes
    task: Task
    members: tuple[_Member, ...]
    known: bool
    same: bool
    tries: int


def _settings(plan: Plan, key: bytes) -> dict[str, str]:
    reading = plan.reading
    return {
        "key": keyed(key, "key", b"").hex(),
        "name": plan.name,
        "number": str(plan.number),
        "frames": reading.frames,
        "volumes": "yes" if reading.volumes else "no",
        "deidentified": "yes" if reading.require_deidentified else "no",
        "validation": repr(plan.split.validation),
        "test": repr(plan.split.test),
    }


def _check_settings(catalogue: Catalogue, settings: dict[str, str]) -> None:
    for name, wanted in settings.items():
        if (stored := catalogue.setting(name)) == wanted:
            continue
        if name == "key":
            raise DataError("site.key is not the key that this site was made with: restore it from its backup")
        raise DataError(
            f"this site was made with {name} = {stored}, not {wanted}, and that never changes: leave the option as it "
            "was, or make another site folder"
        )
