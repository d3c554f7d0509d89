"""Classification of endings, on recorded and on made-up tails."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.relay.endings import (
    RETRYABLE,
    WORKER_FAULT,
    Ending,
    Seen,
    client_error,
    markers_of,
    output_tokens,
    status_ending,
    stream_ending,
)
from router.routing.features import PATHS
from router.routing.types import Endpoint
from twofold.model.reasons import RejectReason

TOKEN = b'data: {"choices":[{"index":0,"text":"%b","finish_reason":null}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n'
ABORT = b'data: {"choices":[{"index":0,"text":"","finish_reason":"abort"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"message":"EngineCore encountered an issue","code":500}}\n\n'


REFUSAL = b'data: {"error":{"message":"bad guided grammar","type":"BadRequestError","code":400}}\n\n'


def ending(endpoint: Endpoint, *runs: bytes, framing_complete: bool) -> Ending:
    seen = Seen(markers_of(endpoint))
    for run in runs:
        seen.look(run)
    return stream_ending(seen, framing_complete=framing_complete)


@pytest.mark.parametrize("framing_complete", [True, False])
@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ((TOKEN, FINISH, DONE), Ending.COMPLETE),
        ((TOKEN, FINISH, USAGE, DONE), Ending.COMPLETE),
        ((TOKEN + FINISH + DONE,), Ending.COMPLETE),
        ((TOKEN, TOKEN), Ending.TRUNCATED),
        ((TOKEN, FINISH), Ending.TRUNCATED),
        ((), Ending.TRUNCATED),
        ((DONE,), Ending.DONE_WITHOUT_FINISH),
        ((TOKEN, DONE), Ending.DONE_WITHOUT_FINISH),
        ((TOKEN, ERROR, DONE), Ending.ENGINE_ERROR),
        ((TOKEN, ABORT, DONE), Ending.ABORTED),
        ((REFUSAL, DONE), Ending.COMPLETE),
    ],
)
def test_completions(runs: tuple[bytes, ...], expected: Ending, framing_complete: bool) -> None:
    for endpoint in (Endpoint.COMPLETIONS, Endpoint.CHAT):
        assert ending(endpoint, *runs, framing_complete=framing_complete) is expected


def test_text_that_looks_like_a_marker_is_no_marker() -> None:
    tricky = TOKEN % rb"data: [DONE] \"finish_reason\":\"stop\" data: {\"error\": event: message_stop\n"
    seen = Seen(markers_of(Endpoint.COMPLETIONS))
    assert not seen.look(tricky)
    assert (seen.done, seen.finished, seen.error) == (False, False, False)
    messages = Seen(markers_of(Endpoint.MESSAGES))
    assert not messages.look(b'data: {"text":"event: message_stop\\n event: error\\n"}\n\n')


@given(st.text(max_size=60))
def test_no_generated_text_ends_a_stream(text: str) -> None:
    for endpoint in Endpoint:
        seen = Seen(markers_of(endpoint))
        assert not seen.look(b'data: {"choices":[{"text":' + json.dumps(text).encode() + b"}]}\n\n")


def test_other_endpoints() -> None:
    stop = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    delta = b'event: message_delta\ndata: {"delta":{"stop_reason":"end_turn"}}\n\n'
    assert ending(Endpoint.MESSAGES, delta, stop, framing_complete=True) is Ending.COMPLETE
    assert ending(Endpoint.MESSAGES, delta, framing_complete=True) is Ending.TRUNCATED
    assert ending(Endpoint.MESSAGES, b"event: error\ndata: {}\n\n", framing_complete=True) is Ending.ENGINE_ERROR
    completed = b"event: response.completed\ndata: {}\n\n"
    assert ending(Endpoint.RESPONSES, completed, framing_complete=True) is Ending.COMPLETE
    assert ending(Endpoint.RESPONSES, b"event: response.created\n\n", framing_complete=True) is Ending.TRUNCATED
    assert ending(Endpoint.EMBEDDINGS, framing_complete=True) is Ending.COMPLETE
    assert ending(Endpoint.EMBEDDINGS, framing_complete=False) is Ending.TRUNCATED


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, b"{}", Ending.COMPLETE),
        (400, b"queue", Ending.COMPLETE),
        (404, b"", Ending.COMPLETE),
        (500, b'{"error":{"message":"list index out of range"}}', Ending.COMPLETE),
        (500, b'{"error":{"message":"cannot schedule new futures after shutdown"}}', Ending.UNAVAILABLE),
        (500, b'{"error":{"message":"EngineCore encountered an issue."}}', Ending.UNAVAILABLE),
        (502, b"", Ending.UNAVAILABLE),
        (503, b'{"error": "The model is currently scaling. Please try again later."}', Ending.UNAVAILABLE),
        (503, b'{"error":{"message":"Request queue is full"}}', Ending.REFUSED),
        (429, b"", Ending.REFUSED),
    ],
)
def test_statuses(status: int, body: bytes, expected: Ending) -> None:
    assert status_ending(status, body) is expected


def test_output_tokens_of_unstreamed_responses() -> None:
    text = b'{"choices":[{"text":"\\"completion_tokens\\":77"}],"usage":{"prompt_tokens":4,"completion_tokens":8}}'
    assert output_tokens(text) == 8
    assert output_tokens(b'{"usage":{"input_tokens":4,"output_tokens": 9}}') == 9
    assert output_tokens(b'{"data":[]}') == 0


def test_every_ending_has_an_error_and_a_place() -> None:
    for one in Ending:
        status, reason, message = client_error(one)
        assert status in (502, 503, 504)
        assert isinstance(reason, RejectReason)
        assert message
    assert Ending.COMPLETE not in RETRYABLE
    assert Ending.CANCELLED not in RETRYABLE
    # Admission control and aborts by an operator say nothing bad about a worker.
    assert not {Ending.REFUSED, Ending.ABORTED, Ending.COMPLETE, Ending.CANCELLED} & WORKER_FAULT


RECORDED = json.loads((Path(__file__).parent / "recorded_streams.json").read_text())


@pytest.mark.parametrize("case", RECORDED, ids=[case["case"] for case in RECORDED])
def test_streams_recorded_from_vllm(case: dict[str, Any]) -> None:
    endpoint = PATHS[case["path"].encode()]
    seen = Seen(markers_of(endpoint))
    *middle, last = [chunk.encode() for chunk in case["chunks"]]
    for chunk in middle:
        seen.look(chunk)
        if case["ending"] == "complete":
            assert not seen.done
    seen.look(last)
    assert stream_ending(seen, framing_complete=case["end"] == "complete") == case["ending"]
