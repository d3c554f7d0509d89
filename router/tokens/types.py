"""What a tokenizer is to a router. Apart from the tokenizers themselves, which take memory that few relays need."""

from array import array
from collections.abc import Mapping
from typing import Any, Protocol


class Unsupported(ValueError):
    """The ids of this body cannot be told here."""


class TokenizerError(ValueError):
    """The tokenizer cannot be loaded."""


class PromptTokenizer(Protocol):
    """Turns bodies into ids. Called from one thread at a time."""

    def text(self, text: str, *, add_special_tokens: bool) -> "array[int]":
        """Ids of a text prompt."""

    def chat(self, body: Mapping[str, Any]) -> "array[int]":
        """Ids of a chat body's prompt. Raises Unsupported."""
