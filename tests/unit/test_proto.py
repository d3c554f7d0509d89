"""The wire contract: generated code is what ``proto/`` says, and every part of it is documented."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

import twofold.v1

ROOT = Path(__file__).resolve().parents[2]
GENERATED = Path(twofold.v1.__file__).parent
PROTOS = sorted((ROOT / "proto/twofold/v1").glob("*.proto"))

# Numbers of the fields of FileDescriptorProto and its parts, which make up the paths of source locations.
FILE_MESSAGE, FILE_ENUM, FILE_SERVICE = 4, 5, 6
MESSAGE_FIELD, MESSAGE_NESTED, MESSAGE_ENUM = 2, 3, 4
ENUM_VALUE, SERVICE_METHOD = 2, 2


def generated(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if "_pb2" in path.name}


def test_generated_code_is_what_the_script_makes_of_proto(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/generate_proto.sh"), str(tmp_path)],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    fresh, present = generated(tmp_path / "twofold/v1"), generated(GENERATED)
    assert sorted(fresh) == sorted(present)
    assert len(fresh) == 4 * len(PROTOS)
    stale = [name for name in fresh if fresh[name] != present[name]]
    assert not stale, "proto/ changed: run `make proto`"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[descriptor_pb2.FileDescriptorProto]:
    """All proto files, parsed, with their comments."""
    out = tmp_path_factory.mktemp("descriptors") / "all"
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"),
            *("--include_source_info", f"--descriptor_set_out={out}"),
            *map(str, PROTOS),
        ],
        check=True,
        timeout=90,
    )
    return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


Parts = Iterator[tuple[str, tuple[int, ...]]]


def parts(file: descriptor_pb2.FileDescriptorProto) -> Parts:
    """Name and source path of all that needs a comment."""
    for i, message in enumerate(file.message_type):
        yield from message_parts(message, message.name, (FILE_MESSAGE, i))
    for i, enum in enumerate(file.enum_type):
        yield from enum_parts(enum, enum.name, (FILE_ENUM, i))
    for i, service in enumerate(file.service):
        yield service.name, (FILE_SERVICE, i)
        for j, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (FILE_SERVICE, i, SERVICE_METHOD, j)


def message_parts(message: descriptor_pb2.DescriptorProto, name: str, path: tuple[int, ...]) -> Parts:
    if message.options.map_entry:
        return
    yield name, path
    for i, field in enumerate(message.field):
        yield f"{name}.{field.name}", (*path, MESSAGE_FIELD, i)
    for i, nested in enumerate(message.nested_type):
        yield from message_parts(nested, f"{name}.{nested.name}", (*path, MESSAGE_NESTED, i))
    for i, enum in enumerate(message.enum_type):
        yield from enum_parts(enum, f"{name}.{enum.name}", (*path, MESSAGE_ENUM, i))


def enum_parts(enum: descriptor_pb2.EnumDescriptorProto, name: str, path: tuple[int, ...]) -> Parts:
    yield name, path
    for i, value in enumerate(enum.value):
        yield f"{name}.{value.name}", (*path, ENUM_VALUE, i)


def test_everything_on_the_wire_has_a_comment(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    assert len(files) == len(PROTOS) > 0
    checked, bare = 0, []
    for file in files:
        comments = {
            tuple(location.path): location.leading_comments + location.trailing_comments
            for location in file.source_code_info.location
        }
        for name, path in parts(file):
            checked += 1
            if not comments.get(path, "").strip():
                bare.append(f"{file.name}: {name}")
    assert not bare
    assert checked > 200


def test_times_carry_their_unit(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """A number that is a time says seconds in its name."""
    words = ("time", "timeout", "delay", "age", "interval", "deadline", "ttl", "ttft", "tpot", "half_life")
    unnamed = [
        f"{message.name}.{field.name}"
        for file in files
        for message in file.message_type
        for field in message.field
        if field.type == descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE
        and any(f"_{word}_" in f"_{field.name}_" for word in words)
        and not field.name.endswith("_s")
    ]
    assert not unnamed
