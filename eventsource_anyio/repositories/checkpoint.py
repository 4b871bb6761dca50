"""Checkpoints: how far a reader has got, under the reader's name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from msgspec import Struct

from ..errors import CheckpointConflictError
from ..ids import check_name

_LARGEST = 2**63 - 1


class SaveCheckpoint(Struct, frozen=True, gc=False):
    """A step of a unit of writing: set a checkpoint, if it is at `expected` (None: wherever)."""

    name: str
    position: int
    expected: int | None

    def check(self, actual: int) -> None:
        """Raise if the checkpoint may not be set from where it is; 0: it was never saved."""
        if self.expected is not None and self.expected != actual:
            raise CheckpointConflictError(self.name, self.expected, actual)


class CheckpointRepository:
    """Where readers stand: a position under a name."""

    __slots__ = ("_read", "_write")

    def __init__(
        self,
        read: Callable[[str], Awaitable[int]],
        write: Callable[[Sequence[SaveCheckpoint]], Awaitable[object]],
    ) -> None:
        self._read = read
        self._write = write

    async def get(self, name: str) -> int:
        """The position that was saved last; 0 if none was."""
        return await self._read(check_name("name", name))

    async def save(self, name: str, position: int, *, expected: int | None = None) -> None:
        """Set it, to any position from 0: further on, or back, for reading again.

        With `expected` it is set only if it is there now (0: it was never saved), else
        `CheckpointConflictError` is raised. So of several that got the same position one wins.
        """
        name = check_name("name", name)
        position = _check_position("position", position)
        if expected is not None:
            expected = _check_position("expected", expected)
        await self._write((SaveCheckpoint(name, position, expected),))


def _check_position(what: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be a position, a number from 0, not {value!r}")
    if not 0 <= value <= _LARGEST:
        raise ValueError(f"{what} must be a position from 0 to 2**63 - 1, not {value!r}")
    return int(value)
