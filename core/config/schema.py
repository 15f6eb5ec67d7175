"""The configuration of a cluster: read once, checked at once, never changed.

``load_config`` is the one way in. Each field's description says its unit and why it is
there; each bound of the system (queue, wait, retry) is one of these fields.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from core.config.engine import check_engine_args
from core.config.errors import describe
from core.config.load import read_raw
from core.errors import ConfigError
from core.net import host_port
from core.types import Pool

KIB = 1024
MIB = 1024 * KIB

# Strict: a quoted number, or a yes or no, stands where somebody meant something else.
Count = Annotated[int, Field(ge=1, strict=True)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Port = Annotated[int, Field(ge=0, le=65535, strict=True)]
ClassName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
HostName = Annotated[str, Field(min_length=1, pattern=r"^[^\s/]+$")]


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number of bytes, not {value}")
    return value


def _check_size(size: ByteSize) -> ByteSize:
    if size < 1:
        raise ValueError("must be at least 1 byte")
    return size


# Bytes; "1 MiB" is understood.
Size = Annotated[ByteSize, BeforeValidator(_refuse_bool), AfterValidator(_check_size)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ClusterConfig(_Section):
    """The cluster as a whole."""

    name: str = Field(
        default="baton",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="Names this cluster's keys in Redis, so that clusters can share one.",
    )
    host: HostName = Field(
        default="127.0.0.1",
        description="Address that our servers, Ray and the embedded Valkey bind and advertise; "
        "loopback unless other machines take part.",
    )
    run_dir: Path | None = Field(
        default=None,
        description="Folder for sockets, logs and pid files. Default: $XDG_RUNTIME_DIR/baton, "
        "else /tmp/baton-UID (Ray's sockets need a short path).",
    )
    start_timeout_s: Seconds = Field(
        default=180,
        description="Seconds until all configured workers must be ready: model loading, mostly.",
    )
    stop_grace_s: Seconds = Field(
        default=10,
        description="Seconds that running requests get to finish when the cluster goes down.",
    )
    connection_silence_s: Seconds = Field(
        default=10,
        description="Seconds without a sign of life until a gRPC connection counts as broken, "
        "though nobody closed it: its other host, or the way there, is gone.",
    )
    num_cpus: Count | None = Field(
        default=None, description="CPU cores that Ray may hand out here. Default: as Ray counts."
    )

    @property
    def run_path(self) -> Path:
        """``run_dir``, or its default in this environment."""
        if self.run_dir is not None:
            return self.run_dir.expanduser()
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        return Path(runtime) / "baton" if runtime else Path(f"/tmp/baton-{os.getuid()}")


class ModelConfig(_Section):
    """The model that both pools serve."""

    path: str = Field(
        default="embedded:smollm2",
        min_length=1,
        description="A folder, a hub name, or embedded:smollm2, which comes with Baton.",
    )
    served_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name that requests may give. Default: the last part of path.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of weights and KV. auto: the model's own."
    )
    max_model_len: Count | None = Field(
        default=None,
        description="Longest prompt and output together, tokens. Default: the model's context. "
        "One request of this length must fit into the KV cache.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model: trust its author."
    )
    prepare_timeout_s: Seconds = Field(
        default=300,
        description="Seconds that unpacking the embedded model may take, once per machine (or "
        "waiting for another process that does it).",
    )


class ServiceClass(_Section):
    """Requests that wait in one queue."""

    weight: Count = Field(
        default=1, description="Its share of what becomes free, beside other classes' weights."
    )
    max_queue: int = Field(
        default=256,
        ge=0,
        strict=True,
        description="Requests waiting to be dispatched; beyond it they are refused at once.",
    )
    queue_timeout_s: Seconds = Field(
        default=30,
        description="Seconds that a request may wait to be dispatched; one that would wait longer "
        "is refused at once.",
    )


class RouterConfig(_Section):
    """The router: where applications connect."""

    host: HostName | None = Field(
        default=None, description="Address to listen on. Default: cluster.host."
    )
    port: Port = Field(default=50051, description="gRPC port; 0 takes a free one.")
    max_message_bytes: Size = Field(
        default=ByteSize(4 * MIB),
        le=2**31 - 1,  # gRPC counts in 32 bits
        description="Largest gRPC message accepted, bytes; bounds a request's memory.",
    )
    max_concurrent: Count = Field(
        default=256, description="Requests dispatched at a time; beyond it they queue."
    )
    prefill_backlog_s: Seconds = Field(
        default=0.2,
        description="Seconds of work that one prefill worker may have, at the rate that it had "
        "lately; beyond it (and two prompts) prompts wait at the router, by class and deadline.",
    )
    classes: dict[ClassName, ServiceClass] = Field(
        default={
            "interactive": ServiceClass(weight=8),
            "batch": ServiceClass(max_queue=1024, queue_timeout_s=300),
        },
        min_length=1,
        description="Queues of requests that wait to be dispatched, by the name that requests "
        "give as service_class; the first one is for those that name none.",
    )
    default_deadline_s: Seconds = Field(
        default=600, description="Seconds that a request without a deadline may take in all."
    )
    client_stall_s: Seconds = Field(
        default=60,
        description="Seconds that a client may leave its stream unread until its request is "
        "ended; meanwhile it holds KV blocks.",
    )
    registry_poll_s: Seconds = Field(
        default=0.25, description="Seconds between two looks at the registry of workers."
    )
    worker_connect_timeout_s: Seconds = Field(
        default=2, description="Seconds until a worker that does not answer counts as lost."
    )
    local_prefill: Literal["never", "fallback"] = Field(
        default="never",
        description="fallback: decode workers prefill themselves while no prefill worker lives; "
        "slower, and disturbs their other streams. never: such requests are refused.",
    )
    max_attempts: Count = Field(
        default=4,
        description="Dispatches of one request, the first included; ends one that kills its "
        "workers. Those that reach no worker, or that it refuses, for it is full or drains, do not "
        "count.",
    )
    failover_timeout_s: Seconds = Field(
        default=60,
        description="Seconds that a request whose worker was lost waits for another one; longer "
        "than a worker takes to start.",
    )
    journal: bool = Field(
        default=True,
        strict=True,
        description="Keep prompts and answers in Redis while they are streamed, so that a client "
        "can resume a stream whose router died. false: nothing of a request leaves the cluster's "
        "processes.",
    )
    journal_ttl_s: Seconds = Field(
        default=60, description="Seconds that a request can be resumed after its last token."
    )
    journal_patience_s: Seconds = Field(
        default=0.05,
        description="Seconds that a token waits to be in the journal; then the stream goes on "
        "ahead of it.",
    )
    stream_buffer_responses: Count = Field(
        default=64, description="Responses held for a client that reads slower than we decode."
    )
    tokenizer_threads: Count = Field(
        default=1,
        description="Threads that tokenise prompts beside the event loop; one more takes the very "
        "long ones.",
    )


class PoolConfig(_Section):
    """One pool of workers: prefill or decode."""

    replicas: Count = Field(default=1, description="Workers to start with.")
    max_replicas: Count = Field(
        default=8, description="Workers that this pool may grow to; bounds connections."
    )
    tensor_parallel_size: Count = Field(
        default=1,
        description="GPUs (or CPU groups) over which one worker splits the model; the pools may "
        "differ.",
    )
    num_gpus_per_replica: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        strict=True,
        description="GPUs that Ray reserves per worker; below 1, workers share one. "
        "Default: tensor_parallel_size where there is CUDA, else 0.",
    )
    cpu_binding: tuple[str, ...] = Field(
        default=(),
        description="CPU backend: cores of each replica's engine, such as 0-3 or 0,2, replicas "
        "wrap around; with tensor parallelism one list per rank, split by |. Empty: vLLM "
        "chooses. Left out of a file: this machine's cores, shared evenly.",
    )
    kv_cache_gib: Count = Field(
        default=1,
        description="CPU backend: KV cache per worker, GiB. On GPUs see the engine argument "
        "gpu_memory_utilization.",
    )
    label_selector: dict[str, str] = Field(
        default={},
        description="Ray node labels that this pool's workers need, such as "
        "ray.io/accelerator-type: H100.",
    )
    engine: dict[str, Any] = Field(
        default={},
        description="vLLM engine arguments, passed through: max_num_seqs, quantization, …",
    )
    health_check_period_s: Seconds = Field(
        default=1, description="Seconds between Ray Serve's health checks of a worker."
    )
    max_concurrent: Count = Field(
        default=256, description="Requests that one worker takes at a time; it refuses more."
    )
    engine_kind: Literal["vllm", "fake"] = Field(
        default="vllm", description="fake: a deterministic engine without a model, for tests."
    )
    progress_timeout_s: Seconds = Field(
        default=30,
        description="Seconds without an answer until an engine counts as hung and is replaced; "
        "longer than its longest step, for it answers between steps.",
    )
    shutdown_grace_s: Seconds = Field(
        default=5, description="Seconds for a stopping worker's requests to end."
    )

    @field_validator("engine")
    @classmethod
    def _engine_args_are_known(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_engine_args(value)
        return value

    @field_validator("cpu_binding")
    @classmethod
    def _core_lists(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for cores in value:
            if not cores or set(cores) - set("0123456789,-|"):
                raise ValueError(f"{cores!r} is no list of CPU cores such as 0-3 or 0,2")
        return value

    @model_validator(mode="after")
    def _replicas_fit(self) -> Self:
        if self.replicas > self.max_replicas:
            raise ValueError(f"replicas {self.replicas} exceed max_replicas {self.max_replicas}")
        return self


class KvTransferConfig(_Section):
    """The KV stream from prefill to decode workers."""

    message_bytes: Size = Field(
        default=ByteSize(2 * MIB),
        description="Bytes that one message aims at: layers are grouped up to it. Small ones "
        "cost throughput, big ones delay the first layer.",
    )
    pair_timeout_s: Seconds = Field(
        default=10, description="Seconds until a process group that is being set up is given up."
    )
    reserve_timeout_s: Seconds = Field(
        default=60,
        description="Seconds that a prefill worker holds KV which no decode worker has reserved.",
    )
    prefill_timeout_s: Seconds = Field(
        default=600,
        description="Seconds that a decode worker's reservation waits for its prefill to begin, "
        "which includes the time in the prefill worker's queue.",
    )
    transfer_timeout_s: Seconds = Field(
        default=60,
        description="Seconds without progress until a transfer that has begun is given up.",
    )
    pair_idle_s: Seconds = Field(
        default=600,
        description="Seconds without a transfer until a process group is closed; the next request "
        "makes it again.",
    )
    max_pairs: Count = Field(
        default=64,
        description="Process groups of one rank; beyond it the one that was idle longest is "
        "closed. A pair of GPUs costs 50 to 100 MB of memory.",
    )
    peer_lease_s: Seconds = Field(
        default=5, description="Seconds without a sign of life until a peer counts as dead."
    )
    staging_buffers: Count = Field(
        default=3,
        description="Buffers of message_bytes per pair: one is filled while others are on their "
        "way.",
    )
    max_pending: Count = Field(
        default=1024, description="Transfers announced and not finished, per worker."
    )


class RedisConfig(_Section):
    """The store that holds the registry of workers."""

    url: str | None = Field(
        default=None,
        pattern=r"^(rediss?|unix)://",
        repr=False,  # may carry a password
        description="redis://, rediss:// or unix:// address. Default: an embedded Valkey.",
    )
    lease_s: Seconds = Field(
        default=3, description="Seconds until a worker that is silent leaves the registry."
    )
    renew_s: Seconds = Field(
        default=0.5, description="Seconds between two renewals of a worker's lease and load."
    )
    socket_timeout_s: Seconds = Field(
        default=2, description="Seconds until a store that does not answer counts as away."
    )

    @model_validator(mode="after")
    def _renewal_outpaces_lease(self) -> Self:
        if self.renew_s * 2 > self.lease_s:
            raise ValueError(
                f"renew_s {self.renew_s} must be at most half of lease_s {self.lease_s}, "
                "so that one lost renewal does not end a lease"
            )
        return self


class Config(_Section):
    """A whole cluster."""

    cluster: ClusterConfig = Field(default=ClusterConfig(), description="The whole.")
    model: ModelConfig = Field(default=ModelConfig(), description="What is served.")
    router: RouterConfig = Field(default=RouterConfig(), description="Where clients connect.")
    prefill: PoolConfig = Field(default=PoolConfig(), description="Workers that read prompts.")
    decode: PoolConfig = Field(default=PoolConfig(), description="Workers that write tokens.")
    kv_transfer: KvTransferConfig = Field(
        default=KvTransferConfig(), description="The KV stream between the pools."
    )
    redis: RedisConfig = Field(default=RedisConfig(), description="The registry's store.")

    @property
    def router_host(self) -> str:
        """The address that the router listens on."""
        return self.router.host or self.cluster.host

    @property
    def router_address(self) -> str:
        """The router's "host:port"; port 0 if only its start will tell."""
        return host_port(self.router_host, self.router.port)

    def pool(self, pool: Pool) -> PoolConfig:
        """The configuration of one pool."""
        return self.prefill if pool is Pool.PREFILL else self.decode


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file (``None``: the defaults), put ``overrides`` over it, and check it.

    Args:
        overrides: values by dotted path, such as ``{"prefill.replicas": 2}``.

    Raises:
        ConfigError: names every field that is wrong and what to write instead.
    """
    raw = read_raw(path, overrides or {})
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        prefix = f"{path}:\n" if path else ""
        raise ConfigError(prefix + describe(error, Config)) from None
