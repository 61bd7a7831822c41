import tracemalloc
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft.data.steps.microbatch_cuts import cut_by_count
from lightning_sft.data.steps.plan import BatchPlan, MicrobatchShape, StepPlan, StepRule, StepTotals

untimed = settings(deadline=None)  # a busy machine is no failure of the plan


@st.composite
def runs(draw, rule: str | None = None) -> tuple[list[int], dict[str, int]]:
    """Lengths, many of them equal, and the arguments of a plan over them, by the rule named or any."""
    longest = draw(st.integers(1, 30))
    size = draw(st.integers(1, 60))  # drawn apart: left to itself, hypothesis rarely makes a list longer than ten
    lengths = draw(st.lists(st.integers(1, longest), min_size=size, max_size=size))
    arguments = {
        "batch_size": draw(st.integers(1, 40)),
        "world_size": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 2**32)),
    }
    rule = rule or draw(st.sampled_from(["none", "gradient_accumulation_steps", "max_tokens_per_microbatch"]))
    if rule == "gradient_accumulation_steps":
        arguments[rule] = draw(st.integers(1, 9))
    if rule == "max_tokens_per_microbatch":
        arguments[rule] = max(lengths) * draw(st.integers(1, 4)) + draw(st.integers(0, 3))
    return lengths, arguments


def plan_of(lengths: list[int], **arguments) -> BatchPlan:
    """A plan in which a third of each example's tokens, rounded down, are labels that count."""
    return make_plan(lengths, [length // 3 for length in lengths], **arguments)


def make_plan(lengths, num_response_tokens, **arguments) -> BatchPlan:
    rule = {name: arguments.pop(name) for name in [*arguments] if name in StepRule.__dataclass_fields__}
    return BatchPlan(lengths, num_response_tokens, StepRule(**rule), **arguments)


def epoch_of(plan: BatchPlan, epoch: int) -> list[StepPlan]:
    return [plan.step(epoch * plan.steps_per_epoch + index) for index in range(plan.steps_per_epoch)]


def examples_on(microbatches: list[list[int]]) -> list[int]:
    return [example for microbatch in microbatches for example in microbatch]


def examples_in(step: StepPlan) -> list[int]:
    return [example for microbatches in step.ranks for example in examples_on(microbatches)]


def padded_size(lengths: list[int], microbatch: list[int]) -> int:
    return len(microbatch) * max(lengths[example] for example in microbatch)


def all_contiguous_splits(items: list[int], count: int) -> list[list[list[int]]]:
    if count == 1:
        return [[items]]
    return [
        [items[:end], *rest]
        for end in range(1, len(items) - count + 2)
        for rest in all_contiguous_splits(items[end:], count - 1)
    ]


# By hand. Longest first: example 3 (9 tokens), 0 (7), 4 (5), 1 (4), 5 (2), 2 (1).
SIX = [7, 4, 1, 9, 5, 2]


def test_without_a_rule_each_rank_gets_one_microbatch_longest_first():
    step = plan_of(SIX, batch_size=6, shuffle=False).step(0)
    assert step == StepPlan(
        ranks=[[[3, 0, 4, 1, 5, 2]]],
        totals=StepTotals(num_sequences=6, num_tokens=28, num_response_tokens=7, num_attended=102),
    )


def test_two_ranks_get_sequences_as_dealt_by_hand():
    # rank 0: 9, then 4 (9 < 12), then 1 (13 < 14); rank 1: 7, 5, then 2 (12 < 13). Both hold 14 tokens.
    step = plan_of(SIX, batch_size=6, world_size=2, shuffle=False).step(0)
    assert step.ranks == [[[3, 1, 2]], [[0, 4, 5]]]


def test_a_budget_fills_microbatches_one_by_one():
    # 9 + 7 padded is 18, 5 + 4 + 2 padded is 15 and with the next 20; with a budget of 18 the last stays alone.
    step = plan_of(SIX, batch_size=6, max_tokens_per_microbatch=18, shuffle=False).step(0)
    assert step.ranks == [[[3, 0], [4, 1, 5], [2]]]


def test_packed_sequences_cost_their_tokens_alone():
    # 9 + 7 packed is 16 and with 5 it is 21; 5 + 4 + 2 + 1 is 12. In halves: 9 + 7 and the other 12 tokens.
    budget = plan_of(SIX, batch_size=6, max_tokens_per_microbatch=18, shuffle=False).step(0, "packed")
    count = plan_of(SIX, batch_size=6, gradient_accumulation_steps=3, shuffle=False).step(0, "packed")
    assert budget.ranks == [[[3, 0], [4, 1, 5, 2]]]
    assert count.ranks == [[[3], [0, 4], [1, 5, 2]]]


def test_a_count_makes_the_costliest_microbatch_as_cheap_as_it_can_be():
    # 9 + 7 padded is 18, the other four padded are 20; 9 + 7 + 5 would be 27, and 7 + 5 + 4 + 2 + 1 would be 35.
    step = plan_of(SIX, batch_size=6, gradient_accumulation_steps=2, shuffle=False).step(0)
    assert step.ranks == [[[3, 0], [4, 1, 5, 2]]]


def test_a_count_beyond_the_fewest_that_are_needed_halves_the_costliest_microbatch():
    # Five microbatches cannot all stay below 4 of 16 equal sequences; four of 4 suffice, and one of those is halved.
    step = plan_of([1] * 16, batch_size=16, gradient_accumulation_steps=5, shuffle=False).step(0)
    assert [len(microbatch) for microbatch in step.ranks[0]] == [2, 2, 4, 4, 4]


def test_a_rank_that_needs_fewer_microbatches_is_split_into_as_many_as_the_others():
    # rank 0: [8]; rank 1: [3, 3, 2], which 8 tokens hold as [3, 3] and [2], so rank 0 needs an empty one.
    step = plan_of([8, 3, 3, 2], batch_size=4, world_size=2, max_tokens_per_microbatch=8, shuffle=False).step(0)
    assert step.ranks == [[[0], []], [[1, 2], [3]]]
    # rank 0: 8, 1, 1 padded is 24; rank 1: 6, 4 padded is 12 and fits, but is split to match.
    step = plan_of([8, 6, 4, 1, 1], batch_size=5, world_size=2, max_tokens_per_microbatch=16, shuffle=False).step(0)
    assert step.ranks == [[[0, 3], [4]], [[1], [2]]]


def test_fewer_sequences_than_ranks_leave_the_last_ranks_with_empty_microbatches():
    step = plan_of([5, 6], batch_size=4, world_size=4, gradient_accumulation_steps=3, shuffle=False).step(0)
    assert step.ranks == [[[1]], [[0]], [[]], [[]]]


def test_without_shuffling_every_epoch_follows_the_data():
    plan = plan_of([3] * 7, batch_size=3, shuffle=False)
    for epoch in (0, 1, 5):
        assert [examples_in(step) for step in epoch_of(plan, epoch)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_last_smaller_step_is_kept():
    plan = plan_of([3] * 7, batch_size=3)
    assert plan.steps_per_epoch == 3
    assert [plan.step(index).totals.num_sequences for index in range(6)] == [3, 3, 1, 3, 3, 1]


@untimed
@given(runs(), st.integers(0, 3), st.booleans())
def test_every_example_comes_exactly_once_per_epoch(run, epoch, shuffle):
    lengths, arguments = run
    steps = epoch_of(plan_of(lengths, shuffle=shuffle, **arguments), epoch)
    assert len(steps) == -(-len(lengths) // arguments["batch_size"])
    assert sorted(example for step in steps for example in examples_in(step)) == list(range(len(lengths)))
    assert all(len(examples_in(step)) == arguments["batch_size"] for step in steps[:-1])


@untimed
@given(runs())
def test_totals_equal_an_independent_recount(run):
    lengths, arguments = run
    for step in epoch_of(plan_of(lengths, **arguments), 0):
        assert step.totals.num_sequences == len(examples_in(step))
        assert step.totals.num_tokens == sum(lengths[example] for example in examples_in(step))
        assert step.totals.num_response_tokens == sum(lengths[example] // 3 for example in examples_in(step))


@untimed
@given(runs())
def test_every_rank_has_as_many_microbatches_and_empty_ones_only_at_its_end_and_only_if_it_must(run):
    lengths, arguments = run
    for step in epoch_of(plan_of(lengths, **arguments), 0):
        assert len(step.ranks) == arguments["world_size"]
        assert len({len(microbatches) for microbatches in step.ranks}) == 1
        for microbatches in step.ranks:
            filled = [bool(microbatch) for microbatch in microbatches]
            assert filled == sorted(filled, reverse=True)
            assert sum(filled) == min(len(filled), len(examples_on(microbatches)))


@untimed
@given(runs())
def test_sequences_stand_longest_first_on_each_rank(run):
    lengths, arguments = run
    for step in epoch_of(plan_of(lengths, **arguments), 0):
        for microbatches in step.ranks:
            on_rank = [lengths[example] for example in examples_on(microbatches)]
            assert on_rank == sorted(on_rank, reverse=True)


@untimed
@given(runs())
def test_ranks_are_balanced_no_rank_without_its_shortest_example_has_more_tokens_than_another(run):
    lengths, arguments = run
    for step in epoch_of(plan_of(lengths, **arguments), 0):
        ranks = [[lengths[example] for example in examples_on(microbatches)] for microbatches in step.ranks]
        fewest = min(sum(on_rank) for on_rank in ranks)
        assert all(sum(on_rank) - min(on_rank) <= fewest for on_rank in ranks if on_rank)
        assert sum(bool(on_rank) for on_rank in ranks) == min(len(ranks), step.totals.num_sequences)


@untimed
@given(runs(rule="max_tokens_per_microbatch"))
def test_no_microbatch_exceeds_the_budget_and_none_is_needless(run):
    lengths, arguments = run
    budget = arguments["max_tokens_per_microbatch"]
    for step in epoch_of(plan_of(lengths, **arguments), 0):
        needed = []
        for microbatches in step.ranks:
            assert all(padded_size(lengths, microbatch) <= budget for microbatch in microbatches if microbatch)
            num_needed, first = 0, 0  # fill one microbatch after another, naively
            on_rank = examples_on(microbatches)
            for end in range(1, len(on_rank) + 1):
                if end == len(on_rank) or padded_size(lengths, on_rank[first : end + 1]) > budget:
                    num_needed, first = num_needed + 1, end
            needed.append(num_needed)
        assert len(step.ranks[0]) == max(needed)


@untimed
@given(runs(rule="gradient_accumulation_steps"))
def test_a_count_of_microbatches_is_met_exactly_where_there_are_enough_sequences(run):
    lengths, arguments = run
    for step in epoch_of(plan_of(lengths, **arguments), 0):
        for microbatches in step.ranks:
            num_filled = sum(bool(microbatch) for microbatch in microbatches)
            assert num_filled == min(arguments["gradient_accumulation_steps"], len(examples_on(microbatches)))


@untimed
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 9), st.sampled_from(["packed", "padded"]))
def test_no_other_cut_into_as_many_microbatches_has_a_cheaper_costliest_one(lengths, count, layout):
    def cost(part):
        return sum(part) if layout == "packed" else len(part) * part[0]

    lengths = sorted(lengths, reverse=True)
    count = min(count, len(lengths))
    cuts = cut_by_count(lengths, count, layout)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, len(lengths), count + 1)
    costs = [max(map(cost, parts)) for parts in all_contiguous_splits(lengths, count)]
    assert max(cost(lengths[start:end]) for start, end in pairwise(cuts)) == min(costs)


@untimed
@given(runs(), st.integers(0, 20))
def test_the_examples_of_a_step_depend_on_neither_the_ranks_nor_the_rule(run, index):
    lengths, arguments = run
    split = plan_of(lengths, **arguments).step(index)
    whole = plan_of(lengths, batch_size=arguments["batch_size"], seed=arguments["seed"]).step(index)
    assert sorted(examples_in(split)) == sorted(examples_in(whole))


@untimed
@given(runs())
def test_a_step_depends_on_the_seed_and_its_index_alone_not_on_the_steps_before(run):
    lengths, arguments = run
    plan = plan_of(lengths, **arguments)
    steps = [plan.step(index) for index in range(3 * plan.steps_per_epoch)]
    assert [plan.step(index) for index in reversed(range(len(steps)))] == steps[::-1]
    assert plan_of(lengths, **arguments).step(len(steps) - 1) == steps[-1]


@untimed
@given(runs(), st.integers(1, 10), st.integers(0, 2))
def test_a_limit_takes_the_first_steps_of_each_epochs_order(run, limit, epoch):
    lengths, arguments = run
    whole = plan_of(lengths, **arguments)
    limited = plan_of(lengths, limit_steps_per_epoch=limit, **arguments)
    assert limited.steps_per_epoch == min(limit, whole.steps_per_epoch)
    assert epoch_of(limited, epoch) == epoch_of(whole, epoch)[:limit]


def test_epochs_and_seeds_differ_in_their_order():
    plans = [plan_of([3] * 50, batch_size=1, seed=seed) for seed in (0, 1)]
    orders = [[examples_in(step) for step in epoch_of(plan, epoch)] for plan in plans for epoch in (0, 1, 2)]
    orders.append([[example] for example in range(50)])
    assert all(one != other for one, other in combinations(orders, 2))


def test_the_plan_neither_writes_into_its_arrays_nor_follows_later_changes_of_them():
    lengths, num_response_tokens = np.array([5, 3, 8], dtype=np.int64), np.array([1, 2, 3], dtype=np.int64)
    plan = make_plan(lengths, num_response_tokens, batch_size=3)
    before = plan.step(0)
    assert (lengths.tolist(), num_response_tokens.tolist()) == ([5, 3, 8], [1, 2, 3])
    lengths[:], num_response_tokens[:] = 1, 1
    assert plan.step(0) == before


def test_a_plan_takes_few_bytes_of_each_example_and_only_one_epochs_order():
    num_examples = 200_000
    lengths = np.full(num_examples, 7, dtype=np.int32)
    tracemalloc.start()
    try:
        plan = make_plan(lengths, lengths, batch_size=10)
        for epoch in range(3):
            plan.step(epoch * plan.steps_per_epoch)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 12 <= peak / num_examples < 13  # two lengths and a position, four bytes each


def test_attention_over_long_sequences_is_counted_without_overflow():
    assert make_plan([100_000] * 3, [1] * 3, batch_size=3).step(0).totals.num_attended == 3 * 100_000 * 100_001 // 2


def test_a_plan_holds_plain_integers_so_that_it_can_be_saved_as_json():
    step = make_plan(np.array([5, 3]), np.array([1, 2]), batch_size=2).step(0)
    numbers = [*examples_in(step), step.totals.num_sequences, step.totals.num_tokens, step.totals.num_response_tokens]
    assert {type(number) for number in numbers} == {int}


def test_an_example_longer_than_the_budget_is_refused_at_once():
    with pytest.raises(
        ValueError,
        match=r"`max_tokens_per_microbatch` is 8, but example 2 has 9 tokens\. "
        r"Raise `max_tokens_per_microbatch` to at least that, or lower `max_length`",
    ):
        plan_of([3, 8, 9], batch_size=2, max_tokens_per_microbatch=8)
    plan_of([3, 8, 9], batch_size=2, max_tokens_per_microbatch=9)


@pytest.mark.parametrize("name", ["batch_size", "gradient_accumulation_steps", "max_tokens_per_microbatch"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` is 0, expected at least 1"):
        plan_of([3, 4], **{"batch_size": 2, name: 0})


def test_negative_seeds_are_refused():
    with pytest.raises(ValueError, match="`seed` is -1, expected at least 0"):
        plan_of([3, 4], batch_size=2, seed=-1)


def test_two_rules_at_once_are_refused():
    with pytest.raises(ValueError, match=r"`gradient_accumulation_steps` is 2 and .* is 64.* Give one of them"):
        plan_of([3, 4], batch_size=2, gradient_accumulation_steps=2, max_tokens_per_microbatch=64)


def test_the_largest_microbatch_is_found_over_ranks_and_steps():
    plan = BatchPlan([5, 9, 3, 3, 7, 1], [1, 2, 3, 4, 5, 6], StepRule(3, max_tokens_per_microbatch=12), shuffle=False)
    assert plan.largest_microbatch(2, "packed") == MicrobatchShape([7, 3, 1], [5, 4, 6], 1)
    assert plan.largest_microbatch(2, "padded") == MicrobatchShape([5, 3], [1, 3], 2)
