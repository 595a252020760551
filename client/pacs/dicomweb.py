"""Pull images from a PACS over DICOMweb: search with QIDO-RS, fetch with WADO-RS, resume at any time."""

import errno
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import requests
from dicomweb_client.web import DICOMwebClient
from pydicom.filereader import read_file_meta_info

from client.pacs.intake import MAX_BYTES, Intake, holds_pixels, open_intake
from client.pacs.multipart import MultipartError, only_part
from client.pacs.query import Where, is_uid, values
from client.pacs.source import Source
from common.errors import DataError
from common.quiet import quiet

__all__ = ["PullReport", "Source", "pull"]

T = TypeVar("T")
Found = dict[str, Any]

_PAGE = 1000  # results of one query
_TIMEOUT = (10.0, 60.0)  # seconds: to connect, and between two pieces of an answer
_BUSY = {408, 425, 429, 502, 503, 504}  # the PACS says: later
_BAD_ANSWERS = 3  # a PACS that answers, but badly, is asked this often
_LONGEST_WAIT = 30.0  # seconds between two tries


@dataclass(frozen=True)
class PullReport:
    """What a pull did so far: counts, and nothing that names a patient.

    Attributes
    ----------
    state : str
        What it is doing: ``"searching"``, ``"fetching"``, ``"waiting"`` (for the PACS) or ``"ended"``.
    studies, studies_done : int
        Studies that match, and those gone through.
    new, there, size : int
        Images fetched, images that were there already, and bytes fetched.
    failed : mapping of str to int
        Images (or lists of them) that the PACS did not give, by reason.
    left_out : mapping of str to int
        What was found but is not wanted, by reason.
    """

    state: Literal["searching", "fetching", "waiting", "ended"]
    studies: int
    studies_done: int
    new: int
    there: int
    size: int
    failed: Mapping[str, int]
    left_out: Mapping[str, int]

    @property
    def complete(self) -> bool:
        """Whether everything wanted is there."""
        return self.state == "ended" and not self.failed


def pull(
    source: Source,
    into: Path,
    *,
    where: Mapping[str, str] | None = None,
    rate: float = 50.0,
    patience: float = 300.0,
    max_bytes: int = MAX_BYTES,
    progress: Callable[[PullReport], None] | None = None,
) -> PullReport:
    """Fetch every image that matches and is not there yet.

    Images are stored byte by byte as the PACS sends them, in the transfer syntax that it keeps them in, one at a
    time and never whole in memory. What is there already is not fetched again, so an interrupted pull goes on
    where it stopped. A PACS that goes away is waited for; its bad answers are counted and the rest goes on.

    Parameters
    ----------
    source : Source
        The PACS.
    into : Path
        Folder for ``<study>/<series>/<image>.dcm``, all names being hashes; made if missing.
    where : mapping of str to str, optional
        DICOM keywords and the values to match (``*`` and ``?``, date ranges as ``20200101-20201231``). What the
        PACS returns is matched here once more: some ignore keys that they do not know.
    rate : float
        Most images fetched per second.
    patience : float
        Seconds that the PACS may stay away at a time before the pull gives up.
    max_bytes : int
        Largest image, in bytes.
    progress : callable, optional
        Called with the state after each image and each try.

    Raises
    ------
    DataError
        The PACS refuses the credentials, is not to be trusted, or stays away longer than ``patience``; the disk
        is full; or ``where`` has a key that is none. What is there stays.
    """
    wanted = Where(where or {})
    if not (rate > 0 and patience >= 0 and max_bytes > 0):
        raise DataError("rate and the largest image must be above zero, and patience not below")
    with open_intake(into) as intake, quiet("dicomweb_client", "urllib3", "pydicom"), requests.Session() as session:
        run = _Pull(source, session, intake, wanted, 1 / rate, patience, max_bytes, progress)
        try:
            return run.all()
        except OSError as error:  # requests' own errors are OSErrors, and have been dealt with by now
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise DataError("the disk is full: make room and run the same command again") from None
            raise DataError(f"{into} cannot be written to: {error.strerror or type(error).__name__}") from None


class _NotGivenError(Exception):
    """The PACS does not give one thing; the reason is one of a few fixed words."""


class _Pull:
    """One run of :func:`pull`: the connection, and what has been counted."""

    def __init__(
        self,
        source: Source,
        session: requests.Session,
        intake: Intake,
        where: Where,
        interval: float,
        patience: float,
        max_bytes: int,
        progress: Callable[[PullReport], None] | None,
    ) -> None:
        session.trust_env = False  # or REQUESTS_CA_BUNDLE would overrule --ca, and .netrc add credentials
        session.max_redirects = 0
        session.verify = True if source.ca is None else str(source.ca)
        session.auth = source.user
        if source.token is not None:
            session.headers["Authorization"] = f"Bearer {source.token}"
        self.url, self.session = source.url.rstrip("/"), session
        self.client = DICOMwebClient(self.url, session=session, permissive_uid=True, timeout=_TIMEOUT)
        self.client.set_http_retry_params(retry=False)  # it would give up sooner, and log addresses
        self.intake, self.where, self.max_bytes = intake, where, max_bytes
        self.interval, self.patience, self.progress = interval, patience, progress
        self.next_fetch = time.monotonic()
        self.count: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def report(self, state: Literal["searching", "fetching", "waiting", "ended"]) -> PullReport:
        count = self.count
        report = PullReport(
            state,
            studies=count["studies"],
            studies_done=count["studies_done"],
            new=count["new"],
            there=count["there"],
            size=count["size"],
            failed=dict(self.failed),
            left_out=dict(self.left_out),
        )
        if self.progress is not None:
            self.progress(report)
        return report

    def all(self) -> PullReport:
        self.report("searching")
        studies = self.found("StudyInstanceUID", self.client.search_for_studies, self.where.study_filters)
        if self.failed:
            raise DataError("the PACS does not answer a search for studies: is this the root of its DICOMweb service?")
        studies = [study for study in studies if self.is_wanted(study, self.where.study)]
        self.count["studies"] = len(studies)
        for study in (values(study, "StudyInstanceUID")[0] for study in studies):
            for series in self.found(
                "SeriesInstanceUID", self.client.search_for_series, self.where.series, study_instance_uid=study
            ):
                if self.is_wanted(series, self.where.series):
                    self.one_series(study, values(series, "SeriesInstanceUID")[0])
            self.count["studies_done"] += 1
            self.report("fetching")
        return self.report("ended")

    def one_series(self, study: str, series: str) -> None:
        for image in self.found(
            "SOPInstanceUID",
            self.client.search_for_instances,
            {},
            study_instance_uid=study,
            series_instance_uid=series,
        ):
            uid = values(image, "SOPInstanceUID")[0]
            path = self.intake.path(study, series, uid)
            if not all(holds_pixels(kind) for kind in values(image, "SOPClassUID")):
                self.left_out["no image"] += 1
            elif path.exists():
                self.count["there"] += 1
            else:
                self.one_image(f"{self.url}/studies/{study}/series/{series}/instances/{uid}", uid, path)
            self.report("fetching")

    def one_image(self, url: str, uid: str, path: Path) -> None:
        time.sleep(max(0.0, self.next_fetch - time.monotonic()))
        self.next_fetch = time.monotonic() + self.interval
        try:
            self.count["size"] += self.insist(lambda: self.fetch(url, uid, path))
            self.count["new"] += 1
        except _NotGivenError as error:
            self.failed[str(error)] += 1

    def found(self, key: str, search: Callable[..., list[Found]], filters: Mapping[str, str], **of: str) -> list[Found]:
        """Search page by page: until a page brings nothing new, since some PACS ignore ``offset``."""
        known: dict[str, Found] = {}
        asked = {"search_filters": dict(filters), "fields": list(filters) or None, "limit": _PAGE, **of}
        offset = 0
        while True:
            try:
                page = self.insist(partial(_search_page, search, offset=offset, **asked))
            except _NotGivenError as error:
                self.failed[f"search: {error}"] += 1
                return list(known.values())
            before = len(known)
            for result in page:
                uid = (values(result, key) or [""])[0]
                if is_uid(uid):
                    known.setdefault(uid, result)
                else:
                    self.failed["not a UID"] += 1
            if len(known) == before:
                return list(known.values())
            offset += len(page)

    def is_wanted(self, result: Found, where: Mapping[str, str]) -> bool:
        wanted = self.where.matches(result, where)
        if not wanted:
            self.left_out["not shown to match"] += 1
        return wanted

    def fetch(self, url: str, uid: str, path: Path) -> int:
        """Stream one image into its file and return its size (bytes)."""
        accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
        with self.session.get(url, headers={"Accept": accept}, stream=True, timeout=_TIMEOUT) as response:
            response.raise_for_status()
            pieces = only_part(response.headers.get("Content-Type", ""), response.iter_content(1 << 20))
            with self.intake.writing(path) as file:
                size = 0
                for piece in pieces:
                    size += len(piece)
                    if size > self.max_bytes:
                        raise _NotGivenError("too large")
                    file.write(piece)
                file.flush()
                _check_identity(file.name, uid)
        return size

    def insist(self, ask: Callable[[], T]) -> T:
        """Ask until there is an answer: for as long as patience lasts, with growing pauses."""
        began, pause, bad = time.monotonic(), 0.5, 0
        while True:
            try:
                return ask()
            except requests.TooManyRedirects:
                raise DataError("the PACS sends us to another address: give that one, if it is to be trusted") from None
            except requests.HTTPError as error:
                bad += 1 if error.response is None else _judge(error.response.status_code)
            except requests.exceptions.SSLError as error:
                if "CERTIFICATE" in str(error):
                    raise DataError(
                        "the certificate of the PACS is not to be trusted: name its authority with --ca"
                    ) from None
            except (requests.exceptions.ChunkedEncodingError, MultipartError, ValueError):
                bad += 1
            except (requests.RequestException, ConnectionError, TimeoutError):
                pass  # refused, reset, timed out: the PACS is away
            if bad == _BAD_ANSWERS:
                raise _NotGivenError("broken answer") from None
            if time.monotonic() + pause - began > self.patience:
                raise DataError(
                    f"the PACS has not answered for {self.patience:.0f} s: run the same command again when it is "
                    "back; what is here is not fetched again"
                ) from None
            self.report("waiting")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT)


def _judge(status: int) -> int:
    """Return how bad an HTTP status is: 0 for a PACS that is busy, 1 for one that may be broken.

    Raises
    ------
    _NotGivenError
        Asking again would change nothing.
    """
    if status in {401, 403}:
        raise DataError("the PACS refuses us: check the token or the user, and what it may read")
    if status in _BUSY:
        return 0
    if status >= 500:
        return 1
    raise _NotGivenError("gone" if status in {404, 410} else "refused")


def _search_page(search: Callable[..., object], **asked: object) -> list[Found]:
    found = search(**asked)
    if not isinstance(found, list) or not all(isinstance(result, dict) for result in found):
        raise MultipartError("not a list of results")
    return found


def _check_identity(file: str, uid: str) -> None:
    """Refuse a file that is no DICOM file or not the image that was asked for; only its first group is read."""
    try:
        identity = read_file_meta_info(file).get("MediaStorageSOPInstanceUID")
    except Exception:
        raise _NotGivenError("not DICOM") from None
    if identity != uid:
        raise _NotGivenError("another image")
