"""The table of an evaluation: what it shows, what it leaves out, and that it fits."""

from io import StringIO

from rich.console import Console

from common.study import Study
from simulations.tables import summary

ADAPTED = ("before", "after", "balanced", "auroc", "ece")
ALL = (*ADAPTED, "scratch", "gain")


def figures(*names: str, pools: tuple[str, ...] = ("known", "new"), mean: float = 0.5) -> dict[str, float]:
    """Return figures that take as many characters as they can, but for 100 %."""
    parts = {"mean": mean, "error": 0.06}
    return {f"{pool}.{name}.{part}": value for pool in pools for name in names for part, value in parts.items()}


def text(scores: dict[str, dict[str, float]], width: int = 100) -> str:
    console = Console(width=width, file=StringIO())
    console.print(summary(Study(), scores))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_every_figure_of_adapted_theta_is_a_cell() -> None:
    site = figures("before", "scratch", "gain") | {
        f"{pool}.{name}.{part}": value
        for pool, shift in (("known", 0.0), ("new", 0.01))
        for name, mean in (("after", 0.612), ("auroc", 0.873), ("ece", 0.104))
        for part, value in (("mean", mean + shift), ("error", 0.01))
    }
    known, new = (line for line in text({"hospital-3": site}).splitlines() if "hospital-3" in line)
    assert known.split("  ")[-2:] == ["87.3 ± 2.0", "10.4 ± 2.0 "]
    for cell in ("62.2 ± 2.0", "88.3 ± 2.0", "11.4 ± 2.0", "+50.0 ± 11.8"):
        assert cell in new
    assert "hospital-3*" in new


def test_it_fits_a_hundred_columns_and_loses_nothing_in_eighty() -> None:
    scores = {"hospital-10": figures(*ADAPTED), "hospital-3": figures(*ALL) | {"new.gain.mean": 0.05}}
    wide, narrow = text(scores), text(scores, 80)
    assert sum("hospital-" in line for line in wide.splitlines()) == 4 + 1  # each pool a line, and the worst
    for shown in (wide, narrow):
        assert "…" not in shown
        assert shown.count("50.0") == 4 * 4 + 3 + 1


def test_what_no_site_offers_has_no_column() -> None:
    shown = text({"hospital-0": figures("before", "after"), "hospital-1": figures(*ADAPTED[:3], pools=("known",))})
    assert "adapted" in shown
    for absent in ("from scratch", "gain", "AUROC", "ECE"):
        assert absent not in shown
    partly = text({"hospital-0": figures("before", "after"), "hospital-1": figures(*ADAPTED)})
    assert [line.split()[-1] for line in partly.splitlines() if line.startswith(" hospital-0")] == ["-", "-"]


def test_the_worst_site_is_that_of_known_classes() -> None:
    scores = {
        "hospital-0": figures("after", pools=("known",), mean=0.42) | figures("after", pools=("new",), mean=0.9),
        "hospital-1": figures("after", pools=("known",), mean=0.43) | figures("after", pools=("new",), mean=0.1),
        "hospital-2": figures("after", pools=("new",), mean=0.01),
    }
    caption = " ".join(text(scores).split())  # a narrow table's caption takes several lines
    assert "worst site: hospital-0, 42.0 % on known classes" in caption
    assert "worst" not in text({"hospital-0": scores["hospital-0"]})  # nobody to compare with
    assert "worst" not in text({"hospital-2": scores["hospital-2"]})
