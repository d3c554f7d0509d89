"""GET /debug/profile: off by default, for this host or with the token, one at a time, bounded."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from twofold.runtime import sampler
from twofold.runtime.port import PATH, ProcessGoneError, ProfilePort, Wanted


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    """Log lines are made, as in production."""
    caplog.set_level("INFO")


Ask = Callable[..., Awaitable[tuple[int, str]]]


async def record(wanted: Wanted) -> sampler.Profile:
    return await sampler.record(wanted.process, seconds=wanted.seconds, hz=wanted.hz, clock=wanted.clock)


@asynccontextmanager
async def serving(port: ProfilePort, *, remote: str = "") -> AsyncIterator[Ask]:
    """Ask a server for profiles; ``remote`` is the address that clients seem to come from."""

    async def get(request: web.Request) -> web.Response:
        return await port.get(request.clone(remote=remote) if remote else request)

    app = web.Application()
    app.router.add_get(PATH, get)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}{PATH}"
    async with aiohttp.ClientSession() as session:

        async def ask(token: str = "", **query: str) -> tuple[int, str]:
            headers = {"authorization": f"Bearer {token}"} if token else {}
            async with session.get(url, params=query, headers=headers) as reply:
                return reply.status, await reply.text()

        yield ask
    await runner.cleanup()


def port(*, enabled: bool = True, token: str = "") -> ProfilePort:
    return ProfilePort(record, lambda: ("relay-0", "agent"), enabled=enabled, token=token)


@pytest.mark.parametrize(
    ("form", "beginning"), [("table", "agent: 0.1 s"), ("collapsed", "agent;"), ("speedscope", '{"$schema"')]
)
async def test_answers_in_each_form(form: str, beginning: str) -> None:
    async with serving(port()) as ask:
        status, text = await ask(process="agent", seconds="0.1", format=form)
    assert status == 200
    assert text.startswith(beginning)


async def test_off_by_default() -> None:
    async with serving(port(enabled=False, token="secret")) as ask:
        status, text = await ask("secret")
    assert status == 403
    assert "--debug-profile" in text


@pytest.mark.parametrize("remote", ["192.0.2.7", "::ffff:192.0.2.7", "2001:db8::1"])
async def test_other_hosts_need_the_token(remote: str) -> None:
    async with serving(port(token="secret"), remote=remote) as ask:
        assert (await ask(seconds="0.1"))[0] == 403
        assert (await ask("wrong", seconds="0.1"))[0] == 403
        assert (await ask("secret", seconds="0.1"))[0] == 200
    async with serving(port(token=""), remote=remote) as ask:
        assert (await ask(seconds="0.1"))[0] == 403


@pytest.mark.parametrize("remote", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
async def test_this_host_needs_none(remote: str) -> None:
    async with serving(port(token="secret"), remote=remote) as ask:
        assert (await ask(seconds="0.1"))[0] == 200


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ({"process": "relay-7"}, 404, "relay-0, agent"),
        ({"seconds": "61"}, 400, "seconds must be"),
        ({"seconds": "nan"}, 400, "seconds must be"),
        ({"seconds": "x"}, 400, "seconds must be"),
        ({"hz": "1000"}, 400, "hz must be"),
        ({"format": "svg"}, 400, "svg"),
        ({"clock": "sun"}, 400, "sun"),
    ],
)
async def test_bad_questions(query: dict[str, str], status: int, message: str) -> None:
    async with serving(port()) as ask:
        got = await ask(**query)
    assert got[0] == status
    assert message in got[1]


async def test_one_at_a_time() -> None:
    going, begun = asyncio.Event(), asyncio.Event()

    async def slow(wanted: Wanted) -> sampler.Profile:
        begun.set()
        await going.wait()
        return await record(wanted)

    async with serving(ProfilePort(slow, lambda: ("agent",), enabled=True, token="")) as ask:
        first = asyncio.ensure_future(ask(seconds="0.1"))
        await begun.wait()
        assert (await ask(seconds="0.1"))[0] == 409
        going.set()
        assert (await first)[0] == 200
        assert (await ask(seconds="0.1"))[0] == 200


@pytest.mark.parametrize(
    ("error", "status"), [(sampler.BusyError("busy"), 409), (ProcessGoneError("gone"), 503), (TimeoutError(), 503)]
)
async def test_failures(error: Exception, status: int) -> None:
    async def fail(_: Wanted) -> sampler.Profile:
        raise error

    async with serving(ProfilePort(fail, lambda: ("agent",), enabled=True, token="")) as ask:
        assert (await ask())[0] == status
        assert (await ask())[0] == status
