"""Errors become gRPC status, and failed calls to a worker become errors."""

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
    return [kind] + [error for child in kind.__subclasses__() for error in all_errors(child)]


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
def test_each_error_has_its_status_code(
    kind: type[errors.BatonError], code: grpc.StatusCode
) -> None:
    assert kind("x").code is code


def test_only_the_base_error_has_the_code_unknown() -> None:
    for kind in all_errors(errors.BatonError):
        assert (kind("x").code is grpc.StatusCode.UNKNOWN) == (kind is errors.BatonError)


def test_the_retry_hint_is_never_rounded_to_zero() -> None:
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
        (grpc.StatusCode.OUT_OF_RANGE, errors.InternalError),
        (grpc.StatusCode.PERMISSION_DENIED, errors.InternalError),
        (grpc.StatusCode.INTERNAL, errors.InternalError),
    ],
)
def test_a_failed_call_to_a_worker_becomes_an_error(
    code: grpc.StatusCode, kind: type[errors.BatonError]
) -> None:
    error = from_rpc_error(rpc_error(code), "decode-1")
    assert type(error) is kind
    assert "decode-1" in error.message
    assert "what happened" in error.message


def test_the_detail_from_the_worker_is_kept() -> None:
    detail = inference_pb2.ErrorDetail(reason="ENGINE_FULL", retry_after_ms=1500)
    error = from_rpc_error(
        rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, detail.SerializeToString()), "w"
    )
    assert error.reason == "ENGINE_FULL"
    assert error.retry_after_s == 1.5


def test_an_unreadable_detail_is_ignored() -> None:
    error = from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, b"\xff\xff"), "w")
    assert error.reason == "WORKER_LOST"


@pytest.mark.asyncio
async def test_abort_cancels_the_handler_when_the_caller_has_gone_away() -> None:
    class GoneContext:
        async def abort(self, *_: object) -> None:
            raise grpc.aio.InternalError("the call has ended")

    with pytest.raises(asyncio.CancelledError):
        await abort(cast(Any, GoneContext()), errors.InternalError("x"))
