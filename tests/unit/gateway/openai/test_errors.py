"""Every error has a status, an envelope, and a word on whether a retry can help."""

from __future__ import annotations

import json

import pytest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from gateway.openai import errors as http_errors
from moesaic import errors


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.InvalidArgument("m", field="n"), 400, "invalid_request_error", "invalid_argument"),
        (errors.InvalidArgument("m", reason="CONTEXT_LENGTH_EXCEEDED"), 400, "invalid_request_error", "context_length_exceeded"),
        (errors.Unsupported("m"), 400, "invalid_request_error", "unsupported"),
        (errors.NotFound("m", reason="MODEL_NOT_FOUND"), 404, "invalid_request_error", "model_not_found"),
        (errors.Aborted("m"), 409, "invalid_request_error", "aborted"),
        (errors.Overloaded("m"), 429, "rate_limit_error", "overloaded"),
        (errors.FailedPrecondition("m"), 500, "server_error", "failed_precondition"),
        (errors.CheckpointError("m"), 500, "server_error", "bad_checkpoint"),
        (errors.InternalError("m"), 500, "server_error", "internal"),
        (errors.MoesaicError("m"), 500, "server_error", "unknown"),
        (errors.Unavailable("m", reason="NO_REPLICA"), 503, "server_error", "no_replica"),
        (errors.DataLoss("m"), 503, "server_error", "data_loss"),
        (errors.DeadlineExceeded("m"), 504, "server_error", "deadline_exceeded"),
    ],
)  # fmt: skip
def test_an_error_of_ours_has_its_status(
    error: errors.MoesaicError, status: int, kind: str, code: str
) -> None:
    response = http_errors.response(http_errors.from_moesaic(error))
    assert response.status_code == status
    assert json.loads(bytes(response.body)) == {
        "error": {"message": "m", "type": kind, "param": error.field, "code": code}
    }


def test_only_an_error_that_a_retry_can_help_invites_one() -> None:
    busy = http_errors.from_moesaic(errors.Overloaded("m", retry_after_s=2.3)).headers
    assert busy == {"retry-after": "3"}
    assert http_errors.from_moesaic(errors.Unavailable("m")).headers == {"retry-after": "1"}
    assert http_errors.from_moesaic(errors.DeadlineExceeded("m")).headers == {"x-should-retry": "false"}
    assert http_errors.from_moesaic(errors.InternalError("m")).headers == {"x-should-retry": "false"}


def test_what_http_refuses_has_a_code_of_its_own() -> None:
    error = http_errors.from_http(HTTPException(413, "too much"))
    assert (error.status, error.message, error.code) == (413, "too much", "body_too_large")
    assert http_errors.from_http(HTTPException(418, "tea")).code == "invalid_request"


@pytest.mark.parametrize(
    ("error", "param", "message"),
    [
        ({"type": "extra_forbidden", "loc": ("body", "zz"), "msg": "no"}, "zz", "unknown field zz"),
        ({"type": "missing", "loc": ("body", "prompt"), "msg": "no"}, "prompt", "missing field prompt"),
        ({"type": "int_type", "loc": ("body", "messages", 0, "content", "<parts>", 1, "text"), "msg": "bad"},
         "messages[0].content[1].text", "messages[0].content[1].text: bad"),
        ({"type": "model_type", "loc": ("body",), "msg": "bad"}, None, "the body: bad"),
        ({"type": "extra_forbidden", "loc": ("body", "a\n" + "b" * 99), "msg": "no"},
         "a\\n" + "b" * 62, "unknown field a\\n" + "b" * 62),
    ],
)  # fmt: skip
def test_a_field_that_does_not_fit_is_named(
    error: dict[str, object], param: str | None, message: str
) -> None:
    got = http_errors.from_validation(RequestValidationError([error]))
    assert (got.status, got.param, got.message) == (400, param, message)


def test_an_error_about_a_field_of_the_router_becomes_one_about_its_name_in_this_api() -> None:
    error = errors.Overloaded("chat: too long, chat: is", field="chat", reason="LONG", retry_after_s=2.0)
    renamed = http_errors.about_field(error, "messages")
    assert (type(renamed), renamed.message) == (errors.Overloaded, "messages: too long, chat: is")
    assert (renamed.field, renamed.reason, renamed.retry_after_s) == ("messages", "LONG", 2.0)
    assert (error.message, error.field) == ("chat: too long, chat: is", "chat")


def test_a_message_that_does_not_begin_with_its_field_stays() -> None:
    error = errors.InvalidArgument("the chat: is too long", field="chat")
    assert http_errors.about_field(error, "messages").message == "the chat: is too long"
