"""The sentence that every report prints."""

from math import inf

import pytest

from common.privacy.statement import guarantee, rounded_up
from common.study import Study

PRIVATE = {
    "privacy.mechanism": "episode-clip",
    "privacy.clip": 1.0,
    "privacy.noise": 8.0,
    "privacy.sampling": 1.0,
    "privacy.delta": 1e-5,
    "privacy.figures": "withheld",
    "study.rounds": 100,
}


def test_each_kind_of_study_says_what_it_promises() -> None:
    assert guarantee(Study()) == "no formal guarantee (privacy.mechanism = 'none')"
    assert guarantee(Study.from_run_config(PRIVATE)) == (
        "epsilon 5.68 at delta 1e-05 for every patient of a site over 100 rounds "
        "(episode-clip, patients added or removed)"
    )
    research = Study.from_run_config(PRIVATE | {"privacy.research": True})
    assert guarantee(research).startswith("no formal guarantee (privacy.research")
    assert not research.privacy.guaranteed


@pytest.mark.parametrize(("cost", "text"), [(2.001, "2.01"), (0.0, "0.00"), (5.68, "5.68"), (inf, "infinite")])
def test_an_epsilon_is_rounded_up(cost: float, text: str) -> None:
    assert rounded_up(cost) == text
