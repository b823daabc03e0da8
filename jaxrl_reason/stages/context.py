"""What the stages of a run share, and what one stage knows of itself."""

import dataclasses
import functools
import random
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Key

from jaxrl_reason import __version__, checkpoint, processes
from jaxrl_reason.config import hash_json, to_json
from jaxrl_reason.data import chat
from jaxrl_reason.data.batching import epoch_order
from jaxrl_reason.data.examples import RowEncoder
from jaxrl_reason.data.loading import Facts
from jaxrl_reason.data.tokenizer import (
    PreTrainedTokenizerFast,
    build_tokenizer,
    load_generation_config,
    load_tokenizer,
)
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Model, Params
from jaxrl_reason.models.lora import ADAPTER
from jaxrl_reason.sampling import Engine, SamplingConfig, Shown
from jaxrl_reason.sharding import batch_multiple, make_mesh, tree_shardings
from jaxrl_reason.stages.config import RunConfig, StageConfig, problems_of
from jaxrl_reason.stages.deadline import COMPILING, compiling, deadline
from jaxrl_reason.stages.encoding import Encoder, Prompt
from jaxrl_reason.stages.eyes import Eyes
from jaxrl_reason.stages.policy_rows import Sight
from jaxrl_reason.stages.shared_steps import SharedSteps
from jaxrl_reason.stages.task_set import Place, TaskSet
from jaxrl_reason.steps import partition
from jaxrl_reason.tasks import Problem, Task, VisualTask, make_task

CHECKED = 64
"""Problems that are looked at before a run begins."""

_PATCH_MULTIPLE = 16  # so that data of another day seldom means another program
_VOCABULARY_MULTIPLE = 8  # so that the embedding can be cut over the devices of one machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """A run: its configuration and what follows from it. Holds no training state."""

    config: RunConfig
    directory: Path
    tasks: TaskSet
    tokenizer: PreTrainedTokenizerFast
    model: Model
    mesh: Mesh
    encoder: Encoder
    """Makes tokens of prompts and completions."""
    stop_ids: tuple[int, ...]
    """Tokens that end a completion."""
    shared: SharedSteps = dataclasses.field(default_factory=SharedSteps, compare=False)
    """Jitted functions of its stages."""

    @classmethod
    def create(cls, config: RunConfig, devices: Sequence[jax.Device] | None = None) -> "Context":
        """Build the task, tokenizer, model and mesh of a configuration.

        Args:
            config: of the run.
            devices: of the mesh; all that are here by default.

        Raises:
            InputError: the model is too short for prompt and completion or reads no images, the
                mesh does not fit, or a published model's tokenizer cannot be read or has no chat
                template.
        """
        tasks, choice = config.make_tasks(), config.model
        generation: dict[str, Any] = {}
        if choice.path is None:
            tokenizer = build_tokenizer(
                tasks.words().union(config.words), level=config.task.tokenizer
            )
        else:
            tokenizer = load_tokenizer(
                choice.path,
                revision=choice.revision,
                chat_template_path=config.chat.chat_template_path,
            )
            generation = load_generation_config(choice.path, revision=choice.revision)
        vocab_size = -(-len(tokenizer) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        model = Model(choice.resolve(vocab_size))
        if len(tokenizer) > model.config.vocab_size:
            raise InputError(
                f"{choice.path}: the tokenizer has {len(tokenizer)} tokens and the model "
                f"{model.config.vocab_size}; they do not belong together"
            )
        _check_eyes(config, tasks, sees=model.config.vision is not None)
        return cls(
            config=config,
            directory=Path(config.output_dir) / config.name,
            tasks=tasks,
            tokenizer=tokenizer,
            model=model,
            mesh=make_mesh(config.mesh, devices),
            encoder=Encoder.create(config, tasks, tokenizer, model.config),
            stop_ids=chat.stop_ids(tokenizer, generation),
        )

    @classmethod
    def describe(cls, config: RunConfig, devices: Sequence[jax.Device]) -> "Context":
        """What the programs of a run follow from, without its tokenizer and its data.

        Args:
            config: of the run. A published model is described by its configuration alone.
            devices: of the mesh, which need not be here.

        Raises:
            InputError: the mesh does not fit.
        """
        choice = config.model
        if choice.path is None:
            return cls.create(config, devices)
        model = choice.resolve(vocab_size=_VOCABULARY_MULTIPLE)
        if "dtype" not in choice.changes and devices[0].platform != "cpu":
            model = dataclasses.replace(model, dtype="bfloat16")
        tasks = TaskSet(main=make_task("arithmetic", {}))
        tokenizer = build_tokenizer(tasks.words(), level="word")
        rows = RowEncoder(tokenizer=tokenizer, plain=True)
        return cls(
            config=config,
            directory=Path(config.output_dir) / config.name,
            tasks=tasks,
            tokenizer=tokenizer,
            model=Model(model),
            mesh=make_mesh(config.mesh, devices),
            encoder=Encoder(tasks=tasks, rows=rows, system_prompt=None),
            stop_ids=(0,),
        )

    @property
    def task(self) -> Task:
        """The main task."""
        return self.tasks.main

    @property
    def pad_id(self) -> int:
        """Fills unused places; nobody reads it."""
        pad = self.tokenizer.pad_token_id
        return self.stop_ids[0] if pad is None else pad

    @property
    def visual_tokens(self) -> int:
        """Most tokens of a prompt that stand for images and videos; 0 for a model of text."""
        sees = self.model.config.vision is not None
        return self.config.max_visual_tokens or 0 if sees else 0

    @property
    def patches_per_token(self) -> int:
        """Patches of images and videos that one of those tokens stands for."""
        vision = self.model.config.vision
        return 1 if vision is None else vision.merge_unit

    def patches_of(self, *rows: Iterable[Facts]) -> int | None:
        """Patches that a row must have room for, of rows of examples; None for a model of text."""
        if self.encoder.vision is None:
            return None
        most = max(sum(fact.num_patches for fact in row) for row in rows)
        unit = self.patches_per_token * _PATCH_MULTIPLE
        return -(-max(most, 1) // unit) * unit

    @functools.cached_property
    def eyes(self) -> Eyes:
        """What encodes images and videos, of a model that sees."""
        return Eyes(self.model, self.mesh, self.visual_tokens)

    def look(
        self, params: Params, prompts: Sequence[Prompt]
    ) -> tuple[list[Shown] | None, list[Sight] | None]:
        """What sampling and an update read of what prompts show; None where all is text.

        Raises:
            InputError: a prompt shows something and `max_visual_tokens` leaves no room for it.
        """
        if self.visual_tokens:
            return self.eyes.look(params, prompts)
        if any(prompt.shown is not None and prompt.shown.patches.size for prompt in prompts):
            raise InputError(f"a prompt shows images or videos; {_ROOM}")
        return None, None

    @functools.cached_property
    def params_shapes(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return jax.eval_shape(self.model.init, jax.random.key(0))

    @functools.cached_property
    def params_shardings(self) -> Params:
        """Where every parameter lies on the mesh."""
        return tree_shardings(self.mesh, self.model.axes(), self.params_shapes)

    @functools.cached_property
    def params_like(self) -> Params:
        """Shapes with shardings: what a checkpoint is restored into."""
        of = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        return jax.tree.map(of, self.params_shapes, self.params_shardings)

    def restore_params(self, path: str | Path) -> Params:
        """The parameters of a checkpoint, within ten times the run's `step_timeout`.

        Raises:
            InputError: as `checkpoint.restore_params` does.
        """
        with deadline(self.config.step_timeout, times=COMPILING):
            return checkpoint.restore_params(path, self.params_like)

    @functools.cached_property
    def root(self) -> dict[str, Any]:
        """The part of the configuration that the untrained model and the task follow from."""
        config = to_json(self.config)
        names = ("seed", "task", "tasks", "words", "model", "chat", "max_visual_tokens")
        return {name: config[name] for name in names}

    @functools.cached_property
    def root_hash(self) -> str:
        """Identifies the untrained model and the task."""
        return hash_json(self.root)

    def init_params(self) -> Params:
        """Fresh or published parameters, created where they lie.

        Raises:
            InputError: the files of a published model do not fit its configuration.
        """
        key = jax.random.fold_in(jax.random.key(self.config.seed), _number("init"))
        choice = self.config.model
        if choice.path is None:
            return jax.jit(self.model.init, out_shardings=self.params_shardings)(key)
        from jaxrl_reason.models.convert import load_params

        base = dataclasses.replace(self.model.config, lora=None)
        params = load_params(Model(base), choice.path, mesh=self.mesh, revision=choice.revision)
        if self.model.config.lora is None:
            return params
        ours = lambda tree: partition(tree, lambda path: path[-1] in ADAPTER)[0]
        # The other parameters are not returned, so the compiler does not make them.
        init = lambda key: ours(self.model.init(key))
        adapter = jax.jit(init, out_shardings=ours(self.params_shardings))(key)
        return _with_adapter(params, adapter)

    def engine(
        self,
        sampling: SamplingConfig,
        max_completion_length: int,
        *,
        max_rows: int,
        group_size: int = 1,
    ) -> Engine:
        """What samples from this run's model.

        Args:
            sampling: how tokens are drawn.
            max_completion_length: in tokens.
            max_rows: completions in flight at once.
            group_size: completions of a prompt that are asked for together.
        """
        return Engine(
            model=self.model,
            mesh=self.mesh,
            sampling=sampling,
            stop_ids=self.stop_ids,
            max_prompt_length=self.config.max_prompt_length,
            max_completion_length=max_completion_length,
            max_rows=max_rows,
            group_size=group_size,
            steps_per_dispatch=self.config.steps_per_dispatch,
            visual_tokens=self.visual_tokens,
            detokenize=lambda ids: chat.decode(self.tokenizer, ids, self.stop_ids),
            compiling=compiling,
        )

    def prompts(self, problems: Sequence[Problem]) -> list[Prompt]:
        """The problems' prompts as the model reads them.

        Of prompts with images or videos each process reads its share, and sends it to the others.
        """
        if self.encoder.vision is None:
            return [self.encoder.problem(problem) for problem in problems]
        return processes.divided(problems, self.encoder.problem)

    def check_prompts(self, problems: Sequence[Problem], where: str) -> None:
        """Refuse problems whose prompts are too long to sample from.

        Raises:
            InputError: naming the first of them.
        """
        longest = self.config.max_prompt_length
        for number, problem in enumerate(problems):
            count = len(self.encoder.problem(problem).tokens)
            if count > longest:
                raise InputError(
                    f"{where}: the prompt of problem {number} has {count} tokens; "
                    f"max_prompt_length={longest} is the most; raise it, or ask for less"
                )

    def decode(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """Texts of completions."""
        return [chat.decode(self.tokenizer, ids, self.stop_ids) for ids in completions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run: its configuration, its place, and the checkpoint it starts from."""

    context: Context
    name: str
    config: StageConfig
    parent: Path
    """Directory of the parent stage."""
    parent_hash: str
    other: Path | None = None
    """Directory of the other stage it reads: the data it trains on, or a second policy."""
    other_hash: str | None = None

    @property
    def directory(self) -> Path:
        """Where the stage writes."""
        return self.context.directory / self.name

    @functools.cached_property
    def hash(self) -> str:
        """Identifies what the stage computes: its configuration and all that came before it."""
        longest = self.context.config.max_prompt_length
        made_of = [to_json(self.config), self.name, self.parent_hash, longest]
        return hash_json(made_of if self.other is None else [*made_of, self.other_hash])

    @property
    def checkpoints(self) -> Path:
        """The folder of the stage's checkpoints."""
        return self.directory / "checkpoints"

    def key(self, step: int) -> Key:
        """The key of a step: a function of the run's seed, the stage's name and the step."""
        key = jax.random.fold_in(jax.random.key(self.context.config.seed), _number(self.name))
        return jax.random.fold_in(key, step)

    @property
    def seed(self) -> int:
        """Seed of the order of the stage's examples."""
        return self._stream_seed(self.name)

    def problems(
        self, start: int, count: int, difficulties: tuple[int, ...] | None = None
    ) -> list[Problem]:
        """Training problems `start` .. `start + count - 1` of the stage's stream.

        Args:
            start: number of the first, counted from 0.
            count: of problems.
            difficulties: in place of those that the stage's `problems` name.
        """
        places = self.places(start, count, difficulties)
        return [self.context.tasks.at(place._asdict()) for place in places]

    def places(
        self, start: int, count: int, difficulties: tuple[int, ...] | None = None
    ) -> list[Place]:
        """Where those problems come from."""
        chosen = problems_of(self.config)
        assert chosen is not None, f"stages.{self.name} reads rows, not problems"
        stream = chosen.stream or self.name
        levels = (chosen.difficulties if difficulties is None else difficulties) or (None,)

        def place(number: int) -> Place:
            if chosen.pool is not None:
                epoch, position = divmod(number, chosen.pool)
                number = int(_order(self._stream_seed(stream), epoch, chosen.pool)[position])
            level = random.Random(f"{stream}|{number}").choice(levels)
            # Streams must not overlap: each starts at its own large index.
            return Place(_number(stream) * 2**24 + number, level, chosen.task)

        return [place(number) for number in range(start, start + count)]

    def _stream_seed(self, stream: str) -> int:
        return (self.context.config.seed << 32) + _number(stream)

    def parent_params(self) -> Params:
        """The parameters that the stage starts from; also the reference of its losses."""
        return self.context.restore_params(self.parent)

    def check_rows(self, option: str, rows: int, *, microbatches: int = 1) -> None:
        """Refuse a number of rows that does not divide into microbatches over the mesh.

        Raises:
            InputError: naming the option.
        """
        devices = batch_multiple(self.context.mesh)
        if rows % (devices * microbatches):
            raise InputError(
                f"stages.{self.name}.{option}={rows} must be a multiple of "
                f"{devices * microbatches}: {devices} devices along data, fsdp and expert"
                + (f", {microbatches} microbatches" if microbatches > 1 else "")
            )

    def devices(self) -> dict[str, Any]:
        """What the last bits of a result depend on besides the configuration."""
        mesh = self.context.mesh
        return {
            "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
            "kind": mesh.devices.flat[0].device_kind,
            "processes": processes.count(),
            "jax": jax.__version__,
        }

    def meta(self, **more: Any) -> dict[str, Any]:
        """What a checkpoint of this stage says about its origin."""
        return {
            "run": self.context.config.name,
            "stage": self.name,
            "kind": self.config.kind,
            "hash": self.hash,
            "config": to_json(self.config),
            "parent": str(checkpoint.find(self.parent)),
            "parent_hash": self.parent_hash,
            **({} if self.other is None else {"other": str(self.other)}),
            "seed": self.context.config.seed,
            "code_version": __version__,
            "devices": self.devices(),
            **more,
        }


_ROOM = (
    "set max_visual_tokens to the most tokens that stand for the images and videos of one prompt"
)


def _check_eyes(config: RunConfig, tasks: TaskSet, *, sees: bool) -> None:
    """Refuse tasks and a model of which only one has to do with images."""
    names = [config.task.name, *(choice.name for choice in config.tasks.values())]
    pairs = zip(names, tasks.all(), strict=True)
    shows = next((name for name, task in pairs if isinstance(task, VisualTask)), None)
    if config.max_visual_tokens is not None and not sees:
        raise InputError(
            f"max_visual_tokens={config.max_visual_tokens} cannot act: the model reads text only; "
            "remove it or choose a vision-language model"
        )
    if shows is not None and not sees:
        raise InputError(
            f"task {shows!r} shows images or videos and the model reads text only; set "
            "model.path to a vision-language model or choose another task"
        )
    if shows is not None and config.max_visual_tokens is None:
        raise InputError(f"task {shows!r} shows images or videos; {_ROOM}")


def _with_adapter(params: Params, adapter: Params) -> Params:
    """Parameters in a larger tree, which holds an adapter and None where it has none."""
    return {
        name: _with_adapter(params.get(name, {}), value)
        if isinstance(value, dict)
        else params[name]
        if value is None
        else value
        for name, value in adapter.items()
    }


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return epoch_order(seed, epoch, size)


def _number(name: str) -> int:
    """A number in [0, 2**31) for a name, the same in every process."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF
