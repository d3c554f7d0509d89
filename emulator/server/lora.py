"""LoRA adapters of one port: loading, unloading, lookup by name."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from emulator.model import Adapter
from emulator.server.errors import ApiError, validation_error
from emulator.server.http import Exchange
from emulator.server.validation import convert_fields, finding, read_body

MAX_ADAPTERS = 10_000
EMULATED = "emulated:"
"""A path that begins so names an adapter that exists nowhere; any other must be a folder with an adapter's files."""
_LOAD_FIELDS = {"lora_name": "str", "lora_path": "str", "load_inplace": "bool", "is_3d_lora_weight": "bool"}


class Adapters:
    """The adapters loaded, by name. ``base``: the served model, which no adapter may be called."""

    def __init__(self, base: str, preloaded: Mapping[str, str]) -> None:
        self._base = base
        self._loaded: dict[str, Adapter] = {}
        self._last_id = 0
        for name, path in preloaded.items():
            self.load(name, path, replace=False)

    def routes(self) -> dict[str, dict[str, Callable[[Exchange], None]]]:
        """Handlers by path and method."""
        return {
            "/v1/load_lora_adapter": {"POST": self._handle_load},
            "/v1/unload_lora_adapter": {"POST": self._handle_unload},
        }

    def get(self, name: Any) -> Adapter | None:
        """The adapter of this name."""
        return self._loaded.get(name) if isinstance(name, str) else None

    def every(self) -> list[Adapter]:
        """All adapters, in the order of loading."""
        return list(self._loaded.values())

    def load(self, name: str, path: str, *, replace: bool) -> None:
        """Make an adapter available. Raises ApiError."""
        if not name or not path:
            raise _refused("Both 'lora_name' and 'lora_path' must be provided.")
        if name == self._base:
            raise _refused(f"The lora adapter '{name}' conflicts with a served base model.")
        known = self._loaded.get(name)
        if known is not None and not replace:
            raise _refused(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True."
            )
        if not path.startswith(EMULATED) and not os.path.isfile(os.path.join(path, "adapter_config.json")):
            raise ApiError(
                f"Loading lora {name} failed: No adapter found for {path}", status=404, type_="NotFoundError"
            )
        if known is None:
            if len(self._loaded) >= MAX_ADAPTERS:
                raise ApiError(f"at most {MAX_ADAPTERS} adapters", status=500, type_="InternalServerError")
            self._last_id += 1
        adapter_id = self._last_id if known is None else known.adapter_id
        self._loaded[name] = Adapter(adapter_id=adapter_id, name=name, path=path)

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that use it go on. Raises ApiError."""
        if not name:
            raise _refused("'lora_name' needs to be provided to unload a LoRA adapter.")
        if name not in self._loaded:
            raise ApiError(f"The lora adapter '{name}' cannot be found.", status=404, type_="NotFoundError")
        del self._loaded[name]

    def _handle_load(self, exchange: Exchange) -> None:
        body = _fields(exchange, _LOAD_FIELDS, ("lora_name", "lora_path"))
        self.load(body["lora_name"], body["lora_path"], replace=bool(body.get("load_inplace")))
        _success(exchange, body["lora_name"], "added")

    def _handle_unload(self, exchange: Exchange) -> None:
        body = _fields(exchange, {"lora_name": "str", "lora_int_id": "int"}, ("lora_name",))
        self.unload(body["lora_name"])
        _success(exchange, body["lora_name"], "removed")


def _fields(exchange: Exchange, kinds: Mapping[str, str], required: tuple[str, ...]) -> dict[str, Any]:
    body = read_body(exchange)
    findings = [finding("missing", f"body.{name}", body) for name in required if name not in body]
    findings += convert_fields(body, kinds)
    null = [name for name in required if name in body and body[name] is None]
    findings += [finding("string_type", f"body.{name}", None) for name in null]
    if findings:
        raise validation_error(findings)
    return body


def _success(exchange: Exchange, name: str, what: str) -> None:
    exchange.respond(200, f"Success: LoRA adapter '{name}' {what} successfully.".encode(), content_type=None)


def _refused(message: str) -> ApiError:
    return ApiError(message, type_="InvalidUserInput")


def read_modules(modules: tuple[str, ...]) -> dict[str, str]:
    """``name=path`` of each ``--lora-modules``. Raises ValueError."""
    found = {}
    for module in modules:
        name, separator, path = module.partition("=")
        if not (name and separator and path):
            raise ValueError(f"lora-modules: {module!r} is not name=path")
        found[name] = path
    return found
