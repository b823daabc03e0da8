"""The device's side of sampling: sizes, compiled programs, and where arrays lie on the mesh."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Model, Pages, Params, empty_pages
from jaxrl_reason.models.mesh import TOKEN_AXES
from jaxrl_reason.sampling.batch import Batch, Prefill, RowShape
from jaxrl_reason.sampling.decode import DecodeOptions, Dispatch, Drawn, decode, prefill
from jaxrl_reason.sampling.filters import SamplingConfig
from jaxrl_reason.sampling.shapes import Level, Programs, make_levels, named
from jaxrl_reason.sharding import axes_of, put

FEWEST_ROWS = 8
PREFILL_TOKENS = 8192
BIASED_TOKENS = 16

_GATHERED = {"fsdp", "context"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """Everything about sampling that is fixed for a stage, and the programs that follow from it."""

    model: Model
    mesh: Mesh
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    """A completion ends with any of these tokens."""
    max_prompt_length: int
    max_completion_length: int
    max_rows: int
    """Completions in flight at once."""
    group_size: int = 1
    """Completions of a prompt that are usually asked for together."""
    max_contexts: int | None = None
    """Prompts in flight at once; by default, as many as fill the rows with whole groups."""
    steps_per_dispatch: int = 16
    """Decode steps between two looks of the host."""
    page_size: int = 0
    """Tokens of a page of keys and values; 0: 128 on TPUs, whose registers are as wide, else 64."""
    visual_tokens: int = 0
    """Most tokens of a prompt that stand for images and videos; 0: prompts are text alone."""
    detokenize: Callable[[Sequence[int]], str] | None = None
    """Tokens to text; needed for stop strings only."""
    compiling: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    """A context in which a program is compiled that nobody has compiled before."""

    def __post_init__(self):
        if self.page_size == 0:
            size = 128 if self._platform == "tpu" else 64
            object.__setattr__(self, "page_size", size)
        room = self.model.config.max_position_embeddings
        if self.max_prompt_length + self.max_completion_length > room:
            raise InputError(
                f"max_prompt_length={self.max_prompt_length} plus max_completion_length="
                f"{self.max_completion_length} exceeds the model's max_position_embeddings={room}"
            )
        for name in ("max_rows", "group_size", "steps_per_dispatch", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @functools.cached_property
    def programs(self) -> Programs:
        """The compiled programs, counted."""
        of = (self.model, self.mesh, self._options, self.page_size, self.pages_per_row)
        return Programs(of, self.compiling)

    @property
    def _options(self) -> DecodeOptions:
        return DecodeOptions(
            most_steps=self.most_steps,
            sampling=self.sampling,
            stop_ids=self.stop_ids,
            devices=self.devices,
            opens=self.opens,
            unstack=self._unstacks,
        )

    @property
    def _unstacks(self) -> bool:
        """Whether layers are taken apart once a dispatch.

        On a CPU products want them apart, and on a TPU the kernels of experts, which cannot read a
        layer where it lies in a stack.
        """
        has_experts = self.model.config.num_experts > 0
        return self._platform == "cpu" or (self._platform == "tpu" and has_experts)

    @property
    def opens(self) -> bool:
        """Whether pages that are written are apart from the cache meanwhile (`OpenPages`)."""
        return self._platform == "tpu"

    @property
    def _platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def most_steps(self) -> int:
        """Decode steps of a dispatch: never more than a page has tokens."""
        return min(self.steps_per_dispatch, self.page_size, self.max_completion_length)

    @property
    def most_tokens(self) -> int:
        """The longest prompt with the longest completion."""
        return self.max_prompt_length + self.max_completion_length

    @property
    def pages_per_row(self) -> int:
        """Pages that one completion may read: its context's and its own, each rounded up."""
        return self.pages(self.most_tokens) + 1

    @functools.cached_property
    def levels(self) -> tuple[Level, ...]:
        """The sizes that the arrays may have, the largest first."""
        groups = -(-self.max_rows // self.group_size)
        return make_levels(
            rows=self.max_rows,
            group_size=min(self.group_size, self.max_rows),
            contexts=self.max_contexts or groups,
            pages_per_context=self.pages(self.max_prompt_length - 1),
            longest_context=self.pages(self.most_tokens),
            pages_per_row=self.pages(self.max_completion_length),
            devices=self.devices,
            fewest_rows=FEWEST_ROWS,
        )

    @property
    def devices(self) -> int:
        """Rows divide over this many devices."""
        return math.prod(self.mesh.shape[axis] for axis in self._row_axes)

    @property
    def _row_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in TOKEN_AXES if axis in self.mesh.shape)

    def pages(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def batch(self, level: Level, own_pages: int) -> Batch:
        """A batch without completions."""
        return Batch(level, own_pages, self.page_size, self.pages_per_row)

    def empty_pages(self, level: Level, own_pages: int) -> Pages:
        """Pages without tokens, where they lie on the mesh."""
        return self.empty_program(level, own_pages)()

    def empty_program(self, level: Level, own_pages: int) -> Callable[[], Pages]:
        """What makes `empty_pages`."""
        make = named("empty_pages", functools.partial(self._make_pages, level, own_pages))
        lower = lambda: jax.jit(make, out_shardings=self._page_sharding).lower()
        return self.programs.get(("empty", level.context_pages, own_pages), lower)

    def pages_like(self, level: Level, own_pages: int) -> Pages:
        """Shapes with shardings, to compile for."""
        like = lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=self._page_sharding.own_keys
        )
        return jax.tree.map(like, jax.eval_shape(lambda: self._make_pages(level, own_pages)))

    def _make_pages(self, level: Level, own_pages: int) -> Pages:
        return empty_pages(self.model.config, level.context_pages, own_pages, self.page_size)

    def place(self, params: Params) -> Params:
        """Parameters as sampling reads them: where they are, or copied once.

        A decode step reads every parameter for a single token of each row. Cut over `fsdp` or
        `context`, all of them would be gathered at every step; and those that are stored wider than
        they are computed with would be rounded at every step.
        """
        if self.copies(params):
            return self.copy_program(params)(params)
        return self.model.parts_to_sample(params)

    def copies(self, params: Params) -> bool:
        """Whether sampling reads other arrays than these, which may be shapes."""
        pairs = jax.tree.map(
            lambda old, new: (old.dtype, old.sharding) != (new.dtype, new.sharding),
            self.model.parts_to_sample(params),
            self.placed_like(params),
        )
        return any(jax.tree.leaves(pairs))

    def copy_program(self, params: Params):
        """What makes the copies, of parameters with these shapes and shardings."""
        before = jax.tree.map(lambda x: x.sharding, self.model.parts_to_sample(params))
        after = jax.tree.map(lambda x: x.sharding, self.placed_like(params))

        def copy(params):
            # Rounded first, so that half as much is sent.
            rounded = self.model.to_sample(params)
            return jax.lax.with_sharding_constraint(rounded, before)

        lower = lambda: jax.jit(named("copy", copy), out_shardings=after).lower(params)
        return self.programs.get(("copy",), lower)

    def placed_like(self, params: Params) -> Params:
        """Shapes of the parameters as sampling reads them, with where they lie."""

        def placed(old, new):
            place = old.sharding
            if any(self.mesh.shape.get(axis, 1) > 1 for axis in _GATHERED):
                spec = [None if {*axes_of(axes)} & _GATHERED else axes for axes in place.spec]
                place = NamedSharding(self.mesh, PartitionSpec(*spec))
            return jax.ShapeDtypeStruct(new.shape, new.dtype, sharding=place)

        rounded = jax.eval_shape(self.model.to_sample, params)
        return jax.tree.map(placed, self.model.parts_to_sample(params), rounded)

    def run_decode(
        self, params: Params, level: Level, pages: Pages, dispatch: Dispatch
    ) -> tuple[Drawn, Pages]:
        """`decode` by its compiled program; `pages` are donated."""
        dispatch = self._put(dispatch, self._dispatch_sharding)
        return self.decode_program(params, level, pages, dispatch)(params, pages, dispatch)

    def decode_program(self, params: Params, level: Level, pages: Pages, dispatch: Dispatch):
        """`decode` for arguments of these shapes."""

        def lower():
            function = jax.jit(
                named("decode", functools.partial(decode, self.model, self._options)),
                in_shardings=(
                    None,
                    self._page_sharding,
                    self._dispatch_sharding,
                ),
                out_shardings=(self._replicated, self._page_sharding),
                donate_argnums=1,
            )
            with jax.set_mesh(self.mesh):  # experts are cut over it
                return function.lower(params, pages, dispatch)

        own = pages.own_keys[0].shape[0]
        sizes = (level.rows, level.context_pages, level.readers, own)
        name = ("decode", *sizes, dispatch.bias is not None)
        return self.programs.get(name, lower)

    def run_prefill(self, params: Params, pages: Pages, group: Prefill) -> Pages:
        """`prefill` by its compiled program; `pages` are donated."""
        context = pages._replace(own_keys=(), own_values=())
        group = self._put(group, self._by_row)
        written = self.prefill_program(params, context, group)(params, context, *group)
        return written._replace(own_keys=pages.own_keys, own_values=pages.own_values)

    def prefill_program(self, params: Params, context: Pages, group: Prefill):
        """`prefill` for arguments of these shapes; pages without own ones."""
        sharding = self._page_sharding._replace(own_keys=None, own_values=None)
        rows, length = group.tokens.shape
        by_row = self._by_row

        def lower():
            function = jax.jit(
                named("prefill", functools.partial(prefill, self.model)),
                in_shardings=(None, sharding, by_row, by_row, by_row, by_row, by_row),
                out_shardings=sharding,
                donate_argnums=1,
            )
            with jax.set_mesh(self.mesh):  # attention of whole rows is cut over it
                return function.lower(params, context, *group)

        name = ("prefill", context.context_keys[0].shape[0], rows, length)
        return self.programs.get(name, lower)

    def run_move(self, pages: Pages, context: np.ndarray, own: np.ndarray) -> Pages:
        """The pages with these indices, in this order; an index past the end gives an empty page.

        Indices are those of each device's own pages. Array by array, because sizes of the two kinds
        would otherwise multiply to many programs.
        """
        indices = Pages(context, context, own, own)
        indices = self._put(indices, self._by_row)
        moved = lambda array, at: self.move_program(array, at)(array, at)
        each = lambda arrays, at: tuple(moved(array, at) for array in arrays)
        return Pages(*map(each, pages, indices))

    def move_program(self, array, at: np.ndarray):
        """`jnp.take` on every device, for arguments of these shapes."""
        take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
        of_pages, of_indices = self._page_sharding.own_keys.spec, PartitionSpec(self._row_axes)
        each = jax.shard_map(
            take, mesh=self.mesh, in_specs=(of_pages, of_indices), out_specs=of_pages
        )
        lower = lambda: jax.jit(named("move", each)).lower(array, at)
        return self.programs.get(("move", *array.shape, len(at)), lower)

    def row_shape(self, length: int, none: int) -> RowShape:
        """The rows that contexts are prefilled in; `none` stands for no page."""
        config, features = self.model.config, None
        if self.visual_tokens:
            levels = len(config.vision.deepstack_visual_indexes)
            features = (self.visual_tokens, config.hidden_size, levels)
        return RowShape(length=length, page_size=self.page_size, none=none, features=features)

    @property
    def prefill_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Numbers of rows of a device, and lengths of a row, that contexts are prefilled in."""
        lengths = {self.pages(max(1, self.max_prompt_length - 1)), self.pages(self.most_tokens)}
        of_device = -(-self.max_rows // self.devices)
        rows, most = [1], max(1, min(of_device, PREFILL_TOKENS // self.most_tokens))
        while rows[-1] < most:
            rows.append(2 * rows[-1])
        return tuple(rows), tuple(sorted(n * self.page_size for n in lengths))

    @functools.cached_property
    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @functools.cached_property
    def _by_row(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(self._row_axes))

    @property
    def _dispatch_sharding(self) -> Dispatch:
        by_row, whole = self._by_row, self._replicated
        return Dispatch(by_row, by_row, by_row, whole, whole, whole, whole)

    def _put(self, tree, sharding):
        """What programs of several processes are given; one process gives host arrays."""
        return tree if jax.process_count() == 1 else put(tree, sharding)

    @functools.cached_property
    def _page_sharding(self) -> Pages:
        sharding = NamedSharding(self.mesh, PartitionSpec(self._row_axes, "tensor"))
        return Pages(sharding, sharding, sharding, sharding)
