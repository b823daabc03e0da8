import pytest

from jaxrl_reason.report.examples import choose, shared_problems, transitions
from jaxrl_reason.report.run_folder import read_run


def shared_of(run):
    stages = read_run(run.folder).stages
    return shared_problems(stages), stages


def counts(run):
    """(from, to) -> became right, became wrong, right twice, wrong twice."""
    shared, stages = shared_of(run)
    found = transitions(shared, stages)
    return {(moved.before, moved.after): tuple(moved.counts.values()) for moved in found}


# Transitions


def test_transitions_are_counted_from_parent_to_stage_and_from_first_to_last(chain):
    assert counts(chain) == {
        # init   - - - - - - - -  + + + + + + + +
        # first  - - - - + + + +  + + + + - - - -
        # second - - + + - + + +  + + - - + - - -
        ("init", "first"): (4, 4, 4, 4),
        ("first", "second"): (3, 3, 5, 5),
        ("init", "second"): (5, 5, 3, 3),
    }


def test_the_change_is_that_of_the_accuracy(make_run):
    run = make_run(a={"parent": "init"})
    run.outcomes("init", "+-----")
    run.outcomes("a", "-++++-")
    (moved,) = transitions(*shared_of(run))
    assert tuple(moved.counts.values()) == (4, 1, 0, 1)
    assert moved.problems == 6
    assert moved.change == pytest.approx(3 / 6)


def test_arms_of_a_tree_are_compared_with_their_parent(make_run):
    run = make_run(
        a={"parent": "init"}, b={"parent": "a"}, other={"parent": "init"}, c={"parent": "b"}
    )
    run.outcomes("init", "----")
    run.outcomes("a", "++--")
    run.outcomes("other", "--++")
    run.outcomes("c", "+++-")
    assert counts(run) == {
        ("init", "a"): (2, 0, 0, 2),
        ("init", "other"): (2, 0, 0, 2),
        ("a", "c"): (1, 0, 2, 1),  # b was not evaluated: its parent stands in
        ("init", "c"): (3, 0, 0, 1),
    }


def test_what_changed_is_seen_since_the_oldest_ancestor_with_something_to_lose(make_run):
    run = make_run(
        a={"parent": "init"}, other={"parent": "a"}, b={"parent": "a"}, c={"parent": "b"}
    )
    run.outcomes("init", "-" * 20)
    run.outcomes("a", "-" * 20)
    run.outcomes("other", "+" * 20)  # no ancestor of c
    run.outcomes("b", "+" + "-" * 19)
    run.outcomes("c", "-+" + "-" * 18)
    shared, _ = shared_of(run)
    assert shared.before == "b"
    assert choose(shared, 3) == {
        "became right": [1],
        "became wrong": [0],
        "wrong before and after": [2],
    }
    assert ("b", "c") in counts(run)


def test_a_shorter_evaluation_shortens_the_comparison_and_another_one_is_left_out(
    make_run, sample_row
):
    run = make_run(a={"parent": "init"}, b={"parent": "a"}, c={"parent": "b"})
    run.outcomes("init", "+-+-+-")
    run.outcomes("a", "++++")
    run.add("b", [sample_row(i, True, prompt=f"other {i}") for i in range(6)])
    shared, _ = shared_of(run)
    assert [stage.name for stage in shared.stages] == ["init", "a"]
    assert [stage.name for stage in shared.others] == ["b"]
    assert shared.problems == 4
    assert counts(run) == {("init", "a"): (2, 0, 2, 0)}
    assert choose(shared, 99) == {"became right": [1, 3], "right before and after": [0, 2]}


# The choice


def test_kinds_take_turns_and_all_that_exist_are_there(chain):
    shared, _ = shared_of(chain)
    assert {kind: len(found) for kind, found in choose(shared, 4).items()} == {
        "became right": 1,
        "became wrong": 1,
        "right before and after": 1,
        "wrong before and after": 1,
    }
    # 5, 5, 3 and 3 there are: the kinds with few are used up, the others go on.
    assert [len(found) for found in choose(shared, 15).values()] == [5, 4, 3, 3]
    assert sorted(i for found in choose(shared, 99).values() for i in found) == list(range(16))
    assert choose(shared, 0) == {}


def test_histories_take_turns_the_most_frequent_first(chain):
    shared, _ = shared_of(chain)
    # Became right: three problems (5, 6, 7) in the first stage, two (2, 3) in the second.
    assert [choose(shared, 4 * n)["became right"] for n in (1, 2, 3)] == [[5], [2, 5], [2, 5, 6]]


def test_the_choice_is_the_same_every_time(chain):
    assert choose(shared_of(chain)[0], 7) == choose(shared_of(chain)[0], 7)


def test_of_a_single_stage_there_are_right_and_wrong_ones(make_run):
    run = make_run(a={"parent": "init"})
    run.outcomes("init", "--+-")
    shared, stages = shared_of(run)
    assert choose(shared, 3) == {"right": [2], "wrong": [0, 1]}
    assert transitions(shared, stages) == []


def test_without_samples_nothing_is_shared(make_run):
    shared, stages = shared_of(make_run(a={"parent": "init"}))
    assert (shared.stages, shared.problems) == ([], 0)
    assert transitions(shared, stages) == []
