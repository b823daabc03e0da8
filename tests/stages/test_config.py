"""Configurations of runs and stages: what is refused, what comes back, and that all is read."""

import ast
import dataclasses
import functools
import inspect
import json
import typing
from collections.abc import Iterator
from pathlib import Path

import pydantic
import pytest

from jaxrl_reason.config import Config, apply_overrides, load_yaml, to_json, validate
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import ModelConfig
from jaxrl_reason.models.config import RopeScaling
from jaxrl_reason.models.lora import LoRAConfig
from jaxrl_reason.models.vision_config import VisionConfig
from jaxrl_reason.rewards import OpenAIServer
from jaxrl_reason.stages.config import EvaluationConfig, EvaluationSet, RunConfig
from jaxrl_reason.stages.data_config import PythonData, StageData
from jaxrl_reason.stages.policy_config import MORLConfig, Phase
from jaxrl_reason.stages.reject_config import RejectConfig
from jaxrl_reason.stages.reward_config import (
    CheckpointJudge,
    JudgeReward,
    PythonJudge,
    PythonReward,
)
from jaxrl_reason.stages.sample import SampleConfig
from jaxrl_reason.steps import OptimizerConfig

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def make(tiny):
    """The configuration of the tests with overrides."""

    def of(*overrides: str) -> RunConfig:
        return validate(RunConfig, apply_overrides(RunConfig, tiny, overrides), "test")

    return of


def test_the_configuration_of_the_tests_is_accepted(make):
    assert list(make().stages) == ["cold", "prefer", "reason", "balance", "ahead", "refill"]


# What cannot act, or cannot be

CISPO = "stages.balance.loss_type=cispo"
TWICE = "stages.balance.num_iterations=2"
SAPO = "stages.balance.loss_type=sapo"
TEMPERATURES = "stages.balance.loss_options={temperature_pos: %s, temperature_neg: %s}"
REFUSED = [
    # clipping
    (["stages.balance.epsilon=0.2"], "epsilon cannot act: with num_iterations=1 the ratio is"),
    (["stages.balance.epsilon_high=0.2"], "epsilon_high cannot act: with num_iterations=1"),
    (["stages.balance.delta=4"], "delta cannot act: with num_iterations=1"),
    (["stages.reason.delta=1.1"], "loss_type=dapo: delta=1.1 is out of range; it must be > 1.2"),
    (["stages.reason.epsilon_high=0.5", "stages.reason.delta=1.5"], "it must be > 1.5"),
    (["stages.reason.epsilon=0"], "epsilon: got 0; needs"),
    (["stages.reason.epsilon=1"], "epsilon: got 1; needs"),
    ([CISPO, TWICE], "loss_type=cispo needs epsilon_high"),
    ([CISPO, TWICE, "stages.balance.epsilon_high=0.3"], r"weight itself\)=0.3 is .* must be >= 1"),
    (
        [CISPO, TWICE, "stages.balance.epsilon_high=5", "stages.balance.delta=6"],
        "delta cannot act with loss_type=cispo",
    ),
    ([CISPO, "stages.balance.epsilon_high=5"], "epsilon_high cannot act: with num_iterations=1"),
    (["stages.reason.loss_type=gsop"], "loss_type='gsop'; allowed are .*'gspo'"),
    # a ratio of whole completions has no default bound
    (["stages.reason.loss_type=gspo"], "loss_type=gspo needs epsilon"),
    (["stages.reason.loss_type=luspo"], "loss_type=luspo needs epsilon"),
    # other options of the policy loss
    ([SAPO, TWICE], "loss_type=sapo needs temperature_pos and temperature_neg"),
    ([SAPO, TWICE, TEMPERATURES % (1, 0)], "sapo: temperature_neg=0.0 is out of range; it must be"),
    (
        [SAPO, TEMPERATURES % (1, 1)],
        "temperature_neg and temperature_pos cannot act: .*choose anot",
    ),
    ([SAPO, TWICE, "stages.balance.loss_options={temprature_pos: 1}"], "mean 'temperature_pos'"),
    ([SAPO, TWICE, "stages.balance.loss_options={lambda_pos: 1}"], "is an option of vespo"),
    ([SAPO, TWICE, "stages.balance.epsilon=0.2"], "epsilon cannot act with loss_type=sapo"),
    ([TWICE, "stages.balance.loss_options={zeta: 1}"], "zeta is no option of .*dapo; nothing is"),
    ([TWICE, "stages.balance.loss_options={delta: 4}"], "write delta beside loss_options"),
    ([TWICE, "stages.balance.loss_options={delta: high}"], 'delta: got "high"; needs float'),
    (["stages.balance.guard_steps=0"], "guard_steps: got 0; needs int > 0"),
    (["stages.reason.beta=-0.1"], "beta: got -0.1; needs float >= 0"),
    # groups and rewards
    (["stages.reason.num_generations=1"], "num_generations: got 1; needs int >= 2"),
    (["stages.reason.sampling.temperature=0"], "temperature=0 gives a group of equal completions"),
    (["stages.prefer.data.sampling.temperature=0"], "temperature=0 gives equal completions"),
    (["stages.reason.rewards=[]"], "rewards: got .*; needs list"),
    (["stages.reason.rewards.0.weight=0"], "weight: got 0; needs float > 0"),
    (["stages.reason.rewards.1.kind=accuracy"], "names .*'accuracy', 'accuracy'.*may occur once"),
    (["stages.balance.rewards.2.low=12"], "low=12 must be smaller than high=12"),
    (["stages.balance.rewards.3.function=ones"], "function: got .ones."),
    (
        ["stages.refill.rewards.1.cache=13"],
        "rewards.overlong.cache=13 exceeds max_completion_length=12",
    ),
    (["stages.refill.rewards.1.cache=0"], "cache: got 0; needs int > 0"),
    (["stages.ahead.rewards.1.scope=row"], "scope: got .row.; needs"),
    # dynamic sampling
    (["stages.refill.dynamic_sampling.max_batches=1"], "max_batches: got 1; needs int >= 2"),
    (
        ["stages.refill.dynamic_sampling.metric=acuracy"],
        "dynamic_sampling.metric='acuracy' is no reward; did you mean 'accuracy'",
    ),
    (
        ["stages.balance.dynamic_sampling={max_batches: 2}"],
        "reward 'ones' has scope=batch; set its scope to group or completion",
    ),
    (
        ["stages.refill.max_staleness=1", "stages.refill.reward_workers=1"],
        "max_staleness=1 cannot act with dynamic_sampling",
    ),
    # sampling ahead
    (["stages.ahead.max_staleness=2"], "max_staleness: got 2; needs"),
    (["stages.ahead.save_steps=1"], "max_staleness=1 cannot act with a checkpoint after every"),
    (["stages.ahead.steps=1"], "max_staleness=1 cannot act with a checkpoint after every"),
    (["stages.reason.max_staleness=1"], "with reward_workers=0 these rewards are computed in"),
    (["stages.ahead.max_staleness=0"], "epsilon cannot act: with num_iterations=1"),
    (["stages.ahead.reward_workers=-1"], "reward_workers: got -1; needs int >= 0"),
    # aggregators
    (["stages.balance.rewards=[{kind: accuracy}]"], "morl needs at least two rewards"),
    (["stages.balance.aggregator=mdga"], "aggregator='mdga'; allowed are"),
    (["stages.balance.rewards.0.weight=2"], "weight of reward 'accuracy' cannot act: pfab finds"),
    (
        ["stages.balance.aggregator=mgda", "stages.balance.rewards.1.weight=2"],
        "weight of reward 'format' cannot act: mgda finds",
    ),
    (["stages.balance.aggregator_options.scop=group"], r"scop is no option of pfab; .*'scope'"),
    (["stages.balance.aggregator_options.weights=[1]"], "weights is no option of pfab"),
    (["stages.balance.aggregator_options.scope=all"], "pfab: scope='all' is unknown"),
    (["stages.balance.aggregator_options.min_std=-1"], "pfab: min_std=-1 is out of range"),
    (["stages.balance.aggregator_options.min_std=[0.1, 0.2]"], r"pfab: min_std has shape \(2,\)"),
    (["stages.balance.aggregator_options={}"], r"must set \['min_std'\] for pfab"),
    (
        ["stages.balance.aggregator=gdpo"],
        "min_std is no option of gdpo; nothing is allowed here",
    ),
    # preferences
    (
        ["stages.prefer.label_smoothing=0.1", "stages.prefer.loss_type=[hinge, ipo]"],
        r"label_smoothing cannot act with loss_type=\['hinge', 'ipo'\]",
    ),
    (["stages.prefer.loss_type=[robust]"], "robust corrects for label_smoothing, which is 0"),
    (["stages.prefer.loss_type=exo_pair"], "exo_pair takes the logarithm of label_smoothing, whi"),
    (["stages.prefer.label_smoothing=0.1", "stages.prefer.loss_type=[simpo]"], "cannot act with"),
    (["stages.prefer.loss_type=[sft]"], "needs a preference term"),
    (["stages.prefer.loss_type=sft"], "needs a preference term"),
    (["stages.prefer.loss_type=[]"], r"loss_type=\[\]; allowed are"),
    (["stages.prefer.loss_type=[sigmoid, kto]"], "allowed are"),
    (["stages.prefer.loss_type=segmoid"], r"loss_type=\['segmoid'\]; allowed are"),
    (["stages.prefer.loss_weights=[1, 2]"], "loss_weights has 2 entries for 1 terms"),
    (["stages.prefer.loss_weights=[0]"], "loss_weights gives sigmoid the weight 0; use a finite"),
    (["stages.prefer.loss_type=simpo"], "loss_type=simpo needs loss_options.gamma"),
    (["stages.prefer.loss_options={gamma: 1}"], "gamma cannot act with .*sigmoid; .* of simpo"),
    (["stages.prefer.loss_options={f_divergense: js}"], "did you mean 'f_divergence'"),
    (["stages.prefer.loss_options={f_divergence: kl}"], "sigmoid: f_divergence='kl' is unknown"),
    (["stages.prefer.loss_options={f_alpha: 0.5}"], "f_alpha=0.5 with f_divergence='reverse_kl'"),
    (["stages.prefer.loss_options={f_divergence: alpha}"], "f_divergence='alpha' needs f_alpha"),
    (["stages.prefer.loss_options={beta: 0.5}"], "write beta beside loss_options"),
    (["stages.prefer.loss_type=simpo", "stages.prefer.loss_options={gamma: -1}"], "gamma=-1.0 is"),
    (["stages.prefer.max_length=20"], "max_length=20 leaves no token for a completion"),
    # data
    (["stages.cold.data.styles={long: 0.5, short: 0.4}"], "styles sum to 0.9; they must sum to 1"),
    (["stages.cold.data.styles={brief: 1}"], "styles.brief: unknown key; "),
    (["stages.cold.data.kind=traced"], "did you mean 'traces'"),
    # stages
    (["stages.prefer.parent=warm"], r"parent='warm' is no earlier stage; known are \['init', 'c"),
    (["stages.cold.parent=reason"], r"parent='reason' is no earlier stage; known are \['init'\]"),
    (["stages.cold.parent=cold"], "parent='cold' is no earlier stage"),
    (["stages.init={kind: sft}"], "stages.init"),
    (["stages.cold.batchsize=8"], "unknown key stages.cold.batchsize; did you mean 'batch_size'"),
    (["stages.cold.steps=0"], "steps: got 0; needs int > 0"),
    (["stages.cold.optimizer.learning_rate=.nan"], "learning_rate=nan must be positive"),
    (["stages.cold.completion_only_loss=false"], "completion_only_loss=false cannot act with data"),
    (["stages.cold.assistant_only_loss=false"], "assistant_only_loss=false cannot act with data"),
    (["chat.chat_template_path=x.jinja"], "chat_template_path cannot act without model.path"),
    (["stages.cold.optimizer.min_lr_ratio=0.1"], "min_lr_ratio cannot act"),
    # the run
    (["seed=-1"], "seed: got -1"),
    (["model.changes.hiden_size=8"], "changes.hiden_size: unknown key; did you mean 'hidden_size'"),
    (["model.changes.hidden_size=32.5"], "changes.hidden_size: got 32.5; needs int"),
    (["model.changes.dtype=float16"], 'changes.dtype: got "float16"; needs'),
    (["model.changes.vocab_size=64"], "vocab_size follows from the task's tokenizer; remove it"),
    (["model.changes.head_dim=15"], "head_dim=15 must be even"),
    (["task.name=arithmetik"], "did you mean 'arithmetic'"),
    (["task.options.modulos=5"], "did you mean 'modulus'"),
    (["evaluation.max_completion_length=29"], "29 tokens of a completion in evaluation exceed"),
    (["stages.reason.max_completion_length=29"], "completion in stages.reason exceed"),
    (["stages.prefer.max_length=49"], "completion in stages.prefer exceed"),
    (["model.changes.max_position_embeddings=31"], "exceed .* max_position_embeddings=31"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda x: str(x)[:60])
def test_what_cannot_act_or_be_is_refused(make, overrides, message):
    with pytest.raises(InputError, match=message):
        make(*overrides)


def test_a_stage_may_not_be_called_init_or_like_a_path(tiny):
    for name in ("init", "a b", "../other"):
        raw = tiny | {"stages": {name: tiny["stages"]["cold"]}}
        with pytest.raises(InputError, match="must be a word of letters"):
            validate(RunConfig, raw, "test")


@pytest.mark.parametrize(
    "overrides",
    [
        ["stages.reason.epsilon=0.1", "stages.reason.epsilon_high=0.3", "stages.reason.delta=1.4"],
        [CISPO, TWICE, "stages.balance.epsilon_high=5"],
        [CISPO, TWICE, "stages.balance.epsilon_high=5", "stages.balance.epsilon=0.5"],
        [SAPO, TWICE, TEMPERATURES % (1, 1.05)],
        ["stages.reason.loss_type=gspo", "stages.reason.epsilon=3e-4"],
        ["stages.balance.loss_type=gspo"],
        ["stages.prefer.loss_type=[robust, sft]", "stages.prefer.label_smoothing=0.1"],
        ["stages.prefer.loss_type=[sigmoid, sft]", "stages.prefer.loss_weights=[1, 0.5]"],
        ["stages.prefer.loss_type=orpo"],
        [
            "stages.prefer.loss_type=[discopop, nca_pair]",
            "stages.prefer.loss_options={discopop_tau: 0.1, f_divergence: alpha, f_alpha: 0.5}",
        ],
        ["stages.balance.aggregator_options={min_std: [0.1, 0.1, 0.1, 0.1]}"],
        ["evaluation.max_completion_length=28", "stages.reason.max_completion_length=28"],
        ["stages.cold.data.styles={long: 0.3, short: 0.3, answer: 0.4}"],
        ["stages.refill.rewards.1.cache=12", "stages.refill.dynamic_sampling.metric=null"],
        ["stages.ahead.reward_workers=0"],
        ["stages.ahead.loss_type=gspo", "stages.ahead.epsilon=3e-4"],
    ],
    ids=str,
)
def test_what_can_act_is_accepted(make, overrides):
    make(*overrides)


def test_options_that_are_set_reach_the_loss(make):
    options = lambda *overrides: make(*overrides).stages["reason"].options
    assert options() == {"epsilon": 0.2}
    assert options("stages.reason.epsilon=0.1") == {"epsilon": 0.1}
    assert options("stages.reason.epsilon_high=0.3", "stages.reason.delta=4") == {
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "delta": 4.0,
    }
    cispo = ["stages.reason.loss_type=cispo", "stages.reason.epsilon_high=5"]
    assert options(*cispo) == {"epsilon_high": 5.0}
    kl_cov = "stages.reason.loss_options={kl_cov_ratio: 0.002, ppo_kl_coef: 1}"
    given = options("stages.reason.loss_type=kl_cov", kl_cov)
    assert given == {"kl_cov_ratio": 0.002, "ppo_kl_coef": 1.0}


def test_one_term_of_a_preference_loss_need_not_be_in_a_list(make):
    alone, listed = (make(f"stages.prefer.loss_type={x}") for x in ("hinge", "[hinge]"))
    assert alone.stages["prefer"].loss_type == ("hinge",)
    assert to_json(alone) == to_json(listed)


# To JSON and back


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_every_configuration_comes_back_from_json(path):
    config = RunConfig.load(path)
    text = json.dumps(to_json(config))
    assert validate(RunConfig, json.loads(text), "json") == config


def test_there_are_configurations():
    assert ROOT / "configs" / "quickstart.yaml" in YAMLS


def test_the_configuration_of_the_tests_comes_back_from_json(make):
    config = make("stages.reason.rewards.1.weight=0.25", "model.changes.rope_theta=1e5")
    assert validate(RunConfig, json.loads(json.dumps(to_json(config))), "json") == config


def test_a_saved_run_has_its_configuration(four):
    assert validate(RunConfig, load_yaml(four.directory / "config.json"), "json") == four.config


# Every field is read: an option that nothing reads is a promise that nobody keeps


def config_classes(*roots: type) -> set[type]:
    """All configurations reachable through the annotations of some."""
    found: set[type] = set()
    waiting = list(roots)
    while waiting:
        cls = waiting.pop()
        if cls in found:
            continue
        if isinstance(cls, type) and (issubclass(cls, Config) or dataclasses.is_dataclass(cls)):
            found.add(cls)
            waiting += typing.get_type_hints(cls).values()
        else:
            waiting += typing.get_args(cls)
    return found


def fields_of(cls: type) -> set[str]:
    """Fields that a class has, those of its bases included."""
    if issubclass(cls, pydantic.BaseModel):
        return set(cls.model_fields)
    return {field.name for field in dataclasses.fields(cls)}


def is_check(node: ast.AST) -> bool:
    """Whether a function only checks the configuration that it belongs to."""
    return isinstance(node, ast.FunctionDef) and (
        node.name == "__post_init__"
        or any("model_validator" in ast.unparse(decorator) for decorator in node.decorator_list)
    )


def attributes_read(node: ast.AST) -> Iterator[str]:
    """Names of the attributes that code reads outside of checks."""
    if is_check(node):
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield node.attr
    for child in ast.iter_child_nodes(node):
        yield from attributes_read(child)


def unread(classes: set[type], sources: list[str]) -> list[str]:
    """Fields that no source reads as an attribute."""
    names = {name for source in sources for name in attributes_read(ast.parse(source))}
    return sorted(f"{cls.__name__}.{f}" for cls in classes for f in fields_of(cls) - names)


@functools.cache
def package() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in (ROOT / "jaxrl_reason").rglob("*.py")]


def test_every_field_is_read_somewhere():
    classes = config_classes(RunConfig, SampleConfig, ModelConfig)
    assert {MORLConfig, OptimizerConfig, PythonReward, EvaluationConfig} < classes
    assert unread(classes, package()) == []


def test_a_field_that_nothing_reads_is_found():
    @dataclasses.dataclass
    class Deep:
        entropy_bonus_never_read: float = 0.0
        also_only_checked: float = 0.0
        max_length: int = 1

        def __post_init__(self):
            assert self.also_only_checked >= 0

    class Outer(Config):
        inner: tuple[Deep, ...] | None = None

    checked_only = """
class Deep:
    def __post_init__(self):
        if self.also_only_checked < 0: raise ValueError
"""
    assert config_classes(Outer) == {Outer, Deep}
    assert unread({Deep}, [*package(), checked_only]) == [
        "Deep.also_only_checked",
        "Deep.entropy_bonus_never_read",
    ]


# Parts that this run and its model have not.
ELSEWHERE = (
    CheckpointJudge,
    EvaluationSet,
    JudgeReward,
    LoRAConfig,
    OpenAIServer,
    Phase,
    PythonData,
    PythonJudge,
    RejectConfig,
    RopeScaling,
    StageData,
    VisionConfig,
)
# Files, a tokenizer of a published model, images, experts; and a limit that acts in checks alone.
NOT_IN_THIS_RUN = {
    "ChatConfig.chat_template_path",
    "FileData.columns",
    "FileData.path",
    "FileData.split",
    "ModelChoice.revision",
    "ModelConfig.max_position_embeddings",
    "ModelConfig.moe_intermediate_size",
    "ModelConfig.mrope_interleaved",
    "ModelConfig.mrope_section",
    "ModelConfig.norm_topk_prob",
    "ModelConfig.num_experts_per_tok",
    "ModelConfig.rope_local_theta",
    "ModelConfig.router_aux_loss_coef",
    "SFTConfig.assistant_only_loss",
    "SFTConfig.completion_only_loss",
}


def test_a_run_reads_every_field_of_its_stages(four):
    """As above, but by watching the run: no field of the same name elsewhere can hide one."""
    classes = {cls.__name__: cls for cls in config_classes(RunConfig, ModelConfig)}
    for other in ELSEWHERE:
        del classes[other.__name__]

    def declared(cls, field):
        return next(base for base in cls.__mro__ if field in inspect.get_annotations(base))

    read = {
        (declared(classes[name], field), field)
        for name in classes.keys() & four.reads.keys()
        for field in four.reads[name] & fields_of(classes[name])
    }
    missing = {
        f"{cls.__name__}.{field}"
        for cls in classes.values()
        for field in fields_of(cls) - {"kind"}
        if (declared(cls, field), field) not in read
    }
    assert missing == NOT_IN_THIS_RUN
