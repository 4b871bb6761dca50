"""Events in NATS messages, several in each, and the ends of streams that were heard live.

- A NATS message is a pack: a MessagePack array of pairs, an event's id and its payload. A pack is
  stored as a whole or not at all, so there is no gap in what was sent, whatever fails.
- A stream of NATS is a partition, and a sequence in it is a pack's. An offset is a sequence, which
  is after all of its pack, or a sequence and how many messages of its pack are before it.
- What was heard is without gaps, or it is forgotten: hearing is a hint, and reading is the truth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from msgspec import DecodeError, Struct
from msgspec.msgpack import Decoder, Encoder

from .broker import Message, ReceivedMessage

_EVENTS, _BYTES = 100, 256 * 1024  # in a pack, unless a single event is larger
_HEARD = 1 << 20  # bytes that are kept of each partition

_encode = Encoder().encode
_decode = Decoder(list[tuple[str, bytes]]).decode


class Place(Struct, frozen=True, gc=False):
    """After all packs before `sequence`, and after `skip` messages of the one that has it."""

    sequence: int
    skip: int = 0


FIRST = Place(0)


class Pack(Struct, frozen=True, gc=False):
    sequence: int
    messages: Sequence[ReceivedMessage]
    size: int


def place_of(offset: str) -> Place:
    if not offset:
        return FIRST
    sequence, _, skip = offset.partition(".")
    return Place(int(sequence), int(skip)) if skip else Place(int(sequence) + 1)


def packed(messages: Iterable[Message]) -> Iterator[bytes]:
    """The payloads for messages of one partition."""
    pairs: list[tuple[str, bytes]] = []
    size = 0
    for message in messages:
        if pairs and (len(pairs) == _EVENTS or size + len(message.payload) > _BYTES):
            yield _encode(pairs)
            pairs, size = [], 0
        pairs.append((message.message_id, message.payload))
        size += len(message.payload)
    if pairs:
        yield _encode(pairs)


def unpacked(partition: int, sequence: int, payload: bytes) -> Pack:
    try:
        pairs = _decode(payload)
    except DecodeError:
        pairs = [(str(sequence), payload)]  # somebody else's: whoever reads it says so
    last = len(pairs)
    messages = [
        ReceivedMessage(
            partition,
            f"{sequence}.{number}" if number < last else str(sequence),
            message_id,
            payload,
        )
        for number, (message_id, payload) in enumerate(pairs, 1)
    ]
    return Pack(sequence, messages, len(payload))


class Heard:
    """The last packs of a partition: all that are from `start` to before `end`, both sequences."""

    __slots__ = ("_packs", "_size", "density", "end", "reached", "start")

    def __init__(self) -> None:
        self.reached = 0  # the server has had what is before it, since we are connected
        self.density = 1.0  # messages in a pack, lately
        self.forget()

    def forget(self) -> None:
        self.start = self.end = -1
        self._packs: deque[Pack] = deque()
        self._size = 0

    def nothing_from(self, sequence: int) -> None:
        """There is nothing there yet, as reading has shown."""
        if self.end < sequence:
            self.forget()
            self.start = self.end = sequence

    def add(self, pack: Pack) -> None:
        if pack.sequence < self.end:
            return
        if pack.sequence != self.end:
            self.forget()
            self.start = pack.sequence
        self.end = pack.sequence + 1
        self.reached = max(self.reached, self.end)
        self._packs.append(pack)
        self._size += pack.size
        while self._size > _HEARD and len(self._packs) > 1:
            dropped = self._packs.popleft()
            self._size -= dropped.size
            self.start = dropped.sequence + 1

    def covers(self, place: Place) -> bool:
        inside = self.start <= place.sequence < self.end
        return inside or (place.sequence == self.end and not place.skip)

    def after(self, place: Place, limit: int) -> list[ReceivedMessage]:
        """Some of what is after a place that it covers; of its last pack all."""
        found: list[ReceivedMessage] = []
        for pack in islice(self._packs, place.sequence - self.start, None):
            if len(found) >= limit:
                break
            found += after(place, pack)
        return found


def after(place: Place, pack: Pack) -> Sequence[ReceivedMessage]:
    """The messages of a pack that are after a place."""
    if pack.sequence == place.sequence and place.skip:
        return pack.messages[place.skip :]
    return pack.messages


def before(place: Place, pack: Pack) -> Sequence[ReceivedMessage]:
    """The messages of a pack, not one after the place's, that are not after the place."""
    return pack.messages[: place.skip] if pack.sequence == place.sequence else pack.messages
