"""One typed settings value per process: flags > ``TWOFOLD_*`` environment > YAML file > defaults.

A settings class is a frozen ``msgspec.Struct`` whose fields all have defaults; each field is one flag
(``listen_host`` -> ``--listen-host``), one environment variable (``TWOFOLD_LISTEN_HOST``) and one key of the YAML file.
Fields are str, int, float, bool, an enum, any of these or None, or ``tuple[str, ...]`` (a flag given several times, a
comma-separated variable, a YAML list). ``Annotated[T, msgspec.Meta(description=...)]`` gives the help text.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

ENVIRONMENT_PREFIX = "TWOFOLD_"

S = TypeVar("S", bound=msgspec.Struct)


class SettingsError(ValueError):
    """A key or value that the settings class does not accept; the message is one line."""


def load(
    cls: type[S],
    argv: Sequence[str],
    *,
    prog: str,
    description: str = "",
    environ: Mapping[str, str] | None = None,
) -> S:
    """Settings of this process. Exits with 2 and one line on bad input, with 0 on ``--print-config``."""
    parser = build_parser(cls, prog=prog, description=description)
    arguments = vars(parser.parse_args(argv))
    config = arguments.pop("config", None)
    print_config = arguments.pop("print_config", False)
    flags = {name: value for name, value in arguments.items() if value is not None}
    try:
        settings = resolve(cls, flags, os.environ if environ is None else environ, read_yaml(config) if config else {})
    except SettingsError as error:
        _fail(prog, str(error))
    if print_config:
        sys.stdout.write(to_yaml(settings))
        raise SystemExit(0)
    return settings


def resolve(cls: type[S], flags: Mapping[str, Any], environ: Mapping[str, str], file: Mapping[str, Any]) -> S:
    """Merge the sources into a settings value. Raises SettingsError naming the offending key."""
    fields = {field.name: field for field in msgspec.structs.fields(cls)}
    unknown = sorted(set(file) - set(fields))
    if unknown:
        raise SettingsError(f"unknown key {unknown[0]!r} in the configuration file; known keys: {', '.join(fields)}")
    merged: dict[str, Any] = {}
    for name, field in fields.items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        if name in flags:
            value, origin = flags[name], "--" + name.replace("_", "-")
        elif variable in environ:
            value, origin = _split_list(field.type, environ[variable]), variable
        elif name in file:
            value, origin = file[name], f"configuration key {name!r}"
        else:
            continue
        try:
            merged[name] = msgspec.convert(value, field.type, strict=False)
        except msgspec.ValidationError as error:
            raise SettingsError(f"{origin}: {error}") from None
    try:
        return cls(**merged)
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from None


def build_parser(cls: type[msgspec.Struct], *, prog: str, description: str = "") -> argparse.ArgumentParser:
    """The argument parser of a settings class, for ``--help`` and shell completion."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings")
    parser.add_argument("--print-config", action="store_true", help="print the settings in force as YAML and exit")
    for field, info in zip(msgspec.structs.fields(cls), _field_infos(cls), strict=True):
        _add_flag(parser, field, info)
    return parser


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises SettingsError when it cannot be read or is no mapping."""
    import yaml  # here, so that processes without a file do not pay for it

    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise SettingsError(f"{path}: expected a mapping of setting names to values")
    return value


def to_yaml(settings: msgspec.Struct) -> str:
    """Settings as a YAML document that ``--config`` accepts."""
    import yaml

    return yaml.safe_dump(msgspec.to_builtins(settings), sort_keys=False)


def to_argv(settings: msgspec.Struct) -> list[str]:
    """Flags that give another process the same settings; fields at their default are left out."""
    argv: list[str] = []
    for field in msgspec.structs.fields(type(settings)):
        value = getattr(settings, field.name)
        if value is None or value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            for item in value:
                argv += [flag, str(item)]
        else:
            argv += [flag, str(msgspec.to_builtins(value))]
    return argv


def _field_infos(cls: type[msgspec.Struct]) -> list[msgspec.inspect.Type]:
    info = msgspec.inspect.type_info(cls)
    assert isinstance(info, msgspec.inspect.StructType)
    return [field.type for field in info.fields]


def _description(info: msgspec.inspect.Type) -> str:
    if isinstance(info, msgspec.inspect.Metadata):
        extra = info.extra_json_schema or {}
        return str(extra.get("description", "")) or _description(info.type)
    return ""


def _bare(info: msgspec.inspect.Type) -> msgspec.inspect.Type:
    if isinstance(info, msgspec.inspect.Metadata):
        return _bare(info.type)
    if isinstance(info, msgspec.inspect.UnionType):
        return next(item for item in map(_bare, info.types) if not isinstance(item, msgspec.inspect.NoneType))
    return info


def _add_flag(parser: argparse.ArgumentParser, field: msgspec.structs.FieldInfo, info: msgspec.inspect.Type) -> None:
    flag = "--" + field.name.replace("_", "-")
    bare = _bare(info)
    default = field.default
    shown = "" if default in ((), "", None) else f" (default: {msgspec.to_builtins(default)})"
    help_text = (_description(info) + shown).replace("%", "%%") or None
    if isinstance(bare, msgspec.inspect.BoolType):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_text)
    elif isinstance(bare, msgspec.inspect.VarTupleType):
        parser.add_argument(flag, action="append", default=None, metavar="VALUE", help=help_text)
    elif isinstance(bare, msgspec.inspect.EnumType):
        choices = [str(member.value) for member in bare.cls]
        parser.add_argument(flag, default=None, choices=choices, help=help_text)
    else:
        metavar = {"IntType": "N", "FloatType": "X"}.get(type(bare).__name__, "VALUE")
        parser.add_argument(flag, default=None, metavar=metavar, help=help_text)


def _split_list(annotation: Any, text: str) -> Any:
    if isinstance(_bare(msgspec.inspect.type_info(annotation)), msgspec.inspect.VarTupleType):
        return [item for item in text.split(",") if item]
    return text


def _fail(prog: str, message: str) -> NoReturn:
    sys.stderr.write(f"{prog}: error: {message}\n")
    raise SystemExit(2)
