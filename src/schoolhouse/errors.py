"""Every error a user can cause: what was found, what was required, where, and what to do.

Exit codes are the contract of the command line: 2 configuration, 3 data, 4 non-finite, 5 memory,
6 storage or checkpoint, 7 peer failure, 8 refused for safety, 75 stopped and resumable.
"""

from __future__ import annotations


class SchoolhouseError(Exception):
    """A fault the user can mend. Its text has four parts and fits six lines."""

    exit_code = 1

    def __init__(self, found: str, *, required: str, where: str, remedy: str) -> None:
        super().__init__(found)
        self.found = found
        self.required = required
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        return (
            f"{self.found}\n  where:    {self.where}\n  required: {self.required}\n  to do:    {self.remedy}"
        )

    def __reduce__(self) -> tuple:
        """Keep the four parts when a worker process hands the error to its parent."""
        return _rebuild, (type(self), self.found, self.required, self.where, self.remedy)


def _rebuild(kind: type[SchoolhouseError], found: str, required: str, where: str, remedy: str) -> SchoolhouseError:
    return kind(found, required=required, where=where, remedy=remedy)


class ConfigError(SchoolhouseError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class DataError(SchoolhouseError):
    """A row or a source is wrong; `where` begins with the row's origin."""

    exit_code = 3


class TemplateError(DataError):
    """The chat template cannot serve this conversation as the data has it."""


class NonFiniteError(SchoolhouseError):
    """The loss or a gradient is NaN or infinite; nothing was updated."""

    exit_code = 4


class MeshError(ConfigError):
    """The processes cannot be laid out as the recipe asks, or the layout cannot work for this model."""


class MemoryFault(SchoolhouseError):
    """What the recipe asks for does not fit the memory."""

    exit_code = 5


class PeerError(SchoolhouseError):
    """Another process of the run died or hangs."""

    exit_code = 7


class CheckpointError(SchoolhouseError):
    """A checkpoint, an export or the storage below them is damaged, incomplete or full."""

    exit_code = 6


class SafetyError(SchoolhouseError):
    """Something unsafe was asked for and refused."""

    exit_code = 8


class ModelError(ConfigError):
    """The model cannot be loaded, or cannot be trained exactly by this program."""


OF_A_FUNCTION = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
)
"""What a user's own function raises on what it does not expect: of a row, or of an answer."""


class Stopped(BaseException):
    """The user asked the run to stop; it was saved and can be resumed (exit code 75). No library may swallow it."""

    exit_code = 75
