"""Soft punishment of completions that come near the longest length (DAPO, arXiv 2503.14476)."""

from jaxrl_reason.rewards.scoring import RewardFunction


def make_overlong_reward(cache: int, max_completion_length: int) -> RewardFunction:
    """DAPO's equation 13: 0 for a short completion, falling to -1 at the longest length.

    With n tokens, the stop token included, and L = `max_completion_length`:

        0                          n <= L - cache
        (L - cache - n) / cache    L - cache < n <= L

    so a completion that was cut has -1, as has one that just ended in time.
    """

    def overlong(prompts, completions, *, completion_ids, **_) -> list[float]:
        free = max_completion_length - cache
        return [min(0.0, (free - len(ids)) / cache) for ids in completion_ids]

    return overlong
