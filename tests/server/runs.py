"""Run folders as the round loop leaves them, made of a seed: for whatever reads them."""

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.canonical import canonical_json
from common.study import Study

__all__ = ["BEGAN", "REASONS", "VERSIONS", "sites_named", "write_lines", "write_run"]

#: When every run here began: Unix seconds.
BEGAN = 1_795_000_000.0
VERSIONS = {"wardround": "0.1.0", "flwr": "1.41.0", "torch": "2.13.0+cpu", "python": "3.11.2", "numpy": "2.3.5"}
REASONS = {
    "no-reply": (0, "no reply before the deadline"),
    "unsent": (0, "Flower could not send the message: the site has left, or it is too large"),
    "error": (104, "images or labels cannot be read, or cannot give the episodes that a study asks for"),
    "not-finite": (102, "the meta-gradient is not finite"),
    "norm": (102, "the meta-gradient has the norm 3.1e+09, above aggregation.max-norm, 1e+06"),
}

#: Called with (round, site): a key of `REASONS`, or None for a reply that counts.
Faults = Callable[[int, str], str | None]


def sites_named(count: int) -> list[str]:
    return [f"hospital-{number}" for number in range(count)]


def write_lines(path: Path, values: Sequence[Mapping[str, Any]], mode: str = "wb") -> None:
    with path.open(mode) as file:
        file.write(b"".join(canonical_json(value) + b"\n" for value in values))


def write_run(
    folder: Path,
    *,
    rounds: int = 20,
    done: int | None = None,
    state: str = "finished",
    sites: Sequence[str] = ("hospital-0", "hospital-1", "hospital-2", "hospital-3"),
    held_out: Sequence[str] = ("hospital-3",),
    faults: Faults | None = None,
    idle_share: float = 0.0,
    failure: str = "too few sites: start more",
    pid: int | None = None,
    seed: int = 0,
    gain: float = 0.12,
    **keys: bool | int | float | str,
) -> Path:
    """Write a run of ``done`` rounds and return its folder; ``keys`` change the study (``a__b`` is ``a.b``)."""
    draw = np.random.default_rng(seed)
    plan: dict[str, bool | int | float | str] = {"study.rounds": rounds, "sites.held-out": ",".join(held_out)}
    study = Study().override(plan | {name.replace("__", ".").replace("_", "-"): value for name, value in keys.items()})
    withheld, done = study.privacy.figures == "withheld", rounds if done is None else done
    training = [site for site in sites if site not in held_out]
    level = dict(zip(sites, draw.uniform(-0.08, 0.08, len(sites)), strict=True))
    events: list[dict[str, Any]] = [{"at": BEGAN, "event": "started"}]
    events += [{"at": BEGAN + 1, "event": "joined", "site": site} for site in sites]
    history: list[dict[str, Any]] = []
    failures, until, last = dict.fromkeys(training, 0), dict.fromkeys(training, 0), dict.fromkeys(training, 0)
    reasons = dict.fromkeys(sites, "")
    evaluations: list[dict[str, Any]] = []
    at = BEGAN + 2
    for number in range(1, done + 1):
        resting = [site for site in training if until[site] > number]
        idle = [site for site in training if site not in resting and draw.random() < idle_share]
        inside, out = {}, []
        for site in training:
            if site in resting or site in idle:
                continue
            if why := faults(number, site) if faults else None:
                code, reasons[site] = REASONS[why]
                out.append({"site": site, "code": code, "why": why, "reason": reasons[site]})
                failures[site] += 1
                events.append({"at": at, "event": "rejected", "round": number, "attempt": 1, **out[-1]})
                if failures[site] >= study.sites.rest_after:
                    until[site] = number + 1 + min(16, 2 ** (failures[site] - study.sites.rest_after))
                    rest = {"site": site, "reason": f"failed {failures[site]} times in a row"}
                    events.append({"at": at, "event": "resting", "round": number, **rest})
                continue
            failures[site], last[site], reasons[site] = 0, number, ""
            skill = 0.35 + 0.4 * (1 - np.exp(-4 * number / rounds)) + level[site]
            accuracy = float(np.clip(skill + draw.normal(0, 0.06), 0, 1))
            loss = float(2.2 * (1 - skill) + abs(draw.normal(0, 0.1)))
            sent = (-1.0, -1.0) if withheld else (loss, round(accuracy, 2))
            inside[site] = dict(zip(("loss", "accuracy"), sent, strict=True))
        seconds = {"compute_seconds": 2 + draw.random(), "transport_seconds": 0.3 + 0.2 * draw.random()}
        seconds["waiting_seconds"] = 1.5 * draw.random() + 20 * any(o["why"] == "no-reply" for o in out)
        at += sum(seconds.values())
        history.append(
            {
                "round": number,
                "attempt": 1,
                "at": at,
                "sites": inside,
                "out": out,
                "resting": [{"site": site, "until": until[site]} for site in resting],
                "idle": idle,
                "gradient_norm": float(3 * np.exp(-number / rounds) + 0.2 * draw.random()),
                "bytes_up": 454_656 * len(inside),
                "bytes_down": 455_210 * (len(inside) + len(out)),
                "seconds": sum(seconds.values()) + 0.05,
                **seconds,
                "seconds_left": 4.0 * (rounds - number),
            }
        )
        if (every := study.episodes.test_every) and number % every == 0 and number < rounds and not withheld:
            evaluations.append(_evaluation(draw, number, "validation", training, level, number / rounds, gain))
            events.append({"at": at, "event": "best", "round": number})
    if state == "finished" and not withheld:
        evaluations.append(_evaluation(draw, done, "test", sites, level, 1.0, gain))
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "history.jsonl", history)
    write_lines(folder / "evaluations.jsonl", [{**line, "at": BEGAN} for line in evaluations])
    _end(folder, study, state, done, evaluations, events, at, failure)
    where = {site: (failures[site], until[site], last[site], reasons[site]) for site in training}
    (folder / "status.json").write_text(json.dumps(_status(state, done, rounds, at, sites, where, pid)))
    return folder


def _status(
    state: str,
    done: int,
    rounds: int,
    at: float,
    sites: Sequence[str],
    whereabouts: Mapping[str, tuple[int, int, int, str]],
    pid: int | None,
) -> dict[str, Any]:
    about: dict[str, Any] = {}
    for site in sites:
        about[site] = {"role": "held-out", "state": "in", "failures": 0, "last_round": None, "reason": ""}
        if site in whereabouts:
            failures, until, last, reason = whereabouts[site]
            here = "resting" if until > done + 1 else "out" if failures else "in"
            more = {"failures": failures, "last_round": last or None, "reason": reason}
            about[site] = {"role": "trains", "state": here, **more}
    running = state not in {"finished", "failed", "stopped"}
    return {
        "state": state,
        "round": min(done + 1, rounds) if running else done,
        "rounds": rounds,
        "attempt": 1,
        "waiting_for": [*whereabouts][-1:] if running else [],
        "sites": about,
        "at": at,
        "pid": os.getpid() if pid is None else pid,
        "host": socket.gethostname(),
        "seconds_left": 4.0 * (rounds - done) if running else None,
        "loss": None,
        "accuracy": None,
        "run_id": 7,
        "versions": VERSIONS,
    }


def _end(
    folder: Path,
    study: Study,
    state: str,
    done: int,
    evaluations: list[dict[str, Any]],
    events: list[dict[str, Any]],
    at: float,
    failure: str,
) -> None:
    (folder / "study.json").write_bytes(canonical_json({"digest": study.digest, "study": study.run_config()}))
    if state == "finished":
        events.append({"at": at, "event": "finished", "round": done})
        result = {
            "study": study.digest,
            "theta": "5f" * 32,
            "theta_from": "best" if study.outer.patience else "last",
            "best_round": done if study.outer.patience else None,
            "numbers_up_per_reply": 113_664,
            "rounds": done,
            "evaluations": evaluations,
        }
        (folder / "result.json").write_text(json.dumps(result, indent=1, sort_keys=True))
        (folder / "theta.safetensors").write_bytes(b"theta")
    if state == "failed":
        events.append({"at": at, "event": "failed", "round": done, "reason": failure})
        (folder / "failure.txt").write_text(failure)
    write_lines(folder / "events.jsonl", events)


def _evaluation(
    draw: np.random.Generator,
    number: int,
    side: str,
    sites: Sequence[str],
    level: Mapping[str, float],
    progress: float,
    gain: float,
) -> dict[str, Any]:
    figures: dict[str, dict[str, float]] = {}
    for site in sites:
        own: dict[str, float] = {}
        for pool in ("known", "new") if side == "test" else ("known",):
            after = 0.5 + 0.22 * progress + level[site] - 0.04 * (pool == "new") + draw.normal(0, 0.01)
            means = {"before": after - 0.2, "after": after, "balanced": after - 0.02}
            means |= {"auroc": 0.5 + after / 2, "ece": 0.18 - 0.1 * after}
            if side == "test":
                means |= {"scratch": after - gain, "gain": gain}
            for name, value in means.items():
                own[f"{pool}.{name}.mean"] = float(np.clip(value, -1, 1))
                own[f"{pool}.{name}.error"] = float(0.008 + 0.004 * draw.random())
        figures[site] = own
    means = {site: own["known.after.mean"] for site, own in figures.items()}
    worst = min(means, key=lambda site: means[site])
    return {
        "round": number,
        "side": side,
        "sites": figures,
        "out": {},
        "score": float(np.mean([*means.values()])),
        "worst": {"site": worst, "accuracy": means[worst]},
        "best": side == "validation",
    }
