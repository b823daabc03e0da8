"""tunix as a contestant: GRPOLearner with its own sampler (W1, W2), the sampler alone (W4).

    python peer_tunix.py --prompts-per-pass 1

Float32, no remat, `beta = 0`, one update per rollout. Its sequence packing for the update
(`max_seq_token_per_tpu`) stays off: outside its TPU kernel it attends without any mask.
`--prompts-per-pass` is `train_micro_batch_size`; the rest of a step is gradient accumulation.
"""

import argparse
import time
from importlib.metadata import version

import jax
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler as sampler_lib
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster as cluster_lib
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from jaxrl_reason.bench.worker import Turns, Work, serve
from jaxrl_reason.bench.workloads import PAD_ID, Shape, Workload, prompts, reward, stop_ids

MANY = 10**6


class Numbers:
    """Token ids as decimal numbers between spaces."""

    def __init__(self, stop: int):
        self.stop = stop

    def encode(self, text: str, **_) -> list[int]:
        """Token ids of a text."""
        return [int(word) for word in text.split()]

    def decode(self, ids, **_) -> str:
        """The text of token ids."""
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        """None: a prompt begins with its own first token."""
        return 0

    def eos_id(self) -> int:
        """A token that ends a completion."""
        return self.stop

    def pad_id(self) -> int:
        """Marks what is no token."""
        return PAD_ID


def make_model(shape: Shape) -> qwen3.Qwen3:
    """A model with random weights, initialised as tunix does."""
    config = qwen3.ModelConfig(
        num_layers=shape.num_hidden_layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.hidden_size,
        hidden_dim=shape.intermediate_size,
        num_heads=shape.num_attention_heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.num_key_value_heads,
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
        dtype=jax.numpy.dtype(shape.dtype),
        param_dtype=jax.numpy.dtype(shape.dtype),
    )
    return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


def stops_of(workload: Workload, shape: Shape) -> list[int]:
    """The stop tokens; where there are none, an id that none can draw, for tunix requires one."""
    return stop_ids(workload, shape) or [shape.vocab_size]


def texts(workload: Workload, shape: Shape, repeat: int) -> list[str]:
    """The prompts of a repeat as the sampler takes them."""
    return [" ".join(map(str, prompt)) for prompt in prompts(workload, shape, repeat)]


def work_of(workload: Workload, tokens, parts: dict[str, float]) -> Work:
    """Counts of what the sampler returned: completions without the token that ended them."""
    longest = workload.max_new_tokens
    useful = [min(len(row) + 1, longest) for row in tokens]
    return Work(useful_tokens=sum(useful), computed_tokens=max(useful) * len(useful), parts=parts)


def info(model) -> dict:
    """What is being timed."""
    packages = ("google-tunix", "jax", "flax", "optax")
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return {name: version(name) for name in packages} | {"num_parameters": int(count)}


class Generate:
    """All completions of a repeat, sampled at temperature 1 without truncation."""

    def __init__(self, workload: Workload, shape: Shape, options: argparse.Namespace):
        self.workload, self.shape = workload, shape
        self.stops = stops_of(workload, shape)
        model = make_model(shape)
        self.info = info(model)
        self.sampler = sampler_lib.Sampler(
            model,
            Numbers(self.stops[0]),
            sampler_lib.CacheConfig(
                cache_size=workload.prompt_length[1] + workload.max_new_tokens,
                num_layers=shape.num_hidden_layers,
                num_kv_heads=shape.num_key_value_heads,
                head_dim=shape.head_dim,
            ),
        )

    def run(self, repeat: int) -> Work:
        """Complete the prompts of the repeat."""
        todo = texts(self.workload, self.shape, repeat)
        out = self.sampler(
            [text for text in todo for _ in range(self.workload.num_generations)],
            max_generation_steps=self.workload.max_new_tokens,
            max_prompt_length=self.workload.prompt_length[1],
            eos_tokens=self.stops,
            temperature=1.0,
            top_p=1.0,  # without it, decoding is greedy
            seed=repeat,
        )
        return work_of(self.workload, out.tokens, {})


class GRPO:
    """One step of GRPOLearner a repeat: rollout, rewards, loss, AdamW."""

    def __init__(self, workload: Workload, shape: Shape, options: argparse.Namespace):
        self.workload, self.shape = workload, shape
        stops = stops_of(workload, shape)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
        model = make_model(shape)
        per_pass = min(options.prompts_per_pass, workload.num_prompts)
        self.info = info(model) | {"prompts_per_pass": per_pass}
        self.rollout_config = base_rollout.RolloutConfig(
            max_tokens_to_generate=workload.max_new_tokens,
            temperature=1.0,
            top_p=1.0,
            max_prompt_length=workload.prompt_length[1],
            kv_cache_size=workload.prompt_length[1] + workload.max_new_tokens,
            eos_tokens=stops,
        )
        roles = (cluster_lib.Role.ACTOR, cluster_lib.Role.REFERENCE, cluster_lib.Role.ROLLOUT)
        self.cluster = cluster_lib.RLCluster(
            actor=model,
            tokenizer=Numbers(stops[0]),
            cluster_config=cluster_lib.ClusterConfig(
                role_to_mesh=dict.fromkeys(roles, mesh),
                training_config=cluster_lib.RLTrainingConfig(
                    actor_optimizer=optax.adamw(1e-6),
                    eval_every_n_steps=MANY,
                    max_steps=MANY,
                    mini_batch_size=workload.num_prompts,
                    train_micro_batch_size=per_pass,
                    rollout_micro_batch_size=workload.num_prompts,
                    compute_logps_micro_batch_size=workload.num_prompts,
                ),
                rollout_config=self.rollout_config,
            ),
        )
        learner = grpo_learner.GRPOLearner(
            rl_cluster=self.cluster,
            algo_config=grpo_learner.GRPOConfig(
                num_generations=workload.num_generations, num_iterations=1, beta=0.0
            ),
            reward_fns=self._reward,
        )
        self.parts: dict[str, float] = {}
        self._time("generate", "rollout")
        self._time("update_actor", "update")
        self.turns = Turns(lambda pause: learner.train(self._batches(pause)))

    def _batches(self, pause):
        for repeat in range(MANY):
            # The next batch is asked for when the update before it was dispatched.
            jax.block_until_ready(nnx.state(self.cluster.actor_trainer.model))
            pause()
            # Without a seed every rollout would draw with the same numbers.
            self.rollout_config.seed = jax.random.PRNGKey(repeat)
            yield {"prompts": np.array(texts(self.workload, self.shape, repeat))}

    def _reward(self, prompts, completions, **_) -> list[float]:
        return [reward([int(word) for word in text.split()]) for text in completions]

    def _time(self, method: str, part: str) -> None:
        inner = getattr(self.cluster, method)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            if part == "rollout":
                self.tokens = result.tokens
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start
            return result

        setattr(self.cluster, method, timed)

    def run(self, repeat: int) -> Work:
        """One step."""
        self.parts.clear()
        self.turns.step()
        return work_of(self.workload, self.tokens, dict(self.parts))


def main() -> None:
    """Serve the driver."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts-per-pass", type=int, default=1)
    options = parser.parse_args()
    kinds = {"grpo": GRPO, "generate": Generate}
    serve(lambda workload, shape: kinds[workload.kind](workload, shape, options))


if __name__ == "__main__":
    main()
