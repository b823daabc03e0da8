"""Groups of completions: as if all were sampled together, while prompts are read as they come."""

import jax
import pytest

from jaxrl_reason.sampling import SamplingConfig, sample
from jaxrl_reason.sharding import batch_multiple
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.groups import sample_groups

PROBLEMS, SIZE, ROWS = 43, 3, 12
LONGEST = 12


@pytest.fixture
def context(four):
    return Context.create(four.config)


@pytest.fixture
def params(context):
    return context.init_params()  # completions of all lengths


def groups(context, params, key, **options):
    return sample_groups(
        context,
        params,
        [context.task.generate("train", i) for i in range(PROBLEMS)],
        key,
        num_generations=SIZE,
        sampling=SamplingConfig(),
        max_completion_length=LONGEST,
        **options,
    )


def test_groups_are_those_of_all_prompts_at_once(context, params):
    key = jax.random.key(3)
    engine = context.engine(SamplingConfig(), LONGEST, max_rows=PROBLEMS * SIZE)
    problems = [context.task.generate("train", i) for i in range(PROBLEMS)]
    prompts = [prompt.tokens for prompt in context.prompts(problems)]
    whole = sample(engine, params, prompts, key, num_generations=SIZE, pad_id=context.pad_id)
    found = [one for group in groups(context, params, key, max_rows=ROWS) for one in group]
    assert [one.ids for one in found] == whole.completions()
    assert [one.finished for one in found] == whole.finished.tolist()
    assert len({tuple(one.ids) for one in found}) > PROBLEMS
    assert len({len(one.ids) for one in found}) > SIZE
    for number, one in enumerate(found):
        assert one.text == context.decode([one.ids])[0]
        assert one.verdict == context.task.verify(problems[number // SIZE], one.text)


def test_prompts_are_read_as_they_come(context, params, monkeypatch):
    going, most, parts, prompts = 0, 0, [], Context.prompts
    decode = Context.decode

    def read(self, problems):
        nonlocal going, most
        parts.append(len(problems))
        going += SIZE * len(problems)
        most = max(most, going)
        return prompts(self, problems)

    def ended(self, completions):
        nonlocal going
        going -= len(completions)
        return decode(self, completions)

    monkeypatch.setattr(Context, "prompts", read)
    monkeypatch.setattr(Context, "decode", ended)
    groups(context, params, jax.random.key(3), max_rows=ROWS)
    part = batch_multiple(context.mesh)
    assert sum(parts) == PROBLEMS
    assert going == 0
    assert most <= ROWS + 2 * part * SIZE
    assert most < PROBLEMS * SIZE / 2
    assert set(parts[:-1]) == {part}
