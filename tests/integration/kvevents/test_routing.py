"""A whole fleet whose routers know what their engines cache, from prompts that those routers never saw."""

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from support.emulators import post
from support.fleets import mapping
from support.up import Up

ENGINES = 6
LONG = 4000
"""Tokens of a prompt: enough work for its cache to matter."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    file = mapping(replicas=1, relays=2, engines=ENGINES, engines_per_process=ENGINES)
    (pool,) = file["pools"]
    pool |= {"kv_events": True, "tokenizer": "builtin"}
    up = Up(file, tmp_path_factory.mktemp("fleet"))
    try:
        up.wait_ready(ENGINES)
        until(lambda: len(up.state(up.admin_urls[0])["control_channel"]) == 2, "both relays can be asked")
        until(lambda: views(up) == {"exact": ENGINES}, "every cache is known")
        yield up
    finally:
        up.stop()


def until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)
    return found


def views(up: Up) -> dict[str, int]:
    found: dict[str, int] = up.state(up.admin_urls[0]).get("kv_events", {}).get("targets", {})
    return found


def engine_urls(up: Up) -> dict[str, str]:
    """URL of each worker, by its number."""
    (pool,) = yaml.safe_load(up.path.read_text())["pools"]
    (group,) = pool["workers"]
    return {str(number): f"http://127.0.0.1:{group['port_base'] + number}" for number in range(ENGINES)}


def explain(up: Up, body: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
    answer = post(f"{up.admin_urls[0]}/explain", {"path": path, "body": body})
    decision: dict[str, Any] = answer["decisions"][0]
    return decision


def chosen(decision: dict[str, Any]) -> tuple[str, int]:
    """(target, cached tokens there)."""
    target = decision["target_id"]
    (examined,) = [seen for seen in decision["examined"] if seen["target_id"] == target]
    return target, int(examined.get("cached_tokens", 0))


def prompt(seed: int, tokens: int = LONG) -> list[int]:
    return [(seed * 7919 + index * 31) % 20_000 for index in range(tokens)]


def test_ids_go_to_whoever_holds_them(fleet: Up) -> None:
    """A prompt is put on one engine behind the routers' backs; the routers send what goes on from it there."""
    reasons = set()
    for number, url in engine_urls(fleet).items():
        ids = prompt(int(number))
        post(f"{url}/v1/completions", {"model": "llama-3.1-8b", "prompt": ids, "max_tokens": 1})
        body = {"model": "default", "prompt": [*ids, 5, 6, 7], "max_tokens": 1}
        known = until(
            lambda body=body: (d := explain(fleet, body)) and chosen(d)[1] == LONG // 16 * 16 and d,
            "the prompt is found",
        )
        target, cached = chosen(known)
        assert target.endswith(f"-{number}")
        assert cached == LONG // 16 * 16, "exact to the block"
        assert len(known["examined"]) <= 6
        reasons.add(known["reason"])
        answer = post(f"{fleet.urls[0]}/v1/completions", body)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
    assert reasons <= {"home", "last-storer"}
    assert "last-storer" in reasons, "some prompt lies on no home of its key"


def test_chats_are_tokenized_and_found(fleet: Up) -> None:
    number, url = next(iter(engine_urls(fleet).items()))
    messages = [
        {"role": "system", "content": "you are a helpful assistant " * 300},
        {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "text", "text": " a router?"}]},
    ]
    first = post(f"{url}/v1/chat/completions", {"model": "llama-3.1-8b", "messages": messages, "max_tokens": 1})
    tokens = first["usage"]["prompt_tokens"]
    turn = {"model": "default", "messages": [*messages, {"role": "user", "content": "and then?"}], "max_tokens": 1}
    path = "/v1/chat/completions"
    known = until(
        lambda: (d := explain(fleet, turn, path)) and chosen(d)[1] > tokens - 64 and d, "the conversation is found"
    )
    target, cached = chosen(known)
    assert target.endswith(f"-{number}")
    assert cached == (tokens - 4) // 16 * 16, "all but the last words of the template are shared"

    def hit() -> Any:
        # A relay that has too much to do at the moment decides without the ids.
        usage = post(f"{fleet.urls[0]}{path}", turn)["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"] >= cached and usage

    usage = until(hit, "a request of the conversation goes where it is cached")
    assert int(known["prompt_tokens"]) == usage["prompt_tokens"], "the length is exact too"


def test_salts_keep_prompts_apart(fleet: Up) -> None:
    url = engine_urls(fleet)["1"]
    ids = prompt(77)
    post(f"{url}/v1/completions", {"model": "llama-3.1-8b", "prompt": ids, "max_tokens": 1, "cache_salt": "a"})
    salted = {"model": "default", "prompt": ids, "max_tokens": 1, "cache_salt": "a"}
    until(lambda: chosen(explain(fleet, salted))[1] >= LONG - 16, "the salted prompt is found")
    for other in ({"cache_salt": "b"}, {}):
        body = {"model": "default", "prompt": ids, "max_tokens": 1, **other}
        assert chosen(explain(fleet, body))[1] == 0


def test_outcomes_are_counted(fleet: Up) -> None:
    post(f"{fleet.urls[0]}/v1/completions", {"model": "default", "prompt": prompt(5, 64), "max_tokens": 1})
    post(f"{fleet.urls[0]}/v1/completions", {"model": "default", "prompt": prompt(6, 30_000), "max_tokens": 1})
    post(f"{fleet.urls[0]}/v1/completions", {"model": "default", "prompt": "some text " * 50, "max_tokens": 1})
    with urllib.request.urlopen(f"{fleet.admin_urls[0]}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    for outcome in ("inline", "tokenized"):
        assert f'twofold_exact_prefixes_total{{pool="llama-8b",outcome="{outcome}"}}' in text
    assert 'twofold_kv_events_targets{pool="llama-8b",state="exact"} 6' in text
    assert "twofold_kv_events_blocks_total" in text


def test_clients_that_leave_while_their_prompt_is_looked_at_leave_nothing_behind(fleet: Up) -> None:
    port = int(fleet.urls[0].rpartition(":")[2])
    for number in range(20):
        messages = [{"role": "user", "content": f"{number} is gone soon " * 3000}]
        body = json.dumps({"model": "default", "messages": messages, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(head.encode() + body)

    def idle() -> bool:
        relays = fleet.state(fleet.admin_urls[0])["relays"].values()
        return all(relay["inflight"] == 0 for relay in relays)

    until(idle, "no request is left in progress")
    post(f"{fleet.urls[0]}/v1/completions", {"model": "default", "prompt": prompt(8, 64), "max_tokens": 1})


def test_bad_bodies_are_still_the_engines_to_refuse(fleet: Up) -> None:
    path = f"{fleet.urls[0]}/v1/chat/completions"
    for body in ({"messages": 5}, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(path, {"model": "default", **body})
        refused.value.close()
        assert refused.value.code == 400
