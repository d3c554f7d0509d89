"""Each recorded exchange of a real vLLM 0.32.0, repeated: same status, headers, keys, types, errors, event order."""

import json
from pathlib import Path
from typing import Any

import pytest

from .client import Response, exchange
from .comparison import difference
from .conftest import Engine
from .registry import Tally

RECORDINGS = Path(__file__).parent / "recordings"
CASES = sorted(f"{path.parent.name}/{path.stem}" for name in ("http", "more") for path in (RECORDINGS / name).iterdir())
"""Folder and name: "http" is the first set, "more" what ``record.py`` asked later."""

DIFFERENT_ON_EMULATOR: dict[str, str] = {}
"""Cases in which the emulator is known to differ, with the reason; each must really differ."""


def load(case: str) -> dict[str, Any]:
    return dict(json.loads((RECORDINGS / f"{case}.json").read_text()))


def replay(engine: Engine, request: dict[str, Any]) -> Response:
    body = request.get("body")
    if isinstance(body, dict) and body.get("model") == "tiny":
        body = {**body, "model": engine.model}
    raw = request["raw_body"].encode() if "raw_body" in request else None
    return exchange(engine.url, request["method"], request["path"], body, headers=request["headers"], raw=raw)


@pytest.mark.parametrize("case", CASES)
def test_recording(engine: Engine, case: str, tally: Tally) -> None:
    recorded = load(case)
    # An engine that is late joins the events of a stream, down to one: then the stream is asked for again.
    for _ in range(5 if "chunks" in recorded["response"] else 1):
        found = difference(case.partition("/")[2], recorded, replay(engine, recorded["request"]))
        if found is None:
            break
    tally(engine.kind, case, found)
    if engine.kind == "emulator" and case in DIFFERENT_ON_EMULATOR:
        assert found is not None, f"equal now; it was thought different: {DIFFERENT_ON_EMULATOR[case]}"
    else:
        assert found is None, found
