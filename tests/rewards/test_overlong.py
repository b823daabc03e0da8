"""DAPO's soft punishment of long completions."""

import pytest

from jaxrl_reason.rewards import make_overlong_reward


@pytest.mark.parametrize(
    ("tokens", "reward"),
    [(0, 0), (1, 0), (15, 0), (16, 0), (17, -0.25), (18, -0.5), (19, -0.75), (20, -1)],
)
def test_the_reward_falls_over_the_last_tokens(tokens, reward):
    overlong = make_overlong_reward(4, 20)
    assert overlong(["p"], ["c"], completion_ids=[[7] * tokens], verdict=[None]) == [reward]


def test_equation_13_of_the_paper():
    """Its own numbers: 16384 tokens are expected, and the punishment grows over 4096 more."""
    overlong = make_overlong_reward(4096, 20480)

    def paper(length, longest=20480, cache=4096):
        if length <= longest - cache:
            return 0
        if length <= longest:
            return ((longest - cache) - length) / cache
        return -1

    lengths = [1, 16383, 16384, 16385, 18000, 20479, 20480]
    ids = [range(length) for length in lengths]
    given = overlong(["p"] * 7, ["c"] * 7, completion_ids=ids)
    assert given == pytest.approx([paper(length) for length in lengths])
