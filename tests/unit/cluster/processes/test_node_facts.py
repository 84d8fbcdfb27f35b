"""What nodes say of themselves decides whether a start goes on, and what is said before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.processes.node_facts import PATIENCE, NodeFacts, check_versions, explain_head_loss, own_facts
from moesaic import __version__
from moesaic.errors import FailedPrecondition

OWN = NodeFacts("0.1.0", "2.13.0", "3.11.7", patience_s=600.0)


def test_a_node_with_another_moesaic_is_refused_by_its_address() -> None:
    with pytest.raises(FailedPrecondition) as refused:
        check_versions(OWN, {"10.0.0.1": OWN, "10.0.0.2": replace(OWN, moesaic="0.2.0")})
    assert refused.value.message == (
        "address: Moesaic is 0.1.0 here and 0.2.0 on node 10.0.0.2: install the same one everywhere"
    )
    assert refused.value.field == "address"


def test_another_torch_or_another_python_is_a_line_for_each_node() -> None:
    nodes = {"10.0.0.1": OWN, "10.0.0.2": replace(OWN, torch="2.12.0", python="3.11.2")}
    assert check_versions(OWN, nodes) == (
        "node 10.0.0.2 has torch 2.12.0, this machine 2.13.0: install the same one everywhere, "
        "or the last bits depend on which node computes",
        "node 10.0.0.2 has Python 3.11.2, this machine 3.11.7: install the same one everywhere",
    )


def test_nodes_with_the_same_versions_are_no_news() -> None:
    assert check_versions(OWN, {"10.0.0.1": OWN, "10.0.0.2": OWN}) == ()


@pytest.mark.parametrize(
    ("storage", "patience_s", "says"),
    [
        ("memory", 60.0, "keeps its state in memory: 60 s after its loss"),
        ("memory", 600.0, "keeps its state in memory: 600 s after its loss"),
        ("rocksdb", 60.0, "the Ray of node 10.0.0.2 ends 60 s after the loss of its head"),
        (None, 60.0, "the Ray of node 10.0.0.2 ends 60 s after the loss of its head"),
    ],
)
def test_a_ray_that_does_not_outlive_its_head_is_told_with_the_cure(
    storage: str | None, patience_s: float, says: str
) -> None:
    told = explain_head_loss(storage, {"10.0.0.1": OWN, "10.0.0.2": replace(OWN, patience_s=patience_s)})
    assert told is not None and says in told
    assert f"{PATIENCE}=600" in told and "\n" not in told


@pytest.mark.parametrize("storage", ["redis", "rocksdb", None])
def test_a_ray_that_outlives_its_head_is_no_news(storage: str | None) -> None:
    assert explain_head_loss(storage, {"10.0.0.1": OWN}) is None


@pytest.mark.parametrize(("set_to", "patience_s"), [("600", 600.0), ("soon", 60.0), (None, 60.0)])
def test_a_process_knows_its_versions_and_the_patience_of_its_ray(
    set_to: str | None, patience_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PATIENCE, raising=False)
    if set_to is not None:
        monkeypatch.setenv(PATIENCE, set_to)
    own = own_facts()
    assert (own.moesaic, own.patience_s) == (__version__, patience_s)
    assert own.torch[:1].isdigit() and own.python.count(".") == 2
