"""The long memory: lifetimes, holders, bounds."""

from __future__ import annotations

import math
from collections import Counter
from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from enforcer.dns_answer import AnswerAddress, DnsAnswer
from enforcer.kernel_abi import LIFETIME_CEILING_SECONDS, LIFETIME_FLOOR_SECONDS, REFRESH_MARGIN_SECONDS, RangeClass
from enforcer.learned import (
    IN_USE_SECONDS,
    Changes,
    Destination,
    LearnedAddress,
    LearnedAddresses,
    combined,
    lifetime_seconds,
    permitted,
)
from enforcer.policy import Address, HostPattern, Rule, RuleKind

PUBLIC = ip_address("198.18.0.1")
PATTERN = HostPattern("registry.corp.example", wildcard=False)
OTHER_PATTERN = HostPattern("cdn.example", wildcard=True)


def entry(
    expires_at: float,
    *,
    address: Address = PUBLIC,
    rule: str = "corp",
    pattern: HostPattern = PATTERN,
    port: int = 443,
) -> LearnedAddress:
    return LearnedAddress(address, port, pattern.name, rule, pattern, expires_at)


def answer(*addresses: str, ttl_seconds: int = 60) -> DnsAnswer:
    records = tuple(AnswerAddress(ip_address(text), ttl_seconds) for text in addresses)
    return DnsAnswer(PATTERN.name, 1, (), records, ip_address("198.18.255.53"), truncated=False)


def classify(address: Address) -> RangeClass | None:
    if address.is_loopback:
        return RangeClass.NEVER
    return RangeClass.PRIVATE if address == ip_address("10.1.1.1") else None


def rule(kind: RuleKind, *ports: int) -> Rule:
    return Rule("corp", kind, (PATTERN,), ports)


def test_each_address_is_permitted_on_each_port_of_the_rule() -> None:
    entries = permitted(
        answer("198.18.0.1", "198.18.0.2"), [(rule(RuleKind.REGISTRY, 443, 8443), PATTERN)], classify, 0
    )
    assert {(str(e.address), e.port) for e in entries} == {
        ("198.18.0.1", 443),
        ("198.18.0.1", 8443),
        ("198.18.0.2", 443),
        ("198.18.0.2", 8443),
    }


def test_loopback_is_permitted_to_nobody() -> None:
    assert not list(permitted(answer("127.0.0.1"), [(rule(RuleKind.REGISTRY, 443), PATTERN)], classify, 0))


def test_a_private_address_is_permitted_to_the_operators_registry_and_refused_to_a_preset() -> None:
    assert list(permitted(answer("10.1.1.1"), [(rule(RuleKind.REGISTRY, 443), PATTERN)], classify, 0))
    assert not list(permitted(answer("10.1.1.1"), [(rule(RuleKind.PRESET, 443), PATTERN)], classify, 0))


@given(st.integers(0, 2**31 - 1))
def test_a_lifetime_stays_between_floor_and_ceiling(ttl_seconds: int) -> None:
    lifetime = lifetime_seconds(ttl_seconds)
    assert LIFETIME_FLOOR_SECONDS <= lifetime <= LIFETIME_CEILING_SECONDS
    assert lifetime == ttl_seconds or ttl_seconds < LIFETIME_FLOOR_SECONDS or ttl_seconds > LIFETIME_CEILING_SECONDS


def test_a_repeated_answer_changes_nothing_and_a_later_one_refreshes() -> None:
    learned = LearnedAddresses()
    assert learned.learn([entry(300)]).permit
    assert not learned.learn([entry(310)])
    assert learned.learn([entry(500)]).permit == (entry(500),)


def test_an_expired_address_is_forgotten_and_an_extended_one_is_not() -> None:
    learned = LearnedAddresses()
    learned.learn([entry(300)])
    learned.learn([entry(600)])
    assert learned.expire(400) == ()
    assert (PUBLIC, 443) in learned
    assert learned.expire(600) == ((PUBLIC, 443),)
    assert (PUBLIC, 443) not in learned


def test_a_shared_address_outlives_the_rule_that_is_revoked_but_not_its_lifetime() -> None:
    learned = LearnedAddresses()
    learned.learn([entry(900, rule="corp"), entry(300, rule="other", pattern=OTHER_PATTERN)])
    learned, changes = learned.narrowed(lambda e: e.rule != "corp")
    assert not changes.withdraw
    assert [(e.rule, e.expires_at) for e in changes.permit] == [("other", 300)]
    assert learned.expire(300) == ((PUBLIC, 443),)


def test_the_last_holders_revocation_withdraws_the_address() -> None:
    learned = LearnedAddresses()
    learned.learn([entry(300)])
    narrowed, changes = learned.narrowed(lambda _: False)
    assert changes.withdraw == ((PUBLIC, 443),)
    assert (len(narrowed), len(learned)) == (0, 1)
    assert narrowed.expire(1_000) == ()


# --- room ------------------------------------------------------------------------------------------------------------
FLOODED = HostPattern("allowed.example", wildcard=True)
NOW = 1_000_000.0


def numbered(number: int) -> Address:
    return ip_address(0xC6120000 + number)


def flood(number: int) -> LearnedAddress:
    """One of as many addresses as the owner of a name below a wildcard likes, for as long as he likes."""
    return entry(NOW + 86_400, address=numbered(number), rule="wide", pattern=FLOODED)


def test_a_flood_below_one_wildcard_takes_nothing_from_another_rule_or_pattern() -> None:
    learned = LearnedAddresses(capacity=100, per_holder=50)
    own = [entry(NOW + 300), entry(NOW + 300, rule="wide", pattern=OTHER_PATTERN), entry(NOW + 300, port=5000)]
    learned.learn(own, NOW)
    for number in range(1_000):
        learned.learn([flood(number)], NOW)
    assert all(entry in list(learned) for entry in own)
    assert len(list(learned)) == 53
    assert learned.evicted == 950


def test_two_floods_leave_the_small_holders_alone_in_a_full_memory() -> None:
    learned = LearnedAddresses(capacity=100, per_holder=80)
    learned.learn([entry(NOW + 300)], NOW)
    for number in range(1_000):
        learned.learn([flood(number), entry(NOW + 900, address=numbered(5_000 + number), rule="other")], NOW)
        assert len(list(learned)) <= 100
    assert entry(NOW + 300) in list(learned)


def test_what_makes_room_is_forgotten_and_not_withdrawn_so_that_its_connections_go_on() -> None:
    learned = LearnedAddresses(per_holder=2)
    learned.learn([flood(1), flood(2)], NOW)
    changes = learned.learn([flood(3)], NOW)
    assert changes.forget == ((numbered(1), 443),)
    assert changes.withdraw == ()


def test_what_was_answered_last_stays_longest_whatever_its_ttl_says() -> None:
    learned = LearnedAddresses(per_holder=2)
    short = entry(NOW + 300, address=numbered(1), rule="wide", pattern=FLOODED)
    learned.learn([short, flood(2)], NOW)
    learned.learn([short], NOW)
    assert learned.learn([flood(3)], NOW).forget == ((numbered(2), 443),)


def test_what_is_in_use_stays_and_what_was_used_long_ago_does_not() -> None:
    used = {(numbered(1), 443): NOW - 1, (numbered(2), 443): NOW - IN_USE_SECONDS}
    learned = LearnedAddresses(per_holder=3, last_used=lambda destination: used.get(destination, -math.inf))
    learned.learn([flood(1), flood(2), flood(3)], NOW)
    assert learned.learn([flood(4)], NOW).forget == ((numbered(2), 443),)
    for number in range(5, 200):
        learned.learn([flood(number)], NOW)
    assert (numbered(1), 443) in learned


def test_where_everything_is_in_use_the_one_that_waits_longest_goes() -> None:
    used = {(numbered(number), 443): NOW - 50 + number for number in range(50)}
    learned = LearnedAddresses(per_holder=40, last_used=lambda destination: used.get(destination, -math.inf))
    learned.learn(map(flood, range(40)), NOW)
    for number in range(40, 50):
        learned.learn([flood(number)], NOW)
    assert len(learned) == 40
    assert {(numbered(number), 443) for number in range(30, 50)} <= {each.destination for each in learned}


def test_a_shared_address_that_makes_room_under_one_rule_lives_on_under_the_other_as_long_as_that_says() -> None:
    learned = LearnedAddresses(per_holder=2)
    learned.learn([flood(1), entry(NOW + 300, address=numbered(1)), flood(2)], NOW)
    changes = learned.learn([flood(3)], NOW)
    assert changes.forget == ()
    assert {(each.rule, each.expires_at) for each in changes.permit} == {("wide", NOW + 86_400), ("corp", NOW + 300)}


def test_smaller_memory_keeps_what_was_used_last_and_revokes_nothing() -> None:
    used = {(ip_address("198.18.2.0"), 443): 100.0}
    learned = LearnedAddresses(last_used=lambda destination: used.get(destination, -math.inf))
    held = [entry(600, address=ip_address(f"198.18.2.{number}")) for number in range(8)]
    learned.learn(held, 100)
    smaller, changes = learned.narrowed(lambda _: True, 4, 100)
    assert (len(smaller), smaller.permissions, smaller.evicted) == (4, 4, 4)
    assert held[0].destination in smaller
    assert set(changes.forget) == {each.destination for each in held[1:5]}
    assert changes.withdraw == ()
    assert len(learned) == 8  # for when the kernel refuses
    larger, changes = smaller.narrowed(lambda _: True, 100, 100)
    assert (len(larger), larger.capacity, bool(changes)) == (4, 100, False)


def test_what_made_room_leaves_nothing_behind() -> None:
    learned = LearnedAddresses(per_holder=10)
    for number in range(10_000):
        learned.learn([flood(number)], NOW)
    assert len(learned._deadlines) < 200
    assert len(learned.expire(NOW + 86_400)) == 10
    assert (len(learned), learned._deadlines, learned._waiting, learned._permissions) == (0, [], {}, 0)


def test_changes_one_after_the_other_come_to_what_the_last_word_is() -> None:
    first, second = (numbered(1), 443), (numbered(2), 443)
    assert combined([]) == Changes()
    assert combined([Changes(permit=(flood(1),)), Changes(forget=(first,))]) == Changes(forget=(first,))
    assert combined([Changes(forget=(first,)), Changes(permit=(flood(1),))]) == Changes(permit=(flood(1),))
    assert combined([Changes(withdraw=(first,)), Changes(forget=(first, second))]) == Changes((), (first,), (second,))
    assert combined([Changes(forget=(first,)), Changes(withdraw=(first,))]) == Changes((), (first,))


operations = st.lists(
    st.one_of(
        st.tuples(st.just("learn"), st.integers(0, 3), st.integers(0, 2), st.integers(1, 2_000)),
        st.tuples(st.just("expire"), st.integers(0, 2_000), st.just(0), st.just(0)),
        st.tuples(st.just("revoke"), st.integers(0, 2), st.integers(1, 4), st.just(0)),
    ),
    max_size=60,
)


@given(operations, st.integers(1, 5), st.dictionaries(st.integers(0, 3), st.floats(-100, 2_000)))
def test_what_the_kernel_was_told_never_outlives_what_is_held(
    steps: list[tuple[str, int, int, int]], per_holder: int, used: dict[int, float]
) -> None:
    """A model of the kernel's set, fed with the changes alone, stays a subset of what the holders justify."""
    last_used = {(ip_address(f"198.18.2.{number}"), 443): at for number, at in used.items()}
    learned = LearnedAddresses(4, per_holder, last_used=lambda destination: last_used.get(destination, -math.inf))
    kernel: dict[Destination, float] = {}
    now = 0.0
    for step, a, b, c in steps:
        if step == "learn":
            address = ip_address(f"198.18.2.{a}")
            changes = learned.learn([entry(now + c, address=address, rule=f"rule{b}")], now)
        elif step == "revoke":
            dropped = f"rule{a}"
            before = {holder: list(waiting) for holder, waiting in learned._waiting.items()}
            learned, changes = learned.narrowed(lambda e, dropped=dropped: e.rule != dropped, b, now)  # type: ignore[misc]
            assert all(holder[0] != dropped for holder in learned._waiting)
            if learned.permissions < b:  # no room had to be made
                kept = {holder: waiting for holder, waiting in before.items() if holder[0] != dropped}
                assert {holder: list(waiting) for holder, waiting in learned._waiting.items()} == kept
        else:
            now = max(now, float(a))
            for destination in learned.expire(now):
                kernel.pop(destination, None)
            continue
        for destination in (*changes.withdraw, *changes.forget):
            assert destination not in learned
            kernel.pop(destination, None)
        for permission in changes.permit:
            kernel[permission.destination] = permission.expires_at
        assert len(list(learned)) == learned._permissions <= 4
        assert max(Counter((each.rule, each.pattern) for each in learned).values(), default=0) <= per_holder
        for destination, expires_at in kernel.items():
            if expires_at > now:
                assert destination in learned
                assert expires_at <= learned.longest(destination).expires_at


def test_what_is_held_for_about_as_long_is_no_news() -> None:
    learned = LearnedAddresses()
    learned.learn([entry(1_000)])
    assert learned.holds(entry(1_000 + REFRESH_MARGIN_SECONDS - 1))
    assert not learned.holds(entry(1_000 + REFRESH_MARGIN_SECONDS))
    for other in entry(1_000, port=5000), entry(1_000, rule="cdn"), entry(1_000, pattern=OTHER_PATTERN):
        assert not learned.holds(other)
    for news in entry(1_000), entry(1_000 + REFRESH_MARGIN_SECONDS - 1), entry(1_000 + REFRESH_MARGIN_SECONDS):
        assert learned.holds(news) == (not learned.learn([news]))
    assert len(list(learned)) == 1
