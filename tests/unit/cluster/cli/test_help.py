"""The help of every verb: -h, a default for every option, and examples that parse."""

from __future__ import annotations

import re
import shlex

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from cluster.cli.commands import app

GROUP = get_command(app)
EXPERT = GROUP.commands["expert"]  # type: ignore[attr-defined]
VERBS = sorted(
    [name for name, command in GROUP.commands.items() if not command.hidden]  # type: ignore[attr-defined]
    + [f"expert {name}" for name in EXPERT.commands]
)


def verb_help(verb: str, flag: str) -> str:
    result = CliRunner().invoke(app, [*verb.split(), flag], env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("verb", VERBS)
def test_both_flags_show_the_help_with_examples(verb: str) -> None:
    text = verb_help(verb, "-h")
    assert text == verb_help(verb, "--help")
    examples = re.findall(r"\$ (.*moesaic .*)", text)
    assert examples
    for example in examples:
        words = shlex.split(example.partition("moesaic ")[2].partition("<")[0])
        group = EXPERT if words[0] == "expert" else GROUP
        verb, *arguments = words[1:] if group is EXPERT else words
        group.commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]  # raises for an unknown option


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_with_a_value_shows_its_default(verb: str) -> None:
    lines = [line for line in verb_help(verb, "-h").splitlines() if re.match(r"│ +(\*)? +--", line)]
    without = [line for line in lines if "[default: " not in line and "<bool>" not in line]
    assert without == []


@pytest.mark.parametrize("verb", ["run", "chat"])
def test_verbs_of_other_servers_get_a_hint(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "demo_model", "--verbose"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: there is no verb `{verb}`: ")
    assert "`moesaic generate PROMPT`" in result.stderr


def test_the_shell_can_complete() -> None:
    names = {name for parameter in GROUP.params for name in parameter.opts}
    assert {"--install-completion", "--show-completion"} <= names
    assert isinstance(app, typer.Typer)
