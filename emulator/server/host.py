"""The emulator process: its engines, their listeners, SIGTERM as vLLM handles it."""

import asyncio
import gc
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from emulator.model import EngineModel
from emulator.server.admin import AdminApp
from emulator.server.app import EngineApp
from emulator.server.elastic import SCALING_STEPS, ElasticSettings
from emulator.server.engine import RealTimeEngine
from emulator.server.faults import FaultError, FaultRequest, Faults
from emulator.server.group import EngineGroup
from emulator.server.http import HttpConnection
from emulator.server.kv_events import KvFeeds, read_config
from emulator.server.kv_transfer import SIDE_CHANNEL_PORT, KvConnector
from emulator.server.lora import read_modules
from emulator.server.metrics import EngineMetrics
from emulator.server.page import PortMetrics
from emulator.server.settings import EngineSettings, Settings
from emulator.server.timer import PreciseTimer
from twofold.model.block_hash import BlockHasher, is_supported
from twofold.model.profile import EngineProfile

log = logging.getLogger(__name__)

_BACKLOG = 2048
RANK_DEATH_NOTICED_S = 5.0
"""From the death of one data-parallel rank until vLLM ends that rank's streams and its server."""


class EngineHost:
    """The engines of one port, one a data-parallel rank, with their listener."""

    def __init__(self, index: int, profile: EngineProfile, settings: Settings, timer: PreciseTimer) -> None:
        self.index = index
        self.port = 0
        self.profile = profile
        self._settings = settings
        self._timer = timer
        self._engine_metrics: list[EngineMetrics] = []
        self._address = settings.host
        self._server: asyncio.Server | None = None
        self.on_idle: Callable[[], None] = lambda: None
        self.on_stopped: Callable[[], None] = lambda: None
        """Called when the listener has been closed for good."""
        self.kv_events = KvFeeds(read_config(settings.kv_events_config), asyncio.get_running_loop())
        metrics = PortMetrics(
            settings.model,
            self._engine_metrics,
            time.monotonic,
            tool_parser=bool(settings.tool_call_parser),
            max_loras=settings.max_loras if settings.enable_lora else None,
        )
        self.group = EngineGroup(
            [self._make_rank(rank) for rank in range(settings.data_parallel_size)],
            max_queued_requests=settings.max_num_queued_reqs,
            max_queued_tokens=settings.max_num_queued_tokens,
            count_rejection=metrics.count_rejection,
        )
        if settings.enable_kv_transfer:
            self.group.connector = KvConnector.new(settings.host, SIDE_CHANNEL_PORT + self.index)
        self.app = EngineApp(
            self.group,
            EngineSettings(
                model=settings.model,
                max_model_len=profile.max_model_len_tokens,
                dev_mode=settings.enable_dev_mode or _set_in_environment("VLLM_SERVER_DEV_MODE"),
                scale_out=settings.enable_scale_out,
                enable_lora=settings.enable_lora,
                lora_modules=tuple(read_modules(settings.lora_modules).items()),
                tool_call_parser=settings.tool_call_parser,
            ),
            metrics,
            elastic=elastic_settings(settings),
            make_rank=self._make_rank,
        )
        self.app.event_sources = self.kv_events.sources
        self.app.ranks_left = self._forget_events_of

    def _forget_events_of(self, ranks: list[RealTimeEngine]) -> None:
        for engine in ranks:
            self.kv_events.detach(engine, int(engine.metrics.engine))

    def _make_rank(self, rank: int) -> RealTimeEngine:
        settings = self._settings
        model = EngineModel(
            self.profile,
            policy=settings.scheduling_policy,
            prefix_caching=settings.prefix_caching,
            max_loras=settings.max_loras,
            record_events=self.kv_events.publishes,
            hasher=self._hasher(),
        )
        model.hash_algorithm = settings.prefix_caching_hash_algo
        metrics = EngineMetrics(model, settings.model, engine=str(rank))
        self._engine_metrics[rank : rank + 1] = [metrics]
        loop = asyncio.get_running_loop()
        engine = RealTimeEngine(model, metrics, self._timer, time.monotonic, loop.call_soon)
        engine.stream_interval_tokens = settings.stream_interval
        engine.on_death = lambda mode: self._die(engine, mode)
        engine.on_idle = lambda: self.on_idle()
        most_ranks = max(settings.data_parallel_size, settings.elastic_ep_max_dp_size or 1)
        self.kv_events.attach(engine, rank=rank, offset=self.index * most_ranks + rank)
        return engine

    def _hasher(self) -> BlockHasher | None:
        """vLLM's names of blocks, where anybody hears of them and could compute them too."""
        algorithm = self._settings.prefix_caching_hash_algo
        if not self.kv_events.publishes or not is_supported(algorithm):
            return None
        return BlockHasher(self.profile.block_size_tokens, algorithm, os.environ.get("PYTHONHASHSEED", ""))

    async def listen(self, port: int) -> None:
        """Open the listener. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: HttpConnection(self.app), self._address, port, backlog=_BACKLOG, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def close_listener(self) -> None:
        """Refuse new connections; those there are stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def ranks_meant(self, rank: int | None) -> list[RealTimeEngine]:
        """The engine of a rank, or all. Raises FaultError."""
        if rank is None:
            return list(self.group.ranks)
        if not 0 <= rank < len(self.group.ranks):
            raise FaultError(f"there is no rank {rank}")
        return [self.group.ranks[rank]]

    async def apply_fault(self, request: FaultRequest) -> None:
        """Put a fault in force. Raises FaultError."""
        if request.kind == "fail_scaling":
            if request.step not in SCALING_STEPS:
                raise FaultError(f"unknown step {request.step!r}; known: {', '.join(SCALING_STEPS)}")
            self.app.elastic.fail_next = request.step
            return
        ranks = self.ranks_meant(request.rank)
        for rank in ranks[:1] if request.kind == "die_after_tokens" else ranks:
            rank.faults.add(request)
        self.app.black_hole = any(rank.faults.black_hole for rank in self.group.ranks)
        if any(rank.faults.refuse for rank in ranks):
            self.close_listener()

    async def clear_faults(self) -> None:
        """Back to normal; a dead engine stays dead."""
        self.app.black_hole = False
        self.app.elastic.fail_next = ""
        for rank in self.group.ranks:
            rank.set_faults(Faults())
        if self._server is None and not self.group.dead and not self.app.closing:
            await self.listen(self.port)

    def reset(self) -> None:
        """Drop all requests without a word, the prefix caches and the lateness figures."""
        for rank in self.group.ranks:
            rank.reset()

    def fall_silent(self) -> None:
        """As vLLM after SIGTERM: no listener, no word to running streams, idle connections closed."""
        for rank in self.group.ranks:
            rank.stop()
        self._stop_listening()

    def _stop_listening(self) -> None:
        self.app.closing = True
        self.close_listener()
        for connection in list(self.app.connections):
            if connection.idle:
                connection.close()
        self.on_stopped()

    def _die(self, engine: RealTimeEngine, mode: str) -> None:
        if mode == "process":
            os.kill(os.getpid(), signal.SIGKILL)
        self.kv_events.close()
        if mode == "engine_core" and len(self.group.ranks) > 1:
            self._rank_died(engine)
            return
        self._stop_listening()
        if mode == "engine_core":
            self.group.kill()
        else:
            self.group.dead = True
            for rank in self.group.ranks:
                rank.stop()
            for connection in list(self.app.connections):
                connection.abort()

    def _rank_died(self, dead: RealTimeEngine) -> None:
        """One rank of several died: the others end their requests with "abort" at once, its own hear it later."""
        dead.stop()
        for rank in self.group.ranks:
            if rank is not dead:
                rank.abort_all()
                rank.stop()

        def noticed() -> None:
            self._stop_listening()
            self.group.kill()

        asyncio.get_running_loop().call_later(RANK_DEATH_NOTICED_S, noticed)


class Process:
    """All engines of this process, from start to end."""

    def __init__(self, settings: Settings, profile: EngineProfile) -> None:
        self._settings = settings
        self._profile = profile
        self._ended = asyncio.Event()
        self._signals = 0
        self._draining: asyncio.Task[None] | None = None
        self.timer = PreciseTimer(asyncio.get_running_loop())
        self.hosts = [EngineHost(index, profile, settings, self.timer) for index in range(settings.engines)]
        self.admin = AdminApp(self.hosts, faults_allowed=settings.enable_fault_injection)
        self._admin_server: asyncio.Server | None = None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT has been carried out. Raises OSError if a port cannot be had."""
        loop = asyncio.get_running_loop()
        for host in self.hosts:
            await host.listen(self._settings.port + host.index if self._settings.port else 0)
            host.app.on_connection_closed = self._check_ended
            host.on_idle = self._check_drained
            host.on_stopped = self._check_ended
        admin_port = await self._listen_admin()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._on_signal)
        self._announce(admin_port)
        gc.collect()
        gc.freeze()
        try:
            await self._ended.wait()
        finally:
            for host in self.hosts:
                host.close_listener()
                host.kv_events.close()
            if self._admin_server is not None:
                self._admin_server.close()
            self.timer.close()
        log.info("emulator stopped")

    async def _listen_admin(self) -> int | None:
        port = self._settings.admin_port
        if port is None:
            return None
        loop = asyncio.get_running_loop()
        self._admin_server = await loop.create_server(lambda: HttpConnection(self.admin), "127.0.0.1", port)
        return int(self._admin_server.sockets[0].getsockname()[1])

    def _announce(self, admin_port: int | None) -> None:
        ports = [host.port for host in self.hosts]
        extra = {
            "worker_id": self._settings.worker_id,
            "profile": self._profile.name,
            "ports": ports,
            "admin_port": admin_port,
        }
        log.info("emulator ready", extra=extra)
        if self._settings.ready_file:
            path = Path(self._settings.ready_file)
            partial = path.with_name(path.name + ".tmp")
            partial.write_text(json.dumps({"pid": os.getpid(), "ports": ports, "admin_port": admin_port}))
            partial.replace(path)

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals > 1:
            self._ended.set()
            return
        log.info("stop requested", extra={"shutdown_timeout_s": self._settings.shutdown_timeout})
        if self._settings.shutdown_timeout <= 0:
            self._fall_silent()
            return
        for host in self.hosts:
            host.app.draining = True
        loop = asyncio.get_running_loop()
        loop.call_later(self._settings.shutdown_timeout, self._fall_silent)
        self._check_drained()

    def _check_drained(self) -> None:
        if self._signals and all(not host.group.busy for host in self.hosts):
            self._fall_silent()

    def _fall_silent(self) -> None:
        for host in self.hosts:
            host.fall_silent()
        self._check_ended()

    def _check_ended(self) -> None:
        if all(host.app.closing and not host.app.connections for host in self.hosts):
            self._ended.set()


def configured_profile(settings: Settings, profile: EngineProfile) -> EngineProfile:
    """The profile with the flags that override it, in the emulator's time. Raises ValueError.

    A KV cache set smaller than the model length shortens the model length, unless that was set too.
    """
    if settings.engines < 1:
        raise ValueError("engines must be at least 1")
    if not settings.time_scale > 0:
        raise ValueError("time-scale must be above 0")
    if settings.data_parallel_size < 1 or settings.max_loras < 1:
        raise ValueError("data-parallel-size and max-loras must be at least 1")
    if min(settings.elastic_ep_prepare_s, settings.elastic_ep_commit_s, settings.num_experts) < 0:
        raise ValueError("elastic-ep-prepare-s, elastic-ep-commit-s and num-experts must not be negative")
    read_modules(settings.lora_modules)
    block = profile.block_size_tokens
    capacity = settings.kv_capacity_tokens or profile.kv_capacity_tokens
    usable = (capacity // block - 1) * block
    if usable < block:
        raise ValueError(f"kv-capacity-tokens must be at least two blocks of {block} tokens")
    scaled = profile if settings.time_scale == 1 else profile.scaled(1 / settings.time_scale)
    name = profile.name if settings.time_scale == 1 else f"{profile.name}@x{settings.time_scale:g}"
    return msgspec.structs.replace(
        scaled,
        name=name,
        kv_capacity_tokens=capacity,
        max_model_len_tokens=settings.max_model_len or min(profile.max_model_len_tokens, usable),
        max_num_seqs=settings.max_num_seqs or profile.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens or profile.max_num_batched_tokens,
    )


def elastic_settings(settings: Settings) -> ElasticSettings:
    """How ``/scale_elastic_ep`` goes, in the emulator's time."""
    return ElasticSettings(
        enabled=settings.enable_elastic_ep,
        max_size=settings.elastic_ep_max_dp_size or settings.data_parallel_size,
        prepare_s=settings.elastic_ep_prepare_s / settings.time_scale,
        commit_s=settings.elastic_ep_commit_s / settings.time_scale,
        drain=settings.elastic_ep_drain_requests or _set_in_environment("VLLM_ELASTIC_EP_DRAIN_REQUESTS"),
        experts=settings.num_experts,
        redundant_experts=settings.num_redundant_experts,
    )


def _set_in_environment(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true")
