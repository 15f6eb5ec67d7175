from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from baton.errors import ERROR_DETAIL_KEY
from baton.v1 import inference_pb2
from core import errors
from core.rpc.status import abort, error_detail, from_rpc_error


def all_errors(kind: type[errors.BatonError]) -> list[type[errors.BatonError]]:
    return [kind] + [each for child in kind.__subclasses__() for each in all_errors(child)]


def rpc_error(code: grpc.StatusCode, detail: bytes | None = None) -> AioRpcError:
    trailing = Metadata((ERROR_DETAIL_KEY, detail)) if detail is not None else Metadata()
    return AioRpcError(code, Metadata(), trailing, details="what happened")


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidArgumentError, grpc.StatusCode.INVALID_ARGUMENT),
        (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
        (errors.AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
        (errors.CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
        (errors.WorkerLostError, grpc.StatusCode.UNAVAILABLE),
        (errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.CancelledError, grpc.StatusCode.CANCELLED),
        (errors.InternalError, grpc.StatusCode.INTERNAL),
        (errors.BatonError, grpc.StatusCode.UNKNOWN),
    ],
)
def test_codes(kind: type[errors.BatonError], code: grpc.StatusCode) -> None:
    assert kind("x").code is code


def test_every_error_of_the_tree_has_a_code_of_its_own_kind() -> None:
    unknown = {errors.BatonError}
    for kind in all_errors(errors.BatonError):
        assert (kind("x").code is grpc.StatusCode.UNKNOWN) == (kind in unknown)


def test_the_retry_hint_is_never_rounded_to_none() -> None:
    error = errors.CapacityError("x", reason="R", retry_after_s=0.0001, request_id="id")
    assert error_detail(error) == inference_pb2.ErrorDetail(
        reason="R", request_id="id", retry_after_ms=1
    )
    assert error_detail(errors.InternalError("x")).retry_after_ms == 0


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.WorkerLostError),
        (grpc.StatusCode.CANCELLED, errors.WorkerLostError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.CapacityError),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidArgumentError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
        (grpc.StatusCode.INTERNAL, errors.InternalError),
    ],
)
def test_worker_failures(code: grpc.StatusCode, kind: type[errors.BatonError]) -> None:
    error = from_rpc_error(rpc_error(code), "decode-1")
    assert type(error) is kind
    assert "decode-1" in error.message
    assert "what happened" in error.message


def test_the_workers_detail_survives() -> None:
    detail = inference_pb2.ErrorDetail(reason="ENGINE_FULL", retry_after_ms=1500)
    error = from_rpc_error(
        rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, detail.SerializeToString()), "w"
    )
    assert error.reason == "ENGINE_FULL"
    assert error.retry_after_s == 1.5


def test_a_detail_that_cannot_be_read_is_left_out() -> None:
    error = from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, b"\xff\xff"), "w")
    assert error.reason == "WORKER_LOST"


@pytest.mark.asyncio
async def test_nobody_is_told_when_the_caller_is_gone() -> None:
    class GoneContext:
        async def abort(self, *_: object) -> None:
            raise grpc.aio.InternalError("the call has ended")

    with pytest.raises(asyncio.CancelledError):
        await abort(cast(Any, GoneContext()), errors.InternalError("x"))
