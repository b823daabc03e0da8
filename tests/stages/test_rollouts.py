"""Batches of completions: the groups they hold, whose they are, and that no timing changes them."""

import itertools
import json
import random
import sys

import jax
import numpy as np
import pytest

from jaxrl_reason import sampling
from jaxrl_reason.rewards.workers import Workers
from jaxrl_reason.sampling import Completion, Request
from jaxrl_reason.stages.breakdown import Times
from jaxrl_reason.stages.judge import Judge
from jaxrl_reason.stages.packed import pack, unpack
from jaxrl_reason.stages.pipeline import plan
from jaxrl_reason.stages.rollouts import Rollouts, open_rollouts
from jaxrl_reason.stages.training import Start
from jaxrl_reason.steps import TrainState

PER_STEP, GROUP, LONGEST = 4, 3, 12
REWARDS = '''
"""Rewards of completions that `Engine` below made up."""

import asyncio

sessions = 0


def second(prompts, completions, *, completion_ids, **_):
    return [ids[1] for ids in completion_ids]


def third(prompts, completions, *, completion_ids, **_):
    return [ids[2] for ids in completion_ids]


async def slow(prompts, completions, *, completion_ids, **_):
    """Is known when the next batch is being sampled, and fails if it never is."""
    for _ in range(2000):
        if sessions > completion_ids[0][1] - 4:  # the token says which batch it is
            return [0.0] * len(completions)
        await asyncio.sleep(0.001)
    raise TimeoutError
'''


class Engine:
    """Makes completions up: a function of (key, id, index), which end in any order.

    The tokens are the number of the session's key and those that `tokens` gives for (id, index).
    """

    def __init__(self, tokens, *, seed=0, begun=lambda: None):
        self.tokens, self.random, self.begun = tokens, random.Random(seed), begun
        self.sessions = []

    def session(self, params, key, *, version):
        self.begun()
        self.sessions.append(Session(self, params, key, version))
        return self.sessions[-1]


class Session:
    def __init__(self, engine, params, key, version):
        self.engine, self.params, self.key, self.version = engine, params, key, version
        self.waiting, self.requests, self.events, self.tokens = [], [], [], 0

    @property
    def stats(self):
        return {"tokens": self.tokens, "wasted_tokens": 5, "row_steps": 20}

    def submit(self, requests):
        self.waiting += requests
        self.requests += requests
        if requests:
            self.events.append(("submit", requests[0].id, len(requests)))

    def __iter__(self):
        while self.waiting:
            chosen = self.engine.random.randrange(len(self.waiting))
            yield self.completed(self.waiting.pop(chosen))

    def completed(self, request):
        number = int(jax.random.key_data(self.key)[-1]) % 4
        tokens = [4 + number, *self.engine.tokens(number, request.id, request.index)]
        count = len(tokens)
        self.tokens += count
        self.events.append(("end", request.id, request.index))
        return Completion(
            request=request,
            tokens=np.asarray(tokens, np.int32),
            logprobs=np.full(count, -1.0 - request.index, np.float32),
            kept_logmass=np.full(count, -0.5, np.float32),
            sampled=np.ones(count, bool),
            versions=np.full(count, self.version, np.int32),
            finish_reason="stop" if count < LONGEST else "length",
        )


@pytest.fixture
def rollouts(make_context, tiny, tmp_path, monkeypatch):
    """Make the rollouts of a stage of 7 steps with such an engine."""
    (tmp_path / "rewards_of_rollouts.py").write_text(REWARDS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    opened = []

    def make(engine, *, count=0, saved=None, rewards=("second", "third"), **changes):
        listed = [
            {
                "kind": "python",
                "name": name,
                "function": f"rewards_of_rollouts:{name}",
                "scope": "completion",
            }
            for name in rewards
        ]
        raw = tiny["stages"]["reason"] | {"parent": "init", "rewards": listed, "steps": 7}
        raw |= {"prompts_per_step": PER_STEP, "num_generations": GROUP, "save_steps": 3}
        (stage,) = plan(make_context(tmp_path, stages={"s": raw | changes}))
        config = stage.config
        context = stage.context
        judge = Judge(
            context.task,
            context.tokenizer,
            config.rewards,
            stop_ids=context.stop_ids,
            max_completion_length=LONGEST,
        )
        opened.append(Workers(judge, count))
        meta = {} if saved is None else {"cursor": saved}
        return Rollouts(
            stage, engine, judge, opened[-1], Start(TrainState(None, None, None), 0, meta)
        )

    yield make
    for workers in opened:
        workers.close()
    sys.modules.pop("rewards_of_rollouts", None)


def tokens_of(rollouts, problems):
    return [prompt.tokens for prompt in rollouts._stage.context.prompts(problems)]


def told(batch):
    """All that a batch holds, to be compared."""
    arrays = {
        name: value.tolist()
        for name, value in {**vars(batch.rollout), **batch.scored._asdict()}.items()
        if isinstance(value, np.ndarray)
    }
    return arrays, batch.rollout.prompts, batch.metrics


def groups_of(batch):
    """The candidate that each group was, as `numbered` wrote it."""
    return batch.rollout.tokens[::GROUP, 3].tolist()


# Fixed batches


def ragged(number, id, index):
    return [5 + index, 5 + id] + [7] * ((id * GROUP + index) % 9)


@pytest.mark.parametrize(("count", "seed"), [(0, 1), (2, 2)])
def test_a_batch_does_not_depend_on_the_order_of_ending(rollouts, count, seed):
    batches = lambda made: [told(made.next(None, step, Times())) for step in range(3)]
    expected = batches(rollouts(Engine(ragged)))
    assert batches(rollouts(Engine(ragged, seed=seed), count=count)) == expected


def test_completions_stand_with_their_prompts_and_rewards(rollouts):
    engine = Engine(ragged)
    made = rollouts(engine)
    read = []
    for step in range(2):
        batch = made.next(f"params {step}", step, Times())
        problems = made._stage.problems(step * PER_STEP, PER_STEP)
        assert batch.rollout.prompts == tokens_of(made, problems)
        read += batch.rollout.prompts
        for number, index in itertools.product(range(PER_STEP), range(GROUP)):
            row = number * GROUP + index
            length = 3 + row % 9
            assert batch.rollout.tokens[row, 1 : min(length, 3)].tolist() == [5 + index, 5 + number]
            assert batch.rollout.lengths[row] == length
            assert batch.scored.rewards[row].tolist() == [5 + index, 5 + number]
        assert batch.metrics["sampling/staleness/mean"] == 0
        assert batch.metrics["wasted_share"] == 0.25
        assert not batch.is_stale
        assert (engine.sessions[step].params, engine.sessions[step].version) == (
            f"params {step}",
            step,
        )
        assert made.state() == {"problems": (step + 1) * PER_STEP}
    assert len({tuple(prompt) for prompt in read}) > PER_STEP


def test_seconds_and_tokens_are_counted(rollouts):
    times = Times()
    batch = rollouts(Engine(ragged)).next(None, 0, times)
    metrics = times.metrics()
    seconds = metrics["time/rollout"]
    assert metrics["tokens_per_second/rollout"] * seconds == pytest.approx(
        batch.rollout.lengths.sum()
    )
    assert min(seconds, metrics["time/rewards"]) > 0


def test_completions_that_were_cut_do_not_count_where_that_is_asked(rollouts):
    cut = lambda number, id, index: [5 + index, 5] + [7] * (9 if index == 1 else 2)
    batch = rollouts(Engine(cut)).next(None, 0, Times())
    assert batch.counts.all()
    assert batch.counted_tokens == batch.num_tokens == PER_STEP * (5 + 12 + 5)
    masked = rollouts(Engine(cut), mask_truncated_completions=True).next(None, 0, Times())
    assert masked.counts.tolist() == [True, False, True] * PER_STEP
    assert masked.counted_tokens == PER_STEP * (5 + 5)
    # They are rewarded all the same.
    np.testing.assert_array_equal(masked.scored.rewards, batch.scored.rewards)
    assert masked.scored.mask.all()


@pytest.mark.parametrize("wanted", [False, True])
def test_sampling_is_compiled_beforehand_where_that_is_asked(
    make_context, tiny, tmp_path, monkeypatch, wanted
):
    raw = tiny["stages"]["reason"] | {"parent": "init", "precompile": wanted}
    (stage,) = plan(make_context(tmp_path, stages={"s": raw}))
    compiled = []
    monkeypatch.setattr(sampling.Engine, "precompile", lambda _, params: compiled.append(params))
    begin = Start(TrainState("params", None, None), 2, {"cursor": {"step": 2, "problems": 7}})
    with open_rollouts(stage, begin) as opened:
        assert opened.state() == {"problems": 7}
    assert compiled == ["params"] * wanted


@pytest.mark.parametrize(("asked", "rows"), [(None, 12), (5, 5), (99, 12)])
def test_so_many_completions_are_decoded_at_once(
    make_context, tiny, tmp_path, monkeypatch, asked, rows
):
    raw = {"parent": "init", "max_num_seqs": asked, "prompts_per_step": 4, "num_generations": 3}
    (stage,) = plan(make_context(tmp_path, stages={"s": tiny["stages"]["reason"] | raw}))
    made = []
    monkeypatch.setattr(Rollouts, "__init__", lambda self, stage, engine, *_: made.append(engine))
    with open_rollouts(stage, Start(TrainState("params", None, None), 0, {})):
        (engine,) = made
    assert engine.max_rows == rows


# Dynamic sampling

# Candidates of each batch of which only some are live, in both rewards or one.
BOTH, SECOND, NONE = (1, 1), (1, 0), (0, 0)


def numbered(kinds):
    """Completions whose fourth token is the number of the candidate."""

    def tokens(number, id, index):
        second, third = kinds(number, id)
        return [5 + second * (index == 1), 5 + third * (index == 2), 10 + id]

    return tokens


def drawn(number, id):
    return random.Random(97 * number + id).choice([BOTH, SECOND, NONE, NONE])


def expected_groups(kinds, number, limit, wanted):
    """The candidates of a batch, by trying one after the other; and how many were tried."""
    live = []
    for id in range(limit):
        if kinds(number, id) in wanted:
            live.append(id)
        if len(live) == PER_STEP:
            return live, id + 1
    dead = [id for id in range(limit) if id not in live]
    return sorted([*live, *dead[: PER_STEP - len(live)]]), limit


@pytest.mark.parametrize(
    ("count", "seed", "max_batches", "metric"),
    [(0, 0, 2, None), (0, 1, 5, None), (0, 2, 2, "third"), (0, 3, 5, "third"), (2, 4, 5, None)],
)
def test_a_batch_is_the_first_live_groups(rollouts, count, seed, max_batches, metric):
    dynamic = {"max_batches": max_batches, "metric": metric}
    engine = Engine(numbered(drawn), seed=seed)
    made = rollouts(engine, count=count, dynamic_sampling=dynamic)
    wanted = [BOTH] if metric == "third" else [BOTH, SECOND]
    read = 0
    for step in range(3):
        batch = made.next(None, step, Times())
        number = int(batch.rollout.tokens[0, 0]) - 4
        groups, tried = expected_groups(drawn, number, max_batches * PER_STEP, wanted)
        assert [token - 10 for token in groups_of(batch)] == groups
        problems = made._stage.problems(read, tried)
        prompts = tokens_of(made, problems)
        assert batch.rollout.prompts == [prompts[i] for i in groups]
        assert batch.metrics["num_gen_batches"] == tried / PER_STEP
        # None was started in vain: what is tried is all that was asked of the engine.
        ids = [request.id for request in engine.sessions[-1].requests]
        assert sorted(ids) == sorted([*range(tried)] * GROUP)
        read += tried
        assert made.state() == {"problems": read}


def test_a_group_is_replaced_at_the_same_moment_wherever_rewards_are_computed(rollouts):
    """Beside whom a completion is sampled may change its last bits."""

    def events(count):
        engine = Engine(numbered(drawn))
        made = rollouts(engine, count=count, dynamic_sampling={"max_batches": 5})
        for step in range(2):
            made.next(None, step, Times())
        return [session.events for session in engine.sessions]

    inside = events(0)
    assert sum(event[0] == "submit" for event in inside[0]) > 2
    assert events(2) == inside


def test_problems_go_on_where_a_checkpoint_was(rollouts):
    options = {"dynamic_sampling": {"max_batches": 4}}
    whole = rollouts(Engine(numbered(drawn)), **options)
    batches = [told(whole.next(None, step, Times())) for step in range(2)]
    saved = whole.state()
    batches.append(told(whole.next(None, 2, Times())))
    resumed = rollouts(Engine(numbered(drawn), seed=5), saved=saved, **options)
    assert told(resumed.next(None, 2, Times())) == batches[2]
    assert batches[2][1] != batches[1][1]


def test_without_a_live_group_the_batch_is_full_all_the_same(rollouts):
    made = rollouts(Engine(numbered(lambda *_: NONE)), dynamic_sampling={"max_batches": 3})
    batch = made.next(None, 0, Times())
    assert groups_of(batch) == [10, 11, 12, 13]
    assert batch.metrics["num_gen_batches"] == 3


# Sampling ahead

AHEAD = {"max_staleness": 1}


def test_a_batch_is_one_update_old_but_after_a_checkpoint(rollouts):
    engine = Engine(ragged)
    made = rollouts(engine, **AHEAD)
    for step in range(7):
        batch = made.next(f"params {step}", step, Times())
        fresh = step % 3 == 0  # checkpoints are written after steps 3 and 6
        version = step if fresh else step - 1
        sampled = batch.rollout.sampled
        assert (batch.rollout.versions[sampled] == version).all()
        assert batch.metrics["sampling/staleness/mean"] == step - version
        assert batch.is_stale == (version < step)
        assert engine.sessions[step].params == f"params {version}"
        problems = made._stage.problems(step * PER_STEP, PER_STEP)
        assert batch.rollout.prompts == tokens_of(made, problems)
    assert len(engine.sessions) == 7


def test_a_run_that_goes_on_after_a_checkpoint_samples_the_same(rollouts):
    whole, batches, saved = rollouts(Engine(ragged), **AHEAD), [], None
    for step in range(7):
        batches.append(told(whole.next(None, step, Times())))
        if step == 2:
            saved = whole.state()
    assert saved == {"problems": 3 * PER_STEP}
    resumed = rollouts(Engine(ragged, seed=1), saved=saved, **AHEAD)
    assert [told(resumed.next(None, step, Times())) for step in range(3, 7)] == batches[3:]


def test_a_checkpoint_before_its_time_holds_the_batch_that_was_sampled_ahead(rollouts):
    whole, batches, saved = rollouts(Engine(ragged), **AHEAD), [], None
    for step in range(7):
        batches.append(told(whole.next(None, step, Times())))
        if step == 3:  # a notice: the checkpoint of step 6 is still to come
            saved = json.loads(json.dumps(whole.state()))
    assert set(saved) == {"problems", "ahead"}
    engine = Engine(ragged, seed=1)
    resumed = rollouts(engine, saved=saved, **AHEAD)
    assert [told(resumed.next(None, step, Times())) for step in range(4, 7)] == batches[4:]
    assert len(engine.sessions) == 2  # of steps 5 and 6


def test_packed_completions_are_the_same_bits():
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate([3, 0, 5]):
        logprobs = rng.normal(size=(2, length)).astype(np.float32)
        one = Completion(
            request=Request(prompt=[1, 2], id=number, index=7),
            tokens=rng.integers(0, 99, length).astype(np.int32),
            logprobs=logprobs[0],
            kept_logmass=logprobs[1],
            sampled=rng.random(length) < 0.5,
            versions=np.full(length, 3),
            finish_reason=("stop", "aborted", "length")[number],
        )
        made.append((number, 7, one))
    found = unpack(pack(made))
    assert [place[:2] for place in found] == [(0, 7), (1, 7), (2, 7)]
    for (_, _, was), (_, _, now) in zip(made, found, strict=True):
        assert now.finish_reason == was.finish_reason
        for name in ("tokens", "logprobs", "kept_logmass", "sampled", "versions"):
            before, after = getattr(was, name), getattr(now, name)
            assert (after.dtype, after.tobytes()) == (before.dtype, before.tobytes())


def test_rewards_of_a_batch_go_on_while_the_next_is_sampled(rollouts):
    """The reward waits for the next session, so a stage that waited for it would never get it."""

    def begun():
        sys.modules["rewards_of_rollouts"].sessions += 1

    engine = Engine(lambda number, id, index: [4 + len(engine.sessions), 5], begun=begun)
    made = rollouts(engine, rewards=("slow",), **AHEAD)
    __import__("rewards_of_rollouts")
    for step in range(2):
        made.next(None, step, Times())
    assert len(engine.sessions) == 3
