"""The documentation runs: the Python blocks of a page, one after another, on asyncio and on Trio.

A `text` block directly after a Python block is what was printed since the one before it. A Python
block after `<!-- not run -->` is only compiled. A page that names `DATABASE_URL` gets an empty
PostgreSQL database under that name, and one that names `REDIS_URL` or `NATS_URL` an empty server.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from eventsource_anyio.testing.nats import NATSServer, nats_binary
from eventsource_anyio.testing.redis import RedisServer, redis_binary

ROOT = Path(__file__).parent.parent
PYTHON = re.compile(
    r"(?P<skip><!-- not run -->\s*)?"
    r"^(?P<indent> *)```python\b[^\n]*\n(?P<source>.*?)^(?P=indent)```[ ]*\n"
    r"(?:\s*^(?P=indent)```text\b[^\n]*\n(?P<printed>.*?)^(?P=indent)```[ ]*$)?",
    re.MULTILINE | re.DOTALL,
)
# What runs a page: given the loop and the page's name as arguments and its blocks as standard
# input, it prints what each of them has printed.
PROGRAM = """if True:
    import contextlib, functools, io, json, sys, types
    import anyio
    backend, name = sys.argv[1:]
    anyio.run = functools.partial(anyio.run, backend=backend)
    page = sys.modules["__main__"] = types.ModuleType("__main__")
    printed = []
    for line, source in json.load(sys.stdin):
        code = compile("\\n" * line + source, name, "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, page.__dict__)
        printed.append(out.getvalue())
    json.dump(printed, sys.stdout)
"""


class Block(NamedTuple):
    line: int
    source: str
    runs: bool
    printed: str | None


def blocks(text: str) -> list[Block]:
    return [
        Block(
            text.count("\n", 0, found.start("source")),
            textwrap.dedent(found["source"]),
            found["skip"] is None,
            None if found["printed"] is None else textwrap.dedent(found["printed"]),
        )
        for found in PYTHON.finditer(text)
    ]


PAGES = {
    str(page.relative_to(ROOT)): found
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if page.is_file() and (found := blocks(page.read_text(encoding="utf-8")))
}


@pytest.fixture
def empty_redis_url(request):
    if binary := redis_binary():
        with RedisServer(binary) as server:
            yield server.url
    else:
        yield request.getfixturevalue("redis_url")  # which says why there is none


@pytest.fixture
def empty_nats_url(request):
    if binary := nats_binary():
        with NATSServer(binary) as server:
            yield server.url
    else:
        yield request.getfixturevalue("nats_url")  # which says why there is none


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("page", PAGES)
def test_page_runs_and_prints_what_it_says(page, backend, tmp_path, request):
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    run = [block for block in PAGES[page] if block.runs]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    if any("DATABASE_URL" in block.source for block in run):
        environment["DATABASE_URL"] = request.getfixturevalue("postgresql_dsn")
    if any("REDIS_URL" in block.source for block in run):
        environment["REDIS_URL"] = request.getfixturevalue("empty_redis_url")
    if any("NATS_URL" in block.source for block in run):
        environment["NATS_URL"] = request.getfixturevalue("empty_nats_url")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, backend, page],
        input=json.dumps([(block.line, block.source) for block in run]),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
        encoding="utf-8",
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    since = ""
    for block, printed in zip(run, json.loads(done.stdout), strict=True):
        since += printed
        if block.printed is not None:
            assert since == block.printed, f"{page}, line {block.line}"
            since = ""


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_python_whether_they_are_run_or_not(page):
    for block in PAGES[page]:
        compile("\n" * block.line + block.source, page, "exec", dont_inherit=True)


def test_blocks_are_found():
    text = (
        "```python\nprint(1)\n```\n\n```text\n1\n```\nand\n<!-- not run -->\n"
        '```python title="x"\nx\n```\n- item\n\n  ```python\n  if 1:\n      y\n  ```\n'
        "```text\nno output of the block before, which is indented\n```\n```pycon\n>>> 1\n```\n"
    )
    assert blocks(text) == [
        Block(1, "print(1)\n", True, "1\n"),
        Block(10, "x\n", False, None),
        Block(15, "if 1:\n    y\n", True, None),
    ]
