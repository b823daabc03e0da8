"""A checkpoint of ours as judge: it is loaded when it is first asked, and replies greedily."""

import functools
import weakref
from typing import NamedTuple

import jax

from jaxrl_reason import checkpoint
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Params
from jaxrl_reason.rewards import Reply, Rubric
from jaxrl_reason.sampling import Engine, SamplingConfig, sample
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.load import load, load_context
from jaxrl_reason.stages.reward_config import CheckpointJudge


class _Loaded(NamedTuple):
    context: Context
    params: Params
    engine: Engine


class JudgeModel:
    """A model that is asked; used in the main process, to which the devices belong.

    Args:
        config: which checkpoint.

    Raises:
        InputError: there is no checkpoint at its path.
    """

    def __init__(self, config: CheckpointJudge):
        self._config = config
        self._step = checkpoint.find(config.path)
        self.identity = f"{self._step} {checkpoint.read_meta(self._step)['hash']}"
        """Models that are equal here give equal replies."""

    def check(self, rubric: Rubric) -> None:
        """Refuse a template that the model cannot read. Loads no parameters.

        Raises:
            InputError: its vocabulary lacks words of the template, or it is too long.
        """
        blank = rubric.question(prompt="", completion="", answer="", given="")
        try:
            _encode(load_context(self._step), blank)
        except InputError as error:
            raise InputError(f"{self._config.path} cannot read its prompt: {error}") from error

    def replies(self, prompts: list[str]) -> list[Reply]:
        """The most likely reply to each prompt; None to one that the model cannot read.

        Such is one too long, or with words or markers that a completion has and the model's
        vocabulary has not or reserves for itself.
        """
        context, params, engine = self._loaded
        readable: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            try:
                readable[number] = _encode(context, prompt)
            except InputError:
                continue
        replies: list[Reply] = [None] * len(prompts)
        if not readable:
            return replies
        # Greedy: the key draws nothing.
        rollout = sample(
            engine, params, list(readable.values()), jax.random.key(0), pad_id=context.pad_id
        )
        texts = context.decode(rollout.completions())
        for number, text in zip(readable, texts, strict=True):
            replies[number] = text
        return replies

    @functools.cached_property
    def _loaded(self) -> _Loaded:
        context, params, _ = load(self._step)
        return _Loaded(context, params, judge_engine(context, self._config))


def judge_engine(context: Context, config: CheckpointJudge) -> Engine:
    """What samples the replies of a judge.

    Args:
        context: of the judge's run.
        config: of the judge.
    """
    sampling = SamplingConfig(temperature=0.0)
    longest = config.max_completion_length
    return context.engine(sampling, longest, max_rows=config.batch_size)


_models: weakref.WeakValueDictionary[str, JudgeModel] = weakref.WeakValueDictionary()


def judge_model(config: CheckpointJudge) -> JudgeModel:
    """The model of a configuration, on the devices only once as long as anybody uses it."""
    model = JudgeModel(config)
    name = f"{model.identity} {config.max_completion_length} {config.batch_size}"
    return _models.setdefault(name, model)


def _encode(context: Context, prompt: str) -> list[int]:
    ids = context.encoder.prompt({"prompt": prompt})
    longest = context.config.max_prompt_length
    if len(ids) > longest:
        raise InputError(f"it has {len(ids)} tokens, and max_prompt_length={longest} of its run")
    return ids
