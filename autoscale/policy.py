"""The autoscaling policy: the fields of its file, each with its unit and its reason.

The file has over 400 lines because it describes every field of the policy in one place.

``autoscale.load`` reads the file. Where a field means the same as in Kubernetes'
HorizontalPodAutoscaler v2 (HPA), it has the same name and the same default.
"""

from __future__ import annotations

from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from autoscale.schedule import check_cron
from core.config.errors import nearest
from core.types import Pool

# More workers than any pool has. decide() tries the counts of a pool one by one.
MAX_WORKERS = 1024

# Strict types refuse a quoted number or a boolean in place of a number.
Workers = Annotated[int, Field(ge=0, le=MAX_WORKERS, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, Field(gt=0, le=1, strict=True)]
# An hour, as in HPA, so that the numbers to remember are bounded.
WindowSeconds = Annotated[int, Field(ge=0, le=3600, strict=True)]
PeriodSeconds = Annotated[int, Field(ge=1, le=1800, strict=True)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


def mistake(text: str, *path: str | int) -> PydanticCustomError:
    """An error in the field at ``path``, which starts at the field that is being validated."""
    # pydantic fills in fields in braces; the text is one, because it may contain braces itself.
    return PydanticCustomError("policy", "{text}", {"text": text, "path": path})


def _check_time_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        known = available_timezones()
        raise mistake(
            f"unknown time zone {name!r}; the nearest name is {nearest(name, known)}"
            if known
            else f"unknown time zone {name!r}, because this machine has no time zones; "
            "install the package tzdata"
        ) from None
    return name


Cron = Annotated[str, Field(max_length=200), AfterValidator(check_cron)]
TimeZone = Annotated[str, Field(max_length=100), AfterValidator(_check_time_zone)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, validate_default=True
    )


class QueueRequests(_Section):
    """The requests that wait for the pool or run on it. A steady signal if requests are alike."""

    type: Literal["QueueRequests"]
    target: Positive = Field(description="Requests per worker.")


class QueueTokens(_Section):
    """The tokens of the requests that wait for the pool or run on it."""

    type: Literal["QueueTokens"]
    target: Positive = Field(
        description="Tokens per worker. Prefill: prompt tokens to compute. Decode: tokens that "
        "will need KV when the requests end."
    )


class QueueSeconds(_Section):
    """The time that the pool needs for its waiting and running prompts, at its measured rate."""

    type: Literal["QueueSeconds"]
    target: Positive = Field(
        description="Seconds of work per worker. A new prompt waits about this long."
    )


class Utilization(_Section):
    """The share of time that the workers are busy: arriving prompt tokens at the measured rate.

    It is the steadiest signal for prefill, because it does not depend on the number of workers. It
    does not see a backlog, so use it beside QueueSeconds.
    """

    type: Literal["Utilization"]
    target: Fraction = Field(description="Share of time, from 0 to 1.")


class KVUtilization(_Section):
    """The KV that the waiting and running requests will need, relative to the pool's KV room."""

    type: Literal["KVUtilization"]
    target: Fraction = Field(
        description="Share of the KV room, from 0 to 1. Above about 0.9, requests wait for room."
    )


class _Latency(_Section):
    percentile: Literal[95, 99] = Field(
        default=95, description="The percent of the measured latencies that must meet the target."
    )
    target_milliseconds: Positive = Field(description="The latency to keep, in milliseconds.")


class TTFT(_Latency):
    """The time to first token, at the router's client edge.

    A latency adds workers only while there are requests for them. See ``autoscale.signals``.
    """

    type: Literal["TTFT"]


class ITL(_Latency):
    """The inter-token latency: the time between two tokens of a stream.

    A latency adds workers only while there are requests for them. See ``autoscale.signals``.
    """

    type: Literal["ITL"]


# A decode worker's rate grows with its batch, so decode has no seconds of work and no utilisation.
PrefillSignal = Annotated[
    QueueRequests | QueueTokens | QueueSeconds | Utilization | TTFT, Field(discriminator="type")
]
DecodeSignal = Annotated[
    QueueRequests | QueueTokens | KVUtilization | ITL, Field(discriminator="type")
]
Signal = QueueRequests | QueueTokens | QueueSeconds | Utilization | KVUtilization | TTFT | ITL


class ScalingPolicy(_Section):
    """How far the number of workers may change within a period."""

    type: Literal["Pods", "Percent"] = Field(
        description="Pods: value is a number of workers. Percent: it is a percentage of the "
        "workers at the start of the period."
    )
    value: Annotated[int, Field(ge=1, le=10_000, strict=True)] = Field(
        description="The largest change within a period, in workers or percent."
    )
    period_seconds: PeriodSeconds = Field(description="Length of the period.")


def _at_most(kind: str, value: int) -> ScalingPolicy:
    return ScalingPolicy.model_validate({"type": kind, "value": value, "periodSeconds": 15})


class _ScalingRules(_Section):
    tolerance: Annotated[float, Field(ge=0, lt=1, strict=True)] = Field(
        default=0.1,
        description="A signal within this fraction of its target changes nothing, so that noise "
        "does not add and remove workers.",
    )
    select_policy: Literal["Max", "Min", "Disabled"] = Field(
        default="Max",
        description="Max: the policy that allows the largest change applies. Min: the one that "
        "allows the smallest. Disabled: no change in this direction.",
    )


Policies = Annotated[tuple[ScalingPolicy, ...], Field(min_length=1, max_length=8)]


class ScaleUp(_ScalingRules):
    """How fast a pool grows."""

    stabilization_window_seconds: WindowSeconds = Field(
        default=0,
        description="The smallest recommendation of this window counts, so that a short peak adds "
        "no worker. 0: the latest one counts.",
    )
    policies: Policies = Field(
        default=(
            _at_most("Percent", 100),
            _at_most("Pods", 4),
        ),
        description="Bounds on growth. As in HPA, a pool may double in 15 s, or add 4 workers.",
    )


class ScaleDown(_ScalingRules):
    """How fast a pool shrinks."""

    stabilization_window_seconds: WindowSeconds = Field(
        default=300,
        description="The largest recommendation of this window counts, so that a short pause "
        "removes no worker. A pool goes to zero after this time without any request.",
    )
    policies: Policies = Field(
        default=(_at_most("Percent", 100),),
        description="Bounds on shrinking. As in HPA, all may go at once after the window.",
    )
    max_utilization: Fraction = Field(
        default=0.8,
        description="Prefill only: no worker leaves if the others would be busy for a larger "
        "share of the time. Above 0.8 the queue of a busy worker grows steeply, so the pool would "
        "have to grow again.",
    )


class Behavior(_Section):
    """How fast a pool grows and shrinks."""

    scale_up: ScaleUp = Field(default_factory=ScaleUp, description="How fast a pool grows.")
    scale_down: ScaleDown = Field(default_factory=ScaleDown, description="How fast it shrinks.")


class _PoolPolicy(_Section):
    min_replicas: Workers = Field(
        default=1,
        description="Fewest workers. 0: the pool is empty while there are no requests, and the "
        "first request waits for a worker to start.",
    )
    max_replicas: Annotated[Workers, Field(ge=1)] = Field(description="Most workers.")
    averaging_seconds: Annotated[int, Field(ge=0, le=600, strict=True)] = Field(
        default=60,
        description="The arriving tokens are averaged over about this time (exponentially), for "
        "Utilization and before a scale-down, because prompts and answers differ in length. A "
        "queue is not averaged. 0: the routers' latest 10 s count.",
    )
    behavior: Behavior = Field(
        default_factory=Behavior, description="How fast the pool grows and shrinks."
    )

    @field_validator("max_replicas")
    @classmethod
    def _holds_the_minimum(cls, most: int, info: ValidationInfo) -> int:
        least = info.data.get("min_replicas", 0)
        if most < least:
            raise mistake(f"must be at least minReplicas ({least}), not {most}")
        return most


class PrefillPolicy(_PoolPolicy):
    """How many prefill workers there should be."""

    signals: Annotated[tuple[PrefillSignal, ...], Field(min_length=1, max_length=8)] = Field(
        description="What to scale on. The signal that asks for most workers wins."
    )


class DecodePolicy(_PoolPolicy):
    """How many decode workers there should be."""

    signals: Annotated[tuple[DecodeSignal, ...], Field(min_length=1, max_length=8)] = Field(
        description="What to scale on. The signal that asks for most workers wins."
    )


PoolPolicy = PrefillPolicy | DecodePolicy


class Budget(_Section):
    """The GPUs of both pools together."""

    gpus: Positive = Field(
        description="Most GPUs that the workers of both pools hold together, those that start and "
        "those that drain included. A worker is added only once its GPUs are free."
    )
    priority: Literal["Prefill", "Decode", "Neither"] = Field(
        default="Neither",
        description="Who wins when GPUs are short. The winner may take workers from the other "
        "pool, down to that pool's minReplicas. Neither: no pool takes a worker that the other "
        "one wants.",
    )

    def has_room_for(self, gpus: float) -> bool:
        """Return whether the budget allows so many GPUs; the sums of fractions are rounded."""
        return gpus <= self.gpus + 1e-9


class Ratio(_Section):
    """Bounds on prefill workers per decode worker, while both pools have workers."""

    min: Positive = Field(default=1 / MAX_WORKERS, description="Fewest prefill per decode worker.")
    max: Positive = Field(default=MAX_WORKERS, description="Most prefill per decode worker.")

    @field_validator("max")
    @classmethod
    def _holds_the_minimum(cls, most: float, info: ValidationInfo) -> float:
        least = info.data.get("min", 0)
        if most < least:
            raise mistake(f"must be at least ratio.min ({least:g}), not {most:g}")
        return most


class Bounds(_Section):
    """Other bounds for a pool."""

    min_replicas: Workers | None = Field(
        default=None, description="Fewest workers. Default: the pool's own."
    )
    max_replicas: Annotated[int, Field(ge=1, le=MAX_WORKERS, strict=True)] | None = Field(
        default=None, description="Most workers. Default: the pool's own."
    )


class Schedule(_Section):
    """Other bounds for a time, such as office hours.

    While several schedules are active, the largest of their minimums and the smallest of their
    maximums hold. If these contradict, the minimum wins.
    """

    name: Name = Field(description="Appears in the reasons of decisions.")
    start: Cron = Field(
        description="Cron expression on the wall clock: from when the schedule is active. A wall "
        "time that a change of the clock leaves out means the time of the change; one that occurs "
        "twice means the first. Start early by the time that a worker takes to load the model."
    )
    end: Cron = Field(description="Cron expression: from when it is no longer active.")
    time_zone: TimeZone = Field(
        default="UTC", description="Name in the IANA database, such as Europe/Berlin."
    )
    prefill: Bounds | None = Field(default=None, description="Bounds of the prefill pool.")
    decode: Bounds | None = Field(default=None, description="Bounds of the decode pool.")

    def bounds(self, pool: Pool) -> Bounds | None:
        """Return what the schedule says about a pool."""
        return self.prefill if pool is Pool.PREFILL else self.decode


class Spec(_Section):
    """What the policy says."""

    mode: Literal["Active", "Advisory"] = Field(
        default="Active", description="Advisory: decisions are logged and not carried out."
    )
    prefill: PrefillPolicy = Field(description="The pool that computes prompts.")
    decode: DecodePolicy = Field(description="The pool that generates tokens.")
    budget: Budget | None = Field(
        default=None, description="Bound on GPUs. Default: only maxReplicas bounds the pools."
    )
    ratio: Ratio | None = Field(
        default=None, description="Bounds on prefill workers per decode worker. Default: none."
    )
    role_change: Literal["Never", "WhenBudgetIsSpent"] = Field(
        default="Never",
        description="WhenBudgetIsSpent: if a pool needs a worker, no GPU is free for it, and the "
        "other pool has one more than it needs, that worker changes its role. It keeps the "
        "model loaded, so this is faster than a new worker.",
    )
    role_change_timeout_seconds: Positive = Field(
        default=300,
        description="A change of role is given up after this time, which includes the drain.",
    )
    warmup_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] = Field(
        default=30,
        description="Rates and latencies of a worker count once it has been ready for this long. "
        "The first requests of a worker are slow, because it still compiles and fills its cache.",
    )
    placement_timeout_seconds: Positive = Field(
        default=60,
        description="A worker that waits longer for a place is given up, so that it does not "
        "count as coming capacity. Ray usually places a worker within seconds; if a machine is "
        "started for it, write a few minutes.",
    )
    placement_retry_seconds: Positive = Field(
        default=60,
        description="Time until the next try, with one worker. It doubles with each failure.",
    )
    placement_max_retry_seconds: Positive = Field(
        default=600, description="Longest time between two tries."
    )
    schedules: Annotated[tuple[Schedule, ...], Field(max_length=32)] = Field(
        default=(), description="Other bounds at certain times."
    )

    def pool(self, pool: Pool) -> PoolPolicy:
        """Return the part for one pool."""
        return self.prefill if pool is Pool.PREFILL else self.decode

    @field_validator("placement_max_retry_seconds")
    @classmethod
    def _holds_the_first(cls, longest: float, info: ValidationInfo) -> float:
        first = info.data.get("placement_retry_seconds", 0)
        if longest < first:
            raise mistake(f"must be at least placementRetrySeconds ({first:g}), not {longest:g}")
        return longest

    @field_validator("role_change")
    @classmethod
    def _needs_a_budget(cls, role_change: str, info: ValidationInfo) -> str:
        if role_change != "Never" and info.data.get("budget", ...) is None:
            raise mistake(f"{role_change} needs budget.gpus; without a budget, write Never")
        return role_change

    @field_validator("ratio")
    @classmethod
    def _can_hold(cls, ratio: Ratio | None, info: ValidationInfo) -> Ratio | None:
        pools = [info.data[pool.value] for pool in Pool if pool.value in info.data]
        if ratio is None or len(pools) < 2:  # a pool has mistakes of its own
            return ratio
        prefill, decode = (range(max(p.min_replicas, 1), p.max_replicas + 1) for p in pools)
        if not any(low_and_high(ratio, count, prefill) for count in decode):
            raise mistake(
                "no numbers of workers within minReplicas and maxReplicas of both pools have "
                f"{ratio.min:g} to {ratio.max:g} prefill workers per decode worker"
            )
        return ratio

    @field_validator("schedules")
    @classmethod
    def _within_bounds(
        cls, schedules: tuple[Schedule, ...], info: ValidationInfo
    ) -> tuple[Schedule, ...]:
        names: set[str] = set()
        for index, schedule in enumerate(schedules):
            if schedule.name in names:
                raise mistake(f"{schedule.name!r} appears twice", index, "name")
            names.add(schedule.name)
            if schedule.start.split() == schedule.end.split():
                raise mistake(
                    "must differ from start, or the schedule is never active", index, "end"
                )
            for pool in Pool:
                own, bounds = info.data.get(pool.value), schedule.bounds(pool)
                if own is not None and bounds is not None:
                    _check_bounds(bounds, own, (index, pool.value))
        return schedules


def _check_bounds(bounds: Bounds, own: PoolPolicy, path: tuple[str | int, ...]) -> None:
    if bounds.max_replicas is not None and bounds.max_replicas > own.max_replicas:
        raise mistake(
            f"must be at most the pool's own maxReplicas ({own.max_replicas})",
            *path,
            "maxReplicas",
        )
    least, most = within(bounds, own)
    if least > most:
        field = "maxReplicas" if bounds.min_replicas is None else "minReplicas"
        raise mistake(f"{least} (minReplicas) is more than {most} (maxReplicas)", *path, field)


def within(bounds: Bounds | None, own: PoolPolicy) -> tuple[int, int]:
    """Return a pool's bounds while a schedule with ``bounds`` is active."""
    least, most = own.min_replicas, own.max_replicas
    if bounds is not None and bounds.min_replicas is not None:
        least = bounds.min_replicas
    if bounds is not None and bounds.max_replicas is not None:
        most = bounds.max_replicas
    return least, most


def low_and_high(ratio: Ratio | None, decode: int, prefill: range) -> range:
    """Return the numbers of prefill workers in ``prefill`` that suit ``decode`` decode workers."""
    if ratio is None or decode == 0:
        return prefill
    # One part in a billion: 0.1 * 30 is not exactly 3.
    low = -int(-(ratio.min * decode - 1e-9) // 1)
    high = int(ratio.max * decode + 1e-9)
    return range(max(prefill.start, low), min(prefill.stop, high + 1))


class Metadata(_Section):
    """What identifies the policy."""

    name: Name = Field(description="Appears in decisions and reports.")


class Policy(_Section):
    """Baton's autoscaling policy: how many workers each pool has."""

    api_version: Literal["baton/v1"] = Field(description="The version of this format.")
    kind: Literal["AutoscalingPolicy"] = Field(description="What the file is.")
    metadata: Metadata = Field(description="What identifies the policy.")
    spec: Spec = Field(description="What the policy says.")
