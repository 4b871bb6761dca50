"""Streams of JetStream: made where they are missing, and asked for what they have.

- A stream begins with a sequence made of the time, so one that was lost and made anew goes on after
  the former, and no sequence comes back.
- All of it runs on asyncio, as `nats_connection` does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.json import encode

from ..errors import StorageError
from .nats_connection import Answer, Call, Connection, RefusedError

if TYPE_CHECKING:
    from nats.aio.msg import Msg

NO_STREAM, NAME_IN_USE, NO_MESSAGE = 10059, 10058, 10037
NO_SUCH_SEQUENCE = (10043, 10057)
WRONG_SEQUENCE = (10071, 10164)
_BYTES = 1 << 20  # of messages that are asked for at once


class Config(Struct, frozen=True):
    subjects: Sequence[str] = ()
    first_seq: int = 1
    allow_direct: bool = False


class State(Struct, frozen=True):
    last_seq: int = 0
    messages: int = 0


class Stream(Answer, frozen=True, kw_only=True):
    config: Config = Config()
    state: State = State()


class Stored(Answer, frozen=True, kw_only=True):
    seq: int = 0


class Done(Answer, frozen=True, kw_only=True):
    success: bool = False


class RawMessage(Struct, frozen=True):
    seq: int
    subject: str = ""
    data: str = ""
    hdrs: str = ""


class Found(Answer, frozen=True, kw_only=True):
    message: RawMessage | None = None


async def make_stream(
    connection: Connection, name: str, subject: str, config: Mapping[str, object]
) -> Stream:
    """A stream of this name, made if it is not there. What is there keeps what it was made with."""
    try:
        found = await stream_info(connection, name)
    except RefusedError as error:
        if error.code != NO_STREAM:
            raise
        try:
            config = {"name": name, "subjects": [subject], "allow_direct": True, **config}
            config["first_seq"] = time.time_ns() // 1000
            return await connection.api(f"STREAM.CREATE.{name}", config, Stream)
        except RefusedError as error:
            if error.code != NAME_IN_USE:
                raise
        found = await stream_info(connection, name)  # somebody else was faster
    if found.config.subjects != [subject] or not found.config.allow_direct:
        raise StorageError(
            f"NATS at {connection.where} has a stream {name} that is not this library's.\n"
            f"  It has {found.config.subjects}, not {subject}, or does not allow direct reads.\n"
            "  Give another name, or delete the stream if nobody needs it."
        )
    return found


async def stream_info(connection: Connection, name: str) -> Stream:
    return await connection.api(f"STREAM.INFO.{name}", {}, Stream)


def get_from(stream: str, sequence: int, count: int, share: int = 1, subject: str = "") -> Call:
    """A call for the messages from a sequence on: up to a number, and a share of the bytes."""
    request: dict[str, object] = {"seq": max(1, sequence), "batch": count}
    request["max_bytes"] = _BYTES // share
    if subject:
        request["next_by_subj"] = subject
    return Call(f"$JS.API.DIRECT.GET.{stream}", encode(request), many=True)


def answered(call: Call) -> tuple[Sequence[Msg], bool]:
    """The messages of such a call, and whether there were no more at that time."""
    *messages, last = call.answers
    headers = last.headers or {}
    return messages, headers["Status"] == "404" or headers.get("Nats-Num-Pending") == "0"


def header(message: Msg, name: str) -> str:
    return (message.headers or {})[name]


def sequence_of(message: Msg) -> int:
    return int(header(message, "Nats-Sequence"))
