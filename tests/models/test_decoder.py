"""The decoder: packing, pages, remat, presets, and parity with transformers' Qwen3."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.models import (
    PRESETS,
    Model,
    ModelConfig,
    PageTable,
    Place,
    close_pages,
    empty_pages,
    open_pages,
    preset,
    write_contexts,
)
from jaxrl_reason.models.config import RopeScaling
from jaxrl_reason.models.layers import project
from jaxrl_reason.models.lora import LoRAConfig, merge_lora, without_adapter
from jaxrl_reason.models.rotary import frequencies, mrope_axes, rotation

TINY = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


# Op by op, every one of them would be compiled for itself.
forward = jax.jit(Model.forward, static_argnums=0)


def make(config=TINY, seed=0):
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(seed))
    # Unit scales would hide a norm that is applied twice or not at all.
    bump = lambda p, x: x + 0.3 * jax.random.normal(jax.random.key(p), x.shape, x.dtype)
    leaves, treedef = jax.tree.flatten(params)
    return model, jax.tree.unflatten(treedef, [bump(i, x) for i, x in enumerate(leaves)])


def tokens_of(length, seed=0, batch=2):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 40, (batch, length)), jnp.int32)


def run(model, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return forward(model, params, tokens, positions=positions, segment_ids=jnp.ones_like(tokens))


def paged(model, params, contexts, following, size=4, unstack=False, opens=False):
    """Hidden states of tokens that follow contexts, one token a step, from pages of `size` tokens.

    Pages that are written may be open for two steps. Row r continues context r % len(contexts); its
    second own page is not next to its first.
    """
    rows, steps = following.shape
    count, readers = len(contexts), rows // len(contexts)
    each = -(-max(map(len, contexts)) // size)
    own, first_own = -(-steps // size), count * each * readers
    width = each + own
    packed = np.zeros((3, count, each * size), np.int32)
    for c, tokens in enumerate(contexts):
        packed[:, c, : len(tokens)] = tokens, np.arange(len(tokens)), np.ones(len(tokens))
    pages = empty_pages(model.config, count * each, rows * own, size)
    places = jnp.arange(count * each)
    keys, values = model.prefill(params, packed[0], positions=packed[1], segment_ids=packed[2])
    pages = write_contexts(pages, keys, values, places)
    page_of = lambda row, number: number * rows + row
    readers_of = [[c + count * q for q in range(readers)] for c in range(count)]
    of_row = [
        [(r % count * each + page) * readers + r // count for page in range(each)]
        + [first_own + page_of(r, number) for number in range(own)]
        for r in range(rows)
    ]
    lengths = np.asarray([len(tokens) for tokens in contexts])
    table = PageTable(
        readers=jnp.repeat(jnp.asarray(readers_of), each, axis=0),
        context_tokens=jnp.clip(
            jnp.asarray((lengths[:, None] - np.arange(each) * size).reshape(-1)), 0, size
        ),
        context_numbers=jnp.tile(jnp.arange(each, dtype=jnp.int32), count),
        owners=jnp.tile(jnp.arange(rows), own),
        numbers=jnp.repeat(jnp.arange(own), rows),
        of_row=jnp.asarray(of_row).reshape(rows, width),
        writing=jnp.zeros((rows, 2), jnp.int32),
    )
    step = jax.jit(Model.decode, static_argnums=0)
    params = model.unstack(params) if unstack else params
    hidden = []
    for t in range(steps):
        number = t // size
        two = (number, number + 1)
        writing = [[page_of(r, n) if n < own else rows * own for n in two] for r in range(rows)]
        if t % 2 == 0 or not opens:
            begun = number
            table = table._replace(writing=jnp.asarray(writing))
            written = open_pages(pages, table) if opens else pages
        state, written = step(
            model,
            params,
            following[:, t],
            pages=pages if opens else written,
            opened=written if opens else None,
            table=table,
            place=Place(
                jnp.asarray(np.tile(lengths, readers) + t, jnp.int32),
                jnp.full(rows, t, jnp.int32),
                jnp.full(rows, begun * size, jnp.int32),
            ),
        )
        if not opens:
            pages = written
        elif t % 2:
            pages = close_pages(pages, written, table)
        hidden.append(state)
    return jnp.stack(hidden, axis=1)


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("lengths", [(6, 6), (8, 3), (1, 9)])
def test_tokens_read_from_pages_give_the_full_forward(lengths, opens):
    model, params = make()
    contexts = [tokens_of(n, seed=n, batch=1)[0].tolist() for n in lengths]
    following = tokens_of(7, 5, batch=6)
    read = paged(model, params, contexts, following, size=3 if opens else 4, opens=opens)
    for row in range(6):
        whole = jnp.asarray([[*contexts[row % 2], *following[row].tolist()]])
        full = run(model, params, whole)
        np.testing.assert_allclose(read[row], full[0, -7:], atol=2e-5)


MIXED = dataclasses.replace(
    TINY,
    sliding_window=4,
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    rope_local_theta=100.0,
    qkv_bias=True,
    query_pre_attn_scalar=5.0,
    sandwich_norms=True,
    rms_norm_offset=True,
    scale_embeddings=True,
    hidden_act="gelu_tanh",
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("lengths", [(6, 6), (8, 3), (1, 9)])
def test_sliding_layers_read_from_pages_what_lies_in_their_window(lengths, opens):
    model, params = make(MIXED)
    contexts = [tokens_of(n, seed=n, batch=1)[0].tolist() for n in lengths]
    following = tokens_of(7, 5, batch=6)
    read = paged(model, params, contexts, following, size=3 if opens else 4, opens=opens)
    for row in range(6):
        whole = jnp.asarray([[*contexts[row % 2], *following[row].tolist()]])
        full = run(model, params, whole)
        np.testing.assert_allclose(read[row], full[0, -7:], atol=5e-5)


def test_a_window_hides_what_lies_further_back():
    config = dataclasses.replace(TINY, sliding_window=3, num_hidden_layers=1)
    model, params = make(config)
    tokens = tokens_of(9)
    changed = tokens.at[:, 2].set((tokens[:, 2] + 1) % 40)
    a, b = run(model, params, tokens), run(model, params, changed)
    differs = np.asarray(jnp.max(jnp.abs(a - b), axis=(0, 2)) > 1e-6)
    assert differs.tolist() == [False] * 2 + [True] * 3 + [False] * 4


@pytest.mark.parametrize("name", ["linear", "llama3"])
def test_stretched_frequencies(name):
    scaling = RopeScaling(
        rope_type=name,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    plain = frequencies(TINY)
    got = frequencies(dataclasses.replace(TINY, rope_scaling=scaling))
    if name == "linear":
        np.testing.assert_allclose(got, plain / 8, rtol=1e-6)
        return
    waves = 2 * np.pi / plain
    assert (waves < 16).any()
    assert (waves > 64).any()
    np.testing.assert_allclose(got[waves < 16], plain[waves < 16], rtol=1e-6)
    np.testing.assert_allclose(got[waves > 64], plain[waves > 64] / 8, rtol=1e-6)


def test_tokens_with_three_equal_positions_turn_as_with_one():
    for interleaved in (False, True):
        config = dataclasses.replace(TINY, mrope_section=(2, 1, 1), mrope_interleaved=interleaved)
        one = jnp.asarray([[0, 1, 5]])
        three = jnp.stack([one] * 3, axis=-1)
        for a, b in zip(rotation(config, one), rotation(config, three), strict=True):
            np.testing.assert_array_equal(a, b)
        assert sorted(mrope_axes(config).tolist()) == [0, 0, 1, 2]
    assert mrope_axes(config).tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="mrope_section"):
        rotation(TINY, three)


def test_an_adapter_acts_where_its_parameters_are_given():
    lora = LoRAConfig(r=2, lora_alpha=6.0, target_modules=("q_proj", "o_proj", "down_proj"))
    model, params = make(dataclasses.replace(TINY, lora=lora))
    plain, tokens = Model(TINY), tokens_of(6)
    attention = params["layers"]["attention"]
    assert sorted(attention["o"]) == ["kernel", "lora_a", "lora_b"]
    assert sorted(attention["k"]) == ["kernel"]
    off = run(model, without_adapter(params), tokens)
    np.testing.assert_array_equal(off, run(plain, without_adapter(params), tokens))
    on = run(model, params, tokens)
    assert float(jnp.max(jnp.abs(on - off))) > 1e-2
    np.testing.assert_allclose(on, run(plain, merge_lora(params, lora), tokens), atol=1e-5)


def test_decoding_reads_layers_in_their_stack_or_out_of_it():
    model, params = make()
    apart = model.unstack(params)
    assert isinstance(apart["layers"], tuple)
    assert model.unstack(apart) is apart
    contexts, following = [[3, 1, 4], [1, 5]], tokens_of(4, 5, batch=4)
    here, there = (paged(model, params, contexts, following, unstack=x) for x in (False, True))
    np.testing.assert_allclose(here, there, atol=1e-6)


@pytest.mark.parametrize(
    ("einsum", "x", "kernel"),
    [
        ("btd,df->btf", (2, 5, 3), (3, 7)),
        ("btf,fd->btd", (2, 5, 7), (7, 3)),
        ("btd,dnh->btnh", (2, 5, 6), (6, 2, 4)),
        ("btnh,nhd->btd", (2, 5, 4, 2), (4, 2, 3)),
    ],
)
def test_the_gradient_of_a_projection_is_that_of_its_einsum(einsum, x, kernel):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        x, kernel = (
            jax.random.normal(k, s, float) for k, s in zip(keys[:2], (x, kernel), strict=True)
        )
        out, backward = jax.vjp(lambda x, kernel: project(einsum, x, kernel), x, kernel)
        expected, plain = jax.vjp(lambda x, kernel: jnp.einsum(einsum, x, kernel), x, kernel)
        np.testing.assert_array_equal(out, expected)
        gradient = jax.random.normal(keys[2], out.shape, float)
        for a, b in zip(backward(gradient), plain(gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def kept(model, params):
    """Shapes that the backward pass of a layer keeps, of the activations of 8 tokens."""
    ids = {"positions": tokens_of(8), "segment_ids": jnp.ones((2, 8), jnp.int32)}
    loss = lambda p: jnp.sum(model.forward(p, tokens_of(8), **ids))
    scans = [e for e in jax.make_jaxpr(jax.grad(loss))(params).eqns if e.primitive.name == "scan"]
    shapes = [v.aval.shape for v in scans[0].outvars]
    return sorted(shape[1:] for shape in shapes if shape[:3] == (3, 2, 8))


def test_the_backward_pass_keeps_products_only():
    params = make()[1]
    few, everything = (
        kept(Model(dataclasses.replace(TINY, remat=name)), params) for name in ("dots", "none")
    )
    # The block's input and the output of attention; queries; keys and values; gate and up.
    assert few == sorted([(2, 8, 32)] * 2 + [(2, 8, 4, 8)] + [(2, 8, 2, 8)] * 2 + [(2, 8, 48)] * 2)
    assert len(everything) > 2 * len(few)


def test_packed_documents_equal_separate_ones():
    model, params = make()
    first, second = tokens_of(5, 1, batch=1), tokens_of(7, 2, batch=1)
    alone = [run(model, params, x) for x in (first, second)]
    row = jnp.concatenate([first, second, tokens_of(3, 3, batch=1)], axis=1)
    segments = jnp.asarray([[1] * 5 + [2] * 7 + [0] * 3])
    positions = jnp.asarray([[*range(5), *range(7), 0, 0, 0]])
    packed = forward(model, params, row, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(packed[:, :5], alone[0], atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:12], alone[1], atol=1e-5)
    assert bool(jnp.all(jnp.isfinite(packed)))


def test_a_token_sees_nothing_after_it():
    model, params = make()
    tokens = tokens_of(9)
    changed = tokens.at[:, 6].set((tokens[:, 6] + 1) % 40)
    a, b = run(model, params, tokens), run(model, params, changed)
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert float(jnp.max(jnp.abs(a[:, 6:] - b[:, 6:]))) > 1e-3


@pytest.mark.parametrize("remat", ["none", "full"])
def test_remat_changes_no_gradient(remat):
    model, params = make()
    other = Model(dataclasses.replace(TINY, remat=remat))
    loss = lambda m: jax.jit(jax.grad(lambda p: jnp.mean(run(m, p, tokens_of(8)) ** 2)))
    pairs = zip(
        jax.tree.leaves(loss(model)(params)), jax.tree.leaves(loss(other)(params)), strict=True
    )
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model, params = make(dataclasses.replace(TINY, dtype="bfloat16"))
    hidden = run(model, params, tokens_of(8))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert hidden.dtype == jnp.bfloat16
    assert model.unembed(params, hidden).dtype == jnp.float32
    wide = run(Model(TINY), params, tokens_of(8))
    np.testing.assert_allclose(hidden.astype(jnp.float32), wide, atol=0.15)


def test_every_parameter_has_an_axis_name_for_every_dimension():
    for config in (TINY, dataclasses.replace(TINY, tie_word_embeddings=False, qk_norm=False)):
        model = Model(config)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        axes = model.axes()
        jax.tree.map(
            lambda names, shape: _check_rank(names, shape),
            axes,
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        assert sum(x.size for x in jax.tree.leaves(shapes)) == config.num_parameters


def _check_rank(names, shape):
    assert len(names) == len(shape.shape), (names, shape)


def test_untied_head_is_its_own_parameter():
    model, params = make(dataclasses.replace(TINY, tie_word_embeddings=False))
    assert not np.allclose(params["head"], params["embedding"])
    np.testing.assert_array_equal(model.unembedding(params), params["head"].T)


def test_presets_span_the_promised_sizes():
    sizes = {name: preset(name, vocab_size=64).num_parameters for name in PRESETS}
    assert 0.25e6 < min(sizes.values()) < 0.4e6
    assert 90e6 < max(sizes.values()) < 130e6
    assert list(sizes.values()) == sorted(sizes.values())
    for name, size in sizes.items():
        assert size == pytest.approx(float(name[:-1]) * 1e6, rel=0.25), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
    with pytest.raises(ValueError, match="the presets are"):
        preset("7b", vocab_size=10)


@pytest.mark.parametrize("tied", [True, False])
def test_parity_with_transformers_qwen3(tied):
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = dataclasses.replace(TINY, tie_word_embeddings=tied, rope_theta=5_000.0)
    torch.manual_seed(0)
    reference = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokens = np.array(tokens_of(11))
    with torch.no_grad():
        wanted = reference(torch.from_numpy(tokens).long()).logits.numpy()
    model, params = Model(config), from_qwen3(reference.state_dict(), config)
    hidden = run(model, params, jnp.asarray(tokens))
    # Float32 on both sides; rounding differs by the order of sums over 32 to 48 channels.
    np.testing.assert_allclose(model.unembed(params, hidden), wanted, atol=2e-4, rtol=1e-4)


def from_qwen3(weights, config):
    get = lambda name: weights[f"model.{name}"].numpy()
    d, h = config.hidden_size, config.head_dim

    def layer(i):
        at = lambda name: get(f"layers.{i}.{name}.weight")
        project = lambda name: {"kernel": at(f"self_attn.{name}_proj").T.reshape(d, -1, h)}
        mlp = {n: {"kernel": at(f"mlp.{n}_proj").T} for n in ("gate", "up", "down")}
        attention = {n: project(n) for n in ("q", "k", "v")}
        attention["o"] = {"kernel": at("self_attn.o_proj").T.reshape(-1, h, d)}
        attention |= {n: {"scale": at(f"self_attn.{n}")} for n in ("q_norm", "k_norm")}
        return {
            "attention": attention,
            "mlp": mlp,
            "attention_norm": {"scale": at("input_layernorm")},
            "mlp_norm": {"scale": at("post_attention_layernorm")},
        }

    layers = [layer(i) for i in range(config.num_hidden_layers)]
    params = {
        "embedding": get("embed_tokens.weight"),
        "final_norm": {"scale": get("norm.weight")},
        "layers": jax.tree.map(lambda *xs: np.stack(xs), *layers),
    }
    if not config.tie_word_embeddings:
        params["head"] = weights["lm_head.weight"].numpy()
    return params
