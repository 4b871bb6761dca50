"""Partitions as streams of JetStream.

- The packs of one partition are sent one after the other was stored, so there is never a gap before
  what is stored.
- Reading asks a stream for what is after a place, and keeps nothing at the server. What a stream
  has stored it also publishes; what was heard of that is not asked for, and wakes whoever waits.
  NATS may lose it, so who has waited in vain asks again.
- All of it runs on asyncio, as `nats_connection` does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import anyio

from .broker import Message, Reading, ReceivedMessage
from .nats_connection import Call, Connection
from .nats_jetstream import (
    Stored,
    Stream,
    answered,
    get_from,
    make_stream,
    sequence_of,
    stream_info,
)
from .nats_packs import FIRST, Heard, Pack, Place, after, before, packed, place_of, unpacked

if TYPE_CHECKING:
    from nats.aio.msg import Msg

_UNHEARD = 60.0  # seconds after which a partition that nobody reads is no longer listened to


class Partitions:
    """All partitions of one name, each made when it is first used."""

    def __init__(
        self, connection: Connection, name: str, config: Mapping[str, object], keep: int
    ) -> None:
        self._connection = connection
        self._name = name
        self._config = {**config, "max_msgs": keep}
        self._begins: dict[int, int] = {}  # the first sequences of streams that are there
        self._heard: defaultdict[int, Heard] = defaultdict(Heard)
        self._listening: dict[int, float] = {}  # until when at least
        self._news = anyio.Event()
        connection.on_change = self._look_again

    def forget(self) -> None:
        """Streams may be gone."""
        self._begins.clear()

    def close(self) -> None:
        self._heard.clear()
        self._listening.clear()

    async def _have(self, partitions: Iterable[int]) -> None:
        for partition in partitions:
            if partition not in self._begins:
                subject = self._subject(partition)
                republish = {"src": subject, "dest": self._stored(partition)}
                config = {**self._config, "republish": republish}
                made = await make_stream(self._connection, self._stream(partition), subject, config)
                self._begins[partition] = made.config.first_seq

    def _stream(self, partition: int) -> str:
        return f"{self._name}_events_{partition}"

    def _subject(self, partition: int) -> str:
        return f"{self._name}.events.{partition}"

    # Sending -------------------------------------------------------------------------------------

    async def send(self, messages: Sequence[Message]) -> None:
        partitions: defaultdict[int, list[Message]] = defaultdict(list)
        for message in messages:
            partitions[message.partition].append(message)
        await self._have(partitions)
        calls_of_each = [
            [Call(self._subject(partition), pack) for pack in packed(its_messages)]
            for partition, its_messages in partitions.items()
        ]
        for together in zip_longest(*calls_of_each):
            calls = [call for call in together if call is not None]
            await self._connection.ask(calls)
            for call in calls:
                call.decoded(Stored)

    # Reading -------------------------------------------------------------------------------------

    async def read(self, offsets: Mapping[int, str], limit: int, wait: float) -> Reading:
        places = {partition: place_of(offset) for partition, offset in offsets.items()}
        deadline = anyio.current_time() + wait
        await self._have(places)
        await self._listen(places, deadline)
        while True:
            news = self._news
            reading = await self._look(places, limit)
            if reading.messages:
                return reading
            with anyio.CancelScope(deadline=deadline) as waiting:
                await news.wait()
            if waiting.cancelled_caught:
                for partition in places:
                    self._heard[partition].forget()
                return reading

    async def _look(self, places: Mapping[int, Place], limit: int) -> Reading:
        """What there is now."""
        asked = {p: place for p, place in places.items() if not self._heard[p].covers(place)}
        lost: set[int] = set()
        found = await self._ask_for(asked, limit, lost) if asked else []
        heard = {p: place for p, place in places.items() if p not in asked}
        heard = {p: place for p, place in heard.items() if self._heard[p].covers(place)}
        for most in (limit, max(1, limit // len(places))):
            news = [one for p, place in heard.items() for one in self._heard[p].after(place, most)]
            if len(news) <= limit:
                break
        return Reading([*found, *news], lost)

    async def _ask_for(
        self, places: Mapping[int, Place], limit: int, lost: set[int]
    ) -> list[ReceivedMessage]:
        """What the server has; adds to the partitions in which something is lost."""
        share = max(1, limit // len(places))
        calls: list[Call] = []
        for partition, place in places.items():
            count = int(share / self._heard[partition].density) + 1
            calls.append(get_from(self._stream(partition), place.sequence, count, len(places)))
        await self._connection.ask(calls)
        found: list[ReceivedMessage] = []
        gone_back: dict[int, Place] = {}
        for (partition, place), call in zip(places.items(), calls, strict=True):
            packs, complete = _packs(partition, call)
            heard = self._heard[partition]
            if packs:
                messages = [one for pack in packs for one in after(place, pack)]
                found += messages
                heard.density = max(1.0, len(messages) / len(packs))
                heard.reached = max(heard.reached, packs[-1].sequence + 1)
                expected = place.sequence or await self._begin(partition, packs[0].sequence)
                if packs[0].sequence != expected:
                    lost.add(partition)
            elif place.sequence > heard.reached and not await self._reaches(partition, place):
                gone_back[partition] = FIRST
                continue
            if complete:
                heard.nothing_from(packs[-1].sequence + 1 if packs else place.sequence)
        if gone_back:
            lost.update(gone_back)
            found += await self._ask_for(gone_back, limit, lost)
        return found

    async def _begin(self, partition: int, first: int) -> int:
        """The first sequence that the partition ever had."""
        if self._begins.get(partition) != first:
            self._begins.pop(partition, None)  # somebody else may have made the stream anew
            await self._have([partition])
        return self._begins[partition]

    async def _reaches(self, partition: int, place: Place) -> bool:
        """Whether the server still has what was before a place, or knows that it had it."""
        end = (await stream_info(self._connection, self._stream(partition))).state.last_seq + 1
        self._heard[partition].reached = end
        return place.sequence <= end

    async def read_back(self, partition: int, upto: str, limit: int) -> Sequence[ReceivedMessage]:
        place = place_of(upto)
        found: list[ReceivedMessage] = []
        end, window = place.sequence + bool(place.skip), 8
        await self._have([partition])
        while end > 0 and len(found) < limit:
            start, window = max(0, end - window), 4 * window
            packs = await self._between(partition, start, end)
            found = [one for pack in packs for one in before(place, pack)] + found
            if not packs or packs[0].sequence > start:
                break
            end = start
        return found[-limit:]

    async def _between(self, partition: int, start: int, end: int) -> Sequence[Pack]:
        found: list[Pack] = []
        while start < end:
            call = get_from(self._stream(partition), start, end - start)
            await self._connection.ask([call])
            packs, complete = _packs(partition, call)
            found += [pack for pack in packs if pack.sequence < end]
            if complete or not packs:
                break
            start = packs[-1].sequence + 1
        return found

    async def ends(self, partitions: Sequence[int]) -> Mapping[int, str]:
        await self._have(partitions)
        streams = [self._stream(partition) for partition in partitions]
        calls = [Call(f"$JS.API.STREAM.INFO.{stream}", b"") for stream in streams]
        await self._connection.ask(calls)
        ends = [str(call.decoded(Stream).state.last_seq) for call in calls]
        return dict(zip(partitions, ends, strict=True))

    # Hearing -------------------------------------------------------------------------------------

    async def _listen(self, partitions: Iterable[int], until: float) -> None:
        now = anyio.current_time()
        for partition in partitions:
            known = partition in self._listening
            self._listening[partition] = max(self._listening.get(partition, now), until)
            if not known:
                try:
                    await self._connection.listen(self._stored(partition), self._hear)
                except BaseException:
                    del self._listening[partition]
                    raise
        for partition, used in list(self._listening.items()):
            if used + _UNHEARD < now:
                del self._listening[partition], self._heard[partition]
                await self._connection.stop_listening(self._stored(partition))

    def _stored(self, partition: int) -> str:
        return f"{self._name}.stored.{partition}"

    async def _hear(self, message: Msg) -> None:
        partition = int(message.subject.rpartition(".")[2])
        self._heard[partition].add(unpacked(partition, sequence_of(message), message.data))
        self._wake()

    def _look_again(self) -> None:
        """What is said while there is no connection is not heard."""
        self._heard.clear()
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = anyio.Event()


def _packs(partition: int, call: Call) -> tuple[Sequence[Pack], bool]:
    messages, complete = answered(call)
    return [unpacked(partition, sequence_of(one), one.data) for one in messages], complete
