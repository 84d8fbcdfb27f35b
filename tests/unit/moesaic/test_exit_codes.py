"""How a command ends: its code, and its one line on stderr."""

from __future__ import annotations

import json

import pytest

from moesaic.errors import InvalidArgument, MoesaicError, Unavailable
from moesaic.exit_codes import exit_with_code
from moesaic.stop_signals import StopRequested


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Unavailable("no router"), 1),
        (InvalidArgument("without a field"), 1),
        (InvalidArgument("device: is wrong", field="device"), 2),
    ],
)
def test_an_error_ends_with_2_where_it_names_what_the_caller_can_mend(error: MoesaicError, code: int) -> None:
    with pytest.raises(SystemExit) as ended, exit_with_code():
        raise error
    assert ended.value.code == code


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_with_code():
        raise Unavailable("first line\n  second line")
    assert capsys.readouterr() == ("", "error: first line second line\n")


def test_an_error_names_what_was_typed_where_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_with_code(spell={"device": "--device tpu"}.get):
        raise InvalidArgument("device: is wrong", field="device")
    with pytest.raises(SystemExit), exit_with_code(spell={"device": "--device tpu"}.get):
        raise InvalidArgument("rows: are wrong", field="rows")
    assert capsys.readouterr().err == "error: --device tpu: is wrong\nerror: rows: are wrong\n"


def test_with_json_an_error_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_with_code(as_json=True):
        raise InvalidArgument("device: is wrong", field="device")
    error = {"message": "device: is wrong", "reason": "INVALID_ARGUMENT", "field": "device"}
    assert json.loads(capsys.readouterr().err) == {"error": error}


def test_a_stop_that_was_requested_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with exit_with_code():
        raise StopRequested
    assert capsys.readouterr() == ("", "stopped\n")
