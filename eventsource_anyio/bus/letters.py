"""Dead letters: events that handlers of a subscription have failed with, and those behind them.

An entry a stream says which versions are set aside; an entry a letter holds the event, since the
broker does not keep its messages for ever.

- A letter is written before its stream's entry counts it in, and the entry is written where it has
  the revision that was known. Whoever retries deletes the entry likewise, after the last letter. So
  either a new letter finds the stream set aside, and the retry finds the letter, or the event is
  handled as usual: none is lost.
- A letter outside of the versions that its stream's entry names was written by somebody who died
  before it counted. Its event was delivered again, so it is nobody's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime

from attrs import evolve, frozen
from msgspec import Struct
from msgspec.json import Decoder
from msgspec.json import Encoder as JsonEncoder
from msgspec.msgpack import Decoder as LetterDecoder
from msgspec.msgpack import Encoder

from ..errors import EventDecodeError
from .broker import Broker, Entry, EntryConflictError
from .delivering import Handlers
from .encoding import Envelope, decode, key_part, open_payload, partition_of

_logger = logging.getLogger("eventsource_anyio.bus")


@frozen
class DeadLetters:
    """What is set aside of one stream: the events of the versions `first` to `last` that the
    subscription wants, `events` of them. `error` is what the first one failed with last."""

    stream_id: str
    first: int
    last: int
    events: int
    error: str
    since: datetime
    revision: str | None = None


class _Value(Struct):
    stream_id: str
    first: int
    last: int
    events: int
    error: str
    since: datetime


class _Letter(Struct, array_like=True):
    payload: bytes
    done: list[str]  # handlers that have handled it


_encode_value, _decode_value = JsonEncoder().encode, Decoder(_Value).decode
_encode_letter, _decode_letter = Encoder().encode, LetterDecoder(_Letter).decode


class DeadLetterRepository:
    """The dead letters of one subscription."""

    def __init__(self, broker: Broker, subscription: str, partitions: int) -> None:
        self._broker = broker
        self._partitions = partitions
        self._directory = f"subscriptions/{key_part(subscription)}"

    async def all(self) -> list[DeadLetters]:
        """By their stream ids."""
        found = await self._broker.list(f"{self._directory}/parked")
        return sorted((_parked(one) for one in found), key=lambda one: one.stream_id)

    async def of(self, partition: int) -> dict[str, DeadLetters]:
        return {
            one.stream_id: one
            for one in await self.all()
            if partition_of(one.stream_id, self._partitions) == partition
        }

    async def get(self, stream_id: str) -> DeadLetters | None:
        entry = await self._broker.get(self._key(stream_id))
        return None if entry is None else _parked(entry)

    async def add(
        self,
        known: DeadLetters | None,
        envelope: Envelope,
        payload: bytes,
        *,
        error: BaseException | None = None,
        done: Sequence[str] = (),
    ) -> DeadLetters | None:
        """Set one more event aside; what is then. None: its stream is not set aside any more."""
        stream_id, version = envelope.stream_id, envelope.version
        letter = self._letter_key(stream_id, version)
        revision: str | None = None
        value = _encode_letter(_Letter(payload, list(done)))
        with suppress(EntryConflictError):  # it was written before, by somebody who died
            revision = await self._broker.put(letter, value, None)
        if known is None:
            text = f"{type(error).__name__}: {error}"[:2000]
            known = DeadLetters(stream_id, version, version, 1, text, datetime.now(UTC))
        else:
            first, last = min(known.first, version), max(known.last, version)
            known = evolve(known, first=first, last=last, events=known.events + 1)
        try:
            return await self.save(known)
        except EntryConflictError:
            if revision is not None:
                with suppress(EntryConflictError):
                    await self._broker.delete(letter, revision)
            return None

    async def save(self, parked: DeadLetters) -> DeadLetters:
        """`EntryConflictError` if somebody else has changed it."""
        value = _Value(
            parked.stream_id, parked.first, parked.last, parked.events, parked.error, parked.since
        )
        key = self._key(parked.stream_id)
        revision = await self._broker.put(key, _encode_value(value), parked.revision)
        return evolve(parked, revision=revision)

    async def letters(self, stream_id: str) -> list[tuple[int, Entry]]:
        """With their versions, by which they are sorted."""
        found = await self._broker.list(self._letters(stream_id))
        return sorted((int(one.key.rpartition("/")[2]), one) for one in found)

    async def remove(self, parked: DeadLetters) -> None:
        await self._broker.delete(self._key(parked.stream_id), parked.revision or "")

    async def remove_letter(self, letter: Entry) -> None:
        with suppress(EntryConflictError):
            await self._broker.delete(letter.key, letter.revision)

    def _key(self, stream_id: str) -> str:
        return f"{self._directory}/parked/{key_part(stream_id)}"

    def _letters(self, stream_id: str) -> str:
        return f"{self._directory}/letters/{key_part(stream_id)}"

    def _letter_key(self, stream_id: str, version: int) -> str:
        return f"{self._letters(stream_id)}/{version:012}"


def _parked(entry: Entry) -> DeadLetters:
    value = _decode_value(entry.value)
    return DeadLetters(
        value.stream_id,
        value.first,
        value.last,
        value.events,
        value.error,
        value.since,
        entry.revision,
    )


async def retry(repository: DeadLetterRepository, handlers: Handlers, stream_id: str) -> int:
    """Handle what is set aside of a stream, in order; how many events that were."""
    handled = 0
    while (parked := await repository.get(stream_id)) is not None:
        letters = await repository.letters(stream_id)
        left = [one for one in letters if parked.first <= one[0] <= parked.last]
        for number, (version, letter) in enumerate(left):
            try:
                await _handle(handlers, letter)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"[:2000]
                again = evolve(parked, first=version, events=len(left) - number, error=text)
                with suppress(EntryConflictError):
                    await repository.save(again)
                raise
            await repository.remove_letter(letter)
            handled += 1
        try:
            await repository.remove(parked)
        except EntryConflictError:
            continue  # there is more by now
        for version, letter in letters:
            if version < parked.first:
                await repository.remove_letter(letter)
        break
    return handled


async def _handle(handlers: Handlers, letter: Entry) -> None:
    content = _decode_letter(letter.value)
    envelope = open_payload(content.payload)
    if envelope is not None and handlers.want(envelope.event_type):
        stored = decode(envelope)
        if isinstance(stored, EventDecodeError):
            raise stored
        await handlers.call(stored, set(content.done))


async def discard(repository: DeadLetterRepository, stream_id: str) -> int:
    """Forget what is set aside of a stream; how many events that were."""
    while (parked := await repository.get(stream_id)) is not None:
        letters = await repository.letters(stream_id)
        try:
            await repository.remove(parked)
        except EntryConflictError:
            continue
        for version, letter in letters:
            if version <= parked.last:
                await repository.remove_letter(letter)
        _logger.warning(
            "discarded %d dead letters of %s, versions %d to %d, set aside after %s",
            *(parked.events, stream_id, parked.first, parked.last, parked.error),
        )
        return parked.events
    return 0
