"""This library on the standard workloads: the engine, rows and steps that the stages use.

Options are the defaults of the stages: what is timed is what a run does, without its logging.
"""

import gc
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrl_reason import __version__
from jaxrl_reason.advantages import group_advantages
from jaxrl_reason.bench.ceilings import decode_bytes, update_flops
from jaxrl_reason.bench.worker import Contestant, Work
from jaxrl_reason.bench.workloads import (
    PAD_ID,
    Shape,
    Workload,
    documents,
    prompts,
    reward,
    stop_ids,
)
from jaxrl_reason.data.batching import fill_rows, microbatches, pack
from jaxrl_reason.models import Model, ModelConfig, Params
from jaxrl_reason.sampling import Completion, Engine, Request, Rollout, SamplingConfig
from jaxrl_reason.sharding import (
    MeshConfig,
    batch_multiple,
    batch_sharding,
    jit_on_mesh,
    make_mesh,
    place_batch,
    replicated,
    tree_shardings,
)
from jaxrl_reason.stages.breakdown import Times
from jaxrl_reason.stages.compiles import CompileWatch
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.policy_config import GRPOConfig
from jaxrl_reason.stages.policy_rows import PolicyRows, may_drop
from jaxrl_reason.steps import (
    OptimizerConfig,
    PolicyObjective,
    Step,
    init_state,
    make_optimizer,
    make_policy_step,
    make_sft_step,
    state_shardings,
)

_STEPS = 64  # of documents, which then come again


def make(workload: Workload, shape: Shape) -> Contestant:
    """What runs the repeats of a workload."""
    kinds = {"grpo": GRPO, "generate": Generate, "sft": SFT}
    return kinds[workload.kind](workload, shape)


class _Setup:
    """A model with random parameters on all devices."""

    def __init__(self, workload: Workload, shape: Shape):
        self.workload, self.shape = workload, shape
        config = ModelConfig(
            **shape.fields,
            max_position_embeddings=2048,
            dtype=shape.dtype,
            param_dtype=shape.dtype,
        )
        self.model = Model(config)
        self.mesh: Mesh = make_mesh(MeshConfig())
        self.watch = CompileWatch(workload.name)
        self.repeats = 0
        shapes = jax.eval_shape(self.model.init, jax.random.key(0))
        self.shardings = tree_shardings(self.mesh, self.model.axes(), shapes)
        init = jax.jit(self.model.init, out_shardings=self.shardings)
        self.params: Params = init(jax.random.key(0))
        self.info = {
            "jaxrl-reason": __version__,
            "jax": version("jax"),
            "devices": [device.device_kind for device in jax.devices()],
            "num_parameters": config.num_parameters,
        }

    def compile_step(self, make_step) -> Step:
        """Turn the parameters into a state, and jit a step of it as the stages do."""
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6), total_steps=1)
        shapes = jax.eval_shape(lambda params: params, self.params)
        whole = replicated(self.mesh)
        states = state_shardings(shapes, optimizer, self.shardings, whole)
        create = jax.jit(lambda params: init_state(params, optimizer), out_shardings=states)
        self.state = create(self.params)
        del self.params
        gc.collect()
        return jit_on_mesh(
            make_step(self.model, optimizer),
            self.mesh,
            in_shardings=(states, batch_sharding(self.mesh, batch_axis=1)),
            out_shardings=(states, whole),
            donate_argnums=0,
        )

    def counts(self, more: dict[str, float]) -> dict[str, float]:
        """What is counted of every repeat, with the programs compiled and the device's memory."""
        memory = jax.devices()[0].memory_stats() or {}
        peak = {"peak_device_mb": memory["peak_bytes_in_use"] / 1e6} if memory else {}
        self.repeats += 1
        return {"compiles": self.watch.look(self.repeats, ()), **peak, **more}


class Generate(_Setup):
    """All completions of a repeat, sampled at temperature 1 without truncation."""

    def __init__(self, workload: Workload, shape: Shape):
        super().__init__(workload, shape)
        self.engine = Engine(
            model=self.model,
            mesh=self.mesh,
            sampling=SamplingConfig(),
            stop_ids=tuple(stop_ids(workload, shape)),
            max_prompt_length=workload.prompt_length[1],
            max_completion_length=workload.max_new_tokens,
            max_rows=workload.num_completions,
            group_size=workload.num_generations,
            steps_per_dispatch=RunConfig.model_fields["steps_per_dispatch"].default,
        )
        self.engine.precompile(self.params)

    def sample(self, params: Params, repeat: int, times: Times) -> tuple[list[Completion], dict]:
        """The completions of a repeat in order, their rewards taken as they end, and counts."""
        self.rewards = np.zeros(self.workload.num_completions, np.float32)
        done: dict[int, Completion] = {}
        with times.phase("rollout"):
            session = self.engine.session(params, jax.random.key(repeat))
            session.submit(
                Request(prompt=prompt, id=i, index=g)
                for i, prompt in enumerate(prompts(self.workload, self.shape, repeat))
                for g in range(self.workload.num_generations)
            )
            for completion in session:
                with times.phase("rewards"):
                    request = completion.request
                    at = request.id * self.workload.num_generations + request.index
                    self.rewards[at] = reward(completion.tokens.tolist())
                    done[at] = completion
        return [done[at] for at in sorted(done)], dict(session.stats)

    def engine_counts(self, completions: list[Completion], stats: dict) -> dict[str, float]:
        """Of the engine's own counts, those worth a record, and what it had to read."""
        names = ("wasted_tokens", "prefill_tokens", "prefill_padding", "dispatches", "moves")
        rows = [(len(c.request.prompt), len(c.tokens)) for c in completions]
        return {
            "decode_bytes": decode_bytes(self.shape, stats["steps"], rows),
            **{name: float(stats[name]) for name in names},
        }

    def run(self, repeat: int) -> Work:
        """Complete the prompts of the repeat."""
        self.watch.start()
        times = Times()
        completions, stats = self.sample(self.params, repeat, times)
        return Work(
            useful_tokens=sum(len(c.tokens) for c in completions),
            computed_tokens=int(stats["row_steps"]),
            parts=_parts(times),
            counts=self.counts(self.engine_counts(completions, stats)),
        )


class GRPO(Generate):
    """One step of GRPO a repeat: rollout, rewards, loss, AdamW."""

    def __init__(self, workload: Workload, shape: Shape):
        super().__init__(workload, shape)
        fields = GRPOConfig.model_fields
        default = lambda name: fields[name].default
        objective = PolicyObjective(
            loss_type=default("loss_type"),
            options={"epsilon": 0.2},
            beta=0.0,
            temperature=1.0,
            max_completion_length=workload.max_new_tokens,
        )
        self.rows = PolicyRows(
            mesh=self.mesh,
            pad_id=PAD_ID,
            max_prompt_length=workload.prompt_length[1],
            max_completion_length=workload.max_new_tokens,
            completions=workload.num_completions,
            num_generations=workload.num_generations,
            microbatch_tokens=default("microbatch_tokens"),
            row_length=default("row_length"),
            drop=may_drop(objective.loss_type, beta=objective.beta),
        )
        chunk = default("logprob_chunk_size")
        self.update = self.compile_step(
            lambda model, optimizer: make_policy_step(
                model, optimizer, objective, logprob_chunk_size=chunk
            )
        )
        self.info |= {"loss_type": objective.loss_type, "rows": [*self.rows.shape]}
        self.info["row_length"] = self.rows.length

    def run(self, repeat: int) -> Work:
        """One step."""
        self.watch.start()
        times = Times()
        completions, stats = self.sample(self.state.params, repeat, times)
        with times.phase("update"):
            rollout = Rollout.of(
                prompts(self.workload, self.shape, repeat),
                self.workload.num_generations,
                completions,
                pad_id=PAD_ID,
                max_completion_length=self.workload.max_new_tokens,
            )
            advantages = group_advantages(
                jnp.asarray(self.rewards), num_generations=self.workload.num_generations
            )
            batch, packing = self.rows.place(rollout, np.asarray(advantages))
            self.state, metrics = self.update(self.state, batch)
            jax.block_until_ready((self.state, metrics))
        paths = [len(c.request.prompt) + len(c.tokens) for c in completions]
        again = [len(c.request.prompt) for c in completions if c.request.index > 0]
        more = {
            "padding_share": packing["padding_share"],
            # A prompt is worked on once for its group.
            "update_flops": update_flops(self.shape, paths) - update_flops(self.shape, again),
            **self.engine_counts(completions, stats),
        }
        return Work(
            useful_tokens=int(rollout.lengths.sum()),
            computed_tokens=int(stats["row_steps"]),
            parts=_parts(times),
            counts=self.counts(more),
        )


class SFT(_Setup):
    """One update on packed rows a repeat, with one row of each device at a time."""

    def __init__(self, workload: Workload, shape: Shape):
        super().__init__(workload, shape)
        texts = documents(workload, shape, steps=_STEPS)
        # A document's first token is predicted by nothing.
        examples = [(text[:1], text[1:]) for text in texts]
        packed = pack([len(text) for text in texts], workload.row_length)
        self.packed = [[examples[i] for i in row] for row in packed]
        self.order = np.random.default_rng(0).permutation(len(packed))
        self.update = self.compile_step(
            lambda model, optimizer: make_sft_step(model, optimizer, logprob_chunk_size=None)
        )
        self.info |= {"packed_rows": len(packed)}

    def run(self, repeat: int) -> Work:
        """One update."""
        self.watch.start()
        times = Times()
        with times.phase("update"):
            rows = self.workload.num_rows
            chosen = np.take(self.order, np.arange(repeat * rows, (repeat + 1) * rows), mode="wrap")
            passes = -(-rows // batch_multiple(self.mesh))
            batch = fill_rows(
                [self.packed[row] for row in chosen],
                self.workload.row_length,
                pad_id=PAD_ID,
                num_rows=passes * batch_multiple(self.mesh),
            )
            used = int(np.count_nonzero(batch["segment_ids"]))
            sizes = [1 + len(rest) for row in chosen for _, rest in self.packed[row]]
            placed = place_batch(microbatches(batch, passes), self.mesh, batch_axis=1)
            self.state, metrics = self.update(self.state, placed)
            jax.block_until_ready((self.state, metrics))
        size = batch["tokens"].size
        return Work(
            useful_tokens=used,
            computed_tokens=size,
            parts=_parts(times),
            counts=self.counts(
                {
                    "padding_share": 1 - used / size,
                    "update_flops": update_flops(self.shape, sizes),
                }
            ),
        )


def _parts(times: Times) -> dict[str, float]:
    """Seconds of the phases that took any."""
    names = {name: value for name, value in times.metrics().items() if name.startswith("time/")}
    return {name.removeprefix("time/"): value for name, value in names.items() if value > 0}
