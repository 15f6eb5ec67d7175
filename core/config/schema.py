"""The configuration of a cluster. It is read once, checked as a whole and never changed.

Call ``load_config`` to get it. Each field's description gives its unit and its reason. Every
bound that depends on the deployment (queues, waits, retries) is one of these fields.

The file has over 400 lines because it describes every field of the configuration in one place.
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

# Strict types refuse a quoted number or a boolean (such as yes in YAML) in place of a number. Such
# a value is usually a mistake.
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


# Bytes, as a number or as text with a unit such as "1 MiB".
Size = Annotated[ByteSize, BeforeValidator(_refuse_bool), AfterValidator(_check_size)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ClusterConfig(_Section):
    """The cluster as a whole."""

    name: str = Field(
        default="baton",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="Name of the cluster. It is part of every key in Redis, so that several "
        "clusters can share one Redis.",
    )
    host: HostName = Field(
        default="127.0.0.1",
        description="Address that Baton's servers, Ray and the embedded Valkey bind and "
        "advertise. Keep the loopback address unless other machines take part.",
    )
    run_dir: Path | None = Field(
        default=None,
        description="Folder for sockets, logs and pid files. Default: $XDG_RUNTIME_DIR/baton, or "
        "/tmp/baton-UID if that variable is not set. Ray's sockets need a short path.",
    )
    policy: Path | None = Field(
        default=None,
        description="File with the autoscaling policy that the cluster starts with. Default: each "
        "pool keeps its number of workers, which baton scale changes.",
    )
    start_timeout_s: Seconds = Field(
        default=180,
        description="Seconds within which all configured workers must become ready. Most of this "
        "time is model loading.",
    )
    stop_grace_s: Seconds = Field(
        default=10,
        description="Seconds that running requests may take to finish when the cluster stops.",
    )
    connection_silence_s: Seconds = Field(
        default=10,
        description="Seconds without any data, keepalive answers included, after which a gRPC "
        "connection counts as broken. Only this bound detects a failed host or network, because "
        "such a failure leaves the connection open.",
    )
    role_change: bool = Field(
        default=False,
        strict=True,
        description="Start workers so that they can change between the pools without loading the "
        "model again. Both pools must then have the same engine.",
    )
    num_cpus: Count | None = Field(
        default=None,
        description="CPU cores of this machine that Ray may assign. Default: the number that Ray "
        "detects.",
    )

    @property
    def run_path(self) -> Path:
        """``run_dir`` with ``~`` expanded, or its default in this environment."""
        if self.run_dir is not None:
            return self.run_dir.expanduser()
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        return Path(runtime) / "baton" if runtime else Path(f"/tmp/baton-{os.getuid()}")


class ModelConfig(_Section):
    """The model that both pools serve."""

    path: str = Field(
        default="embedded:smollm2",
        min_length=1,
        description="A folder, a name on the model hub, or embedded:smollm2, which comes with "
        "Baton.",
    )
    served_name: str | None = Field(
        default=None,
        min_length=1,
        description="Model name that requests may give. Default: the last part of path, or the "
        "embedded model's own name.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Data type of the weights and the KV cache. auto: the model's own type.",
    )
    max_model_len: Count | None = Field(
        default=None,
        description="Largest length of prompt and output together, in tokens. Default: the "
        "model's context length. The KV cache must have room for one request of this length.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the model. Set it only if you trust the "
        "model's author.",
    )
    prepare_timeout_s: Seconds = Field(
        default=300,
        description="Seconds that unpacking the embedded model may take. The model is unpacked "
        "once, into the user's cache folder. The same bound applies to the wait for another "
        "process that unpacks the model.",
    )


class ServiceClass(_Section):
    """A class of requests. The requests of a class wait in one queue."""

    weight: Count = Field(
        default=1,
        description="Share of the freed capacity that this class gets, relative to the weights of "
        "the other classes.",
    )
    max_queue: int = Field(
        default=256,
        ge=0,
        strict=True,
        description="Largest number of requests of this class that wait to be dispatched. Further "
        "requests are refused immediately.",
    )
    queue_timeout_s: Seconds = Field(
        default=30,
        description="Seconds that a request may wait to be dispatched. A request that is expected "
        "to wait longer is refused immediately.",
    )


class RouterConfig(_Section):
    """The router, to which applications connect."""

    host: HostName | None = Field(
        default=None, description="Address to listen on. Default: cluster.host."
    )
    port: Port = Field(default=50051, description="gRPC port. 0: any free port.")
    max_message_bytes: Size = Field(
        default=ByteSize(4 * MIB),
        le=2**31 - 1,  # gRPC counts in 32 bits
        description="Largest gRPC message that is accepted, in bytes. This bounds the memory that "
        "a request takes.",
    )
    max_concurrent: Count = Field(
        default=256,
        description="Largest number of requests that are dispatched at the same time. Further "
        "requests wait in the queues.",
    )
    prefill_backlog_s: Seconds = Field(
        default=0.2,
        description="Seconds of work that one prefill worker may hold, estimated from its recent "
        "rate. A worker may always hold two prompts. Further prompts wait at the router, ordered "
        "by class and deadline.",
    )
    classes: dict[ClassName, ServiceClass] = Field(
        default={
            "interactive": ServiceClass(weight=8),
            "batch": ServiceClass(max_queue=1024, queue_timeout_s=300),
        },
        min_length=1,
        description="Queues of requests that wait to be dispatched, by the name that requests "
        "give as service_class. A request without a service_class goes to the first queue.",
    )
    default_deadline_s: Seconds = Field(
        default=600,
        description="Seconds that a request without a deadline of its own may take in total.",
    )
    max_deadline_s: Seconds = Field(
        default=3600,
        le=2**31 // 1000,  # gRPC counts milliseconds in 32 bits
        description="Longest deadline of a request, in seconds. A longer one is cut to this.",
    )
    max_connections: Count = Field(
        default=4096,
        le=2**31 - 1,  # gRPC counts in 32 bits
        description="Largest number of open connections of clients. Further ones are closed at "
        "once.",
    )
    max_connection_age_s: Seconds = Field(
        default=1800,
        le=2**31 // 1000,  # gRPC counts milliseconds in 32 bits
        description="Seconds after which a client is asked to open a new connection for its next "
        "calls, so that clients also reach routers that started later. Running calls go on, for "
        "max_deadline_s at most.",
    )
    client_stall_s: Seconds = Field(
        default=60,
        description="Seconds that a client may leave its stream unread before its request is "
        "ended. During this time the request holds KV blocks.",
    )
    registry_poll_s: Seconds = Field(
        default=0.25, description="Seconds between two reads of the registry of workers."
    )
    worker_lost_after_s: Seconds = Field(
        default=3,
        description="Seconds without a lease and without an answer after which a worker counts as "
        "lost. If most workers lose their leases at once, the router waits as long before it "
        "believes that.",
    )
    avoid_worker_s: Seconds = Field(
        default=3,
        description="Seconds for which a worker that failed a request gets no new ones, if there "
        "are others.",
    )
    worker_connect_timeout_s: Seconds = Field(
        default=2,
        description="Seconds that the router waits for a connection to a worker, after which the "
        "worker counts as lost. The same bound applies to the call that releases a request's KV.",
    )
    local_prefill: Literal["never", "fallback"] = Field(
        default="never",
        description="What to do while no prefill worker is alive. fallback: decode workers compute "
        "the prefill themselves, which is slower and delays their other streams. never: requests "
        "are refused.",
    )
    max_attempts: Count = Field(
        default=4,
        description="Largest number of attempts at one request, including the first. This bound "
        "stops a request that makes workers crash. An attempt does not count if it reaches no "
        "worker, or if a worker refuses it because that worker is full or draining.",
    )
    cold_start_timeout_s: Seconds = Field(
        default=180,
        description="Seconds that a request may wait while a pool has no worker and the autoscaler "
        "may start one. Must exceed the time that a worker takes to start. Replaces the class's "
        "queue_timeout_s during that time.",
    )
    failover_timeout_s: Seconds = Field(
        default=60,
        description="Seconds that a request waits for another worker after its worker was lost. "
        "Must exceed the time that a worker takes to start.",
    )
    journal: bool = Field(
        default=True,
        strict=True,
        description="Keep prompts and answers in Redis while they are streamed, so that a client "
        "can resume its stream after the router died. false: no part of a request is written to "
        "Redis.",
    )
    journal_lease_s: Seconds = Field(
        default=3,
        description="Seconds without a sign of life from a request's router after which another "
        "router may resume the request.",
    )
    journal_ttl_s: Seconds = Field(
        default=60,
        description="Seconds for which a request can be resumed after its last token.",
    )
    journal_max_bytes: Size = Field(
        default=ByteSize(64 * MIB),
        description="Memory of the store that the journal may take, in bytes. If it is full, "
        "complete requests are dropped first, then those that do not fit. A running request goes "
        "on, but cannot be resumed.",
    )
    journal_patience_s: Seconds = Field(
        default=0.05,
        description="Longest time in seconds that a token waits to be written to the journal. "
        "After that, the stream continues without waiting for the journal.",
    )
    stream_buffer_responses: Count = Field(
        default=64,
        description="Largest number of responses that are buffered for a client that reads more "
        "slowly than tokens are decoded.",
    )
    tokenizer_threads: Count = Field(
        default=1,
        description="Threads that tokenize prompts outside the event loop. One additional thread "
        "handles very long prompts.",
    )

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        if self.default_deadline_s > self.max_deadline_s:
            raise ValueError(
                f"default_deadline_s {self.default_deadline_s} exceeds max_deadline_s "
                f"{self.max_deadline_s}"
            )
        if self.journal_lease_s > self.journal_ttl_s:
            raise ValueError(
                f"journal_lease_s {self.journal_lease_s} exceeds journal_ttl_s "
                f"{self.journal_ttl_s}: an entry would expire while its router is alive"
            )
        return self


class PoolConfig(_Section):
    """One pool of workers: prefill or decode."""

    replicas: Count = Field(default=1, description="Number of workers when the cluster starts.")
    max_replicas: Count = Field(
        default=8,
        description="Largest number of workers in this pool. This bounds the number of "
        "connections.",
    )
    tensor_parallel_size: Count = Field(
        default=1,
        description="GPUs (or groups of CPU cores) over which one worker splits the model. The two "
        "pools may use different values.",
    )
    num_gpus_per_replica: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        strict=True,
        description="GPUs that Ray reserves for each worker. With a value below 1, workers share a "
        "GPU. Default: tensor_parallel_size on a machine with CUDA, otherwise 0.",
    )
    cpu_binding: tuple[str, ...] = Field(
        default=(),
        description="CPU backend: one entry for each replica. An entry lists the cores of the "
        "engine, such as 0-3 or 0,2. If there are more replicas than entries, the entries are "
        "reused in order. With tensor parallelism, an entry holds one list per rank, separated by "
        "|. Empty: vLLM chooses. Default: Baton divides this machine's cores evenly.",
    )
    kv_cache_gib: Count = Field(
        default=1,
        description="CPU backend: size of each worker's KV cache, in GiB. Blocks take their memory "
        "when they are first used. On GPUs, set the engine argument gpu_memory_utilization "
        "instead.",
    )
    label_selector: dict[str, str] = Field(
        default={},
        description="Labels that a Ray node must have to run this pool's workers, such as "
        "ray.io/accelerator-type: H100.",
    )
    engine: dict[str, Any] = Field(
        default={},
        description="Arguments that are passed to the vLLM engine, such as max_num_seqs or "
        "quantization.",
    )
    health_check_period_s: Seconds = Field(
        default=1, description="Seconds between Ray Serve's health checks of a worker."
    )
    max_concurrent: Count = Field(
        default=256,
        description="Largest number of requests that one worker serves at the same time. It "
        "refuses further requests.",
    )
    engine_kind: Literal["vllm", "fake"] = Field(
        default="vllm",
        description="Engine of the workers. fake: a deterministic engine without a model, for "
        "tests.",
    )
    progress_timeout_s: Seconds = Field(
        default=30,
        description="Seconds without an answer after which an engine counts as hung and is "
        "replaced. Must exceed the duration of the engine's longest step, because the engine "
        "answers only between steps.",
    )
    shutdown_grace_s: Seconds = Field(
        default=5, description="Seconds that the requests of a stopping worker may take to end."
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
                raise ValueError(f"{cores!r} is not a list of CPU cores such as 0-3 or 0,2")
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
        description="Target size of one message, in bytes. Layers are grouped up to this size. "
        "Small messages reduce throughput. Large messages delay the first layer.",
    )
    pair_timeout_s: Seconds = Field(
        default=10,
        description="Seconds that each step of setting up or closing a pair (the process group of "
        "one prefill rank and one decode rank) may take before the pair is abandoned.",
    )
    reserve_timeout_s: Seconds = Field(
        default=60,
        description="Seconds that a prefill worker holds KV for which no decode worker has made a "
        "reservation.",
    )
    prefill_timeout_s: Seconds = Field(
        default=600,
        description="Seconds that a decode worker's reservation waits for its prefill to begin. "
        "This includes the time in the prefill worker's queue.",
    )
    transfer_timeout_s: Seconds = Field(
        default=60,
        description="Seconds without progress after which a transfer that has begun is abandoned.",
    )
    pair_idle_s: Seconds = Field(
        default=600,
        description="Seconds without a transfer after which a pair is closed. The next request "
        "sets it up again.",
    )
    max_pairs: Count = Field(
        default=64,
        description="Largest number of pairs of one rank, in each role. If another pair is needed, "
        "the pair that has been idle for longest is closed. If all pairs are busy, the new pair is "
        "refused. On GPUs, a pair takes 50 to 100 MB of memory.",
    )
    peer_lease_s: Seconds = Field(
        default=5,
        description="Seconds without a message from a peer after which the peer counts as dead.",
    )
    staging_buffers: Count = Field(
        default=3,
        description="Number of buffers on each side of a pair, each of message_bytes. One buffer "
        "is filled while the others are being sent.",
    )
    max_pending: Count = Field(
        default=1024,
        description="Largest number of unfinished transfers on one decode rank. Also the largest "
        "number of transfers that wait for their prefill on one prefill rank.",
    )


class RedisConfig(_Section):
    """The store of the registry of workers, the journal and the messages to the launcher."""

    url: str | None = Field(
        default=None,
        pattern=r"^(rediss?|unix)://",
        repr=False,  # may contain a password
        description="Address that begins with redis://, rediss:// or unix://. Default: an embedded "
        "Valkey.",
    )
    lease_s: Seconds = Field(
        default=3,
        description="Seconds without a renewal after which a worker leaves the registry.",
    )
    renew_s: Seconds = Field(
        default=0.5,
        description="Seconds between two renewals of a worker's lease. Each renewal reports the "
        "worker's load.",
    )
    socket_timeout_s: Seconds = Field(
        default=2,
        description="Seconds without an answer after which the store counts as unavailable.",
    )

    @model_validator(mode="after")
    def _renewal_outpaces_lease(self) -> Self:
        if self.renew_s * 2 > self.lease_s:
            raise ValueError(
                f"renew_s {self.renew_s} must be at most half of lease_s {self.lease_s}, "
                "so that one lost renewal does not end a lease"
            )
        return self


# The fields of a pool that a worker starts with, so that they cannot change with its role.
_SHARED_FIELDS = (
    "engine_kind",
    "tensor_parallel_size",
    "engine",
    "kv_cache_gib",
    "num_gpus_per_replica",
    "label_selector",
    "shutdown_grace_s",
)


class Config(_Section):
    """The configuration of a whole cluster."""

    cluster: ClusterConfig = Field(
        default=ClusterConfig(), description="Settings of the cluster as a whole."
    )
    model: ModelConfig = Field(
        default=ModelConfig(), description="The model that both pools serve."
    )
    router: RouterConfig = Field(
        default=RouterConfig(), description="The router, to which applications connect."
    )
    prefill: PoolConfig = Field(
        default=PoolConfig(), description="Workers that compute the KV of prompts."
    )
    decode: PoolConfig = Field(
        default=PoolConfig(), description="Workers that generate the output tokens."
    )
    kv_transfer: KvTransferConfig = Field(
        default=KvTransferConfig(), description="The KV stream between the pools."
    )
    redis: RedisConfig = Field(
        default=RedisConfig(),
        description="The store of the registry of workers, the journal and the messages to the "
        "launcher.",
    )

    @model_validator(mode="after")
    def _workers_renew_before_they_are_lost(self) -> Self:
        renew_s, lost_s = self.redis.renew_s, self.router.worker_lost_after_s
        if renew_s * 2 > lost_s:
            raise ValueError(
                f"redis.renew_s {renew_s} must be at most half of router.worker_lost_after_s "
                f"{lost_s}, so that a store that was emptied learns of each worker in time"
            )
        return self

    @model_validator(mode="after")
    def _roles_change_between_equal_engines(self) -> Self:
        if not self.cluster.role_change:
            return self
        for field in _SHARED_FIELDS:
            prefill, decode = getattr(self.prefill, field), getattr(self.decode, field)
            if prefill != decode:
                raise ValueError(
                    "cluster.role_change needs the same settings of workers in both pools, but "
                    f"prefill.{field} is {prefill!r} and decode.{field} is {decode!r}: write the "
                    "same value in both, or set cluster.role_change to false"
                )
        return self

    @property
    def router_host(self) -> str:
        """The host that the router listens on."""
        return self.router.host or self.cluster.host

    @property
    def router_address(self) -> str:
        """The router's "host:port". Port 0: a free port is chosen when the cluster starts."""
        return host_port(self.router_host, self.router.port)

    def pool(self, pool: Pool) -> PoolConfig:
        """Return the configuration of one pool."""
        return self.prefill if pool is Pool.PREFILL else self.decode


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file, apply ``overrides`` and check the result.

    Args:
        path: the YAML file. None: use the defaults.
        overrides: values by dotted path, such as ``{"prefill.replicas": 2}``. They replace the
            file's values.

    Raises:
        ConfigError: the file cannot be read or is wrong. For each wrong field, the message says
            what to write instead.
    """
    raw = read_raw(path, overrides or {})
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        prefix = f"{path}:\n" if path else ""
        raise ConfigError(prefix + describe(error, Config)) from None
