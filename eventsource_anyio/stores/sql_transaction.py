"""A transaction with the user's own SQL in it: what every store that has one guarantees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from .transaction import Transaction

if TYPE_CHECKING:
    from sqlalchemy import Executable, Result
    from sqlalchemy.orm import Session

P = ParamSpec("P")
T = TypeVar("T")


class SQLTransaction(Transaction, ABC):
    """A `Transaction` that also runs the user's SQL, by SQLAlchemy: all of it together or nothing.

    It begins with the first SQL and ends with the block, which writes the appends, checkpoints,
    messages and documents, and commits. If a cancellation of a scope comes out of the block,
    nothing was stored.

    What goes wrong with SQL is raised as SQLAlchemy raises it, at the end of the block too, where
    the ORM flushes and deferred constraints are checked. Let it leave the block, and so a
    cancelled call, because PostgreSQL refuses all that would follow; or confine an error inside
    `run_sync` by `session.begin_nested()`. To commit or to roll back is the block's alone.
    """

    __slots__ = ()

    def _can_follow(self) -> bool:
        return True

    @abstractmethod
    async def execute(self, statement: Executable, parameters: object = None) -> Result[Any]:
        """Run a statement of SQLAlchemy, Core or ORM; the result is buffered.

        `parameters` are a dict, or a list of dicts to run it with each.
        """

    @abstractmethod
    async def run_sync(
        self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a function with the ORM's `Session` of this transaction.

        Inside it everything of the ORM works as in synchronous code, lazy loading too, and its SQL
        does not block the event loop. The function's own code may run on the event loop's thread or
        on another one, so it neither blocks nor touches what belongs to the event loop.
        """
