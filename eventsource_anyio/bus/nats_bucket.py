"""Entries in a key-value bucket of NATS.

- A key is a subject: its parts are tokens. A revision is the sequence of the value, which is the
  only one of its subject that is kept.
- Values are read at the stream's leader, so what was put is there for everybody; lists are not.
- An entry is deleted by its sequence, which leaves nothing behind. The markers that NATS's own
  tools leave instead are no entries.
"""

from __future__ import annotations

import builtins
from base64 import b64decode
from collections.abc import Mapping, Sequence

from msgspec.json import encode

from .broker import Entry, EntryConflictError
from .nats_connection import Call, Connection, RefusedError
from .nats_jetstream import (
    NO_MESSAGE,
    NO_SUCH_SEQUENCE,
    WRONG_SEQUENCE,
    Done,
    Found,
    RawMessage,
    Stored,
    answered,
    get_from,
    header,
    make_stream,
    sequence_of,
)

_MARKER = "KV-Operation"
_AT_ONCE = 256


class Bucket:
    def __init__(self, connection: Connection, name: str, config: Mapping[str, object]) -> None:
        self._connection = connection
        self.stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."
        self._config = {**config, "max_msgs_per_subject": 1}
        self._there = False

    def forget(self) -> None:
        """The stream may be gone."""
        self._there = False

    async def make(self) -> None:
        if not self._there:
            await make_stream(self._connection, self.stream, f"{self._prefix}>", self._config)
            self._there = True

    async def get(self, key: str) -> Entry | None:
        found = await self._raw(key)
        if found is None or _is_marker(found):
            return None
        return Entry(key, b64decode(found.data), str(found.seq))

    async def _raw(self, key: str) -> RawMessage | None:
        await self.make()
        return await self._get({"last_by_subj": self._subject(key)})

    async def _get(self, request: object) -> RawMessage | None:
        try:
            answer = await self._connection.api(f"STREAM.MSG.GET.{self.stream}", request, Found)
        except RefusedError as error:
            if error.code == NO_MESSAGE:
                return None
            raise
        return answer.message

    async def list(self, directory: str) -> Sequence[Entry]:
        await self.make()
        found: dict[str, Entry] = {}  # one that is put meanwhile comes again, further on
        subject = self._subject(f"{directory}/*")
        sequence, complete = 0, False
        while not complete:
            call = get_from(self.stream, sequence, _AT_ONCE, subject=subject)
            await self._connection.ask([call])
            messages, complete = answered(call)
            for message in messages:
                key = header(message, "Nats-Subject").removeprefix(self._prefix).replace(".", "/")
                sequence = sequence_of(message) + 1
                if _MARKER in (message.headers or {}):
                    found.pop(key, None)
                else:
                    found[key] = Entry(key, message.data, str(sequence - 1))
        return builtins.list(found.values())

    async def put(self, key: str, value: bytes, expected: str | None) -> str:
        await self.make()
        try:
            return await self._put(key, value, expected or "0")
        except EntryConflictError:
            found = None if expected is not None else await self._raw(key)
            if found is None or not _is_marker(found):
                raise
            return await self._put(key, value, str(found.seq))

    async def _put(self, key: str, value: bytes, expected: str) -> str:
        headers = {"Nats-Expected-Last-Subject-Sequence": expected}
        call = Call(self._subject(key), value, headers)
        await self._connection.ask([call], once=True)
        try:
            return str(call.decoded(Stored).seq)
        except RefusedError as error:
            if error.code in WRONG_SEQUENCE:
                raise EntryConflictError(key) from None
            raise

    async def delete(self, key: str, expected: str) -> None:
        await self.make()
        found = await self._get({"seq": int(expected)})
        if found is None or found.subject != self._subject(key):
            raise EntryConflictError(key)
        request = {"seq": int(expected), "no_erase": True}
        try:
            call = Call(f"$JS.API.STREAM.MSG.DELETE.{self.stream}", encode(request))
            await self._connection.ask([call], once=True)
            call.decoded(Done)
        except RefusedError as error:
            if error.code in NO_SUCH_SEQUENCE:
                raise EntryConflictError(key) from None
            raise

    def _subject(self, key: str) -> str:
        return self._prefix + key.replace("/", ".")


def _is_marker(message: RawMessage) -> bool:
    return _MARKER.encode() in b64decode(message.hdrs)
