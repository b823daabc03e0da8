"""Log-probs and entropies against NumPy, and the chunked form against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.logprobs import (
    _at_width,
    chunked_target_logprobs,
    chunked_token_logprobs,
    token_entropy,
    token_logprobs,
)

B, T, D, V = 3, 7, 5, 11


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    return hidden, head, rng.integers(0, V, (B, T)).astype(np.int32)


def oracle(logits, tokens, temperature):
    logprobs, entropy = np.zeros((B, T)), np.zeros((B, T))
    for b in range(B):
        for t in range(1, T):
            p = np.exp(logits[b, t - 1] / temperature)
            p /= p.sum()
            logprobs[b, t] = np.log(p[tokens[b, t]])
            entropy[b, t] = -np.sum(p * np.log(p))
    return logprobs, entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_values_against_numpy_in_float64(temperature):
    hidden, head, tokens = arrays()
    logits = hidden @ head
    with jax.enable_x64(True):
        wanted = oracle(logits, tokens, temperature)
        got = token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), temperature=temperature)
        np.testing.assert_allclose(got, wanted[0], atol=1e-12)
        entropy = token_entropy(jnp.asarray(logits), temperature=temperature)
        np.testing.assert_allclose(entropy, wanted[1], atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 3, 6, 9, 1000])
def test_chunks_change_neither_values_nor_gradients(chunk_size):
    hidden, head, tokens = (jnp.asarray(x) for x in arrays(1))
    hidden, head = hidden.astype(jnp.float32), head.astype(jnp.float32)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, B, T)), jnp.float32)

    def plain(hidden, head):
        logits = jnp.einsum("btd,dv->btv", hidden, head)
        a = token_logprobs(logits, tokens, temperature=0.8)
        return jnp.sum(weights * jnp.stack([a, token_entropy(logits, temperature=0.8)]))

    def chunked(hidden, head):
        pair = chunked_token_logprobs(hidden, head, tokens, temperature=0.8, chunk_size=chunk_size)
        return jnp.sum(weights * jnp.stack(pair))

    wanted = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, head)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_gradient_against_central_differences_in_float64():
    hidden, head, tokens = arrays(3)
    with jax.enable_x64(True):
        function = lambda h: sum(
            jnp.sum(x * jnp.cos(jnp.arange(T, dtype=jnp.float64))[None])
            for x in chunked_token_logprobs(h, jnp.asarray(head), tokens, chunk_size=4)
        )
        gradient = np.asarray(jax.grad(function)(jnp.asarray(hidden)))
        for index in [(0, 0, 0), (1, 3, 2), (2, 5, 4), (2, 6, 1)]:
            shift = np.zeros_like(hidden)
            shift[index] = 1e-6
            difference = (function(hidden + shift) - function(hidden - shift)) / 2e-6
            assert gradient[index] == pytest.approx(float(difference), abs=1e-7)


def test_forbidden_tokens_give_no_nan():
    logits = jnp.asarray([[[0.0, -jnp.inf, 1.0]] * 3])
    entropy = token_entropy(logits)
    p = np.exp([0, 1]) / np.exp([0, 1]).sum()
    np.testing.assert_allclose(entropy[0, 1:], [-np.sum(p * np.log(p))] * 2, rtol=1e-6)


def test_only_one_position_of_logits_lives_at_a_time():
    length, vocab = 64, 1024
    arguments = (
        jnp.zeros((2, length, 8)),
        jnp.zeros((8, vocab)),
        jnp.zeros((2, length), jnp.int32),
    )

    def peak(chunk_size):
        loss = lambda h: jnp.sum(
            chunked_token_logprobs(h, *arguments[1:], chunk_size=chunk_size)[0]
        )
        compiled = jax.jit(jax.grad(loss)).lower(arguments[0]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(8) < peak(2 * length) / 4


@pytest.mark.parametrize("columns", [0, 1, 6, 40, 192, 1024, 1152, 2048])
def test_few_columns_are_worked_on_where_few_are_wanted(columns):
    width = jax.jit(lambda count: _at_width(count, columns, jnp.int32))
    found = [int(width(jnp.int32(count))) for count in range(columns + 1)]
    # The least power of two of which eight make all columns.
    stride = next(2**i for i in range(12) if 8 * 2**i >= columns)
    up = lambda count: max(1, -(-count // stride)) * stride
    assert found == [min(up(count), columns) for count in range(columns + 1)]
    assert int(_at_width(None, columns, jnp.int32)) == columns


@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_columns_that_nobody_wants_are_zero_whatever_they_hold(chunk_size):
    hidden, head, targets = (jnp.asarray(x) for x in arrays(7))
    hidden, head = hidden.astype(jnp.float32), head.astype(jnp.float32)

    def total(hidden, count):
        pair = chunked_target_logprobs(hidden, head, targets, chunk_size=chunk_size, count=count)
        return jnp.sum(pair[0]) + 2 * jnp.sum(pair[1]), pair

    both = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, pair), gradient = both(hidden, jnp.int32(T))
    (_, few), few_gradient = both(hidden.at[:, 4:].set(jnp.nan), jnp.int32(3))
    for a, b in zip((*pair, gradient), (*few, few_gradient), strict=True):
        np.testing.assert_allclose(b[:, :3], a[:, :3], rtol=1e-5, atol=1e-6)
        assert not np.any(b[:, 3:])


def test_a_traced_temperature_has_its_gradient():
    hidden, head, tokens = arrays(4)
    with jax.enable_x64(True):
        hidden, head = jnp.asarray(hidden), jnp.asarray(head)

        def plain(temperature):
            logits = jnp.einsum("btd,dv->btv", hidden, head)
            entropy = token_entropy(logits, temperature=temperature)
            return jnp.sum(token_logprobs(logits, tokens, temperature=temperature) + 2 * entropy)

        def chunked(temperature):
            pair = chunked_token_logprobs(
                hidden, head, tokens, temperature=temperature, chunk_size=5
            )
            return jnp.sum(pair[0] + 2 * pair[1])

        for temperature in (0.7, 1.3):
            np.testing.assert_allclose(
                jax.grad(chunked)(temperature), jax.grad(plain)(temperature), rtol=1e-12
            )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_states_give_float32_results(dtype):
    hidden, head, tokens = arrays(5)
    hidden, head = jnp.asarray(hidden, dtype), jnp.asarray(head, jnp.float32)
    exact = jnp.einsum(
        "btd,dv->btv", *(x.astype(jnp.float32) for x in (hidden, head.astype(dtype)))
    )
    logprobs, entropy = chunked_token_logprobs(hidden, head, tokens, chunk_size=4)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, token_logprobs(exact, tokens), atol=1e-5)
    np.testing.assert_allclose(entropy, token_entropy(exact), atol=1e-5)
    loss = lambda h, w: jnp.sum(chunked_token_logprobs(h, w, tokens, chunk_size=4)[0])
    of_hidden, of_head = jax.grad(loss, argnums=(0, 1))(hidden, head)
    assert of_hidden.dtype == dtype
    assert of_head.dtype == jnp.float32


def test_a_head_cut_over_devices_is_read_where_it_lies(mesh8):
    rng = np.random.default_rng(6)
    batch, length, width, vocab = 4, 9, 8, 192
    hidden = rng.normal(size=(batch, length, width)).astype(np.float32)
    head = rng.normal(size=(width, vocab)).astype(np.float32)
    tokens = rng.integers(0, vocab, (batch, length)).astype(np.int32)

    def gradients(hidden, head, tokens):
        def loss(hidden, head):
            pair = chunked_token_logprobs(hidden, head, tokens, chunk_size=8)
            return jnp.sum(pair[0] + pair[1])

        return jax.grad(loss, argnums=(0, 1))(hidden, head)

    specs = [("data", None, None), (None, "tensor"), ("data", None)]
    shardings = [jax.NamedSharding(mesh8, jax.sharding.PartitionSpec(*spec)) for spec in specs]
    sharded = jax.jit(gradients, in_shardings=shardings, out_shardings=tuple(shardings[:2]))
    compiled = sharded.lower(hidden, head, tokens).compile()
    for got, wanted in zip(
        compiled(hidden, head, tokens), jax.jit(gradients)(hidden, head, tokens), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert "all-gather" not in compiled.as_text()


def test_errors_name_shapes():
    with pytest.raises(ValueError, match="must match the first two axes"):
        token_logprobs(jnp.zeros((2, 3, 4)), jnp.zeros((2, 2), jnp.int32))
    with pytest.raises(ValueError, match="chunk_size=0"):
        chunked_token_logprobs(
            jnp.zeros((1, 2, 3)), jnp.zeros((3, 4)), jnp.zeros((1, 2), jnp.int32), chunk_size=0
        )
    with pytest.raises(ValueError, match="width 3"):
        chunked_token_logprobs(
            jnp.zeros((1, 2, 3)), jnp.zeros((2, 4)), jnp.zeros((1, 2), jnp.int32), chunk_size=1
        )
    with pytest.raises(ValueError, match="temperature=0"):
        token_entropy(jnp.zeros((1, 2, 3)), temperature=0)
