"""``fleet.yaml``: what to run and what to route to, as typed values with errors that name the line."""

import enum
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from controlplane.discovery.yaml_lines import YamlError, line_of, read
from twofold.model.fleet import HashAlgorithm, Pool, RoutingPolicy, Slo
from twofold.model.profile import EngineProfile
from twofold.profiles import ProfileError, get, load_profiles

MAX_FILE_BYTES = 4 << 20
MAX_WORKERS = 10_000
FAULT_PORT_OFFSET = 1000
POLICY_NAMES = ("twofold", "round_robin", "least_requests")
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_LISTEN = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[^:\s]+):(\d{1,5})$")

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
PortNumber = Annotated[int, Meta(ge=0, le=65_535)]
Positive = Annotated[float, Meta(gt=0, le=1e6)]


class FleetFileError(ValueError):
    """A fleet file that cannot be used; the message is one line: ``file:line: path: what is wrong``."""

    def __init__(self, message: str) -> None:
        # Keys and values of the file come back in messages: a line break in one must not break the line.
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__("".join(shown))


class Engine(enum.StrEnum):
    """What a group of workers runs on."""

    EMULATED = "emulated"
    VLLM = "vllm"


class ControlPlaneSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Addresses of the control plane, host:port."""

    listen: str = "127.0.0.1:7700"
    metrics: str = "127.0.0.1:7701"


class RoutersSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Router replicas that ``twofold up`` starts: replica i serves on port + i, its admin port is admin_port + i."""

    replicas: Annotated[int, Meta(ge=0, le=64)] = 1
    relays: Annotated[int, Meta(ge=1, le=64)] = 1
    host: str = "127.0.0.1"
    port: PortNumber = 8000
    admin_port: PortNumber = 8100


class WorkerGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Workers of one engine profile in a pool: engines to run (``replicas``) or existing ones to watch (``urls``)."""

    profile: str
    engine: Engine = Engine.EMULATED
    replicas: Annotated[int, Meta(ge=0, le=MAX_WORKERS)] = 1
    urls: tuple[str, ...] = ()
    zone: Annotated[str, Meta(max_length=128)] = ""
    data_parallel_size: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Ranks behind one URL; 0 takes the profile's."""
    time_scale: Annotated[float, Meta(ge=0.01, le=1000)] = 1.0
    """Emulated engines run this much faster."""
    engines_per_process: Annotated[int, Meta(ge=1, le=256)] = 1
    port_base: PortNumber = 0
    """Port of the first engine, the next ones follow; 0 picks free ports."""
    engine_args: tuple[str, ...] = ()
    python: str = ""
    env: dict[str, str] = {}
    fault_injection: bool = False
    stop_grace_s: Annotated[float, Meta(ge=0, le=3600)] = 5.0

    @property
    def desired(self) -> int:
        """Workers the group stands for."""
        return len(self.urls) or self.replicas


class SloSection(Slo, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Latency target of a pool."""


class PoolSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pool. What is left at 0 or "" is taken from what its engines agree on."""

    name: Name
    models: Annotated[tuple[ModelName, ...], Meta(min_length=1, max_length=64)]
    workers: tuple[WorkerGroup, ...] = ()
    upstream_model: Annotated[str, Meta(max_length=256)] = ""
    adapters: tuple[ModelName, ...] = ()
    reference_profile: str = ""
    chunk_bytes: Annotated[int, Meta(ge=64, le=65_536)] = 1024
    bytes_per_token: Annotated[float, Meta(gt=0, le=64)] = 4.0
    max_model_len_tokens: Annotated[int, Meta(ge=0)] = 0
    block_size_tokens: Annotated[int, Meta(ge=0, le=65_536)] = 0
    hash_algorithm: HashAlgorithm = HashAlgorithm.UNKNOWN
    tokenizer_digest: str = ""
    kv_events: bool = False
    max_inflight_per_target: Annotated[int, Meta(ge=1, le=1_000_000)] = 1024
    tokenizer: Annotated[str, Meta(max_length=4096)] = ""
    """"builtin", or the path of a tokenizer.json (or its folder) on the routers' file system."""
    hash_seed: Annotated[str, Meta(max_length=64)] = ""
    """PYTHONHASHSEED of the engines, where it is set."""
    slo: SloSection = SloSection()


class FleetFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole fleet."""

    name: Name = "fleet"
    control_plane: ControlPlaneSection = ControlPlaneSection()
    routers: RoutersSection = RoutersSection()
    policy: RoutingPolicy = RoutingPolicy()
    profiles: tuple[dict[str, Any], ...] = ()
    pools: tuple[PoolSection, ...] = ()

    def user_profiles(self) -> dict[str, EngineProfile]:
        """Profiles defined in this file. Raises FleetFileError."""
        try:
            return load_profiles(self.profiles)
        except ProfileError as error:
            raise FleetFileError(f"profiles: {error}") from None

    def model_profiles(self) -> dict[str, EngineProfile]:
        """Every profile the fleet's workers and pools refer to, by the name they refer to it."""
        extra = self.user_profiles()
        found: dict[str, EngineProfile] = {}
        for pool in self.pools:
            for group in pool.workers:
                profile = group_profile(group, extra)
                found[profile.name] = profile
            reference = self._reference(pool, extra)
            if reference is not None:
                found[reference.name] = reference
        return found

    def model_pools(self) -> tuple[Pool, ...]:
        """The pools as values of the model, engine facts still open."""
        extra = self.user_profiles()
        pools = []
        for section in self.pools:
            reference = self._reference(section, extra)
            fields = {
                field.name: getattr(section, field.name)
                for field in msgspec.structs.fields(PoolSection)
                if field.name not in ("workers", "slo", "reference_profile")
            }
            slo = Slo(**{field.name: getattr(section.slo, field.name) for field in msgspec.structs.fields(Slo)})
            pools.append(Pool(**fields, slo=slo, reference_profile=reference.name if reference else ""))
        return tuple(pools)

    def _reference(self, pool: PoolSection, extra: Mapping[str, EngineProfile]) -> EngineProfile | None:
        # The fastest profile of the pool, so that a pool's unit does not depend on the order of its groups.
        profiles = [group_profile(group, extra) for group in pool.workers]
        if pool.reference_profile:
            by_name = {profile.name: profile for profile in profiles}
            return by_name.get(pool.reference_profile) or get(pool.reference_profile, extra)
        return max(profiles, key=lambda profile: (profile.capacity_tokens_s(), profile.name), default=None)


def group_profile(group: WorkerGroup, extra: Mapping[str, EngineProfile]) -> EngineProfile:
    """The profile the fleet sees of a group: scaled, and named so, when its engines run on a faster clock."""
    profile = get(group.profile, extra)
    if group.engine is Engine.EMULATED and not group.urls and group.time_scale != 1.0:
        scaled = profile.scaled(1.0 / group.time_scale)
        return msgspec.structs.replace(scaled, name=f"{profile.name}@x{group.time_scale:g}")
    return profile


def load_fleet_file(path: str | Path) -> FleetFile:
    """The fleet file at ``path``. Raises FleetFileError with file and line."""
    try:
        raw = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FleetFileError(f"cannot read {path}: {reason}") from None
    return parse_fleet_file(raw, str(path))


def parse_fleet_file(raw: bytes, name: str = "fleet.yaml") -> FleetFile:
    """The fleet in the bytes of a YAML file called ``name``. Raises FleetFileError with file and line."""
    if len(raw) > MAX_FILE_BYTES:
        raise FleetFileError(f"{name}: larger than {MAX_FILE_BYTES} bytes")
    try:
        value, root = read(raw)
    except YamlError as error:
        raise FleetFileError(f"{name}:{error.line}: {error}" if error.line else f"{name}: {error}") from None
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise FleetFileError(f"{name}: expected a mapping with name, pools, ...")
    try:
        return _build(value)
    except _At as error:
        line = line_of(root, error.path)
        raise FleetFileError(f"{name}:{line}: {error}" if line else f"{name}: {error}") from None


def fleet_file_from_mapping(mapping: Mapping[str, Any]) -> FleetFile:
    """The fleet in a mapping of the same shape as the file. Raises FleetFileError."""
    try:
        return _build(dict(mapping))
    except _At as error:
        raise FleetFileError(str(error)) from None


class _At(ValueError):
    """A fault at a path inside the file."""

    def __init__(self, path: tuple[str | int, ...], message: str) -> None:
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        super().__init__(f"{text}: {message}" if text else message)
        self.path = path


def _build(value: dict[str, Any]) -> FleetFile:
    try:
        file = msgspec.convert(value, FleetFile)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _at_from_msgspec(str(error) or "nested too deeply") from None
    for path, message in _faults(file):
        raise _At(path, message)
    return file


_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `([^`]*)`")


def _at_from_msgspec(text: str) -> _At:
    message, _, where = text.partition(" - at `")
    path: list[str | int] = [name or int(index) for name, index in re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", where)]
    unknown = _UNKNOWN_FIELD.search(message)
    if unknown:
        return _At((*path, unknown.group(1)), "unknown field")
    return _At(tuple(path), message[:1].lower() + message[1:].replace("`", "'"))


Path_ = tuple[str | int, ...]


def _faults(file: FleetFile) -> Iterator[tuple[Path_, str]]:
    for key in ("listen", "metrics"):
        if split_listen(getattr(file.control_plane, key)) is None:
            yield ("control_plane", key), "expected host:port"
    if file.policy.name not in POLICY_NAMES:
        yield ("policy", "name"), f"unknown policy {file.policy.name!r}"
    try:
        extra = load_profiles(file.profiles)
    except ProfileError as error:
        yield ("profiles",), str(error)
        return
    names: set[str] = set()
    models: dict[str, str] = {}
    ports: dict[int, str] = {}
    urls: set[str] = set()
    workers = 0
    for index, pool in enumerate(file.pools):
        at: Path_ = ("pools", index)
        if pool.name in names:
            yield (*at, "name"), f"pool {pool.name!r} is defined twice"
        names.add(pool.name)
        for position, model in enumerate(pool.models):
            if model in models:
                yield (*at, "models", position), f"model {model!r} is also served by pool {models[model]!r}"
            models[model] = pool.name
        if pool.reference_profile:
            yield from _profile_faults((*at, "reference_profile"), pool.reference_profile, extra, pool)
        yield from _group_faults(at, pool, extra, ports, urls)
        workers += sum(group.desired for group in pool.workers)
    if workers > MAX_WORKERS:
        yield ("pools",), f"{workers} workers, more than {MAX_WORKERS}"


def _profile_faults(
    path: Path_, name: str, extra: Mapping[str, EngineProfile], pool: PoolSection
) -> Iterator[tuple[Path_, str]]:
    if any(group_profile(group, extra).name == name for group in pool.workers if _known(group.profile, extra)):
        return
    try:
        get(name, extra)
    except ProfileError as error:
        yield path, str(error)


def _known(name: str, extra: Mapping[str, EngineProfile]) -> bool:
    try:
        get(name, extra)
    except ProfileError:
        return False
    return True


def _group_faults(
    at: Path_, pool: PoolSection, extra: Mapping[str, EngineProfile], ports: dict[int, str], urls: set[str]
) -> Iterator[tuple[Path_, str]]:
    keys: set[tuple[str, str]] = set()
    for position, group in enumerate(pool.workers):
        here: Path_ = (*at, "workers", position)
        yield from _profile_faults((*here, "profile"), group.profile, extra, msgspec.structs.replace(pool, workers=()))
        for number, url in enumerate(group.urls):
            if not valid_url(url):
                yield (*here, "urls", number), f"{url[:100]!r} is not http://host:port"
            if url in urls:
                yield (*here, "urls", number), f"{url} is listed twice"
            urls.add(url)
        if group.urls:
            continue
        key = (group_profile(group, extra).name, group.zone)
        if key in keys:
            yield here, "another group of this pool has the same profile and zone; raise its replicas instead"
        keys.add(key)
        if group.engine is Engine.VLLM and group.engines_per_process > 1:
            yield (*here, "engines_per_process"), "only emulated engines share a process"
        if group.engine is Engine.VLLM and group.time_scale != 1.0:
            yield (*here, "time_scale"), "only emulated engines have one"
        yield from _port_faults((*here, "port_base"), group, f"{pool.name}/{group.profile}", ports)


def _port_faults(path: Path_, group: WorkerGroup, owner: str, ports: dict[int, str]) -> Iterator[tuple[Path_, str]]:
    if group.port_base == 0:
        return
    span = [group.port_base + index for index in range(group.replicas)]
    if group.fault_injection:
        span += [port + FAULT_PORT_OFFSET for port in span]
    for port in span:
        if port > 65_535:
            yield path, f"port {port} is above 65535"
            return
        if port in ports:
            yield path, f"port {port} is also used by {ports[port]}"
            return
        ports[port] = owner


def valid_url(url: str) -> bool:
    """Whether ``url`` is http://host:port with nothing behind it."""
    if len(url) > 512 or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    bare = parts.path in ("", "/") and not parts.query and not parts.fragment and parts.username is None
    return parts.scheme == "http" and bool(parts.hostname) and port is not None and port > 0 and bare


def split_listen(address: str) -> tuple[str, int] | None:
    """Host and port of "host:port" or "[v6]:port"; None when it is neither."""
    match = _LISTEN.match(address)
    if match is None or int(match.group(2)) > 65_535:
        return None
    return match.group(1).strip("[]"), int(match.group(2))
