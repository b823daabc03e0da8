import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_reason import objectives
from jaxrl_reason.objectives import combine, gram_matrix

mgda = jax.jit(objectives.mgda, static_argnames=("normalize", "method", "steps"))
pcgrad = jax.jit(objectives.pcgrad)
cagrad = jax.jit(objectives.cagrad)


@pytest.fixture
def flat():
    return np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)


def as_tree(flat):
    return {"a": flat[:, :4].reshape(3, 2, 2), "b": [flat[:, 4:9], flat[:, 9]]}


METHODS = {
    "mgda": mgda,
    "pcgrad": lambda g: pcgrad(g, jax.random.key(1)),
    "cagrad": lambda g: cagrad(g, c=0.5),
}


@pytest.mark.parametrize("name", METHODS)
def test_trees_and_arrays_agree(name, flat):
    array, tree = METHODS[name](flat), METHODS[name](as_tree(flat))
    assert array.shape == (10,)
    assert jax.tree.map(jnp.shape, tree) == {"a": (2, 2), "b": [(5,), ()]}
    joined = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    np.testing.assert_allclose(joined, array, rtol=1e-4, atol=1e-5)


def test_mgda_works_against_no_objective(flat):
    direction = mgda(flat)
    assert np.all(flat @ direction >= direction @ direction * (1 - 1e-4))
    near, far = (mgda(flat, method="frank_wolfe", steps=steps) for steps in (200, 1))
    assert np.linalg.norm(near - direction) < 0.05 < np.linalg.norm(far - direction)


def test_mgda_mask_and_normalisation(flat):
    kept = mgda(flat, mask=np.asarray([True, True, False]))
    alone = mgda(flat[[0, 1, 1]])  # a clone adds nothing
    np.testing.assert_allclose(kept, alone, rtol=1e-4, atol=1e-5)
    # Two gradients of unit length share the weight equally, whatever their own lengths.
    scaled = flat[:2] * np.asarray([[100.0], [1.0]], np.float32)
    np.testing.assert_allclose(mgda(scaled, normalize="l2"), scaled.mean(0), rtol=1e-4, atol=1e-4)
    assert not np.allclose(mgda(scaled), scaled.mean(0), rtol=0.1)


def test_pcgrad_drops_the_conflict():
    conflict = jnp.asarray([[1.0, 0.0], [-1.0, 1.0]])
    # g1 - <g1,g2>/|g2|^2 g2 = (.5, .5); g2 - <g2,g1>/|g1|^2 g1 = (0, 1); their sum in any order.
    np.testing.assert_allclose(pcgrad(conflict, jax.random.key(0)), [0.5, 1.5], rtol=1e-6)
    agreement = jnp.asarray([[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(pcgrad(agreement, jax.random.key(0)), [2.0, 1.0], rtol=1e-6)
    alone = pcgrad(conflict, jax.random.key(0), mask=jnp.asarray([True, False]))
    np.testing.assert_allclose(alone, [1.0, 0.0])


def test_pcgrad_depends_on_the_key():
    flat = np.random.default_rng(5).normal(size=(5, 3)).astype(np.float32)
    draws = np.stack([pcgrad(flat, jax.random.key(i)) for i in range(6)])
    assert np.ptp(draws, axis=0).max() > 1e-3
    np.testing.assert_array_equal(draws[0], pcgrad(flat, jax.random.key(0)))


def test_cagrad_goes_from_the_mean_to_mgda(flat):
    np.testing.assert_allclose(cagrad(flat, c=0.0), flat.mean(0), rtol=1e-5, atol=1e-6)
    far, shortest = cagrad(flat, c=1e4), mgda(flat)
    cosine = far @ shortest / jnp.linalg.norm(far) / jnp.linalg.norm(shortest)
    assert cosine > 0.999
    kept = cagrad(flat, c=0.5, mask=np.asarray([True, True, False]))
    np.testing.assert_allclose(kept, cagrad(flat[:2], c=0.5), rtol=1e-4, atol=1e-5)


def test_cagrad_at_a_stationary_point_is_finite():
    opposite = jnp.asarray([[1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(cagrad(opposite, c=0.5), [0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("name", ["mgda", "pcgrad", "cagrad"])
def test_a_gradient_that_is_left_out_may_be_nan(name, flat):
    mask = np.asarray([True, False, True])
    options = {"mgda": {}, "pcgrad": {"key": jax.random.key(1)}, "cagrad": {"c": 0.5}}[name]
    combined = functools.partial(getattr(objectives, name), mask=mask, **options)
    clean, bad = combined(as_tree(flat)), combined(as_tree(np.where(mask[:, None], flat, np.nan)))
    jax.tree.map(np.testing.assert_array_equal, bad, clean)


def test_half_precision_leaves():
    gradients = jnp.ones((2, 3), jnp.bfloat16)
    assert gram_matrix(gradients).dtype == jnp.float32
    assert combine(gradients, jnp.ones(2)).dtype == jnp.float32


def test_errors():
    with pytest.raises(ValueError, match="leading sizes"):
        mgda({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="leading sizes"):
        mgda(jnp.ones(()))
    with pytest.raises(ValueError, match=r"mask has shape \(3,\); expected \(2,\)"):
        mgda(jnp.ones((2, 3)), mask=jnp.ones(3))
    with pytest.raises(ValueError, match="normalize='loss' is unknown"):
        mgda(jnp.ones((2, 3)), normalize="loss")


def test_products_are_those_of_float64_and_move_no_gradient(mesh8):
    draw = np.random.default_rng(0)
    shapes = {"wide": (3, 8, 64, 128), "tall": (3, 256, 16), "one": (3,)}
    tree = {name: draw.normal(0.3, 1, shape) for name, shape in shapes.items()}
    flat = np.concatenate([leaf.reshape(3, -1) for leaf in tree.values()], axis=1)
    cut = {"wide": (None, "fsdp", "tensor"), "tall": ("fsdp", None), "one": ()}
    places = {name: NamedSharding(mesh8, PartitionSpec(*spec)) for name, spec in cut.items()}
    gradients = [
        jax.device_put({name: x[i].astype(np.float32) for name, x in tree.items()}, places)
        for i in range(3)
    ]
    stack = lambda *leaves: jnp.stack(leaves)
    gram_of = jax.jit(lambda *trees: gram_matrix(jax.tree.map(stack, *trees)))
    compiled = gram_of.lower(*gradients).compile()
    np.testing.assert_allclose(compiled(*gradients), flat @ flat.T, rtol=1e-6)
    memory = compiled.memory_analysis()  # of a device
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes // 3
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in compiled.as_text()
