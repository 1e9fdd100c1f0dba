"""The long memory: lifetimes, holders, bounds."""

from __future__ import annotations

from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from enforcer.dns_answer import AnswerAddress, DnsAnswer
from enforcer.kernel_abi import LIFETIME_CEILING_SECONDS, LIFETIME_FLOOR_SECONDS, REFRESH_MARGIN_SECONDS, RangeClass
from enforcer.learned import Destination, LearnedAddress, LearnedAddresses, lifetime_seconds, permitted
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


def test_a_full_memory_evicts_what_ends_first() -> None:
    learned = LearnedAddresses(capacity=2)
    first, second, third = (ip_address(f"198.18.1.{n}") for n in (1, 2, 3))
    learned.learn([entry(300, address=first), entry(400, address=second)])
    changes = learned.learn([entry(500, address=third)])
    assert changes.withdraw == ((first, 443),)
    assert learned.evicted == 1
    assert {e.address for e in learned} == {second, third}


operations = st.lists(
    st.one_of(
        st.tuples(st.just("learn"), st.integers(0, 3), st.integers(0, 2), st.integers(1, 2_000)),
        st.tuples(st.just("expire"), st.integers(0, 2_000), st.just(0), st.just(0)),
        st.tuples(st.just("revoke"), st.integers(0, 2), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(operations)
def test_what_the_kernel_was_told_never_outlives_what_is_held(steps: list[tuple[str, int, int, int]]) -> None:
    """A model of the kernel's set, fed with the changes alone, stays a subset of what the holders justify."""
    learned = LearnedAddresses(capacity=4)
    kernel: dict[Destination, float] = {}
    now = 0.0
    for step, a, b, c in steps:
        if step == "learn":
            address = ip_address(f"198.18.2.{a}")
            changes = learned.learn([entry(now + c, address=address, rule=f"rule{b}")])
        elif step == "revoke":
            dropped = f"rule{a}"
            learned, changes = learned.narrowed(lambda e, dropped=dropped: e.rule != dropped)  # type: ignore[misc]
        else:
            now = max(now, float(a))
            for destination in learned.expire(now):
                kernel.pop(destination, None)
            continue
        for destination in changes.withdraw:
            kernel.pop(destination, None)
        for permission in changes.permit:
            kernel[permission.destination] = permission.expires_at
        assert len(list(learned)) <= 4
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
