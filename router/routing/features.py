"""From a request's bytes to the facts that routing needs. Never raises anything but BadRequest, whatever the bytes.

Only the fields used here are decoded; wrong types elsewhere are the engine's to refuse. Where a prompt field has a
shape this does not know, its raw JSON stands in for the canonical text: routing is then merely less clever.
"""

import math
from array import array
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import msgspec

from router.routing import headers as names
from router.routing.canonical import Message, chat_prompt, items_prompt, raw_prompt, text_prompt
from router.routing.prefix import chain, chain_seed, unique_key
from router.routing.types import (
    BadRequest,
    Endpoint,
    ParsedRequest,
    RequestFeatures,
    Resolved,
    Resumability,
)

MAX_MODEL_CHARS = 512
MAX_FIELD_CHARS = 256
ID_BYTES = 4
"""Bytes of one token id in a canonical prompt."""
_MAX_ID = 0xFFFFFFFF
_NONE = msgspec.Raw(b"")

PATHS: dict[bytes, Endpoint] = {
    b"/v1/completions": Endpoint.COMPLETIONS,
    b"/v1/chat/completions": Endpoint.CHAT,
    b"/v1/responses": Endpoint.RESPONSES,
    b"/v1/messages": Endpoint.MESSAGES,
    b"/v1/messages/count_tokens": Endpoint.MESSAGES,
    b"/v1/embeddings": Endpoint.EMBEDDINGS,
    b"/pooling": Endpoint.EMBEDDINGS,
    b"/classify": Endpoint.EMBEDDINGS,
    b"/rerank": Endpoint.RERANK,
    b"/v1/rerank": Endpoint.RERANK,
    b"/v2/rerank": Endpoint.RERANK,
    b"/score": Endpoint.SCORE,
    b"/v1/score": Endpoint.SCORE,
    b"/tokenize": Endpoint.TOKENIZE,
    b"/detokenize": Endpoint.DETOKENIZE,
}
"""Which endpoint a request path is, for the paths that are routed by their ``model``."""


class _Fields(msgspec.Struct):
    """The fields used, of all endpoints together; scalars as whatever they are."""

    model: Any = None
    stream: Any = None
    prompt: msgspec.Raw = _NONE
    tools: msgspec.Raw = _NONE
    input: msgspec.Raw = _NONE
    instructions: msgspec.Raw = _NONE
    system: msgspec.Raw = _NONE
    query: msgspec.Raw = _NONE
    queries: msgspec.Raw = _NONE
    documents: msgspec.Raw = _NONE
    text_1: msgspec.Raw = _NONE
    text_2: msgspec.Raw = _NONE
    tokens: msgspec.Raw = _NONE
    prompt_embeds: msgspec.Raw = _NONE
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    best_of: Any = None
    use_beam_search: Any = None
    priority: Any = None
    cache_salt: Any = None
    return_token_ids: Any = None
    seed: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    response_format: msgspec.Raw = _NONE
    structured_outputs: msgspec.Raw = _NONE
    guided_json: msgspec.Raw = _NONE
    guided_regex: msgspec.Raw = _NONE
    guided_choice: msgspec.Raw = _NONE
    guided_grammar: msgspec.Raw = _NONE
    text: msgspec.Raw = _NONE
    logprobs: Any = None
    prompt_logprobs: Any = None
    stop: msgspec.Raw = _NONE
    stop_token_ids: msgspec.Raw = _NONE
    stop_sequences: msgspec.Raw = _NONE
    echo: Any = None
    previous_response_id: Any = None


class _Body(_Fields):
    messages: msgspec.Raw = _NONE


class _ChatBody(_Fields):
    """A body whose messages are a chat's; most are."""

    messages: list[Message] = []


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_chat = msgspec.json.Decoder(_ChatBody).decode
_decode_any = msgspec.json.decode
_decode_ids = msgspec.json.Decoder(list[int]).decode
_decode_id_lists = msgspec.json.Decoder(list[list[int]]).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_texts = msgspec.json.Decoder(list[str]).decode


def parse_request(endpoint: Endpoint, headers: Mapping[bytes, bytes], body: bytes) -> ParsedRequest:
    """Facts of a request. ``headers``: lower-case names. Raises BadRequest for a body that is not a JSON object, is
    nested too deeply, or names its model by something that is not a short string."""
    fields = _decode(endpoint, body)
    model = fields.model
    if model is None:
        model = ""
    elif not isinstance(model, str):
        raise BadRequest("model must be a string", param="model")
    elif len(model) > MAX_MODEL_CHARS:
        raise BadRequest(f"model is longer than {MAX_MODEL_CHARS} characters", param="model")
    try:
        prompt, ids_count, several = _prompt(endpoint, fields)
    except RecursionError:
        raise BadRequest("the request body is nested too deeply") from None
    stream = fields.stream
    facts = _NO_FACTS if _ROUTING_HEADERS.isdisjoint(headers) else _header_facts(headers)
    return ParsedRequest(
        endpoint=endpoint,
        model=model,
        stream=stream is True or (stream is not None and (stream == 1 or stream == "true")),
        prompt=prompt,
        prompt_ids_count=ids_count,
        max_tokens=_positive(fields.max_completion_tokens)
        or _positive(fields.max_tokens)
        or _positive(fields.max_output_tokens),
        priority=_priority(facts, fields.priority),
        cache_salt=fields.cache_salt[:MAX_FIELD_CHARS] if isinstance(fields.cache_salt, str) else "",
        session_id=facts.session_id or _previous_response(fields),
        objective=facts.objective,
        fairness_id=facts.fairness_id,
        slo_ttft_s=facts.slo_ttft_s,
        slo_tpot_s=facts.slo_tpot_s,
        data_parallel_rank=facts.data_parallel_rank,
        return_token_ids=fields.return_token_ids is True,
        resumability=_resumability(fields, several),
    )


def to_features(
    parsed: ParsedRequest, resolved: Resolved, *, request_id: str, sequence: int, arrival_s: float
) -> RequestFeatures:
    """What the decision needs of a parsed request whose model ``resolved`` to a pool. Hashes the prompt."""
    pool = resolved.pool
    bytes_per_token = max(pool.bytes_per_token, 0.25)
    exact = parsed.prompt_ids_count
    if exact is None:
        prompt_tokens = int(len(parsed.prompt) / bytes_per_token) + 1
        chunk_tokens = pool.chunk_bytes / bytes_per_token
    else:
        prompt_tokens = max(1, exact)
        chunk_tokens = pool.chunk_bytes / ID_BYTES
    return RequestFeatures(
        request_id=request_id,
        pool=pool.name,
        adapter=resolved.adapter,
        sequence=sequence,
        arrival_s=arrival_s,
        chain=chain(parsed.prompt, max(pool.chunk_bytes, 16), chain_seed(resolved.adapter, parsed.cache_salt)),
        chunk_tokens=chunk_tokens,
        prompt_tokens=prompt_tokens,
        prompt_tokens_exact=exact is not None,
        unique_key=unique_key(parsed.session_id or request_id),
        stream=parsed.stream,
        max_tokens=parsed.max_tokens,
        priority=parsed.priority,
        session_id=parsed.session_id,
        objective=parsed.objective,
        fairness_id=parsed.fairness_id,
        slo_ttft_s=parsed.slo_ttft_s,
        slo_tpot_s=parsed.slo_tpot_s,
        data_parallel_rank=parsed.data_parallel_rank,
    )


def _decode(endpoint: Endpoint, body: bytes) -> _Body | _ChatBody:
    if endpoint is Endpoint.CHAT or endpoint is Endpoint.MESSAGES:
        try:
            return _decode_chat(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # what is wrong with it, and whether that matters, shows below
    try:
        return _decode_body(body)
    except RecursionError:
        raise BadRequest("the request body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if not body.lstrip().startswith(b"{") and isinstance(error, msgspec.ValidationError):
            raise BadRequest("the request body must be a JSON object") from None
        if isinstance(error, msgspec.ValidationError):
            raise BadRequest(f"the request body cannot be read: {_bounded(str(error))}") from None
        raise BadRequest(f"the request body is not valid JSON: {_bounded(str(error))}") from None


def _prompt(endpoint: Endpoint, fields: _Body | _ChatBody) -> tuple[bytes, int | None, bool]:
    """(canonical prompt, exact count of token ids if it was ids, whether there are several prompts)."""
    if endpoint is Endpoint.CHAT:
        return chat_prompt(fields.tools, fields.messages), None, False
    if endpoint is Endpoint.MESSAGES:
        return chat_prompt(fields.tools, fields.messages, fields.system), None, False
    if endpoint is Endpoint.RESPONSES:
        return items_prompt(fields.tools, fields.instructions, fields.input), None, False
    if endpoint is Endpoint.DETOKENIZE:
        return _completion_prompt(fields.tokens)
    if endpoint in (Endpoint.RERANK, Endpoint.SCORE):
        parts = (fields.query, fields.queries, fields.text_1, fields.documents, fields.text_2)
        return raw_prompt(*parts), None, False
    prompt = fields.prompt if len(bytes(fields.prompt)) else fields.input
    if not bytes(prompt) and isinstance(fields, _Body) and bytes(fields.messages):
        return chat_prompt(fields.tools, fields.messages), None, False
    if not bytes(prompt):
        return raw_prompt(fields.prompt_embeds), None, False
    return _completion_prompt(prompt)


def _completion_prompt(raw: msgspec.Raw) -> tuple[bytes, int | None, bool]:
    """A prompt of the completions kind: a text, token ids, or a list of either."""
    data = bytes(raw)
    try:
        if data[:1] == b'"':
            return text_prompt(_decode_text(data)), None, False
        inner = data[1:64].lstrip()[:1]
        if inner == b'"':
            texts = _decode_texts(data)
            return text_prompt("\x1e".join(texts)), None, len(texts) > 1
        if inner == b"[":
            lists = _decode_id_lists(data)
            ids = array("I", [value for ids in lists for value in ids])
            return ids.tobytes(), len(ids), len(lists) > 1
        if data[:1] == b"[":
            ids = array("I", _decode_ids(data))
            return ids.tobytes(), len(ids), False
    except (msgspec.DecodeError, UnicodeError, OverflowError):
        pass
    return data, None, False


_resumability_fields = attrgetter(
    *("n", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "response_format"),
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "text", "logprobs"),
    *("prompt_logprobs", "tools", "stop", "stop_token_ids", "stop_sequences", "echo", "use_beam_search", "best_of"),
    "previous_response_id",
)
_NONE_GIVEN = _resumability_fields(_Fields())
_PLAIN = Resumability()


def _resumability(fields: _Fields, several: bool) -> Resumability:
    if not several and _resumability_fields(fields) == _NONE_GIVEN:
        return _PLAIN
    n = fields.n if isinstance(fields.n, int) and not isinstance(fields.n, bool) else 1
    return Resumability(
        n=max(1, min(n, 1 << 16)),
        has_seed=fields.seed is not None,
        has_penalties=fields.presence_penalty not in (None, 0)
        or fields.frequency_penalty not in (None, 0)
        or fields.repetition_penalty not in (None, 1),
        has_structured_output=_given(fields.response_format)
        or _given(fields.structured_outputs)
        or _given(fields.guided_json)
        or _given(fields.guided_regex)
        or _given(fields.guided_choice)
        or _given(fields.guided_grammar)
        or _given(fields.text),
        has_logprobs=fields.logprobs not in (None, False) or fields.prompt_logprobs not in (None, False),
        has_tools=_given(fields.tools),
        has_stop=_given(fields.stop) or _given(fields.stop_token_ids) or _given(fields.stop_sequences),
        echo=fields.echo is True,
        beam_search=fields.use_beam_search is True or fields.best_of not in (None, 1, fields.n),
        several_prompts=several,
        stateful=fields.previous_response_id is not None,
    )


_NOTHING_ASKED = frozenset((b"", b"null", b"[]", b'{"type":"text"}', b'{"type": "text"}'))


def _given(raw: msgspec.Raw) -> bool:
    # Most fields are absent, and an absent one is the default itself.
    return raw is not _NONE and bytes(raw) not in _NOTHING_ASKED


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 40 else None


def _header(headers: Mapping[bytes, bytes], aliases: tuple[bytes, ...]) -> str:
    for name in aliases:
        value = headers.get(name)
        if value:
            return value[:MAX_FIELD_CHARS].decode("latin-1").strip()
    return ""


class _HeaderFacts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the headers say to routing. ``priority`` is None where they say nothing of it."""

    priority: int | None = None
    session_id: str = ""
    objective: str = ""
    fairness_id: str = ""
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    data_parallel_rank: int | None = None


_NO_FACTS = _HeaderFacts()
_ROUTING_HEADERS = frozenset(
    name
    for aliases in (
        *(names.PRIORITY, names.SESSION, names.OBJECTIVE, names.FAIRNESS),
        *(names.SLO_TTFT_MS, names.SLO_TPOT_MS, names.DATA_PARALLEL_RANK),
    )
    for name in aliases
)


def _header_facts(headers: Mapping[bytes, bytes]) -> _HeaderFacts:
    rank = _small_int(_header(headers, names.DATA_PARALLEL_RANK))
    return _HeaderFacts(
        priority=_small_int(_header(headers, names.PRIORITY)),
        session_id=_header(headers, names.SESSION),
        objective=_header(headers, names.OBJECTIVE),
        fairness_id=_header(headers, names.FAIRNESS),
        slo_ttft_s=_milliseconds(headers, names.SLO_TTFT_MS),
        slo_tpot_s=_milliseconds(headers, names.SLO_TPOT_MS),
        data_parallel_rank=rank if rank is not None and 0 <= rank < 1 << 16 else None,
    )


def _previous_response(fields: _Fields) -> str:
    previous = fields.previous_response_id
    return previous[:MAX_FIELD_CHARS] if isinstance(previous, str) else ""


def _milliseconds(headers: Mapping[bytes, bytes], aliases: tuple[bytes, ...]) -> float | None:
    """Seconds of a header in milliseconds; None where it is absent or no positive number."""
    text = _header(headers, aliases)
    if not text:
        return None
    try:
        value = float(text) / 1000.0
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _small_int(text: str) -> int | None:
    if len(text) > 11 or not text.lstrip("-").isascii() or not text.lstrip("-").isdigit():
        return None
    try:
        return int(text)
    except ValueError:
        return None


def _priority(facts: _HeaderFacts, field: Any) -> int:
    """The header wins over the body, as in vLLM."""
    if facts.priority is not None:
        return facts.priority
    if isinstance(field, int) and not isinstance(field, bool) and abs(field) < 1 << 31:
        return field
    return 0


def _bounded(text: str) -> str:
    return text[:MAX_FIELD_CHARS]
