"""Asking a service what it is before sending it a workload."""

import time
from array import array

import msgspec

from emulator.tokens import ChainChecker, ChainViolation
from twofold.replay.answer import Answer
from twofold.replay.client import Client, ExchangeError, Receiver, parse_url
from twofold.replay.render import CompletionConversation
from twofold.replay.workload import Blocks, content_key

TIMEOUT_S = 30.0
MAX_BODY_BYTES = 1 << 20


class ProbeError(Exception):
    """The service does not answer as an OpenAI-compatible one; one line."""


class _Body(Receiver):
    __slots__ = ("data",)

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def on_body(self, data: bytes, now_s: float) -> None:
        """See Receiver."""
        self.data = (self.data + data)[:MAX_BODY_BYTES]


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model] = []


async def find_model(url: str, api_key: str = "") -> str:
    """The first model that ``GET /v1/models`` lists. Raises ProbeError."""
    client = _client(url, api_key)
    body = _Body()
    try:
        await client.send(body, "/v1/models", b"", method="GET", timeout_s=TIMEOUT_S)
        if body.status != 200:
            raise ProbeError(f"{url}/v1/models: status {body.status}")
        models = msgspec.json.decode(body.data, type=_Models).data
    except ExchangeError as error:
        raise ProbeError(f"{url}: {error}") from None
    except msgspec.DecodeError:
        raise ProbeError(f"{url}/v1/models: the answer is no list of models") from None
    finally:
        await client.close()
    if not models:
        raise ProbeError(f"{url}: serves no model; name one with --model")
    return models[0].id


async def follows_chain(url: str, model: str, api_key: str = "") -> bool:
    """Whether a short completion is the token chain of an emulated engine. False for anything else, errors included."""
    client = _client(url, api_key)
    keys = Blocks(keys=_keys(), block_tokens=8, input_tokens=8)
    prompt = CompletionConversation(0).prompt(keys)
    checker = ChainChecker(prompt.ids)
    answer = Answer(checker, keep_text=False, streamed=True, on_gap=lambda _gap_s: None)
    members = {"model": model, "max_tokens": 4, "stream": True, "temperature": 0}
    body = b"{" + prompt.fragment + b"," + msgspec.json.encode(members)[1:]
    try:
        await client.send(answer, prompt.path, body, timeout_s=TIMEOUT_S)
        checker.finish(4)
    except (ExchangeError, ChainViolation):
        return False
    finally:
        await client.close()
    return not answer.failure


def _client(url: str, api_key: str) -> Client:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return Client(parse_url(url), time.monotonic, headers=headers)


def _keys() -> "array[int]":
    return array("Q", [content_key("probe")])
