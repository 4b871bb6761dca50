"""What comes out of a task group of this library: one error where there is but one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from .errors import StoreClosedError


def only_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error of a group that holds but one, however deep, else the group.

    A store that is closed under several tasks is one error.
    """
    errors = list(_leaves(group))
    closed = all(isinstance(error, StoreClosedError) for error in errors)
    return errors[0] if closed or len(errors) == 1 else group


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from _leaves(one)
    else:
        yield error
