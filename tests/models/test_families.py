"""Every family against transformers, float32 on CPU: log-probs, gradients, greedy decoding.

The reference models are tiny, random, and use every feature of their family: heads of 20 or 24
channels, biases, windows shorter than the rows, stretched rotary frequencies in all their ranges.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference implementation needs torch")

import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from jaxrl_reason.errors import InputError  # noqa: E402
from jaxrl_reason.models import Model  # noqa: E402
from jaxrl_reason.models.convert import from_pretrained, save_pretrained  # noqa: E402
from jaxrl_reason.models.convert.families import family_of, read_config, write_config  # noqa: E402
from jaxrl_reason.models.convert.files import read_header, read_headers  # noqa: E402
from jaxrl_reason.models.convert.load import TEXT_LAYOUT, model_weights  # noqa: E402
from jaxrl_reason.models.convert.write import write_tensors  # noqa: E402
from jaxrl_reason.sampling import Engine, SamplingConfig, sample  # noqa: E402
from jaxrl_reason.sharding import MeshConfig, make_mesh  # noqa: E402

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    # Waves of 6 to 100 positions: some are kept, some divided, some between.
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}

# Name -> model_type and what differs from SIZES.
CASES = {
    "qwen2": (
        "qwen2",
        {
            "hidden_size": 80,
            "tie_word_embeddings": True,
            "rope_parameters": PLAIN,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    ),
    "qwen2-untied": ("qwen2", {"head_dim": 20, "rope_parameters": LINEAR}),
    "qwen3": ("qwen3", {"head_dim": 24, "rope_parameters": PLAIN, "num_key_value_heads": 1}),
    "qwen3-tied": (
        "qwen3",
        {"head_dim": 20, "rope_parameters": LINEAR, "tie_word_embeddings": True},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 20,
            "rope_parameters": PLAIN,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe-unnormalised": (
        "qwen3_moe",
        {
            "head_dim": 24,
            "rope_parameters": PLAIN,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
    "llama": ("llama", {"head_dim": 24, "rope_parameters": LLAMA3}),
    "llama-tied": (
        "llama",
        {"head_dim": 20, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", {"head_dim": 20, "rope_parameters": PLAIN, "sliding_window": 5}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 20,
            "tie_word_embeddings": False,
            "num_hidden_layers": 4,
            "sliding_window": 6,
            "query_pre_attn_scalar": 28,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN},
        },
    ),
    "gemma3-tied": (
        "gemma3_text",
        {
            "head_dim": 24,
            "sliding_window": 4,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
            "rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN},
        },
    ),
}
ONE_A_FAMILY = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "gemma3")


def slow_but(*quick, names=ONE_A_FAMILY):
    """Cases, of which all but some are for the long suite."""
    slow = lambda name: pytest.param(name, marks=() if name in quick else pytest.mark.slow)
    return pytest.mark.parametrize("name", [*map(slow, names)])


# Documents of a batch: longer than every window, of odd lengths.
LENGTHS = (19, 7, 23)


@functools.cache
def tokens_of(lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """A function from the name of a case to (reference model, directory); made when asked for."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    made = {}

    def reference(name):
        if name not in made:
            family, changes = CASES[name]
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **{**SIZES, **changes})
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                for p in model.parameters():  # unit scales and zero biases would hide much
                    p.add_(0.1 * torch.randn_like(p))
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            made[name] = model, directory
        return made[name]

    return reference


@pytest.fixture(scope="module")
def ours(references):
    return functools.cache(lambda name: from_pretrained(references(name)[1]))


@functools.partial(jax.jit, static_argnums=0)
def log_probs(model, params, tokens, positions, segment_ids):
    hidden = model.forward(params, tokens, positions=positions, segment_ids=segment_ids)
    return jax.nn.log_softmax(model.unembed(params, hidden))


def padded(side):
    """Tokens, positions and mask [B, T] of the documents, one a row."""
    rows, longest = tokens_of(LENGTHS), max(LENGTHS)
    tokens, positions, mask = np.zeros((3, len(rows), longest), np.int32)
    for i, row in enumerate(rows):
        here = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        tokens[i, here], positions[i, here], mask[i, here] = row, np.arange(len(row)), 1
    return tokens, positions, mask


def reference_log_probs(model, tokens, positions, mask):
    with torch.no_grad():
        logits = model(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask).long(),
            position_ids=torch.from_numpy(positions).long(),
        ).logits
    return torch.log_softmax(logits, -1).numpy()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_log_probs_of_padded_rows(references, ours, name, side):
    tokens, positions, mask = padded(side)
    wanted = reference_log_probs(references(name)[0], tokens, positions, mask)
    got = np.asarray(log_probs(*ours(name), tokens, positions, mask))
    assert wanted[mask == 1].std() > 0.5, "a flat distribution would prove nothing"
    assert np.abs(got - wanted)[mask == 1].max() <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_log_probs_of_packed_rows(references, ours, name):
    rows = tokens_of(LENGTHS)
    join = lambda pieces: np.concatenate([*pieces, np.zeros(3, np.int32)])[None].astype(np.int32)
    packed = (
        join(rows),
        join(map(np.arange, LENGTHS)),
        join(np.full(len(row), i + 1) for i, row in enumerate(rows)),
    )
    got = np.asarray(log_probs(*ours(name), *packed))[0, : sum(LENGTHS)]
    alone = [
        reference_log_probs(references(name)[0], row[None], np.arange(len(row))[None], ones)[0]
        for row, ones in ((row, np.ones((1, len(row)), np.int32)) for row in rows)
    ]
    assert np.abs(got - np.concatenate(alone)).max() <= 1e-4


@slow_but("qwen2", "qwen3_moe", "gemma3")
def test_gradients(references, ours, name, tmp_path):
    """Of the mean log-prob of the next tokens, for every parameter, by its name in the file."""
    tokens, positions, mask = padded("right")
    reference, directory = references(name)
    model, params = ours(name)
    config = AutoConfig.from_pretrained(directory)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    twin.load_state_dict(reference.state_dict())
    labels = torch.from_numpy(np.where(mask == 1, tokens, -100)).long()
    twin(
        torch.from_numpy(tokens).long(),
        attention_mask=torch.from_numpy(mask).long(),
        position_ids=torch.from_numpy(positions).long(),
        labels=labels,
    ).loss.backward()
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(p.grad)
    twin.save_pretrained(tmp_path / "theirs")

    def loss(params):
        logp = log_probs(model, params, tokens, positions, mask)[:, :-1]
        chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
        counted = mask[:, 1:].astype(np.float32)
        return -jnp.sum(chosen * counted) / counted.sum()

    gradients = jax.jit(jax.grad(loss))(params)
    (tmp_path / "ours").mkdir()
    weights = model_weights(model.config, TEXT_LAYOUT)
    write_tensors(tmp_path / "ours", weights, gradients, dtype=None, limit=10**9)
    theirs, mine = (read_headers(tmp_path / side) for side in ("theirs", "ours"))
    assert theirs.keys() == mine.keys()
    for tensor in theirs:
        wanted, got = (x[tensor].rows(0, x[tensor].shape[0]) for x in (theirs, mine))
        scale = np.abs(wanted).max()
        assert np.abs(got - wanted).max() <= 1e-3 * scale, tensor
        assert scale > 1e-6 or ".experts." in tensor, f"{tensor} has no gradient"


@slow_but("qwen3_moe", "gemma3")
def test_greedy_continuation(references, ours, name):
    """64 tokens of prompts of two lengths, beyond every window."""
    model, params = ours(name)
    prompts = [row.tolist() for row in tokens_of((9, 4))]
    engine = Engine(
        model=model,
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        sampling=SamplingConfig(temperature=0.0),
        stop_ids=(VOCAB,),
        max_prompt_length=9,
        max_completion_length=64,
        max_rows=2,
        page_size=32,
    )
    rollout = sample(engine, params, prompts, jax.random.key(0), pad_id=0)
    for prompt, got in zip(prompts, rollout.tokens, strict=True):
        wanted = (
            references(name)[0]
            .generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=64,
                do_sample=False,
                pad_token_id=0,
            )[0, len(prompt) :]
            .tolist()
        )
        assert len(set(wanted)) > 3, "one token again and again would prove little"
        assert got.tolist() == wanted


@slow_but(*ONE_A_FAMILY, names=CASES)
def test_export_transformers_import_is_the_identity(references, ours, name, tmp_path):
    (_, published), (model, params) = references(name), ours(name)
    save_pretrained(model, params, tmp_path / "ours")
    before, after = read_headers(published), read_headers(tmp_path / "ours")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.shape, tensor.dtype) == (after[key].shape, after[key].dtype)
        count = tensor.shape[0]
        assert np.array_equal(tensor.rows(0, count), after[key].rows(0, count)), key
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")
    again, back = from_pretrained(tmp_path / "theirs")
    assert again == model
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gemma3"])
def test_bfloat16_stays_near_float32(references, ours, name):
    """Log-probs of likely tokens; 8 bits of mantissa over 3 or 4 layers."""
    _, params = ours(name)
    narrow, _ = from_pretrained(references(name)[1], dtype="bfloat16")
    tokens, positions, mask = padded("right")
    wide = np.asarray(log_probs(*ours(name), tokens, positions, mask))[mask == 1]
    near = np.asarray(log_probs(narrow, params, tokens, positions, mask))[mask == 1]
    off = np.abs(near - wide)
    assert 1e-4 < off.mean() < 0.03, off.mean()


@slow_but("qwen3", "qwen3_moe", "gemma3")
def test_a_deep_model_has_its_layers_once(ours, name):
    """The program for 24 layers has as many products as that for 4."""

    def products(count):
        c = ours(name)[0].config
        kinds = (c.layer_types * 8)[:count]
        model = Model(dataclasses.replace(c, num_hidden_layers=count, layer_types=kinds))
        params = jax.eval_shape(model.init, jax.random.key(0))
        ids = jnp.ones((1, 16), jnp.int32)
        loss = lambda p: jnp.sum(log_probs(model, p, ids, ids, ids))
        return jax.jit(jax.grad(loss)).lower(params).as_text().count("dot_general")

    assert products(24) == products(4) > 10


# Configurations


@pytest.mark.parametrize("name", CASES)
def test_the_family_of_a_model_is_that_it_came_from(ours, name):
    assert family_of(ours(name)[0].config) == CASES[name][0]


def hf(family, **changes):
    return AutoConfig.for_model(family, **{**SIZES, "head_dim": 8, **changes})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3", {"rope_parameters": PLAIN | {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ("qwen3", {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("mistral", {"sliding_window": 0}, "this mistral model is not supported: sliding_window=0"),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": -1.0}}, "factor=-1.0 must be positive"),
        ("gpt2", {}, "model_type='gpt2' is not supported; one of qwen2"),
    ],
)
def test_settings_that_the_decoder_lacks_are_refused_by_name(family, changes, message):
    with pytest.raises(InputError, match=message):
        read_config(hf(family, **changes))


def test_published_configurations_of_before_transformers_5_are_read():
    """Rotary settings as they stand in the files on the hub."""
    llama = {"rope_theta": 500000.0, "rope_scaling": dict(LLAMA3)}
    del llama["rope_scaling"]["rope_theta"]
    config = read_config(hf("llama", **llama))
    assert (config.rope_theta, config.rope_scaling.factor) == (500000.0, 4.0)
    assert config.rope_scaling.original_max_position_embeddings == 40
    gemma = read_config(
        hf(
            "gemma3_text",
            num_hidden_layers=7,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
            sliding_window_pattern=6,
            sliding_window=512,
        )
    )
    assert (gemma.rope_theta, gemma.rope_local_theta, gemma.rope_scaling.factor) == (1e6, 1e4, 8.0)
    assert [i for i, slides in enumerate(gemma.sliding_layers) if not slides] == [5]
    qwen = read_config(hf("qwen2", sliding_window=64, use_sliding_window=False, rope_theta=1e6))
    assert (qwen.sliding_window, qwen.layer_types, qwen.rope_theta) == (None, (), 1e6)


@pytest.mark.parametrize(
    "changes",
    [
        {"sandwich_norms": True},
        {"qkv_bias": True},
        {"rope_local_theta": 50.0, "layer_types": ("sliding_attention",) * 2 + ("full_attention",)},
        {"query_pre_attn_scalar": 99.0},
    ],
)
def test_a_model_of_no_family_is_not_written(ours, changes):
    config = dataclasses.replace(ours("qwen3")[0].config, sliding_window=9, **changes)
    with pytest.raises(InputError, match="no published family has this model; the nearest is"):
        write_config(config)


def test_experts_are_in_their_own_files_names(references):
    names = read_header(references("qwen3_moe")[1] / "model.safetensors")
    assert "model.layers.2.mlp.experts.5.down_proj.weight" in names
