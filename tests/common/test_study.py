"""The study: what is read is what is meant, whatever is wrong is named, and the digest sees every value."""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StudyError
from common.study import ALGORITHMS, RUN_KEYS, Study, names

ROOT = Path(__file__).parents[2]
DEFAULT = Study()
CONFIG = DEFAULT.run_config()

#: The keys that pixels and splits of virtual sites depend on.
DATA_KEYS = {key for key in CONFIG if key.startswith("data.")} | {
    "model.channels",
    "model.image-size",
    "model.dimensions",
    "model.window",
    "episodes.classes",
    "episodes.held-out",
}


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return {f"{group}.{key}": value for group, values in tree.items() for key, value in values.items()}


def test_the_defaults_are_what_flower_runs_by_default() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    config = pyproject["tool"]["flwr"]["app"]["config"]
    assert {key: config.pop(key) for key in RUN_KEYS} == dict.fromkeys(RUN_KEYS, "")
    assert _flat(config) == CONFIG
    assert Study.from_run_config(config) == DEFAULT
    assert Study.from_run_config({**config, "resume": "12", "track": "tensorboard"}) == DEFAULT  # of a run, not a study


def _other_values(value: bool | int | float | str) -> list[Any]:
    """Return values of the same type, one of which most fields allow."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, 2, 3]
    if isinstance(value, float):
        return [value / 2, 0.25]
    return ["other", "ward=2", "2031-05-06", '{"dropout": 0.1}', *_literals(value)]


def _literals(value: str) -> list[str]:
    """Return the alternatives of every choice that has this value in it."""
    found: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if value in node.get("enum", []):
                found.extend(choice for choice in node["enum"] if choice != value)
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(Study.model_json_schema())
    return found


#: What else has to change with a key: a rule's own numbers go with the rule.
_CLIPPING = {"aggregation.rule": "centred-clipping", "aggregation.tolerated": 1, "aggregation.radius": 1.0}
_PRIVATE = {
    "privacy.mechanism": "episode-clip",
    "privacy.clip": 1.0,
    "privacy.noise": 1.1,
    "privacy.sampling": 0.05,
    "privacy.delta": 1e-5,
    "privacy.figures": "withheld",
}
_BY_PATIENT: dict[str, Any] = {
    **_PRIVATE,
    "privacy.mechanism": "patient-clip",
    "algorithm.name": "maml",
    "model.norm": "group",
    "episodes.labels": "fixed",
    "episodes.held-out": "",
}
TOGETHER: dict[str, dict[str, Any]] = {
    "episodes.labels": {"episodes.held-out": ""},
    "sites.per-round": {"sites.quorum": 1},
    "outer.patience": {"episodes.test-every": 10},
    "privacy.mechanism": {**_PRIVATE, "privacy.research": True},
    "privacy.research": _PRIVATE,
    "privacy.clip": _PRIVATE,
    "privacy.noise": _PRIVATE,
    "privacy.sampling": _PRIVATE,
    "privacy.delta": _PRIVATE,
    "aggregation.rule": {"aggregation.tolerated": 1},
    "aggregation.tolerated": {"aggregation.rule": "median"},
    "aggregation.selected": {"aggregation.rule": "multi-krum", "aggregation.tolerated": 1},
    "aggregation.radius": _CLIPPING,
    "aggregation.iterations": _CLIPPING,
    "aggregation.momentum": _CLIPPING,
}


def _changed(key: str) -> Study | None:
    for value in _other_values(CONFIG[key]):
        extra = TOGETHER.get(key, {})
        if key == "episodes.classes":
            value = ",".join(f"class-{i}" for i in range(9))  # noqa: PLW2901
        if value == CONFIG[key]:
            continue
        try:
            return DEFAULT.override(extra | {key: value})
        except StudyError:
            continue
    return None


@pytest.mark.parametrize("key", CONFIG)
def test_every_key_can_be_changed_and_changes_the_digest(key: str) -> None:
    study = _changed(key)
    assert study is not None
    assert study.run_config()[key] != CONFIG[key]
    assert study != DEFAULT
    assert study.digest != DEFAULT.digest
    if key not in TOGETHER:
        assert {k for k, v in study.run_config().items() if v != CONFIG[k]} == {key}
        assert (study.data_digest != DEFAULT.data_digest) == (key in DATA_KEYS)


@pytest.mark.parametrize("key", CONFIG)
def test_a_study_reads_back_from_each_of_its_forms(key: str) -> None:
    study = _changed(key)
    assert study is not None
    again = (
        Study.from_run_config(study.run_config()),
        Study.from_run_config(dict(reversed(study.run_config().items()))),
        Study.from_toml(study.toml()),
        Study.from_run_config(json.loads(json.dumps(study.model_dump(by_alias=True)))),
    )
    for other in again:
        assert other == study
        assert other.digest == study.digest


def test_the_digest_is_sha_256_over_sorted_json() -> None:
    text = json.dumps(CONFIG, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert DEFAULT.digest == hashlib.sha256(text.encode("utf-8")).hexdigest()


def test_the_digest_does_not_see_how_a_number_was_written() -> None:
    one = Study.from_run_config({"outer.rate": 1, "sites.deadline-seconds": 60})
    two = Study.from_toml("outer.rate = 1.0\n[sites]\ndeadline-seconds = 6e1")
    assert one == two
    assert one.digest == two.digest


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=200))
def test_a_title_in_any_script_survives_a_study_file(title: str) -> None:
    study = DEFAULT.override({"study.title": title})
    assert study.study.title == title
    assert Study.from_toml(study.toml()) == study


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("study.rounds", -1),
        ("study.rounds", "20"),
        ("study.rounds", True),
        ("study.rounds", 2.5),
        ("study.seed", 2**63),
        ("study.id", "Überstudie"),
        ("study.id", ""),
        ("study.expires", "soon"),
        ("sites.deadline-seconds", 0.0),
        ("sites.quorum", 0),
        ("model.norm", "layer"),
        ("model.channels", 2),
        ("algorithm.name", "mamal"),
        ("algorithm.inner-rate", float("nan")),
        ("algorithm.inner-rate", float("inf")),
        ("algorithm.test-rate", -0.1),
        ("algorithm.recompute", 1),
        ("algorithm.proximal", float("nan")),
        ("episodes.ways", 1),
        ("episodes.labels", "random"),
        ("outer.momentum", 1.0),
        ("outer.momentum", float("nan")),
        ("aggregation.rule", "bulyan"),
        ("aggregation.tolerated", -1),
        ("aggregation.radius", -1.0),
        ("aggregation.radius", float("inf")),
        ("aggregation.iterations", 0),
        ("aggregation.momentum", 1.0),
        ("aggregation.max-norm", float("nan")),
        ("aggregation.max-norm", -1.0),
        ("aggregation.weights", "ward"),
        ("aggregation.weights", "=2"),
        ("aggregation.weights", "ward="),
        ("aggregation.weights", "ward=0"),
        ("aggregation.weights", "ward=-1"),
        ("aggregation.weights", "ward=1e9"),
        ("aggregation.weights", "ward=nan"),
        ("aggregation.weights", "ward=1_0"),
        ("aggregation.weights", "ward=1,annex"),
        ("aggregation.weights", "ward=1,annex=2, ward =2"),
        ("privacy.mechanism", "hope"),
        ("privacy.clip", -1.0),
        ("privacy.noise", float("inf")),
        ("privacy.sampling", 1.5),
        ("privacy.delta", 1.0),
        ("wire.dtype", "bfloat16"),
        ("data.test-fraction", 1.0),
        ("data.alpha", float("nan")),
    ],
)
def test_a_bad_value_is_named_with_what_it_was(key: str, value: Any) -> None:
    with pytest.raises(StudyError) as caught:
        DEFAULT.override({key: value})
    assert f"{key}: " in str(caught.value)
    assert f"(it was {value!r})" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"study.round": 3}, r"study\.round: unknown key; known here: .*\brounds\b"),
        ({"studies.rounds": 3}, r"studies: unknown key; known here: .*\bstudy\b"),
        ({"rounds": 3}, r"rounds: unknown key; known here: .*\bstudy\b"),
        ({"episodes.classes.first": "a"}, r"episodes\.classes\.first: unknown key"),
        ({"study": 5}, r"study: .*\(it was 5\)"),
        ({"sites.deadline-seconds": 5.0, "sites.deadline_seconds": 6.0}, r"sites\.deadline_seconds: unknown key"),
    ],
)
def test_an_unknown_key_is_named_with_what_is_known(config: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        Study.from_run_config(config)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(StudyError) as caught:
        Study.from_run_config({"study.rounds": -1, "model.widht": 3, "outer.rate": "fast"})
    for key in ("study.rounds: ", "model.widht: ", "outer.rate: "):
        assert key in str(caught.value)


MULTI_KRUM = {"aggregation.rule": "multi-krum", "aggregation.tolerated": 1, "aggregation.selected": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes.classes": " , "}, "episodes.classes is empty"),
        ({"episodes.classes": "a,b,a", "episodes.ways": 2}, r"name a class twice: \['a'\]"),
        ({"episodes.held-out": "disc"}, r"name a class twice: \['disc'\]"),
        ({"episodes.ways": 11}, "episodes.ways is 11 but episodes.classes names 10 classes"),
        ({"episodes.train-ways": 11}, "episodes.train-ways is 11 and episodes.classes names 10 classes"),
        ({"episodes.train-ways": 1}, "episodes.train-ways is 1 .*: set it to 0, or from 2 to that number"),
        ({"episodes.train-ways": 8, "algorithm.name": "maml"}, "train-ways is 8, but the head of maml has one size"),
        (
            {"episodes.train-ways": 8, "episodes.labels": "fixed", "episodes.held-out": ""},
            "use protonet or protomaml with episodes.labels = 'shuffled'",
        ),
        ({"episodes.labels": "fixed"}, "episodes.held-out needs episodes.labels = 'shuffled'"),
        ({"algorithm.inner-steps": 0}, "algorithm.inner-steps is 0, but protomaml needs at least 1"),
        ({"aggregation.tolerated": 1}, "aggregation.tolerated is 1, but one hostile site moves a mean anywhere"),
        ({"aggregation.rule": "median"}, "median needs aggregation.tolerated"),
        ({"aggregation.rule": "centred-clipping", "aggregation.radius": 1.0}, "needs aggregation.tolerated"),
        ({"aggregation.selected": 2}, "aggregation.selected belongs to the rule multi-krum"),
        ({"aggregation.radius": 2.0}, "aggregation.radius belongs to the rule centred-clipping"),
        ({"aggregation.iterations": 2}, "aggregation.iterations belongs to the rule centred-clipping"),
        ({**MULTI_KRUM, "aggregation.momentum": 0.5}, "momentum belongs .*: set it to 0.0 with multi-krum"),
        (
            {**MULTI_KRUM, "aggregation.weights": "a=1"},
            "aggregation.weights belongs to the rule mean: multi-krum counts",
        ),
        ({**MULTI_KRUM, "aggregation.selected": 0}, "multi-krum needs aggregation.selected"),
        ({**MULTI_KRUM, "aggregation.selected": 1}, r"2 or more \(1 is the rule krum\)"),
        ({"aggregation.rule": "centred-clipping", "aggregation.tolerated": 1}, "needs aggregation.radius"),
        ({"privacy.mechanism": "episode-clip"}, r"episode-clip needs privacy\.clip, above 0"),
        ({**_PRIVATE, "privacy.delta": 0.0}, r"episode-clip needs privacy\.delta"),
        ({**_PRIVATE, "privacy.figures": "sent"}, r"privacy\.figures are outside of episode-clip: set 'withheld'"),
        ({**_BY_PATIENT, "privacy.clip": 0.0}, r"patient-clip needs privacy\.clip, above 0"),
        ({**_BY_PATIENT, "model.norm": "batch"}, r"patient-clip needs model\.norm = 'group'"),
        ({**_BY_PATIENT, "episodes.per-round": 2}, r"patient-clip needs episodes\.per-round = 1"),
        ({**_BY_PATIENT, "episodes.labels": "shuffled"}, r"patient-clip needs episodes\.labels = 'fixed'"),
        ({"privacy.noise": 1.0}, r"privacy\.noise belongs to a mechanism"),
        ({"privacy.research": True}, r"privacy\.research belongs to a mechanism"),
        ({"aggregation.weights": "hospital-3=1"}, r"weights names a site of sites\.held-out.*\['hospital-3'\]"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        DEFAULT.override(changes)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_only_learners_of_sums_over_patients_go_with_patient_clip(name: str) -> None:
    changes = {**_BY_PATIENT, "algorithm.name": name}
    if name in {"maml", "fomaml"}:
        assert DEFAULT.override(changes).privacy.guaranteed
    else:
        with pytest.raises(StudyError, match=f"goes with maml and fomaml, not with {name}: .* 'episode-clip'"):
            DEFAULT.override(changes)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_only_learners_without_an_inner_loop_go_without_inner_steps(name: str) -> None:
    changes: dict[str, str | int | float] = {"algorithm.name": name, "algorithm.inner-steps": 0}
    if name in {"protonet", "local-only"}:
        assert DEFAULT.override(changes).algorithm.inner_steps == 0
    else:
        with pytest.raises(StudyError, match=name):
            DEFAULT.override(changes)


def test_an_override_changes_a_copy() -> None:
    other = DEFAULT.override({"study.rounds": 7})
    assert (other.study.rounds, DEFAULT.study.rounds) == (7, 75)
    with pytest.raises(StudyError, match=r"study\.ruonds"):
        DEFAULT.override({"study.ruonds": 7})


def test_a_study_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DEFAULT.study.rounds = 3


def test_text_that_is_not_toml_is_refused() -> None:
    with pytest.raises(StudyError, match="not a TOML file"):
        Study.from_toml("[study")


@given(st.lists(st.text(st.characters(exclude_characters=",", exclude_categories=["Cs"]), min_size=1)))
def test_names_are_split_and_trimmed(parts: list[str]) -> None:
    assert names(" , ".join(parts)) == tuple(p.strip() for p in parts if p.strip())


def test_weights_of_sites_are_read() -> None:
    study = DEFAULT.override({"aggregation.weights": " ward 1 = 2, a=b=0.5 ,x=1e3"})
    assert study.aggregation.site_weights == {"ward 1": 2.0, "a=b": 0.5, "x": 1000.0}
    assert DEFAULT.aggregation.site_weights == {}


def test_group_lists_are_read() -> None:
    study = DEFAULT.override({"sites.held-out": "a, b", "episodes.held-out": "x,y"})
    assert study.sites.held_out_names == ("a", "b")
    assert study.episodes.held_out_names == ("x", "y")
