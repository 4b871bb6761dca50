"""What a peer's process is: it answers one request a line, from when it says that it is ready.

It stays, so that its turns are neighbours of ours and not of an interpreter that starts. Nothing
here, nor in the peers' files, imports eventsource_anyio or what is not in their environments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

READY = "ready"


def serve(operations: Mapping[str, Callable[..., Any]]) -> None:
    """Requests from standard input; or the single one that is the first argument."""
    if len(sys.argv) > 1:
        request = json.loads(sys.argv[1])
        print(json.dumps(operations[request.pop("do")](**request)))
        return
    answers, sys.stdout = sys.stdout, sys.stderr
    print(READY, file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"found": operations[request.pop("do")](**request)}
        except Exception as error:  # noqa: BLE001 - told to who asked
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=answers, flush=True)
