"""The report and the model card: well-formed, safe, self-contained, and saying what the folder says."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.report import write_report
from tests.server.runs import sites_named, write_lines, write_run

HOSTILE = "</td><script>alert('x')</script><img src=x onerror=\"alert(1)\">|`*[a](http://x)\x1b[31m%s"
_VOID = {"meta", "br", "img"}


class Parsed(HTMLParser):
    """A page's elements and its text; checks that every element is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.words.append(data)


def read(folder: Path) -> tuple[Parsed, str]:
    out = write_report(folder)
    assert out == folder / "report.html"
    return Parsed(out.read_text(encoding="utf-8")), (folder / "model-card.md").read_text(encoding="utf-8")


def faults(number: int, site: str) -> str | None:
    kinds = {3: "no-reply", 5: "not-finite", 6: "norm", 8: "error", 9: "unsent"}
    return kinds.get(number % 11) if site.endswith("1") else None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("one round", {"rounds": 1}),
        ("no round", {"rounds": 0}),
        ("twenty", {"rounds": 20, "faults": faults, "episodes__test_every": 5}),
        ("best", {"rounds": 20, "episodes__test_every": 5, "outer__patience": 3}),
        ("many rounds", {"rounds": 1300, "faults": faults, "idle_share": 0.2}),
        ("many sites", {"rounds": 12, "sites": sites_named(200), "held_out": sites_named(200)[-2:], "faults": faults}),
        ("ten sites", {"rounds": 12, "sites": sites_named(10), "held_out": ["hospital-9"], "faults": faults}),
        ("nobody apart", {"rounds": 4, "held_out": ()}),
        ("withheld", {"rounds": 12, "privacy__figures": "withheld", "faults": faults}),
        ("failed", {"rounds": 12, "done": 5, "state": "failed", "faults": faults}),
        ("failed at once", {"rounds": 12, "done": 0, "state": "failed"}),
        ("stopped", {"rounds": 12, "done": 5, "state": "stopped"}),
        ("interrupted", {"rounds": 12, "done": 5, "state": "training", "pid": 2**22 - 3}),
        ("joining", {"rounds": 12, "done": 0, "state": "joining"}),
        (
            "fixed labels",
            {"rounds": 4, "episodes__labels": "fixed", "episodes__held_out": ""},
        ),
        ("all rejected but few", {"rounds": 6, "faults": lambda n, s: "norm" if s != "hospital-0" else None}),
    ],
)
def test_every_kind_of_run_gives_a_page_and_a_card(name: str, settings: dict[str, object], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "7", **settings)  # type: ignore[arg-type]
    page, card = read(folder)
    raw = (folder / "report.html").read_text()
    assert not re.search(r"\bnan\b|\binf\b|None\b", page.text + card.replace("None: no figures", ""))
    assert "nan" not in "".join(re.findall(r'd="([^"]*)"', raw))
    assert "No formal guarantee of privacy" in page.text
    assert "No formal guarantee of privacy" in card
    digest = json.loads((folder / "study.json").read_text())["digest"]
    assert digest in page.text
    assert digest in card
    assert len(raw) < 1_500_000
    again = (raw, card)
    read(folder)
    assert ((folder / "report.html").read_text(), (folder / "model-card.md").read_text()) == again  # the same bytes


def test_nothing_from_outside_is_markup(tmp_path: Path) -> None:
    def built(name: str) -> tuple[Parsed, str]:
        sites = [name, "hospital-1", "hospital-2", "hospital-3"]
        settings = {"faults": lambda n, s: "norm" if s == name and n == 4 else None, "episodes__test_every": 2}
        folder = write_run(
            tmp_path / ("plain" if name[0] == "A" else "hostile"),
            rounds=6,
            sites=sites,
            study__title=name[:200],
            **settings,  # type: ignore[arg-type]
        )
        for file, key in (("history.jsonl", "reason"), ("events.jsonl", "reason")):
            lines = [json.loads(line) for line in (folder / file).read_text().splitlines()]
            for line in lines:
                for out in [*line.get("out", []), line] if key in line else line.get("out", []):
                    out[key] = name
            write_lines(folder / file, lines)
        (folder / "failure.txt").write_text(name)
        status = json.loads((folder / "status.json").read_text())
        status["versions"] |= {"torch": name}
        (folder / "status.json").write_text(json.dumps(status))
        return read(folder)

    plain, _ = built("A" * len(HOSTILE))
    hostile, card = built(HOSTILE)
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(about) for _, about in hostile.elements] == [sorted(about) for _, about in plain.elements]
    shown = HOSTILE.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert hostile.text.count(shown) > 5
    assert "\x1b" not in card
    for line in card.splitlines():
        if line.startswith("|"):  # the name does not make columns
            assert len(re.findall(r"(?<!\\)\|", line)) in {4, 9}
    assert not re.search(r"(?<!\\)<(script|img|/td)|(?<!\\)\[a", card)


def test_the_page_needs_nothing_from_outside_and_runs_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "7", rounds=20, faults=faults, episodes__test_every=5)
    page, _ = read(folder)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "form", "a", "img", "use"}
    assert not [about for _, about in page.elements if {"src", "href", "onclick", "onload"} & set(about)]
    assert not re.search(r"https?:|url\(|@import|file:|javascript:", (folder / "report.html").read_text())
    (policy,) = (about["content"] for _, about in page.elements if about.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_what_the_sites_sent_stands_on_the_page_with_its_interval(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "7", rounds=6)
    page, card = read(folder)
    figures = json.loads((folder / "evaluations.jsonl").read_text())["sites"]
    for site, values in figures.items():
        for name, factor, digits in (("known.after", 100, 1), ("new.auroc", 1, 2), ("new.ece", 1, 2)):
            mean, half = factor * values[f"{name}.mean"], 1.96 * factor * values[f"{name}.error"]
            cell = f"{mean:.{digits}f} ± {half:.{digits}f}"
            assert cell in page.text
            assert re.search(rf"^\| {site}( \\\*)? \|.*{cell}", card, re.MULTILINE)
        gain = f"{100 * values['known.gain.mean']:+.1f} ± {196 * values['known.gain.error']:.1f}"
        assert gain in page.text


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (0.12, "so theta helps"),
        (0.001, "which cannot be told from no gain"),
        (-0.001, "which cannot be told from no gain"),
        (-0.12, "so theta is worse than none"),
    ],
)
def test_the_verdict_says_no_more_than_the_interval(gain: float, words: str, tmp_path: Path) -> None:
    page, card = read(write_run(tmp_path / "7", rounds=6, gain=gain))
    others = {"so theta helps", "which cannot be told from no gain", "so theta is worse than none"} - {words}
    for text in (page.text, card):
        assert words in text
        assert not any(other in text for other in others)


def test_the_verdict_judges_by_sites_that_never_trained(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", rounds=6)
    page, _ = read(folder)
    figures = json.loads((folder / "evaluations.jsonl").read_text())["sites"]["hospital-3"]
    assert f"At hospital-3, which never trained, theta adapted to 5 labelled scans of each of 5 classes is right in " \
        f"{100 * figures['known.after.mean']:.1f} %" in page.text.replace("\xa0", " ")  # fmt: skip
    page, _ = read(write_run(tmp_path / "b", rounds=6, held_out=()))
    assert "none was kept apart" in page.text
    assert "On average over the 4 sites that trained" in page.text


def test_how_a_run_ended_is_said(tmp_path: Path) -> None:
    said = {
        "failed": "The run failed after 3 of 9 rounds and has no result: quorum missed hospital-1: no reply. 3 sites",
        "stopped": "The run was stopped after 3 of 9 rounds and has no result; 'wardround-study resume stopped'",
        "training": "The run had not ended when this was written: it stood after 3 of 9 rounds.",
    }
    for state, words in said.items():
        failure = "quorum missed\n  hospital-1: no reply."
        page, _ = read(write_run(tmp_path / state, rounds=9, done=3, state=state, failure=failure))
        assert words in " ".join(page.text.split())
    folder = write_run(tmp_path / "early", rounds=40, done=20, episodes__test_every=5, outer__patience=2)
    write_lines(folder / "events.jsonl", [{"at": 1.8e9, "event": "stopped-early", "round": 20}], "ab")
    page, _ = read(folder)
    assert "The run ended early, after 20 of 40 rounds, as 2 evaluations in a row found no better theta" in page.text
    assert "the best one, of round 20" in page.text


def test_withheld_figures_are_said_and_nothing_is_drawn_of_them(tmp_path: Path) -> None:
    page, card = read(write_run(tmp_path / "7", rounds=9, privacy__figures="withheld"))
    assert "The study withholds figures" in page.text
    assert "How it learned" not in page.text
    assert "What theta is worth" not in page.text
    assert "no figure" in card


@pytest.mark.parametrize("research", [False, True])
def test_a_private_study_says_what_it_guarantees(tmp_path: Path, research: bool) -> None:
    plan = {"mechanism": "episode-clip", "clip": 1.0, "noise": 8.0, "sampling": 1.0, "delta": 1e-5}
    changes: dict[str, Any] = {f"privacy__{key}": value for key, value in plan.items()}
    changes |= {"privacy__figures": "withheld", "privacy__research": research}
    page, card = read(write_run(tmp_path / "7", rounds=9, **changes))
    for text in (page.text, card):
        assert ("epsilon 1.45 at delta 1e-05" in text) != research
        assert ("no formal guarantee of privacy" in text.lower()) == research


def test_failures_stand_with_their_reason(tmp_path: Path) -> None:
    page, _ = read(write_run(tmp_path / "7", rounds=22, faults=faults, sites__rest_after=100))
    assert re.search(r"hospital-1 2 2 2 2 2 10\b", page.text)
    assert "not-finite: the meta-gradient held NaN or infinity" in page.text
    assert "10 of 66" in page.text


def test_the_study_file_on_the_page_is_the_study(tmp_path: Path) -> None:
    from common.study import Study

    folder = write_run(tmp_path / "7", rounds=9, study__title='A "quoted" <title>')
    raw = write_report(folder).read_text()
    (printed,) = re.findall(r'<pre class="study">(.*?)</pre>', raw, re.DOTALL)
    text = "".join(Parsed(printed).words)
    assert Study.from_toml(text).digest == json.loads((folder / "study.json").read_text())["digest"]
    assert "<b>rounds = 9</b>" in printed
    assert "<b>quorum" not in printed


def test_a_folder_of_before_there_was_a_status_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "7", rounds=4)
    for name in ("status.json", "evaluations.jsonl", "events.jsonl"):
        (folder / name).unlink()
    page, _ = read(folder)
    assert "The run finished all 4 rounds" in page.text
    assert "hospital-3 *" in page.text


@pytest.mark.parametrize(("state", "words"), [("finished", "finished all 4 rounds"), ("failed", "failed after 4 of 4")])
def test_a_report_that_the_run_itself_writes_says_how_it_ended(state: str, words: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "7", rounds=4, state=state)
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "state": "reporting"}))
    page, _ = read(folder)
    assert f"The run {words}" in page.text


def test_the_command_writes_both_and_says_where(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "7", rounds=2)
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0
    assert result.output == f"wrote {folder / 'report.html'} and {folder / 'model-card.md'}\n"
    assert (folder / "report.html").exists()
    assert CliRunner().invoke(app, ["report", "nothing"]).exit_code == 2


@pytest.mark.slow
def test_ten_thousand_rounds_of_many_sites_are_one_readable_page(tmp_path: Path) -> None:
    sites = sites_named(40)
    folder = write_run(tmp_path / "7", rounds=10_000, sites=sites, held_out=sites[-2:], faults=faults)
    began = time.monotonic()
    page, _ = read(folder)
    assert time.monotonic() - began < 30
    assert (folder / "report.html").stat().st_size < 1_000_000
    assert "10,000" in page.text
