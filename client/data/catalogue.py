"""The site's catalogue: which pictures there are, in SQLite, with nobody's name in it.

Files, patients, studies, series and accession numbers are keyed hashes. What stands in clear is the label, the split,
and the header values of `client.data.picture.Header`.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.data.keys import keyed
from client.data.picture import IDENTIFIERS
from client.data.worker import Entry
from common.errors import DataError, NotPreparedError

__all__ = ["ASIDE", "Catalogue", "Known", "Split", "open_catalogue", "split_of"]

_VERSION = "3"

# A row of `image` owns the slot of that number in every pixel cache. Slots are never given to another picture. A row of
# `cached` without a checksum: the picture has not the recipe's number of dimensions. `wipe` holds the slots of removed
# pictures until their pixels are overwritten, which comes after the removal: a kill between the two changes no picture.
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE file (
    key BLOB PRIMARY KEY,
    root BLOB NOT NULL,
    stamp BLOB NOT NULL,
    unit BLOB NOT NULL,
    reason TEXT,
    tries INTEGER NOT NULL,
    seen INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX file_of_unit ON file (unit);
CREATE TABLE image (
    slot INTEGER PRIMARY KEY AUTOINCREMENT,
    unit BLOB NOT NULL,
    frame INTEGER NOT NULL,
    own_patient BLOB, study BLOB, series BLOB, instance BLOB, accession BLOB, path BLOB,
    content BLOB NOT NULL,
    own_label TEXT,
    patient BLOB,
    label TEXT,
    split TEXT CHECK (split IN ('train', 'validation', 'test')),
    aside TEXT DEFAULT 'indexing has not ended',
    modality TEXT NOT NULL, manufacturer TEXT NOT NULL, scanner TEXT NOT NULL, body_part TEXT NOT NULL,
    exposed TEXT NOT NULL, notes TEXT NOT NULL,
    UNIQUE (unit, frame)
) STRICT;
CREATE TABLE label (
    kind TEXT NOT NULL, value BLOB NOT NULL, label TEXT NOT NULL, patient BLOB, repeats INTEGER NOT NULL DEFAULT 0,
    UNIQUE (kind, value, label)
) STRICT;
CREATE TABLE cached (
    slot INTEGER NOT NULL, recipe TEXT NOT NULL, checksum INTEGER, PRIMARY KEY (slot, recipe)
) STRICT, WITHOUT ROWID;
CREATE TABLE wipe (slot INTEGER PRIMARY KEY) STRICT;
"""

#: Columns of `image` by what a label can be joined on.
COLUMNS = dict(zip(IDENTIFIERS, ("own_patient", "study", "series", "instance", "accession", "path"), strict=True))

#: Why a picture that was read is in no episode, in the order in which it is decided.
ASIDE = (
    "indexing has not ended",
    "no patient",
    "conflicting labels",
    "no label",
    "same picture twice",
    "same picture of two patients",
)


@dataclass(frozen=True)
class Split:
    """Shares of patients in the validation and in the test split, fixed when a site is made; the rest trains."""

    validation: float = 0.1
    test: float = 0.2


@dataclass(frozen=True)
class Known:
    """What the catalogue knows of a file: the same stamp means that it has not changed.

    ``tries`` is how often it was read as it is.
    """

    stamp: bytes
    unit: bytes
    reason: str | None
    tries: int


def split_of(key: bytes, patient: bytes, split: Split) -> str:
    """Return a patient's split, which nothing that is added later can change."""
    share = int.from_bytes(keyed(key, "split", patient)[:8], "big") / 2**64
    if share < split.test:
        return "test"
    return "validation" if share < split.test + split.validation else "train"


@contextmanager
def open_catalogue(path: Path, *, new: Mapping[str, str] | None = None) -> Iterator["Catalogue"]:
    """Open a catalogue.

    Parameters
    ----------
    path : Path
        The SQLite file.
    new : mapping, optional
        Open for writing; where there is none yet, make one with these settings. Without it, read only.

    Raises
    ------
    NotPreparedError
        There is no catalogue, and none is to be made.
    DataError
        The file is damaged or of another version.
    """
    if new is None and not path.exists():
        raise NotPreparedError(
            "this site has no catalogue: run `wardround-site index` first, or in simulation "
            "`wardround-lab prepare STUDY`"
        )
    try:
        with closing(
            sqlite3.connect(
                # Not `ro`: what a killed run has left half done is undone by whoever opens the catalogue next.
                f"{path.absolute().as_uri()}?mode={'rwc' if new is not None else 'rw'}",
                uri=True,
                timeout=60,
                isolation_level=None,
            )
        ) as database:
            catalogue = Catalogue(database)
            if new is None:
                database.execute("PRAGMA query_only = ON")
            else:
                database.execute("PRAGMA secure_delete = ON")  # what is removed leaves no bytes behind
                if not database.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                    with catalogue.transaction():
                        for statement in _SCHEMA.strip().removesuffix(";").split(";\n"):
                            database.execute(statement)
                        settings = {"version": _VERSION, "run": "0", **new}
                        database.executemany("INSERT INTO meta VALUES (?, ?)", settings.items())
            if (version := catalogue.setting("version")) != _VERSION:
                raise DataError(
                    f"the catalogue has version {version}, this program reads {_VERSION}: index again into "
                    "a new site folder"
                )
            yield catalogue
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise DataError("another program is writing to this site's catalogue: wait until it has ended") from None
        raise DataError("the catalogue cannot be written: is there space, and are its permissions right?") from None
    except sqlite3.DatabaseError:
        raise DataError(
            "the catalogue is damaged: restore it from a backup, or index again into a new folder"
        ) from None


class Catalogue:
    """Statements on an open catalogue. Memory does not grow with the number of pictures."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make everything inside happen, or nothing."""
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self.database.in_transaction:  # SQLite itself ends it where the disk is full
                self.database.execute("ROLLBACK")
            raise
        self.database.execute("COMMIT")

    def setting(self, key: str) -> str:
        """Return one of the settings that were fixed when the catalogue was made."""
        row = self.database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else ""

    def note(self, key: str, value: str) -> None:
        """Store what is settled anew in every run."""
        self.database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def begin_run(self) -> int:
        """Return the number of this indexing run, one more than the last."""
        self.database.execute("UPDATE meta SET value = value + 1 WHERE key = 'run'")
        return int(self.setting("run"))

    def known(self, file: bytes) -> Known | None:
        """Return what is known of a file."""
        row = self.database.execute("SELECT stamp, unit, reason, tries FROM file WHERE key = ?", (file,)).fetchone()
        return Known(*row) if row else None

    def remember(self, file: bytes, root: bytes, known: Known, run: int) -> None:
        """Note a file: what it was when it was read, and why it was not, if so."""
        self.database.execute(
            "INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?, ?)",
            (file, root, known.stamp, known.unit, known.reason, known.tries, run),
        )

    def seen(self, file: bytes, root: bytes, run: int) -> None:
        """Note that a file is still there."""
        self.database.execute("UPDATE file SET seen = ?, root = ? WHERE key = ?", (run, root, file))

    def slots(self, unit: bytes) -> list[int]:
        """Return the slots of a file's or series' pictures, in the order of its frames."""
        rows = self.database.execute("SELECT slot FROM image WHERE unit = ? ORDER BY frame", (unit,))
        return [slot for (slot,) in rows]

    def contents(self, unit: bytes) -> list[bytes]:
        """Return the content of a file's or series' pictures, in the order of its frames."""
        rows = self.database.execute("SELECT content FROM image WHERE unit = ? ORDER BY frame", (unit,))
        return [content for (content,) in rows]

    def add(self, unit: bytes, entry: Entry) -> int:
        """Store a picture and return its slot."""
        identifiers = [entry.identifiers.get(kind) for kind in IDENTIFIERS]
        header = entry.header
        cursor = self.database.execute(
            "INSERT INTO image (unit, frame, own_patient, study, series, instance, accession, path, content, "
            "own_label, modality, manufacturer, scanner, body_part, exposed, notes) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                unit, entry.frame, *identifiers, entry.content, entry.label, header.modality, header.manufacturer,
                header.scanner, header.body_part, ",".join(header.exposed), ",".join(header.notes),
            ),
        )  # fmt: skip
        return int(cursor.lastrowid or 0)

    def last_slot(self) -> int:
        """Return the last slot that was ever given to a picture; 0 if none was."""
        row = self.database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'image'").fetchone()
        return int(row[0]) if row else 0

    def forget(self, unit: bytes) -> None:
        """Remove the pictures of a file or series; their slots are to be wiped."""
        self._forget("unit = ?", unit)

    def forget_orphans(self) -> None:
        """Remove the pictures none of whose files is there any more; their slots are to be wiped."""
        self._forget("NOT EXISTS (SELECT 1 FROM file WHERE file.unit = image.unit)")

    def _forget(self, condition: str, *values: bytes) -> None:
        if self.database.execute(f"INSERT INTO wipe SELECT slot FROM image WHERE {condition}", values).rowcount:
            self.database.execute("DELETE FROM cached WHERE slot IN (SELECT slot FROM wipe)")
            self.database.execute("DELETE FROM image WHERE slot IN (SELECT slot FROM wipe)")

    def to_wipe(self) -> list[int]:
        """Return some of the slots that are to be wiped."""
        return [slot for (slot,) in self.database.execute("SELECT slot FROM wipe ORDER BY slot LIMIT 1000")]

    def wiped(self, slots: Iterable[int]) -> None:
        """Note that slots were wiped."""
        self.database.executemany("DELETE FROM wipe WHERE slot = ?", ((slot,) for slot in slots))

    def incomplete(self, roots: Iterable[bytes], run: int) -> set[bytes]:
        """Return the units that had a file under these folders that is there no more."""
        query = "SELECT DISTINCT unit FROM file WHERE root = ? AND seen < ?"
        return {unit for root in roots for (unit,) in self.database.execute(query, (root, run))}

    def drop_files(self, roots: Iterable[bytes], run: int) -> int:
        """Remove the files that were under these folders and are there no more, and return how many they were."""
        query = "DELETE FROM file WHERE root = ? AND seen < ?"
        return sum(self.database.execute(query, (root, run)).rowcount for root in roots)

    def settle(self, key: bytes) -> None:
        """Join labels, split patients, and set aside what no episode may hold.

        Picture by picture, through indices: it takes no memory.
        """
        split = Split(float(self.setting("validation")), float(self.setting("test")))
        self.database.create_function(
            "split_of", 1, lambda who: None if who is None else split_of(key, who, split), deterministic=True
        )
        kinds = [kind for (kind,) in self.database.execute("SELECT DISTINCT kind FROM label ORDER BY kind")]
        # Made when a site's first pictures are all there, which is several times faster than with every picture.
        for column in ["content", *(COLUMNS[kind] for kind in kinds)]:
            self.database.execute(f"CREATE INDEX IF NOT EXISTS image_of_{column} ON image ({column})")
        joins = " UNION ALL ".join(
            f"SELECT label, patient FROM label WHERE kind = '{kind}' AND value = image.{COLUMNS[kind]}"
            for kind in kinds
        )
        joined = f"({joins or 'SELECT NULL AS label, NULL AS patient WHERE FALSE'})"
        # Equal pictures stay one patient.
        lone = ", content" if self.setting("each_a_patient") == "yes" else ""
        labels = f"(SELECT label FROM {joined} UNION ALL SELECT own_label WHERE own_label IS NOT NULL)"
        self.database.execute(
            "UPDATE image SET aside = NULL, "
            "patient = coalesce(own_patient, (SELECT CASE count(DISTINCT patient) WHEN 1 "
            f"THEN nullif(min(patient), x'') END FROM {joined}){lone}), "
            f"label = (SELECT CASE count(DISTINCT label) WHEN 1 THEN min(label) WHEN 0 THEN NULL ELSE '' END "
            f"FROM {labels})"
        )
        self.database.execute("UPDATE image SET split = split_of(patient)")
        # Counted once for each content that comes twice, however often it does.
        self.database.execute("DROP TABLE IF EXISTS temp.twin")
        self.database.execute(
            "CREATE TEMP TABLE twin AS SELECT content, count(DISTINCT patient) AS patients, "
            "count(DISTINCT label) AS labels, NULL AS first FROM image GROUP BY content HAVING count(*) > 1"
        )
        self.database.execute("CREATE UNIQUE INDEX temp.twin_content ON twin (content)")
        twin = "EXISTS (SELECT 1 FROM twin WHERE twin.content = image.content AND {})"

        def set_aside(why: str, condition: str) -> None:
            self.database.execute(f"UPDATE image SET aside = ? WHERE aside IS NULL AND ({condition})", (why,))

        set_aside("no patient", "patient IS NULL")
        # An empty label stands for several; equal pictures with several labels are the same case.
        set_aside("conflicting labels", f"label = '' OR {twin.format('labels > 1')}")
        set_aside("no label", "label IS NULL")
        # Of those that could be in an episode, the first stays.
        self.database.execute(
            "UPDATE twin SET first = (SELECT min(slot) FROM image WHERE image.content = twin.content AND aside IS NULL)"
        )
        set_aside("same picture twice", twin.format("patients = 1 AND first < image.slot"))
        if self.setting("leave_out_shared") == "yes":
            set_aside("same picture of two patients", twin.format("patients > 1"))

    def leaks(self, key: bytes) -> int:
        """Return how many pictures could be in an episode and are, or their patient is, on two sides of the split.

        The second looks at what is stored, and so would find a change of the program too.
        """
        split = Split(float(self.setting("validation")), float(self.setting("test")))
        usable = "SELECT {0} FROM image WHERE aside IS NULL GROUP BY {0} HAVING count(DISTINCT split) > 1"
        leaks = 0
        for what in ("content", "patient"):
            leaks += self.database.execute(f"SELECT count(*) FROM ({usable.format(what)})").fetchone()[0]
        for patient, stored in self.database.execute("SELECT DISTINCT patient, split FROM image WHERE aside IS NULL"):
            leaks += split_of(key, patient, split) != stored
        return leaks

    def counts(self, query: str, *values: object) -> dict[str, int]:
        """Return the rows of a query for a name and a number."""
        return {str(name): int(number) for name, number in self.database.execute(query, values)}
