"""The log probabilities of a choice, and the shapes in which the endpoints show them."""

import codecs
from collections.abc import Sequence
from typing import Any

import msgspec

from emulator.logprobs import LogprobChain, TokenLogprob, prompt_logprobs
from emulator.tokens import EOS_ID, decode_bytes, token_bytes


class Entry(msgspec.Struct, frozen=True):
    """A token with its text, and what is known of its position: itself first, then the best others; or nothing."""

    token_id: int
    text: str
    found: Sequence[TokenLogprob] | None


class ChoiceLogprobs:
    """Entries of a choice's tokens as they come. ``best``: others per position."""

    __slots__ = ("_best", "_chain", "_decoder", "_sampled_best")

    def __init__(self, prompt_ids: Sequence[int], choice: int, best: int, *, sampled_best: bool) -> None:
        self._chain = LogprobChain(prompt_ids, choice)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._best = best
        self._sampled_best = sampled_best

    def take(self, tokens: Sequence[int]) -> list[Entry]:
        """The entries of the next tokens; a token that completes no character has no text."""
        entries = []
        for token in tokens:
            sampled_best = self._sampled_best or token == EOS_ID
            found = self._chain.step(token, self._best, sampled_best=sampled_best)
            entries.append(Entry(token, self._decoder.decode(token_bytes(token)), found))
        return entries


def prompt_entries(prompt_ids: Sequence[int], best: int) -> list[Entry]:
    """The entries of a prompt's tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = prompt_logprobs(prompt_ids, best)
    return [Entry(token, decoder.decode(token_bytes(token)), found[place]) for place, token in enumerate(prompt_ids)]


def prompt_shape(entries: Sequence[Entry]) -> list[dict[str, Any] | None]:
    """``prompt_logprobs``: a mapping of token ids a position."""
    return [
        None
        if entry.found is None
        else {
            str(one.token_id): {"logprob": one.logprob, "rank": one.rank, "decoded_token": _decoded(one, entry)}
            for one in entry.found
        }
        for entry in entries
    ]


def completion_shape(entries: Sequence[Entry], offset: int, *, as_ids: bool) -> tuple[dict[str, Any], int]:
    """``logprobs`` of a completion, whose text starts at character ``offset``; and the offset of what follows.

    As in vLLM the offsets count the shown tokens, so with ``as_ids`` they are those of the placeholders.
    """
    offsets: list[int] = []
    own: list[float | None] = []
    shown: list[str] = []
    top: list[dict[str, float] | None] = []
    for entry in entries:
        offsets.append(offset)
        text = _shown(entry.token_id, entry.text, as_ids)
        shown.append(text)
        offset += len(text)
        if entry.found is None:
            own.append(None)
            top.append(None)
        else:
            own.append(entry.found[0].logprob)
            top.append({_shown(one.token_id, _decoded(one, entry), as_ids): one.logprob for one in entry.found})
    return {"text_offset": offsets, "token_logprobs": own, "tokens": shown, "top_logprobs": top}, offset


def chat_shape(entries: Sequence[Entry], best: int, *, as_ids: bool) -> dict[str, Any]:
    """``logprobs`` of a chat, and of generated tokens in text mode: ``best`` entries a position."""
    content = []
    for entry in entries:
        found = entry.found or ()
        item = _chat_item(found[0], entry, as_ids)
        item["top_logprobs"] = [_chat_item(one, entry, as_ids) for one in found[:best]]
        content.append(item)
    return {"content": content}


def chat_item(entry: Entry) -> dict[str, Any]:
    """An entry that a caller gave back, with all the others that came with it."""
    found = entry.found or ()
    return {**_chat_item(found[0], entry, False), "top_logprobs": [_chat_item(one, entry, False) for one in found[1:]]}


def returned_shape(entries: Sequence[Entry], offset: int) -> tuple[dict[str, Any], int]:
    """``completion_shape`` of entries that a caller gave back."""
    shown, after = completion_shape(entries, offset, as_ids=False)
    others = [(entry.found or ())[1:] for entry in entries]
    shown["top_logprobs"] = [
        {_decoded(one, entry): one.logprob for one in found} or None
        for entry, found in zip(entries, others, strict=True)
    ]
    return shown, after


def generate_shape(entries: Sequence[Entry], best: int) -> dict[str, Any]:
    """``logprobs`` of generated tokens: ids, no text."""
    content = []
    for entry in entries:
        found = [msgspec.structs.asdict(one) for one in entry.found or ()]
        content.append({**found[0], "top_logprobs": found[: max(best, 1)]})
    return {"content": content}


def resolved(content: Sequence[dict[str, Any]], before: Sequence[int]) -> list[Entry]:
    """Entries of generated logprobs as they came back from a caller; ``before``: ids that precede them.

    Raises KeyError, TypeError or ValueError for what is none.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(decode_bytes(before))
    entries = []
    for item in content:
        others = [_found(top) for top in item.get("top_logprobs") or []]
        text = decoder.decode(token_bytes(item["token_id"]))
        entries.append(Entry(item["token_id"], text, [_found(item), *others]))
    return entries


def _found(item: dict[str, Any]) -> TokenLogprob:
    return TokenLogprob(token_id=item["token_id"], logprob=float(item["logprob"]), rank=item.get("rank") or 0)


def _chat_item(one: TokenLogprob, entry: Entry, as_ids: bool) -> dict[str, Any]:
    text = _decoded(one, entry)
    data = list(text.encode("utf-8", "replace"))
    return {"token": _shown(one.token_id, text, as_ids), "logprob": one.logprob, "bytes": data}


def _decoded(one: TokenLogprob, entry: Entry) -> str:
    if one.token_id == entry.token_id:
        return entry.text
    return token_bytes(one.token_id).decode("utf-8", "replace")


def _shown(token_id: int, text: str, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids else text
