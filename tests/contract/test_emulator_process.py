"""The emulator as a process: how it ends, the faults it shows, what its admin port tells, what garbage does to it."""

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from emulator.tokens import ChainChecker, ChainViolation, chat_prompt_ids, encode

from .client import Response, exchange, open_request, read_response
from .conftest import Emulator

Start = Callable[..., Emulator]
PROMPT = "count to a hundred and tell me when you are done"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Emulator] = []

    def launch(*flags: str) -> Emulator:
        running.append(Emulator(tmp_path, *flags))
        return running[-1]

    yield launch
    for process in running:
        process.kill()


def body(tokens: int = 20, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": PROMPT, "max_tokens": tokens, "stream": True, **fields}


def ask(emulator: Emulator, tokens: int = 20, **fields: Any) -> Response:
    return exchange(emulator.url, "POST", "/v1/completions", body(tokens, **fields))


def fault(emulator: Emulator, kind: str, **fields: Any) -> Response:
    return exchange(emulator.admin, "POST", "/faults", {"kind": kind, **fields})


def check(response: Response, tokens: int) -> ChainChecker:
    checker = ChainChecker(encode(PROMPT))
    for delta in response.deltas():
        for choice in delta["choices"]:
            checker.feed(choice["text"])
    checker.finish(tokens)
    return checker


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def refused(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def read_until_silence(sock: socket.socket) -> bytes:
    """What comes until the socket's timeout passes without a byte; fails at the end of the stream."""
    received = b""
    try:
        while data := sock.recv(65536):
            received += data
    except TimeoutError:
        return received
    raise AssertionError("the stream ended")


def silent(sock: socket.socket) -> bool:
    """Whether the stream falls silent without ending."""
    return b"[DONE]" not in read_until_silence(sock)


def started(received: bytes) -> bool:
    return received.count(b'"text"') >= 3


def test_output_is_the_chain_in_stream_batch_and_chat(start: Start) -> None:
    emulator = start()
    assert check(ask(emulator, 50), 50).verified == 50
    messages = [{"role": "user", "content": "héllo"}]
    chat = exchange(
        emulator.url, "POST", "/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 9}
    )
    checker = ChainChecker(chat_prompt_ids(messages))
    checker.feed(chat.json()["choices"][0]["message"]["content"])
    checker.finish(9)


def test_a_stream_interval_gathers_tokens_but_for_the_first_and_the_last(start: Start) -> None:
    emulator = start("--stream-interval", "4")
    response = ask(emulator, 11, return_token_ids=True)
    sizes = [len(choice["token_ids"]) for delta in response.deltas() for choice in delta["choices"]]
    assert check(response, 11).verified == 11
    assert sizes[0] == 1
    assert sum(sizes) == 11
    # A step that is late joins its tokens to the next ones: events may be larger, never smaller.
    assert all(size >= 4 for size in sizes[1:-1])


def test_without_max_tokens_a_chat_ends_by_itself(start: Start) -> None:
    emulator = start("--time-scale", "20")
    lengths, reasons = [], set()
    for index in range(12):
        messages = [{"role": "user", "content": f"question {index}"}]
        request = {"model": "tiny", "messages": messages, "return_token_ids": True}
        answer = exchange(emulator.url, "POST", "/v1/chat/completions", request).json()
        choice = answer["choices"][0]
        checker = ChainChecker(answer["prompt_token_ids"])
        checker.feed(choice["message"]["content"])
        checker.finish(answer["usage"]["completion_tokens"] - (choice["finish_reason"] == "stop"))
        lengths.append(answer["usage"]["completion_tokens"])
        reasons.add(choice["finish_reason"])
    assert "stop" in reasons
    assert len(set(lengths)) > 6


@pytest.mark.parametrize(("kind", "delivered"), [("corrupt_token", 20), ("drop_token", 19), ("double_token", 21)])
def test_the_checker_catches_one_planted_fault(start: Start, kind: str, delivered: int) -> None:
    emulator = start()
    assert fault(emulator, kind, tokens=7).status == 200
    checker = ChainChecker(encode(PROMPT))
    response = ask(emulator)
    for delta in response.deltas():
        checker.feed(delta["choices"][0]["text"])
    with pytest.raises(ChainViolation) as caught:
        checker.finish(20)
    assert caught.value.position in (7, 8)
    assert checker.delivered == delivered
    assert check(ask(emulator), 20).verified == 20, "the fault was planted once"


def test_sigterm_closes_the_listener_and_falls_silent(start: Start) -> None:
    emulator = start()
    with open_request(emulator.url, "POST", "/v1/completions", body(1500), timeout_s=1.0) as stream:
        idle = open_request(emulator.url, "GET", "/health", close=False)
        assert read_response(idle).status == 200
        received = b""
        while not started(received):
            received += stream.recv(65536)
        emulator.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refused(emulator.url))
        assert idle.recv(10) == b"", "idle connections are closed"
        idle.close()
        assert silent(stream)
        assert emulator.process.poll() is None, "it lives until its last client goes"
    assert emulator.process.wait(10) == 0


def test_sigterm_without_clients_ends_at_once(start: Start) -> None:
    emulator = start("--engines", "3")
    emulator.process.terminate()
    assert emulator.process.wait(10) == 0
    assert all(refused(url) for url in emulator.urls)


def test_second_signal_ends_it_though_a_client_waits(start: Start) -> None:
    emulator = start()
    with open_request(emulator.url, "POST", "/v1/completions", body(1500)) as stream:
        stream.recv(65536)
        emulator.process.terminate()
        wait_until(lambda: refused(emulator.url))
        emulator.process.terminate()
        assert emulator.process.wait(10) == 0


def test_death_of_the_process_ends_streams_inside_the_body(start: Start) -> None:
    emulator = start()
    fault(emulator, "die_after_tokens", tokens=10)
    response = ask(emulator)
    assert response.end == "truncated"
    assert len(response.deltas()) == 10
    assert emulator.process.wait(10) == -signal.SIGKILL


def test_death_of_one_engine_leaves_its_siblings(start: Start) -> None:
    emulator = start("--engines", "2")
    fault(emulator, "die_after_tokens", tokens=10, mode="abrupt")
    response = ask(emulator)
    assert (response.end, len(response.deltas())) == ("truncated", 10)
    assert refused(emulator.urls[0])
    assert exchange(emulator.urls[1], "POST", "/v1/completions", body(5)).end == "complete"


def test_hang_answers_health_and_goes_on_without_a_lost_token(start: Start) -> None:
    emulator = start()
    with open_request(emulator.url, "POST", "/v1/completions", body(400), timeout_s=20) as stream:
        received = b""
        while not started(received):
            received += stream.recv(65536)
        fault(emulator, "hang")
        stream.settimeout(0.5)
        received += read_until_silence(stream)
        assert exchange(emulator.url, "GET", "/health").status == 200
        assert b"vllm:num_requests_running" in exchange(emulator.url, "GET", "/metrics").body
        assert exchange(emulator.admin, "DELETE", "/faults").status == 200
        stream.settimeout(20)
        while data := stream.recv(65536):
            received += data
    assert received.count(b'"text"') == 400


def test_slow_status_refuse_and_black_hole(start: Start) -> None:
    emulator = start()
    fault(emulator, "status", status=503, count=2)
    assert [ask(emulator).status for _ in range(3)] == [503, 503, 200]
    fault(emulator, "slow", factor=50)
    begun = time.monotonic()
    ask(emulator, 3)
    assert time.monotonic() - begun > 3 * 50 * 0.0028
    exchange(emulator.admin, "DELETE", "/faults")
    fault(emulator, "refuse")
    wait_until(lambda: refused(emulator.url))
    exchange(emulator.admin, "DELETE", "/faults")
    assert check(ask(emulator), 20).verified == 20
    fault(emulator, "black_hole")
    with open_request(emulator.url, "GET", "/health", timeout_s=0.5) as sock:
        assert read_response(sock).end == "timeout"
    exchange(emulator.admin, "DELETE", "/faults")
    assert exchange(emulator.url, "GET", "/health").status == 200


def test_admin_port_tells_and_refuses(start: Start) -> None:
    emulator = start("--engines", "2")
    ask(emulator, 30)
    stats = exchange(emulator.admin, "GET", "/stats").json()
    first, second = stats["engines"]
    assert (first["generation_tokens"], second["generation_tokens"]) == (30, 0)
    assert first["lateness_ratio"]["p99"] >= first["lateness_ratio"]["p50"] > 0
    text = exchange(emulator.url, "GET", "/metrics").body.decode()
    assert "twofold_emulator_step_lateness_seconds_count 30.0" in text
    for wrong in ({"kind": "sleepy"}, {"kind": "slow", "factor": 0}, {"kind": "hang", "engine": 9}, {"color": 1}, 7):
        refusal = exchange(emulator.admin, "POST", "/faults", wrong)
        assert refusal.status == 400
        assert refusal.json()["error"]["message"]
    assert exchange(emulator.admin, "POST", "/reset").status == 200
    assert exchange(emulator.admin, "GET", "/stats").json()["engines"][0]["lateness_ratio"]["p99"] == 0


def test_faults_need_their_flag(start: Start) -> None:
    emulator = start("--no-enable-fault-injection")
    assert fault(emulator, "hang").status == 403
    assert exchange(emulator.admin, "GET", "/stats").status == 200


def test_slow_reader_gets_every_token_in_merged_events(start: Start) -> None:
    emulator = start("--time-scale", "50")
    parts = urlsplit(emulator.url)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect((parts.hostname, parts.port))
        data = json.dumps(body(1900, return_token_ids=True)).encode()
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data) + data
        )
        stats = lambda: exchange(emulator.admin, "GET", "/stats").json()["engines"][0]  # noqa: E731
        wait_until(lambda: stats()["generation_tokens"] == 1900)
        response = read_response(sock)
    assert check(response, 1900).verified == 1900
    ids = [token for delta in response.deltas() for token in delta["choices"][0]["token_ids"]]
    assert len(ids) == 1900


def test_priority_policy_over_http(start: Start) -> None:
    emulator = start("--scheduling-policy", "priority", "--max-num-seqs", "1", "--time-scale", "0.5")
    order: list[str] = []

    def run(name: str, priority: int, by_header: bool) -> None:
        headers = {"X-Vllm-Priority": str(priority)} if by_header else {}
        fields = {} if by_header else {"priority": priority}
        exchange(emulator.url, "POST", "/v1/completions", body(30, **fields), headers=headers)
        order.append(name)

    threads = [threading.Thread(target=run, args=("first", 0, False))]
    threads[0].start()
    seen = lambda: exchange(emulator.admin, "GET", "/stats").json()["engines"][0]["requests"]  # noqa: E731
    wait_until(lambda: seen() == 1)
    for count, (name, priority, by_header) in enumerate((("low", 5, False), ("high", -5, True)), start=2):
        threads.append(threading.Thread(target=run, args=(name, priority, by_header)))
        threads[-1].start()
        wait_until(lambda count=count: seen() == count)
    for thread in threads:
        thread.join(30)
    assert order == ["first", "high", "low"]


def test_garbage_on_the_wire_never_kills_it(start: Start) -> None:
    emulator = start()
    parts = urlsplit(emulator.url)
    rng = random.Random(7)
    good = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    samples = [
        b"\x00" * 50,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 100,
    ]
    for _ in range(60):
        mutated = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        samples.append(bytes(mutated))
    for sample in samples:
        with socket.create_connection((parts.hostname, parts.port), timeout=5) as sock:
            sock.sendall(sample)
            sock.shutdown(socket.SHUT_WR)
            received = b""
            try:
                while data := sock.recv(65536):
                    received += data
            except ConnectionResetError:
                pass
            assert b"Traceback" not in received
    assert check(ask(emulator), 20).verified == 20
    assert "Traceback" not in emulator.log_path.read_text()


def test_http_1_0_stream_is_not_chunked(start: Start) -> None:
    emulator = start()
    parts = urlsplit(emulator.url)
    data = json.dumps(body(3)).encode()
    with socket.create_connection((parts.hostname, parts.port), timeout=5) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data)
            + data
        )
        received = b""
        while part := sock.recv(65536):
            received += part
    head, _, rest = received.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert rest.startswith(b"data: {")
    assert rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--profile", "nope"], 2, "unknown engine profile"),
        (["--profile", "cpu-tiny", "--max-model-len", "9999999"], 2, "exceeds the KV cache"),
        (["--profile", "cpu-tiny", "--kv-capacity-tokens", "10"], 2, "at least two blocks"),
        (["--profile", "cpu-tiny", "--time-scale", "0"], 2, "time-scale"),
        (["--profile", "cpu-tiny", "--engines", "x"], 2, "--engines"),
        (["--profile-file", "/nonexistent.json"], 2, "cannot read profiles"),
        (["--host", "203.0.113.1"], 1, "cannot listen"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], status: int, message: str) -> None:
    done = subprocess.run([sys.executable, "-m", "emulator", *flags], capture_output=True, text=True, timeout=30)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_profiles() -> None:
    shown = subprocess.run([sys.executable, "-m", "emulator", "--help"], capture_output=True, text=True, timeout=30)
    assert "--enable-fault-injection" in shown.stdout
    listed = subprocess.run(
        [sys.executable, "-m", "emulator", "--list-profiles"], capture_output=True, text=True, timeout=30
    )
    assert "h100-70b-tp4" in listed.stdout


def test_user_profile_and_time_scale(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"name": "mine", "base": "cpu-tiny", "kv_capacity_tokens": 4096}]))
    emulator = start("--profile-file", str(path), "--profile", "mine", "--time-scale", "4")
    stats = exchange(emulator.admin, "GET", "/stats").json()["engines"][0]
    assert stats["profile"] == "mine@x4"
    assert 'num_gpu_blocks="32"' in exchange(emulator.url, "GET", "/metrics").body.decode()
