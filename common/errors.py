"""One typed error per refusal, each with a code that may cross the wire; its text never does."""

from typing import ClassVar

__all__ = [
    "ApprovalError",
    "AuditError",
    "BudgetError",
    "ClockError",
    "ContractError",
    "DataError",
    "DeviceError",
    "EgressError",
    "ExportError",
    "FleetError",
    "MembershipError",
    "ModelError",
    "NotPreparedError",
    "RoundError",
    "ServiceError",
    "SignatureError",
    "StorageError",
    "StudyError",
    "ThetaError",
    "WardroundError",
    "explain",
]


class WardroundError(Exception):
    """Base of every refusal; the message says what was wrong and what to do next.

    The text is for whoever runs this process. Only ``code`` may leave a site: exception text can hold
    file names, and file names can hold patients' names.
    """

    code: ClassVar[int] = 100


class StudyError(WardroundError):
    """A study file has an unknown key, a bad value, or values that do not fit together."""

    code = 101


class ContractError(WardroundError):
    """A message does not hold exactly what the study declares.

    Attributes
    ----------
    why : str
        A word for the kind of breach, the same every time: for counts and for programs.
    """

    code = 102

    def __init__(self, text: str, why: str = "contract") -> None:
        super().__init__(text)
        self.why = why


class ModelError(WardroundError):
    """A network cannot be built, or keeps state that a study does not share (buffers)."""

    code = 103


class DataError(WardroundError):
    """Images or labels cannot be read, or cannot give the episodes that a study asks for."""

    code = 104


class NotPreparedError(WardroundError):
    """The site's folder for this study does not exist yet."""

    code = 105


class DeviceError(WardroundError):
    """A compute device is missing, or the work does not fit on it."""

    code = 106


class RoundError(WardroundError):
    """A round cannot be completed: too few sites, or none in time."""

    code = 107


class SignatureError(WardroundError):
    """A signature or key is malformed, or a signature does not verify."""

    code = 108


class StorageError(WardroundError):
    """Something could not be written or read back: the disk is full, read-only or damaged."""

    code = 109


class ExportError(WardroundError):
    """A run's theta cannot be exported, or an export does not compute what theta does."""

    code = 110


class MembershipError(WardroundError):
    """A key, certificate, request, kit or manifest of a consortium is not what it must be.

    Attributes
    ----------
    why : str
        A word for the kind of breach, the same every time: for tests and for programs.
    """

    code = 111

    def __init__(self, text: str, why: str = "membership") -> None:
        super().__init__(text)
        self.why = why


class AuditError(WardroundError):
    """An audit log was changed, cut or damaged.

    Attributes
    ----------
    why : str
        A word for the kind of damage, the same every time.
    """

    code = 112

    def __init__(self, text: str, why: str = "audit") -> None:
        super().__init__(text)
        self.why = why


class EgressError(WardroundError):
    """What was to leave a site is not exactly what its study declares.

    Attributes
    ----------
    why : str
        A word for the kind of breach, the same every time: for the audit log and for programs.
    """

    code = 113

    def __init__(self, text: str, why: str) -> None:
        super().__init__(text)
        self.why = why


class BudgetError(WardroundError):
    """The privacy budget of a site's patients does not allow what a study asks for."""

    code = 114


class ThetaError(WardroundError):
    """The theta that was sent is not one that the study can have led to.

    Attributes
    ----------
    why : str
        ``start``: further from the study's first theta than so many outer steps lead; ``step``: further from the theta
        that the site saw last.
    """

    code = 115

    def __init__(self, text: str, why: str) -> None:
        super().__init__(text)
        self.why = why


class ApprovalError(WardroundError):
    """The site has not approved the bundle or the study that it was asked to run.

    Attributes
    ----------
    why : str
        A word for what is missing, the same every time: for the audit log and for programs.
    """

    code = 120

    def __init__(self, text: str, why: str) -> None:
        super().__init__(text)
        self.why = why


class FleetError(WardroundError):
    """A call between a site's node and the coordinator was not made, or was answered with an error.

    Attributes
    ----------
    status : int
        HTTP status that says to a SuperNode what to do: 403 to drop the message, 503 to try again.
    stranger : bool
        The SuperLink knows no node with this number and key: it has to be let in anew.
    """

    code = 121

    def __init__(self, text: str, status: int = 503, *, stranger: bool = False) -> None:
        super().__init__(text)
        self.status, self.stranger = status, stranger


class ServiceError(WardroundError):
    """A process that is to run all the time cannot be started, or does not stay."""

    code = 122


class ClockError(WardroundError):
    """The coordinator's clock and the site's are too far apart.

    Attributes
    ----------
    why : str
        Always ``clock``: for the audit log and for programs.
    """

    code = 123
    why = "clock"


def explain(code: int) -> str:
    """Return in words what an error code from another process means; Flower's own codes are below 100."""
    kinds: list[type[WardroundError]] = [WardroundError, *WardroundError.__subclasses__()]
    summaries = {kind.code: (kind.__doc__ or "").split(".")[0].lower() for kind in kinds}
    flower = {3: "the reply did not arrive whole", 5: "the site went away", 8: "the site's process crashed"}
    return (summaries | flower | {WardroundError.code: "an unexpected error at the site"}).get(
        code, "an error in Flower"
    )
