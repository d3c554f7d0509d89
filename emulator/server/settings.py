"""Settings of the emulator process."""

from typing import Annotated

import msgspec

from emulator.model import SchedulingPolicy
from twofold.model.fleet import HashAlgorithm


def _doc(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Flags of ``python -m emulator``."""

    profile: Annotated[str, _doc("engine profile; see --list-profiles")] = "h100-8b-tp1"
    model: Annotated[str, _doc("served model name")] = "emulated"
    host: Annotated[str, _doc("address to listen on")] = "127.0.0.1"
    port: Annotated[int, _doc("port of the first engine; 0 picks a free one")] = 8000
    engines: Annotated[int, _doc("number of engines in this process, on ports P..P+N-1")] = 1
    time_scale: Annotated[float, _doc("run this many times faster than the profile")] = 1.0
    worker_id: Annotated[str, _doc("name of this worker in the logs")] = ""
    max_model_len: Annotated[int | None, _doc("longest prompt plus output in tokens; default: the profile's")] = None
    kv_capacity_tokens: Annotated[int | None, _doc("size of the KV cache in tokens; default: the profile's")] = None
    max_num_seqs: Annotated[int | None, _doc("most running requests; default: the profile's")] = None
    max_num_batched_tokens: Annotated[int | None, _doc("token budget of a step; default: the profile's")] = None
    scheduling_policy: Annotated[SchedulingPolicy, _doc("fcfs or priority")] = SchedulingPolicy.FCFS
    stream_interval: Annotated[int, msgspec.Meta(ge=1, description="tokens per event of a stream, after its first")] = 1
    prefix_caching: Annotated[bool, _doc("keep KV blocks for later prompts")] = True
    prefix_caching_hash_algo: Annotated[HashAlgorithm, _doc("how blocks are named in KV events")] = HashAlgorithm.SHA256
    kv_events_config: Annotated[str, _doc("vLLM's JSON of that name: KV events over ZMQ")] = ""
    profile_file: Annotated[str, _doc("JSON or YAML file with one profile or a list of them")] = ""
    list_profiles: Annotated[bool, _doc("print the built-in profiles and exit")] = False
    admin_port: Annotated[int | None, _doc("port for statistics and faults, on loopback; 0 picks a free one")] = None
    enable_fault_injection: Annotated[bool, _doc("accept faults on the admin port")] = False
    data_parallel_size: Annotated[int, _doc("data-parallel ranks behind each port")] = 1
    max_num_queued_reqs: Annotated[int | None, _doc("refuse with 503 beyond so many unfinished requests")] = None
    max_num_queued_tokens: Annotated[int | None, _doc("refuse with 503 from so many tokens in prefill on")] = None
    enable_lora: Annotated[bool, _doc("serve LoRA adapters, and load and unload them while running")] = False
    max_loras: Annotated[int, _doc("most adapters in one step")] = 1
    lora_modules: Annotated[tuple[str, ...], _doc("name=path of an adapter loaded from the start")] = ()
    enable_elastic_ep: Annotated[bool, _doc("let /scale_elastic_ep change the number of ranks")] = False
    elastic_ep_max_dp_size: Annotated[int | None, _doc("most ranks; default: those at the start")] = None
    elastic_ep_prepare_s: Annotated[float, _doc("seconds to load new ranks, while serving goes on")] = 20.0
    elastic_ep_commit_s: Annotated[float, _doc("seconds of the switch, while every path answers 503")] = 5.0
    elastic_ep_drain_requests: Annotated[bool, _doc("wait for an empty engine before the switch")] = False
    num_experts: Annotated[int, _doc("logical experts of the model; 0: no lower limit of ranks")] = 0
    num_redundant_experts: Annotated[int, _doc("redundant experts at the start")] = 0
    enable_dev_mode: Annotated[bool, _doc("serve vLLM's development endpoints: pause, sleep, caches, ...")] = False
    enable_scale_out: Annotated[bool, _doc("serve /inference/v1/* and */render, which answer 403 otherwise")] = False
    enable_kv_transfer: Annotated[bool, _doc("answer kv_transfer_params as vLLM's NixlConnector does")] = False
    tool_call_parser: Annotated[str, _doc("hermes, or nothing to refuse tools as vLLM does without one")] = "hermes"
    shutdown_timeout: Annotated[float, _doc("seconds that running streams get to finish after SIGTERM")] = 0.0
    ready_file: Annotated[str, _doc("file to write the listening ports to, as JSON, once all are open")] = ""
    log_file: Annotated[str, _doc("append JSON log lines here instead of writing to stderr")] = ""
    log_level: Annotated[str, _doc("debug, info, warning or error")] = "info"


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the request handlers of one engine need to know."""

    model: str
    max_model_len: int
    dev_mode: bool = False
    scale_out: bool = False
    enable_lora: bool = False
    lora_modules: tuple[tuple[str, str], ...] = ()
    tool_call_parser: str = "hermes"
