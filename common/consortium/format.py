"""What all files that pass between coordinator and sites have in common."""

from typing import Annotated, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, StringConstraints, ValidationError

from common.errors import MembershipError

__all__ = ["Digest", "Moment", "Name", "Pem", "Signature", "Strict"]

#: Largest file that is read at all, in bytes: a manifest of a thousand sites is half of it.
_LARGEST = 4 * 2**20

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){64,110}$")]
Pem = Annotated[str, StringConstraints(max_length=8192, pattern=r"^-----BEGIN ")]
Moment = AwareDatetime


class Strict(BaseModel):
    """A frozen value that takes exactly its fields, of exactly their types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Read JSON.

        Raises
        ------
        MembershipError
            The bytes are not this kind of file, or one of another version of wardround.
        """
        kind = cls.__name__.lower().removeprefix("signed")
        if len(data) > _LARGEST:
            raise MembershipError(f"not a {kind}: it has {len(data)} bytes, at most {_LARGEST} are read", "format")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "file"
            raise MembershipError(
                f"not a {kind} that this version of wardround reads: {where}: {first['msg'].lower()}", "format"
            ) from None

    def json_bytes(self) -> bytes:
        """Return the value as JSON for a file."""
        return self.model_dump_json(indent=1).encode() + b"\n"
