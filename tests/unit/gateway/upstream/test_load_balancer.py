"""The choice of a router: load first, prefixes kept together, and nothing but arithmetic."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from gateway.upstream.load_balancer import (
    BUSIER,
    HEAD_LENGTH,
    MAX_PREFIXES,
    TOKENS_PER_SEQUENCE,
    Demand,
    LoadBalancer,
)
from moesaic.v1 import inference_pb2 as pb

NAMES = ("router-0", "router-1", "router-2", "router-3")
LONG = "x" * HEAD_LENGTH


def demand(prefix: str | int, weight: float = 1.0) -> Demand:
    return Demand(str(prefix).encode(), weight)


def text(prompt: str, **fields: object) -> Demand:
    return Demand.of(pb.GenerateRequest(text=prompt, **fields))


def token_ids(ids: Sequence[int]) -> Demand:
    return Demand.of(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids)))


def chat(*messages: tuple[str, str]) -> Demand:
    return Demand.of(
        pb.GenerateRequest(
            chat=pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in messages])
        )
    )


# What is read of a request


def test_prompts_that_begin_alike_have_one_prefix_and_others_have_their_own() -> None:
    assert text(LONG + "a").prefix == text(LONG + "b").prefix != text("a" + LONG).prefix
    assert token_ids([*range(HEAD_LENGTH), 1]).prefix == token_ids([*range(HEAD_LENGTH), 2]).prefix
    assert token_ids([1, 23]).prefix != token_ids([12, 3]).prefix


def test_tenants_have_prefixes_of_their_own_for_none_is_served_from_the_cache_of_another() -> None:
    assert text(LONG, tenant="a").prefix != text(LONG, tenant="b").prefix != text(LONG).prefix
    assert text("b", tenant="a").prefix != text("", tenant="ab").prefix


def test_policies_and_epochs_have_prefixes_of_their_own_for_each_computes_other_keys_and_values() -> None:
    prefixes = {
        text(LONG, **fields).prefix
        for fields in (
            {},
            {"epoch": "e1"},
            {"epoch": "e2"},
            {"experts": pb.ExpertPolicy(deny=["a"])},
            {"experts": pb.ExpertPolicy(allow=["a"])},
            {"experts": pb.ExpertPolicy(deny=["a", "b"])},
            {"experts": pb.ExpertPolicy(deny=["ab"])},
            {"experts": pb.ExpertPolicy(top_k=1)},
        )
    }
    assert len(prefixes) == 8


def test_how_a_policy_is_written_does_not_part_its_prefixes() -> None:
    one = text(LONG, experts=pb.ExpertPolicy(deny=["a", "b"], require=["c"]))
    other = text(LONG, experts=pb.ExpertPolicy(deny=["b", "a", "b"]))
    assert one.prefix == other.prefix
    assert text(LONG, experts=pb.ExpertPolicy(require=["c"])).prefix == text(LONG).prefix


def test_a_conversation_keeps_its_prefix_as_it_grows() -> None:
    first = (("system", "Be brief."), ("user", "Who is there?"))
    later = (*first, ("assistant", "Nay, answer me."), ("user", "Long live the king!"))
    assert chat(*first).prefix == chat(*later).prefix
    assert chat(*first).prefix != chat(("system", "Be brief."), ("user", "Bernardo?")).prefix


def test_conversations_under_one_long_system_prompt_share_their_prefix() -> None:
    assert chat(("system", LONG), ("user", "a")).prefix == chat(("system", LONG), ("user", "b")).prefix


def test_a_request_weighs_its_continuations_and_the_length_of_its_prompt() -> None:
    assert token_ids(range(TOKENS_PER_SEQUENCE)).weight == 2
    assert text("x" * 4 * TOKENS_PER_SEQUENCE, n=3).weight == 4
    assert chat(("user", "x" * 4 * TOKENS_PER_SEQUENCE)).weight == 2
    assert Demand.of(pb.GenerateRequest()).weight == 1


# The choice


def test_strange_prompts_go_to_the_least_loaded_router() -> None:
    balancer = LoadBalancer(NAMES)
    taken = [balancer.take(demand(index), NAMES) for index in range(16)]
    assert set(Counter(taken).values()) == {4}


def test_a_heavy_request_counts_for_several() -> None:
    balancer = LoadBalancer(NAMES[:2])
    busy = balancer.take(demand("heavy", 3.0), NAMES[:2])
    (idle,) = set(NAMES[:2]) - {busy}
    assert [balancer.take(demand(index), NAMES[:2]) for index in range(3)] == [idle] * 3


def test_what_ends_is_no_load_any_more() -> None:
    balancer = LoadBalancer(NAMES[:2])
    heavy = demand("heavy", 3.0)
    first = balancer.take(heavy, NAMES[:2])
    balancer.take(demand("light"), NAMES[:2])
    balancer.release(first, heavy)
    assert balancer.take(demand("next"), NAMES[:2]) == first


def test_a_prefix_stays_with_its_router_while_others_are_less_loaded_but_not_clearly() -> None:
    balancer = LoadBalancer(NAMES)
    home = balancer.take(demand("shared"), NAMES)
    for index in range(8):
        balancer.take(demand(index), NAMES)
    assert balancer.take(demand("shared"), NAMES) == home


def test_one_prefix_for_all_does_not_overload_its_router() -> None:
    balancer = LoadBalancer(NAMES)
    taken = Counter(balancer.take(demand("shared"), NAMES) for _ in range(400))
    assert max(taken.values()) <= BUSIER * 100 + 1
    assert min(taken.values()) >= 80


def test_one_after_another_the_same_prefix_always_meets_the_same_router() -> None:
    balancer = LoadBalancer(NAMES)
    shared = demand("shared")
    homes = set()
    for index in range(50):
        homes.add(home := balancer.take(shared, NAMES))
        other = balancer.take(demand(index), NAMES)
        balancer.release(home, shared)
        balancer.release(other, demand(index))
    assert len(homes) == 1


def test_idle_pools_side_by_side_send_a_prefix_the_same_way() -> None:
    chosen = [[LoadBalancer(NAMES).take(demand(index), NAMES) for index in range(40)] for _ in range(2)]
    assert chosen[0] == chosen[1]
    assert set(chosen[0]) == set(NAMES)


def test_when_a_router_goes_only_its_prefixes_move() -> None:
    before = [LoadBalancer(NAMES).take(demand(index), NAMES) for index in range(40)]
    after = [LoadBalancer(NAMES).take(demand(index), NAMES[1:]) for index in range(40)]
    assert all(new == old for old, new in zip(before, after, strict=True) if old != NAMES[0])


def test_a_prefix_whose_router_is_away_finds_a_new_home_and_keeps_it() -> None:
    balancer = LoadBalancer(NAMES)
    shared = demand("shared")
    home = balancer.take(shared, NAMES)
    balancer.release(home, shared)
    left = [name for name in NAMES if name != home]
    new = balancer.take(shared, left)
    balancer.release(new, shared)
    assert new in left
    assert balancer.take(shared, NAMES) == new


def test_the_only_candidate_is_taken_however_busy_it_is() -> None:
    balancer = LoadBalancer(NAMES)
    assert {balancer.take(demand(index), NAMES[:1]) for index in range(100)} == {NAMES[0]}


@pytest.mark.parametrize("num_prefixes", [1, 5, 1000])
def test_whatever_comes_and_goes_loads_stay_near_each_other(num_prefixes: int) -> None:
    draw = random.Random(num_prefixes)
    balancer = LoadBalancer(NAMES)
    running: list[tuple[str, Demand]] = []
    worst = 0.0
    for _ in range(5000):
        if len(running) == 64:
            balancer.release(*running.pop(draw.randrange(64)))
        wanted = demand(draw.randrange(num_prefixes), draw.choice((1.0, 1.5, 2.0)))
        running.append((balancer.take(wanted, NAMES), wanted))
        loads = Counter[str]()
        for name, it in running:
            loads[name] += it.weight
        if len(running) == 64:
            worst = max(worst, max(loads.values()) / (sum(loads.values()) / len(NAMES)))
    assert worst < 1.6


def test_prefixes_are_forgotten_least_recently_used_first() -> None:
    balancer = LoadBalancer(NAMES)
    for index in range(3 * MAX_PREFIXES):
        balancer.release(balancer.take(demand("kept"), NAMES), demand("kept"))
        balancer.release(balancer.take(demand(index), NAMES), demand(index))
    assert len(balancer._homes) == MAX_PREFIXES
    assert demand("kept").prefix in balancer._homes and demand(0).prefix not in balancer._homes
