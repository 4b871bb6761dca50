"""The Redis server for tests: found, started, gone with who started it, or missed with a reason."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eventsource_anyio.testing import redis

BINARY = redis.redis_binary() or Path()
needs_binary = pytest.mark.skipif(Path() == BINARY, reason="no redis-server on PATH")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@needs_binary
def test_a_server_is_there_while_it_is_entered():
    with redis.RedisServer(BINARY) as server:
        directory, pid = server.directory, server.pid
        assert server.url.startswith("redis://127.0.0.1:")
        server.stop()
        assert not alive(pid)
        server.start()
        server.kill()
        with pytest.raises(RuntimeError, match="not stopped"):
            server.start()
            server.start()
        pid = server.pid
    assert not alive(pid)
    assert not directory.exists()


@needs_binary
def test_two_servers_find_ports_of_their_own(monkeypatch):
    with redis.RedisServer(BINARY) as one:
        ports = iter([one.port, one.port + 1])
        monkeypatch.setattr(secrets, "choice", lambda _: next(ports))
        with redis.RedisServer(BINARY) as other:
            assert other.url != one.url


@needs_binary
def test_a_server_that_does_not_start_says_why():
    with pytest.raises(RuntimeError, match="did not start:"):
        with redis.RedisServer(BINARY, settings=("--no-such-setting", "1")):
            pass


@needs_binary
def test_a_server_does_not_outlive_who_started_it():
    script = (
        "import os, signal\n"
        "from eventsource_anyio.testing.redis import *\n"
        "with RedisServer(redis_binary()) as server:\n"
        "    print(server.pid, server.directory, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    pid, directory = said.split()
    deadline = time.monotonic() + 20
    while alive(int(pid)) or Path(directory).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_your_own_server_wins(monkeypatch):
    monkeypatch.setenv("EVENTSOURCE_REDIS_URL", "redis://elsewhere:1/2")
    with redis.redis_server() as server:
        assert server.url == "redis://elsewhere:1/2"


def test_without_one_it_is_said_what_would_bring_one(monkeypatch):
    monkeypatch.delenv("EVENTSOURCE_REDIS_URL", raising=False)
    monkeypatch.setenv("EVENTSOURCE_REDIS_BIN", "/nowhere/redis-server")
    with pytest.raises(redis.RedisUnavailableError, match="apt-get install redis-server"):
        with redis.redis_server():
            pass


@pytest.mark.parametrize("ci", ["", "true"])
def test_tests_that_need_one_are_skipped_or_fail_in_ci(pytester, monkeypatch, ci):
    monkeypatch.delenv("EVENTSOURCE_REDIS_URL", raising=False)
    monkeypatch.setenv("EVENTSOURCE_REDIS_BIN", "/nowhere/redis-server")
    monkeypatch.setenv("CI", ci)
    pytester.makepyfile("def test_it(redis_url): pass")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(errors=1) if ci else result.assert_outcomes(skipped=1)
