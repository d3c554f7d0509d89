"""Tokenizers by the name that a pool gives: "builtin" for emulated engines, or a Hugging Face tokenizer on disk.

A body becomes the ids that vLLM 0.32 makes of it: text prompts with the tokenizer's special tokens, chats through the
chat template and without them. Whatever a body holds that is not understood here raises Unsupported: the router then
decides without exact ids, it never refuses a request for that.
"""

import json
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router.tokens.types import PromptTokenizer, TokenizerError, Unsupported
from twofold import tokenizer as builtin

BUILTIN = "builtin"
MAX_SEGMENTS = 4096
MAX_SEGMENT_CHARS = 1 << 20
_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal"})
_UNSUPPORTED_FIELDS = (
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "continue_final_message",
    "media_io_kwargs",
)


def load(name: str) -> PromptTokenizer:
    """The tokenizer of a pool. Raises TokenizerError."""
    return BuiltinTokenizer() if name == BUILTIN else HuggingFaceTokenizer(Path(name))


def body_ids(tokenizer: PromptTokenizer, body: Mapping[str, Any], *, chat: bool) -> "array[int]":
    """Ids of the prompt in a completion's or a chat's body. Raises Unsupported."""
    if any(body.get(name) for name in _UNSUPPORTED_FIELDS):
        raise Unsupported("a field that changes the prompt")
    if chat:
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise Unsupported("no messages")
        return tokenizer.chat(body)
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise Unsupported("not one text")
    return tokenizer.text(prompt, add_special_tokens=body.get("add_special_tokens", True) is not False)


class BuiltinTokenizer:
    """That of emulated engines (``twofold.tokenizer``); remembers what it made of texts met before."""

    def __init__(self) -> None:
        self._segments = _Segments()

    def text(self, text: str, *, add_special_tokens: bool) -> "array[int]":
        """See PromptTokenizer."""
        return array("I", builtin.encode(text))

    def chat(self, body: Mapping[str, Any]) -> "array[int]":
        """See PromptTokenizer."""
        messages = body["messages"]
        for message in messages:
            if not isinstance(message, dict):
                raise Unsupported("a message that is no object")
            _check_parts(message.get("content"))
        tools = body.get("tools")
        generate = body.get("add_generation_prompt", True) is not False
        head = builtin.chat_prompt_ids((), tools if isinstance(tools, list) else None, add_generation_prompt=False)
        ids = array("I", head)
        for message in messages:
            ids += self._segments.get(json.dumps(message), lambda message=message: _turn(message))
        if generate:
            ids += array("I", builtin.chat_prompt_ids(())[1:])
        return ids


def _turn(message: Mapping[str, Any]) -> "array[int]":
    return array("I", builtin.chat_prompt_ids([message], add_generation_prompt=False)[1:])


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` with the chat template beside it. ``path`` names the file or its folder.

    Where the tokenizer treats what lies between two special tokens by itself, each piece is tokenised once and
    remembered, so that a conversation's next turn costs only its new messages. Raises TokenizerError.
    """

    def __init__(self, path: Path) -> None:
        folder = path if path.is_dir() else path.parent
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(file))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            layout = json.loads(file.read_text(encoding="utf-8"))
        except ImportError:
            raise TokenizerError("install twofold[tokenizer] to use a tokenizer") from None
        except Exception as error:  # the library raises bare Exception for files that it cannot read
            raise TokenizerError(f"cannot load {file}: {str(error)[:200]}") from None
        self._template = _Template(folder)
        self._special = _splitter(layout)
        self._segments = _Segments()

    def text(self, text: str, *, add_special_tokens: bool) -> "array[int]":
        """See PromptTokenizer."""
        return self._encode(text, add_special_tokens)

    def chat(self, body: Mapping[str, Any]) -> "array[int]":
        """See PromptTokenizer."""
        text = self._template.render(body)
        if self._special is None:
            return self._encode(text, False)
        ids = array("I")
        for piece in self._special.split(text):
            if piece:
                ids += self._segments.get(piece, lambda piece=piece: self._encode(piece, False))
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> "array[int]":
        # The batch form lets go of the interpreter's lock while it works.
        (encoded,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return array("I", encoded.ids)


class _Segments:
    """Ids of pieces of text met before, the least recently used ones forgotten."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self._chars = 0

    def get(self, text: str, make: Any) -> "array[int]":
        """Ids of ``text``, by ``make`` where they are not known."""
        known: array[int] | None = self._known.get(text)
        if known is not None:
            self._known.move_to_end(text)
            return known
        made: array[int] = make()
        if len(text) <= MAX_SEGMENT_CHARS // 4:
            self._known[text] = made
            self._chars += len(text)
            while self._chars > 16 * MAX_SEGMENT_CHARS or len(self._known) > MAX_SEGMENTS:
                self._chars -= len(self._known.popitem(last=False)[0])
        return made


def _splitter(layout: Mapping[str, Any]) -> Any:
    """A pattern that splits text at special tokens, kept; None where pieces could not be tokenised by themselves."""
    import re

    if not _is_local(layout.get("pre_tokenizer")) or layout.get("normalizer") is not None:
        return None
    tokens = [token for token in layout.get("added_tokens") or () if token.get("special")]
    if not tokens or any(token.get("lstrip") or token.get("rstrip") or token.get("single_word") for token in tokens):
        return None
    names = sorted((token["content"] for token in tokens), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, names)) + ")")


def _is_local(pre_tokenizer: Any) -> bool:
    """Whether a piece's tokens depend on that piece alone: byte-level splitting, no space put in front."""
    if not isinstance(pre_tokenizer, dict):
        return False
    if pre_tokenizer.get("type") == "Sequence":
        parts = pre_tokenizer.get("pretokenizers") or ()
        return bool(parts) and all(_is_local(part) for part in parts)
    if pre_tokenizer.get("type") == "ByteLevel":
        return not pre_tokenizer.get("add_prefix_space")
    return pre_tokenizer.get("type") in ("Split", "Digits", "Punctuation")


class _Template:
    """The chat template in a tokenizer's folder, rendered in a sandbox."""

    def __init__(self, folder: Path) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> str:
            raise TemplateError(message)

        def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=False, indent=indent, **options)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        source, self._names = _template_source(folder)
        try:
            self._compiled = environment.from_string(source) if source else None
        except TemplateError as error:
            raise TokenizerError(f"the chat template in {folder} cannot be used: {error}") from None
        self._wants_parts = bool(source) and _loops_over_content(environment.parse(source))
        self._error = TemplateError

    def render(self, body: Mapping[str, Any]) -> str:
        """The prompt text of a chat. Raises Unsupported."""
        if self._compiled is None:
            raise Unsupported("no chat template")
        try:
            return self._compiled.render(
                messages=[_as_rendered(message, self._wants_parts) for message in body["messages"]],
                tools=body.get("tools") or None,
                documents=None,
                add_generation_prompt=body.get("add_generation_prompt", True) is not False,
                **self._names,
            )
        except (self._error, TypeError, ValueError, KeyError) as error:
            raise Unsupported(str(error)[:200]) from None


def _template_source(folder: Path) -> tuple[str, dict[str, str]]:
    """(template, names of the special tokens that templates mention)."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"cannot read {folder / 'tokenizer_config.json'}: {error}") from None
    names = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[name] = value
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    return source if isinstance(source, str) else "", names


def _loops_over_content(template: Any) -> bool:
    """Whether a template goes through the parts of a message: then vLLM gives it lists of parts, else one text."""
    from jinja2 import nodes

    for loop in template.find_all(nodes.For):
        for node in (loop.iter, *loop.iter.find_all(nodes.Expr)):
            if isinstance(node, nodes.Getattr) and node.attr == "content":
                return True
            if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content":
                return True
            if isinstance(node, nodes.Name) and node.name == "content":
                return True
    return False


def _as_rendered(message: Any, wants_parts: bool) -> dict[str, Any]:
    """A message as vLLM hands it to the template. Raises Unsupported."""
    if not isinstance(message, dict) or message.get("role") == "developer":
        raise Unsupported("a message that is no object, or of a role that engines rewrite")
    content = message.get("content")
    _check_parts(content)
    if isinstance(content, list):
        texts = [part if isinstance(part, str) else str(part.get("text", "")) for part in content]
    else:
        texts = [str(content)] if content else []
    shown = {
        **message,
        "content": [{"type": "text", "text": text} for text in texts] if wants_parts else "\n".join(texts),
    }
    if message.get("tool_calls"):
        shown["tool_calls"] = [_with_arguments(call) for call in message["tool_calls"]]
    return shown


def _with_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object, as templates want them. Raises ValueError."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise Unsupported("a tool call that is no function")
    arguments = function.get("arguments") or {}
    return {
        **call,
        "function": {**function, "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments},
    }


def _check_parts(content: Any) -> None:
    for part in content if isinstance(content, Sequence) and not isinstance(content, str) else ():
        if isinstance(part, str):
            continue
        if not isinstance(part, dict) or part.get("type", "text") not in _TEXT_PARTS:
            raise Unsupported("a part that is no text")
