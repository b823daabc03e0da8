"""What the stages of a run share, and what one stage knows of itself."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Key

from jaxrl_reason import __version__, checkpoint
from jaxrl_reason.config import hash_json, to_json
from jaxrl_reason.data.batching import Example
from jaxrl_reason.data.tokenizer import (
    PreTrainedTokenizerFast,
    build_tokenizer,
    decode_completion,
    render_completion,
    render_prompt,
)
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Model, Params
from jaxrl_reason.sampling import Engine, SamplingConfig
from jaxrl_reason.sharding import batch_multiple, make_mesh, tree_shardings
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.stage_config import Training
from jaxrl_reason.tasks import Problem, Task, make_task

_VOCABULARY_MULTIPLE = 8  # so that the embedding can be cut over the devices of one machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """A run: its configuration and what follows from it. Holds no training state."""

    config: RunConfig
    directory: Path
    task: Task
    tokenizer: PreTrainedTokenizerFast
    model: Model
    mesh: Mesh

    @classmethod
    def create(cls, config: RunConfig) -> "Context":
        """Build the task, tokenizer, model and mesh of a configuration.

        Raises:
            InputError: the model is too short for prompt and completion, or the mesh does not fit.
        """
        task = make_task(config.task.name, config.task.options)
        tokenizer = build_tokenizer(task.words(), level=config.task.tokenizer)
        vocab_size = -(-len(tokenizer) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        return cls(
            config=config,
            directory=Path(config.output_dir) / config.name,
            task=task,
            tokenizer=tokenizer,
            model=Model(config.model.resolve(vocab_size)),
            mesh=make_mesh(config.mesh),
        )

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

    @functools.cached_property
    def root(self) -> dict[str, Any]:
        """The part of the configuration that the untrained model and the task follow from."""
        config = to_json(self.config)
        return {name: config[name] for name in ("seed", "task", "model")}

    @functools.cached_property
    def root_hash(self) -> str:
        """Identifies the untrained model and the task."""
        return hash_json(self.root)

    def init_params(self) -> Params:
        """Fresh parameters, created where they lie."""
        init = jax.jit(self.model.init, out_shardings=self.params_shardings)
        return init(jax.random.fold_in(jax.random.key(self.config.seed), _number("init")))

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
            stop_ids=(self.tokenizer.eos_token_id,),
            max_prompt_length=self.config.max_prompt_length,
            max_completion_length=max_completion_length,
            max_rows=max_rows,
            group_size=group_size,
            steps_per_dispatch=self.config.steps_per_dispatch,
            detokenize=functools.partial(decode_completion, self.tokenizer),
        )

    def encode(self, prompt: str, completion: str) -> Example:
        """Token ids of a prompt and of its completion."""
        return render_prompt(self.tokenizer, prompt), render_completion(self.tokenizer, completion)

    def encode_prompts(self, problems: Sequence[Problem]) -> list[list[int]]:
        """Token ids of the problems' prompts."""
        return [render_prompt(self.tokenizer, problem.prompt) for problem in problems]

    def decode(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """Texts of completions."""
        return [decode_completion(self.tokenizer, ids) for ids in completions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run: its configuration, its place, and the checkpoint it starts from."""

    context: Context
    name: str
    config: Training
    parent: Path
    """Directory of the parent stage."""
    parent_hash: str

    @property
    def directory(self) -> Path:
        """Where the stage writes."""
        return self.context.directory / self.name

    @functools.cached_property
    def hash(self) -> str:
        """Identifies what the stage computes: its configuration and all that came before it."""
        longest = self.context.config.max_prompt_length
        return hash_json([to_json(self.config), self.name, self.parent_hash, longest])

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
        return (self.context.config.seed << 32) + _number(self.name)

    def problems(self, start: int, count: int) -> list[Problem]:
        """Training problems `start` .. `start + count - 1` of the stage's own stream."""
        # Streams of different stages must not overlap: each starts at its own large index.
        first = _number(self.name) * 2**24 + start
        return [self.context.task.generate("train", first + i) for i in range(count)]

    def parent_params(self) -> Params:
        """The parameters that the stage starts from; also the reference of its losses."""
        return checkpoint.restore_params(self.parent, self.context.params_like)

    def check_rows(self, option: str, rows: int, *, microbatches: int = 1) -> None:
        """Refuse a number of rows that does not divide into microbatches over the mesh.

        Raises:
            InputError: naming the option.
        """
        devices = batch_multiple(self.context.mesh)
        if rows % (devices * microbatches):
            raise InputError(
                f"stages.{self.name}.{option}={rows} must be a multiple of "
                f"{devices * microbatches}: {devices} devices along data and fsdp, "
                f"{microbatches} microbatches"
            )

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
            "seed": self.context.config.seed,
            "code_version": __version__,
            **more,
        }


def _number(name: str) -> int:
    """A number in [0, 2**31) for a name, the same in every process."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF
