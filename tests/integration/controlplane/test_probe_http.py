"""The probes' HTTP client against servers that answer as they please, and what is asked of engines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane.fleet.values import ProbeOutcome
from controlplane.probes.client import MAX_SMALL_BYTES, NAMED_METRICS, ProbeClient
from controlplane.probes.exposition import NAMES
from controlplane.probes.http import MAX_HEAD_BYTES, HttpClient, HttpError, Reply, TooLarge
from twofold.model.fleet import EngineFacts

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """Answers the n-th request of the n-th connection with ``answers``: bytes, or None to close without one.

    ``requests`` keeps the heads; a server without answers left repeats the last one.
    """

    def __init__(self, *answers: bytes | None, close: bool = False) -> None:
        self.answers = list(answers)
        self.close = close
        self.requests: list[bytes] = []
        self.connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> "Server":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def stop(self) -> None:
        self._server.close()
        self.drop()
        await self._server.wait_closed()

    def drop(self) -> None:
        """Close the connections that are open."""
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
                if self.close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


Serve = Callable[..., Awaitable[Server]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """``await serve(*answers)``: a running server."""
    running: list[Server] = []

    async def begin(*answers: bytes | None, close: bool = False) -> Server:
        running.append(await Server(*answers, close=close).start())
        return running[-1]

    yield begin
    for server in running:
        await server.stop()


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    made = HttpClient(connect_timeout_s=2.0, request_timeout_s=0.5)
    yield made
    await made.close()


async def test_a_connection_is_kept_and_used_again(serve: Serve, client: HttpClient) -> None:
    server = await serve(OK)
    for _ in range(5):
        assert await client.get(server.url, "/a?b=c", 100) == Reply(200, b"ok")
    assert (server.connections, client.connects) == (1, 1)
    head = server.requests[0]
    assert head.startswith(b"GET /a?b=c HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"accept-encoding: identity" in head


async def test_a_prefix_in_the_url_is_kept(serve: Serve, client: HttpClient) -> None:
    server = await serve(OK)
    await client.get(f"{server.url}/engine/", "/health", 100)
    assert server.requests[0].startswith(b"GET /engine/health ")


async def test_a_kept_connection_that_was_closed_meanwhile_is_replaced(serve: Serve, client: HttpClient) -> None:
    server = await serve(OK)
    await client.get(server.url, "/", 100)
    server.drop()
    for _ in range(3):
        assert (await client.get(server.url, "/", 100)).body == b"ok"
    assert server.connections == 2
    racing = await serve(OK, None, OK)
    await client.get(racing.url, "/", 100)
    # The server takes the second request and closes without an answer, as one whose idle time-out has just run out.
    assert (await client.get(racing.url, "/", 100)).body == b"ok"
    assert (racing.connections, len(racing.requests)) == (2, 3)


async def test_a_fresh_connection_closed_without_an_answer_is_an_error(serve: Serve, client: HttpClient) -> None:
    server = await serve(None)
    with pytest.raises(HttpError, match="without an answer"):
        await client.get(server.url, "/", 100)
    assert server.connections == 1


@pytest.mark.parametrize(
    ("answer", "close", "body"),
    [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", False, b"abc"),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", True, b"until the end"),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", True, b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, False, b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False, b""),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", True, b"ok"),
    ],
)
async def test_the_ways_in_which_a_body_can_end(
    serve: Serve, client: HttpClient, answer: bytes, close: bool, body: bytes
) -> None:
    server = await serve(answer, close=close)
    for _ in range(3):
        assert (await client.get(server.url, "/", 100)).body == body
    assert server.connections == (3 if close else 1)


@pytest.mark.parametrize(
    ("answer", "close", "says"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort", True, "in the middle"),
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", False, "no HTTP"),
        (b"\x00\x01\x02" * 50, False, "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * MAX_HEAD_BYTES, False, "head|no HTTP"),
        (OK.replace(b"2\r", b"-2\r"), False, "no HTTP"),
    ],
)
async def test_broken_answers_are_errors(
    serve: Serve, client: HttpClient, answer: bytes, close: bool, says: str
) -> None:
    server = await serve(answer, close=close)
    with pytest.raises(HttpError, match=says):
        await client.get(server.url, "/", 1 << 20)
    server.answers = [OK]
    server.close = False
    assert (await client.get(server.url, "/", 100)).body == b"ok", "and leave nothing behind"


async def test_an_answer_above_its_bound_is_refused_whatever_it_says_of_its_length(
    serve: Serve, client: HttpClient
) -> None:
    chunks = b"".join(b"400\r\n" + b"x" * 1024 + b"\r\n" for _ in range(50))
    server = await serve(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks)
    with pytest.raises(TooLarge, match="more than 4096 bytes"):
        await client.get(server.url, "/", 4096)


async def test_a_server_that_says_nothing_is_given_up_and_its_late_answer_belongs_to_nobody(
    serve: Serve, client: HttpClient
) -> None:
    server = await serve(b"HTTP/1.1 200 OK\r\n")
    with pytest.raises(TimeoutError):
        await client.get(server.url, "/", 100)
    server.answers = [OK]
    assert (await client.get(server.url, "/", 100)).body == b"ok"
    assert server.connections == 2


async def test_bytes_after_an_answer_spoil_the_connection_only(serve: Serve, client: HttpClient) -> None:
    server = await serve(OK + OK)
    for number in range(1, 4):
        assert (await client.get(server.url, "/", 100)).body == b"ok"
        assert server.connections == number


async def test_requests_at_the_same_time_do_not_share_a_connection(serve: Serve, client: HttpClient) -> None:
    server = await serve(OK)
    replies = await asyncio.gather(*(client.get(server.url, "/", 100) for _ in range(8)))
    assert {reply.body for reply in replies} == {b"ok"}
    assert 1 < server.connections <= 8
    await client.get(server.url, "/", 100)


async def test_urls_that_are_no_http(client: HttpClient) -> None:
    for url in ("ftp://127.0.0.1", "127.0.0.1:80", "http://"):
        with pytest.raises(HttpError, match="neither"):
            await client.get(url, "/", 100)


async def test_tls_that_cannot_be_trusted_is_an_error(serve: Serve, client: HttpClient) -> None:
    server = await serve(OK)
    with pytest.raises(OSError):
        await client.get(server.url.replace("http:", "https:"), "/", 100)


@given(raw=st.binary(max_size=300), prefix=st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", OK[:-2], OK]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_server_sends_a_probe_is_a_finding(raw: bytes, prefix: bytes) -> None:
    async def probe() -> None:
        server = await Server(prefix + raw, close=True).start()
        client = ProbeClient(request_timeout_s=0.5, probe_timeout_s=1.0)
        try:
            finding = await client.probe(server.url, None, "m")
            assert finding.outcome in ProbeOutcome
        finally:
            await client.close()
            await server.stop()

    asyncio.run(probe())


def metrics(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body


EMPTY = metrics(b"")
SERIES = metrics(b'vllm:num_requests_running{engine="0"} 3\n')
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


async def paths(server: Server) -> list[str]:
    return [head.split(b" ")[1].decode().partition("?")[0] for head in server.requests]


async def test_engines_are_asked_for_the_needed_series_only(serve: Serve) -> None:
    server = await serve(EMPTY, SERIES)
    client = ProbeClient()
    finding = await client.probe(server.url, EngineFacts(), "m")
    assert finding.outcome is ProbeOutcome.OK
    assert finding.readings is not None
    assert finding.readings.ranks == {0: {"running": 3.0}}
    asked = server.requests[1].split(b" ")[1].decode()
    assert asked == NAMED_METRICS
    assert asked.startswith("/metrics/?name%5B%5D=")
    assert asked.count("name%5B%5D=") == len(NAMES)
    await client.close()


@pytest.mark.parametrize("refusal", [NOT_FOUND, metrics(b"# nothing by these names\n")])
async def test_an_engine_that_cannot_is_asked_for_all_until_it_fails(serve: Serve, refusal: bytes) -> None:
    client = ProbeClient()
    server = await serve(EMPTY, refusal, SERIES)
    known = EngineFacts()
    assert (await client.probe(server.url, known, "m")).outcome is ProbeOutcome.OK
    assert await paths(server) == ["/health", "/metrics/", "/metrics"]
    server.requests.clear()
    server.answers = [EMPTY, SERIES]
    assert (await client.probe(server.url, known, "m")).outcome is ProbeOutcome.OK
    assert await paths(server) == ["/health", "/metrics"]
    server.answers = [NOT_FOUND]
    failed = await client.probe(server.url, known, "m")
    assert (failed.outcome, failed.message) == (ProbeOutcome.FAILED, "/health answered 404")
    server.requests.clear()
    server.answers = [EMPTY, SERIES]
    assert (await client.probe(server.url, known, "m")).outcome is ProbeOutcome.OK
    assert await paths(server) == ["/health", "/metrics/"], "another engine may sit there now"
    await client.close()


async def test_what_went_wrong_is_said(serve: Serve) -> None:
    client = ProbeClient(request_timeout_s=0.3)
    server = await serve(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (1 << 24) + b"x" * (MAX_SMALL_BYTES + 1))
    large = await client.probe(server.url, EngineFacts(), "m")
    assert large.message == f"/health answered more than {MAX_SMALL_BYTES} bytes"
    await server.stop()
    refused = await client.probe(server.url, EngineFacts(), "m")
    assert refused.message == "cannot connect: Connection refused"
    assert refused.outcome is ProbeOutcome.FAILED
    await client.close()
