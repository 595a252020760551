"""What the documents for IT departments name is there: files, tests, links and commands."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from client.cli import app as site_app
from server.cli import app as study_app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "docs" / name for name in ("deploy.md", "threat-model.md", "compliance.md")]
#: What a version without the gateway lacks.
GATEWAY = {"gateway", "pause", "resume", "approvals", "approve", "reject", "diff"}

document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)


def commands(app: typer.Typer) -> set[str]:
    group: Any = typer.main.get_command(app)
    return set(group.commands)


@document
def test_files_that_are_named_are_there(document: Path) -> None:
    names = re.findall(r"`((?:client|common|server|deploy|tests|docs|requirements)/[\w./-]+)`", document.read_text())
    assert names or document.stem == "compliance"
    assert [name for name in names if not (ROOT / name).exists()] == []


@document
def test_links_lead_somewhere(document: Path) -> None:
    for name, anchor in re.findall(r"\]\(([\w.-]+\.md)(?:#([\w-]+))?\)", document.read_text()):
        text = (document.parent / name).read_text()
        titles = {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
        }
        assert not anchor or anchor in titles, f"{name}#{anchor}"


@document
def test_sections_that_are_named_are_there(document: Path) -> None:
    for name, title in re.findall(r"\[[\w.-]+\]\(([\w.-]+\.md)\), \"([^\"]+)\"", document.read_text()):
        text = (document.parent / name).read_text()
        assert f"# {title}\n" in text or title in text, f"{name}: {title}"


@document
def test_commands_that_are_named_are_there(document: Path) -> None:
    known = {"site": commands(site_app), "study": commands(study_app)}
    named = set(re.findall(r"(?<!-n )wardround-(site|study) ([a-z]+)", document.read_text()))
    missing = {word for program, word in named if word not in known[program]}
    assert missing <= (set() if "gateway" in known["site"] else GATEWAY)
