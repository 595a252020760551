"""The validated plan of a federated study, and the digest that names it everywhere."""

import json
import re
import tomllib
from collections.abc import Mapping
from datetime import date
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from common.canonical import canonical_json, sha256_hex
from common.errors import StudyError

__all__ = [
    "ALGORITHMS",
    "RUN_KEYS",
    "WINDOWS",
    "Aggregation",
    "Algorithm",
    "Data",
    "Episodes",
    "Model",
    "Outer",
    "Privacy",
    "Sites",
    "Study",
    "StudyIdentity",
    "Wire",
    "names",
]

ALGORITHMS = (
    "maml",
    "fomaml",
    "anil",
    "metasgd",
    "reptile",
    "protonet",
    "protomaml",
    "fedavg",
    "fedprox",
    "local-only",
)

#: How a CT's Hounsfield units are shown; ``header`` as the file itself says, which all other pictures follow.
WINDOWS = (
    "header",
    "abdomen",
    "angio",
    "bone",
    "brain",
    "liver",
    "lung",
    "mediastinum",
    "soft-tissue",
    "stroke",
    "subdural",
)

#: Keys of a run configuration that belong to one run and not to its study: the run to resume, and who is told of it.
RUN_KEYS = ("resume", "track")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

# float() alone would also take "nan", "1_000" and digits of other scripts.
_WEIGHT = re.compile(r"[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def names(text: str) -> tuple[str, ...]:
    """Split a comma-separated list; Flower's run configuration knows no lists."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


class _Group(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )


class StudyIdentity(_Group):
    """Which study this is, how long it runs, and the seed of its initialisation."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")] = "demo"
    title: Annotated[str, Field(max_length=200)] = "Lesion types on phantom hospitals"
    rounds: Annotated[int, Field(ge=0, le=100_000)] = 75
    seed: Seed = 0
    expires: str = ""

    @field_validator("expires")
    @classmethod
    def _is_a_date(cls, value: str) -> str:
        if value:
            date.fromisoformat(value)
        return value


class Sites(_Group):
    """How many sites a round needs, how long to wait for them, and which sites never train.

    ``per_round`` sites, drawn anew for every attempt, are asked in a round; 0 asks all. A round that misses the quorum
    is tried again with the same theta, ``attempts`` times in all. A site that failed ``rest_after`` times in a row
    rests for one round, then for two, for four, up to sixteen.
    """

    quorum: Count = 2
    join_seconds: Positive = 30.0
    deadline_seconds: Positive = 600.0
    held_out: str = "hospital-3"
    per_round: Annotated[int, Field(ge=0)] = 0
    attempts: Annotated[int, Field(ge=1, le=1000)] = 3
    rest_after: Count = 3

    @property
    def held_out_names(self) -> tuple[str, ...]:
        return names(self.held_out)


class Model(_Group):
    """The network and its images. ``arguments`` is a JSON object handed to a MONAI network or a factory.

    With ``head:`` before its name, only the network's last layer learns and is sent; its body stays as it begins. With
    a ``start`` among the arguments, any network's body begins as a released theta: the SHA-256 of that file.

    ``window`` is how grey values are shown: ``header`` as the file says, or a window for CT by its name.
    """

    name: str = "conv4"
    width: Count = 32
    norm: Literal["batch", "group"] = "batch"
    channels: Literal[1, 3] = 1
    image_size: Annotated[int, Field(ge=8, le=1024)] = 28
    dimensions: Literal[2, 3] = 2
    window: Literal[WINDOWS] = "header"  # type: ignore[valid-type]
    arguments: str = "{}"


class Algorithm(_Group):
    """The learner and its inner loop. Steps and rates at meta-test time are apart."""

    name: Literal[ALGORITHMS] = "protomaml"  # type: ignore[valid-type]
    inner_steps: Annotated[int, Field(ge=0, le=1000)] = 1
    inner_rate: Positive = 0.01
    test_steps: Annotated[int, Field(ge=0, le=10_000)] = 5
    test_rate: Positive = 0.01
    rates: Literal["element", "tensor"] = "element"
    proximal: NonNegative = 0.01
    recompute: bool = False
    precision: Literal["full", "bf16"] = "full"


class Episodes(_Group):
    """What one episode is. ``classes`` orders the head; ``held_out`` is seen at meta-test only.

    ``augment`` turns and mirrors training images: each ``image`` by itself, or all images of a ``class`` in an
    episode alike, which makes classes that nobody drew (shuffled labels only). ``train_ways`` is how many ways
    training episodes have, 0 as many as ``ways``: only learners whose head is made of prototypes can differ.
    """

    labels: Literal["shuffled", "fixed"] = "shuffled"
    classes: str = "disc,ring,cross,bar,wedge,striated,reticular,satellites,mottled,branching"
    held_out: str = "crescent,target,haze,miliary,septated"
    ways: Annotated[int, Field(ge=2, le=1000)] = 5
    train_ways: Annotated[int, Field(ge=0, le=1000)] = 0
    shots: Count = 5
    queries: Count = 10
    per_round: Count = 1
    augment: Literal["none", "image", "class"] = "none"
    test_episodes: Annotated[int, Field(ge=2, le=100_000)] = 16
    test_every: Annotated[int, Field(ge=0)] = 0
    scratch_steps: Annotated[int, Field(ge=0, le=10_000)] = 20
    scratch_rate: Positive = 0.02

    @property
    def class_names(self) -> tuple[str, ...]:
        return names(self.classes)

    @property
    def held_out_names(self) -> tuple[str, ...]:
        return names(self.held_out)

    @property
    def in_training(self) -> "Episodes":
        """What a training episode is."""
        return self.model_copy(update={"ways": self.train_ways or self.ways})


class Outer(_Group):
    """The outer optimiser, kept for the whole run; ``cosine`` lets its rate fall to zero over the rounds.

    A meta-gradient longer than ``clip`` is shortened to it: the first ones can be long, and would fill Adam's memory of
    squares. 0 does not clip, as averages of weights need it. With ``average`` above 0, the theta that is evaluated and
    published is an exponential moving average with this decay. With ``patience`` above 0, it is the best one by the
    validation patients of the training sites, and the run ends after so many evaluations (``episodes.test-every``)
    without a better one.
    """

    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    rate: Positive = 0.007
    schedule: Literal["constant", "cosine"] = "constant"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip: NonNegative = 1.0
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    patience: Annotated[int, Field(ge=0)] = 0


class Aggregation(_Group):
    """How the sites' replies become one meta-gradient, and how much of it a site may be.

    Every rule but ``mean`` withstands ``tolerated`` hostile sites, f, if enough sites take part:
    ``server.aggregation`` says how many. ``selected`` (how many replies it averages) belongs to ``multi-krum``;
    ``radius``, ``iterations`` and ``momentum`` to ``centred-clipping``; ``weights``, as in
    ``hospital-0=2,hospital-1=0.5``, to ``mean``: a robust rule counts sites, not weights. Empty weights are equal ones.
    A reply whose Euclidean norm exceeds ``max_norm`` is refused, whatever the rule; 0 is no bound.
    """

    rule: Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "centred-clipping"] = "mean"
    tolerated: Annotated[int, Field(ge=0, le=1000)] = 0
    selected: Annotated[int, Field(ge=0, le=1000)] = 0
    radius: NonNegative = 0.0
    iterations: Annotated[int, Field(ge=1, le=1000)] = 1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weights: str = ""
    max_norm: NonNegative = 1e6

    @property
    def site_weights(self) -> dict[str, float]:
        """The weight of each site that ``weights`` names."""
        pairs = [part.rpartition("=") for part in names(self.weights)]
        return {name.strip(): float(weight) for name, _, weight in pairs}

    @field_validator("weights")
    @classmethod
    def _are_weights(cls, value: str) -> str:
        named = [part.rpartition("=")[0].strip() for part in names(value)]
        for part in names(value):
            name, _, weight = part.rpartition("=")
            if not name.strip() or not _WEIGHT.fullmatch(weight.strip()) or not 1e-6 <= float(weight) <= 1e6:
                raise ValueError(f"{part!r} is not a site's name, '=' and a number from 1e-6 to 1e6")
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise ValueError(f"names a site twice: {', '.join(twice)}")
        return value

    @model_validator(mode="after")
    def _fits_the_rule(self) -> "Aggregation":
        if self.rule == "mean" and self.tolerated:
            raise ValueError(
                f"aggregation.tolerated is {self.tolerated}, but one hostile site moves a mean anywhere: "
                "set it to 0, or choose a robust aggregation.rule"
            )
        if self.rule != "mean" and not self.tolerated:
            raise ValueError(
                f"{self.rule} needs aggregation.tolerated, how many hostile sites it withstands: 1 or more"
            )
        if self.rule != "mean" and self.weights:
            raise ValueError(f"aggregation.weights belongs to the rule mean: {self.rule} counts sites, so empty it")
        if self.rule == "multi-krum" and self.selected < 2:
            raise ValueError(
                "multi-krum needs aggregation.selected, how many replies it averages: 2 or more (1 is the rule krum)"
            )
        if self.rule != "multi-krum" and self.selected:
            raise ValueError(f"aggregation.selected belongs to the rule multi-krum: set it to 0 with {self.rule}")
        if self.rule == "centred-clipping" and not self.radius:
            raise ValueError(
                "centred-clipping needs aggregation.radius, how far from the centre a reply counts in full: above 0"
            )
        if self.rule != "centred-clipping":
            neutral = {"radius": 0.0, "iterations": 1, "momentum": 0.0}
            for name, value in neutral.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"aggregation.{name} belongs to the rule centred-clipping: set it to {value} with {self.rule}"
                    )
        return self


class Privacy(_Group):
    """The privacy mechanism, per patient; ``none`` gives no formal guarantee, and every report says so.

    With ``episode-clip``, a patient is in a round with probability ``sampling`` and in one of its
    ``episodes.per-round`` episodes; every episode's meta-gradient is clipped to a norm of ``clip``, and their sum gets
    normal noise of ``noise`` times what one patient can move it by. What that costs a patient is counted at ``delta``.

    With ``patient-clip``, the patients in a round, each with probability ``sampling``, are one task: ``shots`` in
    ``shots + queries`` of them are support, the others query. MAML's meta-gradient is made of sums over patients; every
    patient's term is clipped to ``clip``, and every sum gets noise: ``noise`` times what one patient can move all the
    sums by that they are in (`common.privacy.site_task`).

    Losses and accuracies are outside of it: with ``figures`` ``withheld`` no site sends any, and nobody is asked to
    evaluate. ``research`` lets them be sent, and draws the noise from the sites' keys, so that a run can be repeated:
    both void the guarantee, and every report says so.
    """

    mechanism: Literal["none", "episode-clip", "patient-clip"] = "none"
    clip: NonNegative = 0.0
    noise: NonNegative = 0.0
    sampling: Annotated[float, Field(ge=0, le=1)] = 0.0
    delta: Annotated[float, Field(ge=0, lt=1)] = 0.0
    research: bool = False
    figures: Literal["sent", "withheld"] = "sent"

    @property
    def guaranteed(self) -> bool:
        """Whether a guarantee holds for the patients of the sites."""
        return self.mechanism != "none" and not self.research

    @model_validator(mode="after")
    def _fits_the_mechanism(self) -> "Privacy":
        numbers = ("clip", "noise", "sampling", "delta")
        if self.mechanism == "none":
            for name in (*numbers, "research"):
                if getattr(self, name):
                    raise ValueError(f"privacy.{name} belongs to a mechanism: set privacy.mechanism, or leave it out")
            return self
        for name in numbers:
            if not getattr(self, name):
                raise ValueError(f"{self.mechanism} needs privacy.{name}, above 0: see docs/privacy.md")
        if self.figures == "sent" and not self.research:
            raise ValueError(
                f"privacy.figures are outside of {self.mechanism}: set 'withheld', or privacy.research = true, "
                "which voids the guarantee"
            )
        return self


class Wire(_Group):
    """The precision of theta and of the meta-gradient, in computation and on the wire."""

    dtype: Literal["float32", "float64"] = "float32"


class Data(_Group):
    """Where virtual sites come from; in deployment a hospital uses its own images instead."""

    source: str = "phantoms"
    partition: Literal["natural", "iid", "dirichlet", "pathological", "quantity", "scanner"] = "natural"
    sites: Annotated[int, Field(ge=1, le=100_000)] = 4
    alpha: Positive = 0.5
    classes_per_site: Count = 2
    patients_per_class: Count = 15
    seed: Seed = 0
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _leaves_some_to_train(self) -> "Data":
        if self.test_fraction + self.validation_fraction >= 1:
            raise ValueError("data.test-fraction and data.validation-fraction leave no patients to train: lower one")
        return self


class Study(_Group):
    """Everything that a federated study may do.

    A study is a plain Flower run configuration: every field is a key ``group.name`` with a default.

    Examples
    --------
    >>> Study.from_run_config({"study.rounds": 3}).study.rounds
    3
    """

    study: StudyIdentity = StudyIdentity()
    sites: Sites = Sites()
    model: Model = Model()
    algorithm: Algorithm = Algorithm()
    episodes: Episodes = Episodes()
    outer: Outer = Outer()
    aggregation: Aggregation = Aggregation()
    privacy: Privacy = Privacy()
    wire: Wire = Wire()
    data: Data = Data()

    @model_validator(mode="after")
    def _episodes_fit(self) -> "Study":
        classes, held_out = self.episodes.class_names, self.episodes.held_out_names
        if not classes:
            raise ValueError("episodes.classes is empty: name the classes, comma-separated, in the head's order")
        if duplicates := {c for c in classes + held_out if (classes + held_out).count(c) > 1}:
            raise ValueError(f"episodes.classes and episodes.held-out name a class twice: {sorted(duplicates)}")
        if self.episodes.labels == "shuffled" and len(classes) < self.episodes.ways:
            raise ValueError(
                f"episodes.ways is {self.episodes.ways} but episodes.classes names {len(classes)} classes: "
                "lower ways or name more classes"
            )
        if self.episodes.labels == "fixed" and held_out:
            raise ValueError("episodes.held-out needs episodes.labels = 'shuffled': a fixed head has no new classes")
        if self.episodes.labels == "fixed" and self.episodes.augment == "class":
            raise ValueError("episodes.augment = 'class' needs episodes.labels = 'shuffled': it makes new classes")
        if train_ways := self.episodes.train_ways:
            if self.algorithm.name not in {"protonet", "protomaml"} or self.episodes.labels == "fixed":
                raise ValueError(
                    f"episodes.train-ways is {train_ways}, but the head of {self.algorithm.name} has one size for "
                    "training and test: set it to 0, or use protonet or protomaml with episodes.labels = 'shuffled'"
                )
            if not 2 <= train_ways <= len(classes):
                raise ValueError(
                    f"episodes.train-ways is {train_ways} and episodes.classes names {len(classes)} classes: "
                    "set it to 0, or from 2 to that number"
                )
        if self.model.name.startswith("head:") and self.algorithm.name in {"protonet", "protomaml"}:
            raise ValueError(
                f"model.name is {self.model.name}, of which the head alone learns, but {self.algorithm.name} shares no "
                "head: choose another algorithm, such as maml or anil, or leave 'head:' out"
            )
        if self.algorithm.inner_steps == 0 and self.algorithm.name not in {"protonet", "local-only"}:
            raise ValueError(f"algorithm.inner-steps is 0, but {self.algorithm.name} needs at least 1")
        return self

    @model_validator(mode="after")
    def _rounds_fit(self) -> "Study":
        if self.sites.per_round and self.sites.per_round < self.sites.quorum:
            raise ValueError(
                f"sites.per-round is {self.sites.per_round}, less than sites.quorum, {self.sites.quorum}: "
                "no round could reach it; 0 asks all sites"
            )
        if self.outer.patience and not self.episodes.test_every:
            raise ValueError("outer.patience counts evaluations on the way: set episodes.test-every")
        if self.outer.patience and self.privacy.figures == "withheld":
            raise ValueError("outer.patience needs validation scores, which privacy.figures = 'withheld' keeps back")
        if idle := sorted(set(self.aggregation.site_weights) & set(self.sites.held_out_names)):
            raise ValueError(f"aggregation.weights names a site of sites.held-out, which never trains: {idle}")
        return self

    @model_validator(mode="after")
    def _site_can_be_a_task(self) -> "Study":
        if self.privacy.mechanism != "patient-clip":
            return self
        if self.algorithm.name not in {"maml", "fomaml"}:
            raise ValueError(
                f"patient-clip clips what each patient adds to a gradient, and goes with maml and fomaml, not with "
                f"{self.algorithm.name}: choose one of them, or privacy.mechanism = 'episode-clip', which takes all"
            )
        if self.model.norm == "batch":
            raise ValueError(
                "patient-clip needs model.norm = 'group': with the statistics of a batch, a patient's gradient is "
                "not their own"
            )
        if self.episodes.labels != "fixed":
            raise ValueError("patient-clip needs episodes.labels = 'fixed': a site is one task of all classes")
        if self.episodes.per_round != 1:
            raise ValueError(
                f"patient-clip needs episodes.per-round = 1, not {self.episodes.per_round}: a site is one task"
            )
        return self

    @classmethod
    def from_run_config(cls, config: Mapping[str, Any]) -> "Study":
        """Read a flat (``group.key``) or nested mapping; keys that are missing have their defaults.

        The keys of one run (`RUN_KEYS`) are no part of a study, and left out.

        Raises
        ------
        StudyError
            Names every key that is wrong, its value and what is allowed.
        """
        nested: dict[str, Any] = {}
        for key, value in config.items():
            if key in RUN_KEYS:
                continue
            group, _, name = key.partition(".")
            if not name and not isinstance(value, Mapping):
                nested[group] = value
                continue
            keys = nested.setdefault(group, {})
            if not isinstance(keys, dict):
                raise StudyError(f"the study is not valid:\n  {group}: a group of keys and a value at once ({keys!r})")
            keys.update({name: value} if name else value)
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise StudyError(_explain(error)) from None

    @classmethod
    def from_toml(cls, text: str) -> "Study":
        """Read the text of a study file.

        Raises
        ------
        StudyError
            The text is not TOML, or as in `from_run_config`.
        """
        try:
            return cls.from_run_config(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise StudyError(f"not a TOML file: {error}") from None

    def run_config(self) -> dict[str, bool | int | float | str]:
        """Return the study as Flower's flat run configuration."""
        tree = self.model_dump(by_alias=True)
        return {f"{group}.{key}": value for group, values in tree.items() for key, value in values.items()}

    def toml(self) -> str:
        """Return the study as the text of a study file, every value written out."""
        tree = self.model_dump(by_alias=True)
        # JSON's strings, numbers and booleans are TOML's.
        groups = (
            f"[{group}]\n"
            + "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
            for group, values in tree.items()
        )
        return "\n".join(groups)

    def override(self, changes: Mapping[str, bool | int | float | str]) -> "Study":
        """Return a new, validated study with some ``group.key`` values changed."""
        return Study.from_run_config(self.run_config() | dict(changes))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON of every value, defaults included, in hex."""
        return sha256_hex(canonical_json(self.run_config()))

    @cached_property
    def data_digest(self) -> str:
        """Names prepared virtual sites: SHA-256 over all that the pixels and splits depend on, in hex."""
        parts = {
            "data": self.data.model_dump(),
            "image": [self.model.channels, self.model.image_size, self.model.dimensions, self.model.window],
            "classes": [self.episodes.class_names, self.episodes.held_out_names],
        }
        return sha256_hex(canonical_json(parts))


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"]) or "study"
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"])
            lines.append(f"{key}: unknown key; known here: {', '.join(known)}")
        else:
            message = re.sub(r"^Value error, ", "", item["msg"])
            given = "" if isinstance(item["input"], dict | BaseModel) else f" (it was {item['input']!r})"
            lines.append(f"{key}: {message}{given}")
    return "the study is not valid:\n  " + "\n  ".join(lines)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    tree = Study.model_construct().model_dump(by_alias=True)
    return sorted(tree if len(location) == 1 else tree[str(location[0])])
