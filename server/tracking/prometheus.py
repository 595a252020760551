"""Prometheus: the figures of the last round, on a port of this machine alone."""

from pathlib import Path
from typing import Any

from common.errors import StudyError
from common.study import Study
from server.tracking.tracker import Line, round_figures, site_figures

__all__ = ["Prometheus"]


class Prometheus:
    def __init__(self, value: str, folder: Path, study: Study) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

        if not (value.isascii() and value.isdigit() and 0 < int(value) < 65536):
            raise StudyError(f"track: prometheus={value} is no port; give a number from 1 to 65535")
        registry = CollectorRegistry()

        def gauge(name: str, about: str, *labels: str) -> Any:
            return Gauge(f"wardround_{name}", about, labels, registry=registry)

        def counter(name: str, about: str, *labels: str) -> Any:
            return Counter(f"wardround_{name}", about, labels, registry=registry)

        self._round = gauge("round", "Last round that was completed")
        self._at = gauge("last_round_timestamp_seconds", "When it was completed, Unix time")
        self._left = gauge("left_seconds", "Time left, as estimated")
        self._loss = gauge("loss", "Query loss in the last round", "site")
        self._accuracy = gauge("accuracy", "Query accuracy in the last round, 0 to 1", "site")
        self._norm = gauge("gradient_norm", "Norm of the aggregated meta-gradient")
        self._sites = gauge("sites", "Sites in each state in the last round", "state")
        self._figure = gauge("evaluation", "Figures of the last evaluation", "site", "side", "figure")
        self._finished = gauge("finished", "1 once the run is complete")
        self._bytes = counter("bytes", "Bytes up from sites and down to them", "direction")
        self._seconds = counter("seconds", "Seconds of all rounds and of their parts", "part")
        self._rejections = counter("rejections", "Replies that did not count", "site", "why")
        about = gauge("run_info", "Which run this is", "run", "study", "digest")
        about.labels(folder.resolve().name, study.study.id, study.digest).set(1)
        gauge("rounds", "Rounds that the study plans").set(study.study.rounds)
        try:
            self._server, self._thread = start_http_server(int(value), addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise StudyError(
                f"track: prometheus={value} cannot be opened ({error.strerror}): choose another port"
            ) from None

    def round(self, line: Line) -> None:
        once = round_figures(line)
        self._at.set(line.get("at", 0))
        self._left.set(line.get("seconds_left") or 0)
        self._norm.set(once.get("gradient_norm", 0))
        # A site that is out shows no figure of an earlier round.
        self._loss.clear()
        self._accuracy.clear()
        for site, name, value in site_figures(line):
            (self._loss if name == "loss" else self._accuracy).labels(site).set(value)
        for state in ("in", "out", "resting", "idle"):
            self._sites.labels(state).set(once[f"sites_{state}"])
        for direction in ("up", "down"):
            self._bytes.labels(direction).inc(once.get(f"bytes_{direction}", 0))
        for part, name in (("all", "seconds"), *((p, f"{p}_seconds") for p in ("compute", "transport", "waiting"))):
            self._seconds.labels(part).inc(once.get(name, 0))
        for one in line.get("out", ()):
            self._rejections.labels(one["site"], one["why"]).inc()
        self._round.set(line["round"])  # last: whoever sees the round sees all of it

    def evaluation(self, line: Line) -> None:
        for site, name, value in site_figures(line):
            self._figure.labels(site, line.get("side", "test"), name).set(value)

    def finish(self, result: Line) -> None:
        self._finished.set(1)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
