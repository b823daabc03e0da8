"""Attention of whole rows: every backend against loops over tokens, and against the plain one."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tpu_compiler import tpu_compiler

from jaxrl_reason.models import Model, ModelConfig, attention_rows, attention_splash
from jaxrl_reason.models.attention import Window, attend, row_mask
from jaxrl_reason.models.attention_blockwise import BLOCK, attend_blocks, plan_blocks
from jaxrl_reason.models.attention_cudnn import attend_cudnn, plan_cudnn
from jaxrl_reason.models.attention_rows import choose_backend, row_attention
from jaxrl_reason.models.attention_splash import attend_splash, plan_splash

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
NO_MESH = jax.sharding.get_abstract_mesh()


def ragged(length, rows=3, seed=0):
    """Segment and branch ids of rows of prompts with branches; the last row is padding."""
    rng = np.random.default_rng(seed)
    segments, branches = np.zeros((2, rows, length), np.int32)
    for row in range(rows - 1):
        at, document, branch = 0, 0, 0
        while at < length - 5:
            document += 1
            trunk, *rest = (1 + rng.integers(0, length // 6, 1 + rng.integers(0, 4))).tolist()
            for size in (trunk, *rest):
                segments[row, at : at + size] = document
                branches[row, at : at + size] = branch if size is not trunk else 0
                at += size
                branch += 1
        segments[row, length - 2 :] = branches[row, length - 2 :] = 0
    return segments, branches


def places(segments, branches):
    """The position of every token along its trunk and branch; 0 at padding."""
    positions = np.zeros_like(segments)
    for row, (of_row, in_row) in enumerate(zip(segments, branches, strict=True)):
        for slot in np.flatnonzero(of_row):
            before = (of_row[:slot] == of_row[slot]) & np.isin(in_row[:slot], (0, in_row[slot]))
            positions[row, slot] = before.sum()
    return positions


def real(segments, like):
    """1 at documents and 0 at padding, to multiply [B T N H] or [B T D] with."""
    return jnp.asarray(segments > 0, like.dtype).reshape(*segments.shape, *[1] * (like.ndim - 2))


def arrays(length, rows=3, heads=4, kv_heads=2, width=8, dtype=np.float32):
    """Queries, keys, values, and the gradient that arrives at the output."""
    rng = np.random.default_rng(1)
    shapes = [(rows, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def sees(segments, branches, q, k):
    return k <= q and segments[k] == segments[q] and branches[k] in (0, branches[q])


def close(positions, q, k, reach):
    return positions[q] - positions[k] < reach


def oracle(segments, branches, queries, keys, values, gradient, reach=None):
    """Output and gradients by loops over rows, heads and queries, in NumPy and float64."""
    positions = places(segments, branches)
    rows, length, heads, width = queries.shape
    group = heads // keys.shape[2]
    out, dq = np.zeros(queries.shape), np.zeros(queries.shape)
    dk, dv = np.zeros(keys.shape), np.zeros(keys.shape)
    for b in range(rows):
        for t in range(length):
            seen = [s for s in range(t + 1) if sees(segments[b], branches[b], t, s)]
            seen = seen if reach is None else [s for s in seen if close(positions[b], t, s, reach)]
            for n in range(heads):
                m = n // group
                k, v, g = keys[b, seen, m], values[b, seen, m], gradient[b, t, n]
                weights = np.exp(k @ queries[b, t, n] / np.sqrt(width))
                weights /= weights.sum()
                out[b, t, n] = weights @ v
                dscores = weights * (v @ g - g @ out[b, t, n]) / np.sqrt(width)
                dq[b, t, n] = dscores @ k
                np.add.at(dk, (b, seen, m), np.outer(dscores, queries[b, t, n]))
                np.add.at(dv, (b, seen, m), np.outer(weights, g))
    return out, (dq, dk, dv)


def value_and_gradients(function, queries, keys, values, gradient):
    @jax.jit
    def run(queries, keys, values, gradient):
        out, pull = jax.vjp(function, queries, keys, values)
        return out, pull(gradient)

    return run(queries, keys, values, gradient)


def functions(segments, branches, reach=None):
    """Every backend as a function of queries, keys and values, to run on a CPU."""
    ids = [jnp.asarray(segments), jnp.asarray(branches)]
    if reach is not None:
        ids.append(Window(jnp.asarray(places(segments, branches)), reach))
    return {
        "plain": lambda q, k, v: attend(q, k, v, row_mask(*ids)),
        "blockwise": lambda q, k, v: attend_blocks(q, k, v, plan_blocks(*ids)),
        "cudnn": lambda q, k, v: attend_cudnn(q, k, v, plan_cudnn(*ids), implementation="xla"),
        "splash": lambda q, k, v: attend_splash(q, k, v, plan_splash(*ids), interpret=True),
    }


def assert_close(got, wanted, scale):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=scale, atol=scale * float(np.max(np.abs(b))))


def test_the_ragged_rows_of_these_tests_hold_what_they_should():
    segments, branches = ragged(150)
    assert segments[0].max() > 2
    assert branches[0].max() > 4
    assert not segments[2].any()
    assert ((segments > 0) & (branches == 0)).any()


@pytest.mark.parametrize("name", ["plain", "blockwise"])
@pytest.mark.parametrize(("length", "reach"), [(7, None), (150, None), (150, 9)])
def test_backend_equals_loops_in_float64(name, length, reach):
    segments, branches = ragged(length)
    with jax.enable_x64(True):
        given = arrays(length, dtype=np.float64)
        documents = real(segments, given[-1])
        given[-1] = given[-1] * documents
        wanted = oracle(segments, branches, *map(np.asarray, given), reach)
        out, gradients = value_and_gradients(functions(segments, branches, reach)[name], *given)
        assert_close((out * documents, gradients), (wanted[0] * documents, wanted[1]), 1e-10)


@pytest.mark.parametrize("reach", [None, 17])
@pytest.mark.parametrize(("name", "length"), [("blockwise", 150), ("cudnn", 150), ("splash", 270)])
def test_backend_equals_the_plain_one(name, length, reach):
    segments, branches = ragged(length)
    given = arrays(length)
    documents = real(segments, given[-1])
    given[-1] = given[-1] * documents
    every = functions(segments, branches, reach)
    out, gradients = value_and_gradients(every[name], *given)
    wanted = value_and_gradients(every["plain"], *given)
    assert_close((out * documents, gradients), (wanted[0] * documents, wanted[1]), 1e-5)
    assert bool(jnp.all(jnp.isfinite(out)))


@pytest.mark.parametrize("branching", [False, True])
@pytest.mark.parametrize(("length", "seed"), [(270, 0), (700, 1), (1536, 2)])
def test_splash_makes_the_mask_itself(length, seed, branching):
    """No table has the pairs of slots; values and gradients are those of the plain backend."""
    segments, branches = map(jnp.asarray, ragged(length, seed=seed))
    ids = (segments, branches if branching else None)
    plan = jax.jit(plan_splash)(*ids)
    assert plan.by_query.partial_mask_blocks is None
    assert plan.by_key.mask_next is None
    given = arrays(length)
    documents = real(segments, given[-1])
    given[-1] = given[-1] * documents
    splash = lambda q, k, v: attend_splash(q, k, v, plan, interpret=True)
    out, gradients = value_and_gradients(splash, *given)
    wanted = value_and_gradients(lambda q, k, v: attend(q, k, v, row_mask(*ids)), *given)
    assert_close((out * documents, gradients), (wanted[0] * documents, wanted[1]), 1e-5)
    assert bool(jnp.all(jnp.isfinite(out)))


def test_splash_reads_the_mask_where_a_row_has_more_slots_than_numbers_can_tell(monkeypatch):
    segments, branches = map(jnp.asarray, ragged(270))
    given = arrays(270)
    function = lambda q, k, v: attend_splash(q, k, v, plan, interpret=True)
    plan = plan_splash(segments, branches)
    made = function(*given[:3])
    monkeypatch.setattr(attention_splash, "_SLOT_BITS", 8)
    plan = plan_splash(segments, branches)
    assert plan.segments is None
    documents = real(segments, made)
    np.testing.assert_allclose(function(*given[:3]) * documents, made * documents, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("branching", [False, True])
def test_splash_passes_over_the_blocks_that_are_empty(seed, branching):
    """As the tables of a whole mask do, but for few in which trunks of several documents begin."""
    segments, branches = map(jnp.asarray, ragged(2048, seed=seed))
    branches = branches if branching else jnp.zeros_like(branches)
    own = plan_splash(segments, branches if branching else None)
    mask = row_mask(segments, branches) & (segments > 0)[:, :, None]
    needed = np.asarray(mask).reshape(3, 4, 512, 4, 512).any(axis=(2, 4))
    for info in (own.by_query, own.by_key):
        visited = np.asarray(info.block_mask)[:, 0] > 0
        visited = visited.reshape(3, 4, -1, 4).any(axis=2)
        assert (visited >= needed).all()
        assert visited[:2].sum() <= needed[:2].sum() + (2 if branching else 0)


@pytest.mark.parametrize(("side", "axis"), [("by_query", 1), ("by_key", 0)])
def test_splash_fetches_the_blocks_that_it_visits(side, axis):
    info = getattr(plan_splash(*map(jnp.asarray, ragged(2048))), side)
    for blocks, fetched in zip(np.asarray(info.block_mask), info.data_next, strict=True):
        places = np.nonzero(blocks[0])
        np.testing.assert_array_equal(np.asarray(fetched)[0][places], places[axis])


@pytest.mark.parametrize("plan", [row_mask, plan_blocks, plan_cudnn])
def test_rows_without_branch_ids_have_one_branch(plan):
    segments = jnp.asarray(ragged(150)[0])
    with_zeros = jax.jit(lambda ids: plan(ids, jnp.zeros_like(ids)))(segments)
    without = jax.jit(lambda ids: plan(ids, None))(segments)
    jax.tree.map(np.testing.assert_array_equal, without, with_zeros)


def test_blockwise_padding_is_zero_whatever_arrives_there():
    segments, branches = ragged(150)
    given = arrays(150)
    out, gradients = value_and_gradients(functions(segments, branches)["blockwise"], *given)
    for array in (out, *gradients):
        assert not np.asarray(array)[segments == 0].any()
        assert np.asarray(array)[segments > 0].any()


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_lists_every_pair_that_sees_once_and_in_order(seed):
    segments, branches = ragged(5 * BLOCK - 9, seed=seed)
    plan = jax.tree.map(np.asarray, plan_blocks(jnp.asarray(segments), jnp.asarray(branches)))
    mask = np.asarray(row_mask(jnp.asarray(segments), jnp.asarray(branches)))
    mask = np.pad(mask & (segments > 0)[:, :, None], ((0, 0), (0, 9), (0, 9)))
    seen = mask.reshape(-1, 5, BLOCK, 5, BLOCK).any(axis=(2, 4))
    for row, (pairs, count) in enumerate(zip(plan.pairs, plan.count, strict=True)):
        listed = [tuple(pair) for pair in pairs[:count].tolist()]
        assert listed == sorted(set(listed))
        assert set(listed) >= {tuple(pair) for pair in np.argwhere(seen[row]).tolist()}
    assert plan.count[-1] == 0


def test_the_plan_of_a_prompt_with_completions_skips_the_other_completions():
    lengths = [BLOCK] + [2 * BLOCK] * 8
    branches = jnp.asarray(np.repeat(np.arange(9), lengths))[None]
    # Each of 8 completions: 2 blocks that see the prompt, 3 pairs within itself; the prompt itself.
    assert plan_blocks(jnp.ones_like(branches), branches).count.tolist() == [8 * (2 + 3) + 1]


def test_the_plan_of_a_window_skips_blocks_that_lie_further_back():
    segments = jnp.ones((1, 6 * BLOCK), jnp.int32)
    window = Window(jnp.arange(6 * BLOCK, dtype=jnp.int32)[None], BLOCK)
    # Every block sees itself and the one before.
    assert plan_blocks(segments, None, window).count.tolist() == [6 + 5]


def test_bfloat16_rounds_about_as_the_plain_backend_does():
    segments, branches = ragged(300)
    given = arrays(300)
    documents = real(segments, given[-1])
    given[-1] = given[-1] * documents
    every = functions(segments, branches)
    narrow = [x.astype(jnp.bfloat16) for x in given]
    exact = value_and_gradients(every["plain"], *[x.astype(jnp.float32) for x in narrow])
    results = {name: value_and_gradients(every[name], *narrow) for name in ("plain", "blockwise")}
    assert {x.dtype for x in jax.tree.leaves(results)} == {jnp.dtype("bfloat16")}
    error = lambda got, wanted: float(
        jnp.sum(jnp.abs(got.astype(jnp.float32) - wanted) * documents)
    )
    for plain, blocks, wanted in zip(
        *map(jax.tree.leaves, (results["plain"], results["blockwise"], exact)), strict=True
    ):
        assert error(blocks, wanted) < 1.5 * error(plain, wanted)


def batch(length, rows=2):
    segments, branches = ragged(length, rows + 1)
    segments, branches = jnp.asarray(segments[:rows]), jnp.asarray(branches[:rows])
    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.integers(0, 40, segments.shape), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
    return tokens, positions, segments, branches


def loss(model, params, tokens, positions, segments, branches):
    hidden = model.forward(
        params, tokens, positions=positions, segment_ids=segments, branch_ids=branches
    )
    return jnp.sum(jnp.sin(hidden) * real(segments, hidden))


value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_blockwise_model_equals_the_plain_one(remat):
    plain = Model(dataclasses.replace(CONFIG, attention="plain"))
    blocks = Model(dataclasses.replace(CONFIG, attention="blockwise", remat=remat))
    params = jax.jit(plain.init)(jax.random.key(0))
    wanted = value_and_grad(plain, params, *batch(150))
    assert_close(value_and_grad(blocks, params, *batch(150)), wanted, 2e-5)


@pytest.mark.parametrize("attention", ["plain", "blockwise"])
def test_branches_equal_separate_documents(attention):
    """A prompt with three completions in one row, and prompt + completion in a row each."""
    model = Model(dataclasses.replace(CONFIG, attention=attention))
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(3)
    prompt, *completions = (rng.integers(0, 40, n).tolist() for n in (50, 30, 7, 61))
    tokens, branches, positions = list(prompt), [0] * 50, list(range(50))
    for number, completion in enumerate(completions, 1):
        tokens += completion
        branches += [number] * len(completion)
        positions += range(50, 50 + len(completion))
    row = [jnp.asarray([x], jnp.int32) for x in (tokens, positions, [1] * len(tokens), branches)]
    hidden = forward(model, params, *row)[0]
    at = 50
    for completion in completions:
        alone = jnp.asarray([prompt + completion], jnp.int32)
        positions = jnp.arange(alone.shape[1])[None]
        wanted = forward(model, params, alone, positions, jnp.ones_like(alone), None)[0, 50:]
        np.testing.assert_allclose(hidden[at : at + len(completion)], wanted, atol=2e-5)
        at += len(completion)


@jax.jit(static_argnums=0)
def forward(model, params, tokens, positions, segments, branches):
    return model.forward(
        params, tokens, positions=positions, segment_ids=segments, branch_ids=branches
    )


@pytest.mark.parametrize("attention", ["auto", "blockwise"])
def test_eight_devices_equal_one(mesh8, attention):
    plain = Model(dataclasses.replace(CONFIG, attention="plain"))
    params = jax.jit(plain.init)(jax.random.key(0))
    given = batch(150, rows=4)
    wanted = value_and_grad(plain, params, *given)
    cut = jax.device_put(given, NamedSharding(mesh8, PartitionSpec(("data", "fsdp"))))
    blocks = Model(dataclasses.replace(CONFIG, attention=attention, remat="full"))
    with jax.set_mesh(mesh8):
        got = value_and_grad(blocks, params, *cut)
        program = value_and_grad.lower(blocks, params, *cut).as_text()
    assert "sdy.manual_computation" in program
    assert_close(got, wanted, 2e-5)


def test_a_backend_runs_within_a_shard_map_of_the_caller(mesh8):
    segments, branches = ragged(150, rows=8)
    *given, _ = arrays(150, rows=8)
    config = dataclasses.replace(CONFIG, attention="blockwise")
    rows = PartitionSpec(("data", "fsdp", "tensor"))

    @jax.jit
    @jax.shard_map(in_specs=rows, out_specs=rows, check_vma=False)
    def run(queries, keys, values, segments, branches):
        return row_attention(config, segments, branches)(False)(queries, keys, values)

    with jax.set_mesh(mesh8):
        got = run(*given, jnp.asarray(segments), jnp.asarray(branches))
    wanted = functions(segments, branches)["blockwise"](*given)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("platform", "change", "shape", "chosen"),
    [
        ("cpu", {}, (4, 128), "blockwise"),
        ("cpu", {}, (4, BLOCK), "plain"),
        ("cpu", {"attention": "plain"}, (4, 128), "plain"),
        ("gpu", {"dtype": "bfloat16"}, (4, 128), "cudnn"),
        ("gpu", {}, (4, 128), "plain"),
        ("gpu", {"dtype": "bfloat16", "head_dim": 132}, (4, 128), "plain"),
        ("gpu", {"dtype": "bfloat16", "attention": "blockwise"}, (4, 128), "blockwise"),
        ("tpu", {}, (4, 128), "splash"),
        ("rocm", {"dtype": "bfloat16"}, (4, 128), "plain"),
    ],
)
def test_auto_takes_what_suits_the_platform(monkeypatch, platform, change, shape, chosen):
    monkeypatch.setattr(attention_rows, "platform_of", lambda mesh: platform)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose_backend(dataclasses.replace(CONFIG, **change), shape, NO_MESH) == chosen


def test_auto_is_plain_where_the_rows_cannot_be_cut(mesh8):
    mesh = mesh8.abstract_mesh
    one_head = dataclasses.replace(CONFIG, num_key_value_heads=1)
    assert choose_backend(CONFIG, (4, 128), mesh) == "blockwise"
    assert choose_backend(CONFIG, (6, 128), mesh) == "plain"
    assert choose_backend(one_head, (4, 128), mesh) == "plain"
    assert choose_backend(CONFIG, (4, 128), NO_MESH) == "plain"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "cudnn"}, "'cudnn' cannot run here: it needs an NVIDIA GPU and .* 'cpu'"),
        ({"attention": "splash"}, "it needs a TPU and the platform is 'cpu'; .* \"auto\""),
        ({"attention": "blockwise"}, "6 rows do not divide over 4 devices"),
        ({"attention": "blockwise", "num_key_value_heads": 1}, "6 rows do not divide"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(mesh8, change, message):
    config = dataclasses.replace(CONFIG, **change)
    with jax.set_mesh(mesh8), pytest.raises(ValueError, match=message):
        row_attention(config, jnp.ones((6, 128), jnp.int32))


@pytest.mark.parametrize(
    ("change", "rows", "message"),
    [
        ({}, 4, "it needs dtype=\"bfloat16\" and dtype is 'float32'"),
        ({"dtype": "bfloat16", "head_dim": 132}, 4, "multiple of 8 up to 128, and it is 132"),
        ({"dtype": "bfloat16", "num_key_value_heads": 1}, 4, "1 key heads do not divide over 2"),
    ],
)
def test_what_cudnn_cannot_do_is_refused(monkeypatch, mesh8, change, rows, message):
    monkeypatch.setattr(attention_rows, "platform_of", lambda mesh: "gpu")
    config = dataclasses.replace(CONFIG, attention="cudnn", **change)
    with pytest.raises(ValueError, match=message):
        choose_backend(config, (rows, 128), mesh8.abstract_mesh)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="attention='flash' is unknown; one of auto, plain"):
        dataclasses.replace(CONFIG, attention="flash")


def test_cudnn_lowers_forward_and_backward(monkeypatch):
    # There is no cuDNN here to ask for its version, which is all that lowering wants of it.
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91_200)
    segments, branches = map(jnp.asarray, ragged(150))
    given = [x.astype(jnp.bfloat16) for x in arrays(150, width=64)]

    def gradients(queries, keys, values, gradient, segments, branches):
        mix = lambda q, k, v: attend_cudnn(q, k, v, plan_cudnn(segments, branches))
        return jax.vjp(mix, queries, keys, values)[1](gradient)

    traced = jax.jit(gradients).trace(*given, segments, branches)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in program
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in program


COMPILE_FOR_TPU = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxrl_reason.models import Model, ModelConfig

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
axes, types = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
mesh = Mesh(np.asarray(devices).reshape(2, 1, 2), axes, axis_types=types)
model = Model(ModelConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=64,
    num_attention_heads=4, num_key_value_heads=2, dtype="bfloat16", remat="full",
))
place = lambda spec: lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
)
params = jax.tree.map(place(PartitionSpec()), jax.eval_shape(model.init, jax.random.key(0)))
ids = place(PartitionSpec(("data", "fsdp")))(jax.ShapeDtypeStruct((2, 300), jnp.int32))

def loss(params, tokens, positions, segments, branches):
    hidden = model.forward(
        params, tokens, positions=positions, segment_ids=segments, branch_ids=branches
    )
    return jnp.sum(hidden.astype(jnp.float32) ** 2)

with jax.set_mesh(mesh):
    for branches in (ids, None):
        lowered = jax.jit(jax.grad(loss)).lower(params, ids, ids, ids, branches)
        program = lowered.compile().as_text()
        for phase in ("fwd", "dq", "dkv"):
            print(f"splash_mha_{phase}_segmented" in program)
        print("[384,384]" not in program)
"""


@pytest.mark.skipif(
    tpu_compiler() is None,
    reason="the compiler for TPUs is in libtpu, which is not installed (pip install libtpu)",
)
def test_splash_compiles_for_a_tpu_forward_and_backward_on_a_mesh():
    library = tpu_compiler()
    # A process of its own: the library locks itself to one, and logs to standard error.
    settings = {
        "TPU_LIBRARY_PATH": str(library),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_TPU],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True"] * 8
