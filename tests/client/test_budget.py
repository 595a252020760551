"""`wardround-site budget`, and the client's own refusal when it is used up."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from client.cli import app
from client.data.store import Site
from client.ledger import open_ledger
from common.contract import check_reply
from common.errors import BudgetError, ContractError
from common.privacy.accounting import Rounds, epsilon
from common.study import Study
from tests.client.hospitals import ask, instruct, prepared, tiny_study

PRIVATE: dict[str, bool | int | float | str] = {
    "study.rounds": 50,
    "privacy.mechanism": "episode-clip",
    "privacy.clip": 0.5,
    "privacy.noise": 2.0,
    "privacy.sampling": 1.0,
    "privacy.delta": 1e-5,
    "privacy.figures": "withheld",
}


@pytest.fixture
def site() -> Iterator[Site]:
    """A prepared hospital whose ledger is empty."""
    (site, *_) = prepared(tiny_study(PRIVATE))
    (site.folder / "ledger.sqlite").unlink(missing_ok=True)
    yield site
    (site.folder / "ledger.sqlite").unlink(missing_ok=True)
    (site.folder / "incidents.log").unlink(missing_ok=True)


def answer(study: Study, number: int, attempt: int = 1) -> bytes | int:
    """Return the bytes of the first hospital's answer, or the code of its refusal."""
    instruction, theta = instruct(study, "train", number=number)
    assert theta is not None
    asked = replace(instruction, attempt=attempt)
    reply = ask(study, 0, asked, theta)
    if reply.has_error():
        return reply.error.code
    vector = check_reply(reply.content, asked, size=theta.size, dtype="float32").vector
    assert vector is not None
    return vector.tobytes()


def budget(site: Site, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["budget", "--site", str(site.folder), *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_round_that_is_tried_again_gets_the_same_bytes(site: Site) -> None:
    study = tiny_study(PRIVATE)
    first = answer(study, 1)
    assert answer(study, 1, attempt=2) == first
    assert answer(study, 2) != first
    with open_ledger(site.folder) as ledger:
        assert [part.rounds for part in ledger.spent()] == [Rounds(1.0, 2.0, 2)]


def test_the_budget_ends_a_site_before_data_are_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tiny_study(PRIVATE), tiny_study({**PRIVATE, "study.seed": 5})
    limit = epsilon([Rounds(1.0, 2.0, 2)], 1e-5) + 0.01
    assert f"epsilon {limit:g}" in budget(site, "--epsilon", str(limit))
    first = answer(one, 1)
    assert isinstance(first, bytes)
    assert isinstance(answer(other, 1), bytes)
    assert json.loads(budget(site, "--json"))["spent"] == pytest.approx(limit - 0.01)

    def touched(*_: object) -> np.ndarray:
        raise AssertionError("data were read")

    monkeypatch.setattr(Site, "pixels", touched)
    assert answer(one, 2) == answer(other, 2) == BudgetError.code
    assert answer(tiny_study(), 1) == BudgetError.code  # no guarantee at all
    assert answer(one, 1) == first
    assert "data were read" not in (site.folder / "incidents.log").read_text()


def test_the_same_round_at_another_theta_is_refused(site: Site) -> None:
    study = tiny_study(PRIVATE)
    assert isinstance(answer(study, 1), bytes)
    instruction, theta = instruct(study, "train", number=1)
    assert theta is not None
    from tests.client.test_app import _digest

    moved = np.nextafter(theta, np.float32(1))
    reply = ask(study, 0, replace(instruction, theta=_digest(study, moved)), moved)
    assert reply.error.code == ContractError.code


def test_what_was_spent_is_shown(site: Site) -> None:
    study = tiny_study(PRIVATE)
    answer(study, 1)
    answer(tiny_study(), 1)
    text = budget(site)
    assert "budget    none: nothing is refused" in text
    cost = epsilon([Rounds(1.0, 2.0, 1)], 1e-5)
    assert f"epsilon {cost:.1f}"[:9] in text
    assert f"study {study.digest[:12]}: 1 rounds, noise 2, sampling rate 1" in text
    assert f"study {tiny_study().digest[:12]}: no formal guarantee" in text
    assert "epsilon 3 at delta 1e-06, per patient" in budget(site, "--epsilon", "3", "--delta", "1e-6")
    assert "none: nothing is refused" in budget(site, "--epsilon", "inf")


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["budget", "--site", str(tmp_path / "no")])
    assert result.exit_code == 1
    assert not (tmp_path / "no").exists()
