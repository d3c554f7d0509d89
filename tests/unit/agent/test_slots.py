"""SlotTable: stability, reuse, recovery."""

from hypothesis import given, settings
from hypothesis import strategies as st

from router.agent.slots import SlotTable


def free(_: int) -> bool:
    return False


def test_slots_are_stable_and_a_returning_target_gets_its_own() -> None:
    table = SlotTable(8, quarantine_s=60.0)
    assert table.update(["a", "b", "c"], 0.0, free) == []
    before = dict(table.assigned)
    table.update(["c", "a"], 1.0, free)
    table.update(["d", "c", "a"], 2.0, free)
    assert table.assigned["d"] not in before.values()
    table.update(["d", "c", "a", "b"], 3.0, free)
    assert {name: table.assigned[name] for name in before} == before


def test_a_slot_is_reused_only_after_quarantine_and_when_nothing_is_in_flight() -> None:
    table = SlotTable(2, quarantine_s=60.0)
    table.update(["a", "b"], 0.0, free)
    slot = table.assigned["a"]
    assert table.update(["b", "c"], 10.0, free) == ["c"]
    assert table.update(["b", "c"], 69.0, free) == ["c"]
    assert table.update(["b", "c"], 71.0, lambda s: s == slot) == ["c"]
    assert table.update(["b", "c"], 72.0, free) == []
    assert table.assigned["c"] == slot
    assert table.update(["a", "b"], 73.0, free) == ["a"], "its former slot belongs to another target now"


def test_a_busy_slot_does_not_block_a_free_one_behind_it() -> None:
    table = SlotTable(3, quarantine_s=1.0)
    table.update(["a", "b", "c"], 0.0, free)
    busy = table.assigned["a"]
    table.update(["c"], 1.0, free)
    assert table.update(["c", "d"], 5.0, lambda s: s == busy) == []
    assert table.assigned["d"] != busy


def test_an_earlier_life_is_taken_over() -> None:
    first = SlotTable(4, quarantine_s=60.0)
    first.update(["a", "b", "c"], 0.0, free)
    first.update(["a", "c"], 1.0, free)
    second = SlotTable(4, quarantine_s=60.0, assigned=dict(first.assigned), high_water=first.high_water, now_s=5.0)
    assert second.assigned == first.assigned
    assert second.update(["a", "c", "d", "e"], 6.0, free) == ["e"]
    assert second.assigned["d"] == 3, "a slot never used goes first"
    assert second.update(["a", "c", "d", "e"], 66.0, free) == []


def test_a_ledger_that_says_too_much_or_too_little_is_no_catastrophe() -> None:
    assert SlotTable(4, quarantine_s=1.0, assigned={"a": 3}, high_water=0).high_water == 4
    assert SlotTable(4, quarantine_s=1.0, assigned={"a": 99}, high_water=77).assigned == {}


@settings(deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sets(st.integers(0, 12)), st.floats(0, 40), st.sets(st.integers(0, 7)), st.booleans()), max_size=40
    )
)
def test_no_two_targets_share_a_slot_and_nothing_busy_or_resting_is_given_away(
    steps: list[tuple[set[int], float, set[int], bool]],
) -> None:
    table, now_s = SlotTable(8, quarantine_s=30.0), 0.0
    last_owner: dict[int, tuple[str, float]] = {}
    for wanted, passed_s, busy, restart in steps:
        now_s += passed_s
        if restart:
            table = SlotTable(
                8, quarantine_s=30.0, assigned=dict(table.assigned), high_water=table.high_water, now_s=now_s
            )
        before = dict(table.assigned)
        names = [str(number) for number in sorted(wanted)]
        missing = table.update(names, now_s, busy.__contains__)
        assert set(table.assigned) | set(missing) == set(names)
        assert not set(table.assigned) & set(missing)
        assert len(set(table.assigned.values())) == len(table.assigned)
        assert all(0 <= slot < 8 for slot in table.assigned.values())
        for name, slot in table.assigned.items():
            if name in before:
                assert before[name] == slot
            elif slot in last_owner and last_owner[slot][0] != name:
                assert now_s - last_owner[slot][1] >= 30.0
                assert slot not in busy
        for name, slot in before.items():
            if name not in table.assigned:
                last_owner[slot] = (name, now_s)
        for name, slot in table.assigned.items():
            last_owner[slot] = (name, now_s)
