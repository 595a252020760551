"""What a site has and can offer, as numbers: no name, no date, no path is in them."""

from typing import Any

from client.data.catalogue import Catalogue
from client.data.labels import label_report
from client.data.picture import Reason
from client.data.store import SPLITS

__all__ = ["ADVICE", "contents", "offer", "statement"]

#: What to do about a picture that is set aside, by the reason (`client.data.catalogue.ASIDE`).
ADVICE = {
    "indexing has not ended": "run `wardround-site index` again: the last run was stopped",
    "no patient": "give the labels file a column `patient`, or map one to it",
    "conflicting labels": "make the labels of this picture, and of its copies, agree",
    "no label": "add it to the labels file, if it belongs to a study",
    "same picture twice": "nothing: one of the copies is used",
    "same picture of two patients": "find out whose it is",
}

#: Classes that a sentence names before it says how many more there are.
_NAMED = 8


def contents(catalogue: Catalogue) -> dict[str, Any]:
    """Return what is in a catalogue and what is not, as JSON takes it.

    Returns
    -------
    dict
        ``files`` read; ``refused`` files by reason; ``pictures`` that episodes can hold; those ``aside``, by reason;
        ``labels``, as in `client.data.labels.LabelReport`; ``identifying``, files by header attribute that names
        somebody; ``notes``, files by what their header says about identity (`client.data.picture.Header`).
    """
    one = catalogue.database.execute
    rows = label_report(catalogue)
    return {
        "files": one("SELECT count(*) FROM file WHERE reason IS NULL").fetchone()[0],
        "refused": {
            Reason[name].value: n
            for name, n in catalogue.counts(
                "SELECT reason, count(*) FROM file WHERE reason IS NOT NULL GROUP BY reason ORDER BY 2 DESC, reason"
            ).items()
        },
        "pictures": one("SELECT count(*) FROM image WHERE aside IS NULL").fetchone()[0],
        "aside": catalogue.counts(
            "SELECT aside, count(*) AS n FROM image WHERE aside IS NOT NULL GROUP BY aside ORDER BY n DESC, aside"
        ),
        "labels": {"rows": rows.rows, "repeated": rows.repeated, "unmatched": rows.unmatched},
        "identifying": _words(catalogue, "exposed"),
        "notes": _words(catalogue, "notes"),
    }


def offer(catalogue: Catalogue) -> dict[str, Any]:
    """Return what episodes a site can give.

    Returns
    -------
    dict
        ``pictures`` that are ready; ``patients`` by split; ``leaks``, as `client.data.index.Counts` has them;
        ``classes``: for each label its pictures, its patients in every split, and ``largest_shots``, the largest K for
        which an episode of training patients has K support patients, as `client.data.episodes.draw` deals them out: at
        most half of a class supports; ``shots_by_ways``: the largest K for episodes of 2, 3, ... classes, as far as it
        is at least 1; ``modalities`` and ``scanners``: pictures by each.
    """
    classes: dict[str, dict[str, Any]] = {}
    usable = "FROM image WHERE aside IS NULL GROUP BY"
    query = f"SELECT label, split, count(*), count(DISTINCT patient) {usable} label, split ORDER BY label, split"
    for label, split, pictures, patients in catalogue.database.execute(query):
        about = classes.setdefault(label, {"pictures": 0, "patients": dict.fromkeys(SPLITS, 0)})
        about["pictures"] += pictures
        about["patients"][split] = patients
    for about in classes.values():
        about["largest_shots"] = about["patients"]["train"] // 2
    shots = sorted((about["largest_shots"] for about in classes.values()), reverse=True)
    return {
        "pictures": sum(about["pictures"] for about in classes.values()),
        "patients": dict.fromkeys(SPLITS, 0)
        | catalogue.counts(f"SELECT split, count(DISTINCT patient) {usable} split"),
        "leaks": int(catalogue.setting("leaks") or 0),
        "classes": classes,
        "shots_by_ways": {str(ways): k for ways, k in enumerate(shots, 1) if ways > 1 and k > 0},
        "modalities": catalogue.counts(f"SELECT modality, count(*) {usable} 1 ORDER BY 2 DESC, 1"),
        "scanners": catalogue.counts(
            f"SELECT trim(manufacturer || ' ' || scanner), count(*) {usable} 1 ORDER BY 2 DESC, 1"
        ),
    }


def statement(figures: dict[str, Any]) -> list[str]:
    """Return in sentences what a site can offer, what it cannot, and what would help.

    Parameters
    ----------
    figures : dict
        As `offer` returns them.
    """
    classes, by_ways = figures["classes"], figures["shots_by_ways"]
    if not classes:
        return ["No picture is ready for episodes: `wardround-site index` says which were set aside, and why."]
    said = []
    if figures["leaks"]:
        said.append(
            f"The split leaks: {figures['leaks']} pictures or patients are on two sides of it, and no episode is drawn "
            "before that is put right; see `wardround-site index --help`."
        )
    if by_ways:
        ways, shots = list(by_ways.items())[-1]
        said.append(
            f"Training episodes can have up to {ways} ways. Shots, each of another patient: up to {by_ways['2']} with "
            + ("2 ways." if ways == "2" else f"2 ways, up to {shots} with {ways} ways.")
        )
    else:
        said.append(
            "No training episode can be drawn: that takes two classes with two training patients each. "
            "Add labelled patients."
        )
    few = {name: about["patients"]["train"] for name, about in classes.items() if not about["largest_shots"]}
    if few:
        named = [f"{name} ({count})" for name, count in few.items()]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        said.append(f"Fewer than two training patients, so in no training episode: {', '.join(named[:_NAMED])}{more}.")
    tested = sum(about["patients"]["test"] > 1 for about in classes.values())
    if tested < 2:
        said.append(
            "A model cannot be tested here on patients that never trained: that takes two classes with two test "
            f"patients each, and there {'is one' if tested else 'are none'}."
        )
    return said


def _words(catalogue: Catalogue, column: str) -> dict[str, int]:
    """Count a column of comma-separated words, once for each file."""
    counts: dict[str, int] = {}
    query = f"SELECT {column}, count(DISTINCT unit) FROM image WHERE {column} <> '' GROUP BY {column}"
    for words, number in catalogue.database.execute(query):
        for word in words.split(","):
            counts[word] = counts.get(word, 0) + number
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
