"""Qwen2.5-VL and Qwen3-VL as a whole against transformers, float32 on CPU.

Documents with two images of different size, with a video of five frames behind an image, and of
text alone; padded on either side, packed, differentiated, continued, written and read again.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference implementation needs torch")

import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText  # noqa: E402

from jaxrl_reason.data import vision  # noqa: E402
from jaxrl_reason.models import Model  # noqa: E402
from jaxrl_reason.models.convert import from_pretrained, save_pretrained  # noqa: E402
from jaxrl_reason.models.convert.files import read_headers  # noqa: E402
from jaxrl_reason.models.convert.load import LAYOUTS, model_weights  # noqa: E402
from jaxrl_reason.models.convert.write import write_tensors  # noqa: E402
from jaxrl_reason.sampling import Engine, SamplingConfig, sample  # noqa: E402
from jaxrl_reason.sampling.requests import Shown  # noqa: E402
from jaxrl_reason.sharding import MeshConfig, make_mesh  # noqa: E402

TEXT, VOCAB = 90, 97
IDS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
SIZES = {
    "vocab_size": VOCAB,
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
# Windows of 2 x 2 merged patches that divide no image, heads of 12 and 8 channels; a square of
# 5 x 5 learned positions, smaller than some images.
CASES = {
    "qwen2_5_vl": {
        "text_config": {
            **SIZES,
            "hidden_size": 80,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [2, 5, 3],
            },
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 36,
            "intermediate_size": 40,
            "num_heads": 3,
            "out_hidden_size": 80,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        "tie_word_embeddings": False,
    },
    "qwen3_vl": {
        "text_config": {
            **SIZES,
            "hidden_size": 32,
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [6, 4, 2],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 2],
        },
        "tie_word_embeddings": True,
    },
}
FAMILIES = pytest.mark.parametrize("family", CASES)
SLOW_BUT_QWEN3 = pytest.mark.parametrize(
    "family", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_vl"]
)
PATCHES = 300


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """A function from a family to (reference model, directory); made when asked for."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

    @functools.cache
    def reference(family):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **CASES[family], **IDS)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
            # So that no placeholder is generated, which would stand for an image that is not there.
            model.lm_head.weight[TEXT:] = 0
        directory = tmp_path_factory.mktemp(family)
        model.save_pretrained(directory)
        return model, directory

    return reference


@pytest.fixture(scope="module")
def ours(references):
    return functools.cache(lambda family: from_pretrained(references(family)[1]))


def processor(family):
    sizes = CASES[family]["vision_config"]
    return vision.VisionProcessorConfig(
        family=family,
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        min_pixels=8 * 8,
        max_pixels=64 * 64,
        video_min_pixels=8 * 8,
        video_max_pixels=64 * 64,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.25, 0.25, 0.25),
        do_sample_frames=False,
        fps=2.0,
        num_frames=None,
        min_frames=2,
        max_frames=8,
        cap_pixels_per_frame=False,
        max_video_tokens=1024,
        window_size=sizes.get("window_size"),
        tokens_per_second=sizes.get("tokens_per_second"),
        **IDS,
    )


@dataclasses.dataclass(frozen=True)
class Document:
    tokens: np.ndarray
    images: list
    videos: list
    row: vision.VisionRow


@functools.cache
def documents(family):
    config, rng = processor(family), np.random.default_rng(0)
    draw = lambda *shape: rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    show = lambda pad: [92, IDS[f"{pad}_token_id"], 93]
    text = lambda n: rng.integers(0, TEXT, n).tolist()
    first = [vision.process_image(draw(24, 40), config), vision.process_image(draw(48, 16), config)]
    second = [vision.process_image(draw(8, 24), config)]
    clip = [vision.process_video(draw(5, 24, 16), config, source_fps=2.0)]
    made = [
        ([*text(3), *show("image"), *text(5), *show("image"), *text(7)], first, []),
        ([*text(2), *show("image"), *text(4), *show("video"), *text(6)], second, clip),
        (text(9), [], []),
    ]
    found = []
    for tokens, images, videos in made:
        encode = lambda stamp: [ord(c) % TEXT for c in stamp]
        expanded = vision.expand_tokens(tokens, images, videos, config, encode).tokens
        row = vision.vision_row(expanded, images, videos, config)
        found.append(Document(expanded, images, videos, row))
    grids = {visual.grid for d in found for visual in (*d.images, *d.videos)}
    assert grids == {(1, 6, 10), (1, 12, 4), (1, 2, 6), (3, 6, 4)}
    return found


def theirs(family, chosen, side):
    """Arguments of transformers for a batch of documents."""
    rows = [documents(family)[i] for i in chosen]
    longest = max(len(row.tokens) for row in rows)
    tokens, mask, kinds = np.zeros((3, len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        n = len(row.tokens)
        here = slice(0, n) if side == "right" else slice(longest - n, longest)
        tokens[i, here], mask[i, here] = row.tokens, 1
        kinds[i, here] = (row.tokens == 90) + 2 * (row.tokens == 91)
    arguments = {"input_ids": tokens, "attention_mask": mask, "mm_token_type_ids": kinds}
    images, videos = ([x for row in rows for x in getattr(row, k)] for k in ("images", "videos"))
    if images:
        arguments["pixel_values"] = np.concatenate([x.patches for x in images])
        arguments["image_grid_thw"] = np.asarray([x.grid for x in images])
    if videos:
        arguments["pixel_values_videos"] = np.concatenate([x.patches for x in videos])
        arguments["video_grid_thw"] = np.asarray([x.grid for x in videos])
        if family == "qwen2_5_vl":
            arguments["second_per_grid_ts"] = np.asarray([x.seconds_per_slice for x in videos])
    return {name: torch.from_numpy(x) for name, x in arguments.items()}


def reference_log_probs(model, arguments):
    model.model.rope_deltas = None  # of the call before
    with torch.no_grad():
        return torch.log_softmax(model(**arguments).logits, -1).numpy()


@functools.partial(jax.jit, static_argnums=0)
def log_probs(model, params, tokens, positions, segment_ids, visual):
    ids = {"positions": positions, "segment_ids": segment_ids}
    hidden = model.forward(params, tokens, **ids, visual=visual)
    return jax.nn.log_softmax(model.unembed(params, hidden))


def padded(family, side):
    """Our arguments for one document a row."""
    rows = documents(family)
    longest = max(len(row.tokens) for row in rows)
    tokens, segments = np.zeros((2, len(rows), longest), np.int32)
    joined = []
    for i, row in enumerate(rows):
        n = len(row.tokens)
        start = 0 if side == "right" else longest - n
        tokens[i, start : start + n], segments[i, start : start + n] = row.tokens, 1
        joined.append(vision.join_rows([row.row], starts=[start], row_length=longest))
    positions = np.stack([row.positions for row in joined])
    return tokens, positions, segments, vision.pack_vision(joined, PATCHES)


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_log_probs_of_padded_rows(references, ours, family, side):
    wanted = reference_log_probs(references(family)[0], theirs(family, (0, 1, 2), side))
    arguments = padded(family, side)
    got = np.asarray(log_probs(*ours(family), *arguments))
    real = arguments[2] == 1
    assert wanted[real].std() > 0.5, "a flat distribution would prove nothing"
    assert np.abs(got - wanted)[real].max() <= 1e-4


@FAMILIES
def test_log_probs_of_packed_rows(references, ours, family):
    rows = documents(family)
    tokens = np.concatenate([row.tokens for row in rows])
    segments = np.concatenate([np.full(len(row.tokens), i + 1) for i, row in enumerate(rows)])
    joined = vision.join_rows([row.row for row in rows], row_length=len(tokens) + 5)
    pad = lambda x: np.pad(x, (0, 5))[None].astype(np.int32)
    visual = vision.pack_vision([joined], PATCHES)
    arguments = pad(tokens), joined.positions[None], pad(segments), visual
    got = np.asarray(log_probs(*ours(family), *arguments))[0, : len(tokens)]
    model = references(family)[0]
    alone = [reference_log_probs(model, theirs(family, (i,), "right"))[0] for i in range(3)]
    assert np.abs(got - np.concatenate(alone)).max() <= 1e-4


@FAMILIES
def test_images_matter(ours, family):
    """A model that did not look would pass a comparison of models that do not look."""
    tokens, positions, segments, visual = padded(family, "right")
    seen = np.asarray(log_probs(*ours(family), tokens, positions, segments, visual))
    other = {**visual, "patches": visual["patches"] + np.float32(0.5)}
    changed = np.asarray(log_probs(*ours(family), tokens, positions, segments, other))
    moved = np.abs(seen - changed).max(axis=-1)
    assert moved[0, segments[0].sum() - 1] > 0.01
    assert moved[2, :9].max() == 0, "text alone"


@FAMILIES
def test_float32_features_go_into_a_model_of_bfloat16(ours, family):
    """Sampling and training with a frozen encoder give features that were made before."""
    model, params = ours(family)
    model = Model(dataclasses.replace(model.config, dtype="bfloat16"))
    tokens, positions, segments, visual = padded(family, "right")
    found = {
        name: x.astype(jnp.bfloat16) for name, x in model.visual_features(params, visual).items()
    }
    wide = {name: x.astype(jnp.float32) for name, x in found.items()}
    index = {"visual_index": visual["visual_index"]}
    rows = (tokens, positions, segments)
    wanted, got = (log_probs(model, params, *rows, x | index) for x in (found, wide))
    np.testing.assert_array_equal(got, wanted)


@SLOW_BUT_QWEN3
def test_gradients(references, ours, family, tmp_path):
    """Of the mean log-prob of the next text tokens, for every parameter of both towers."""
    reference, directory = references(family)
    model, params = ours(family)
    config = AutoConfig.from_pretrained(directory)
    twin = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    twin.load_state_dict(reference.state_dict())
    arguments = padded(family, "right")
    tokens, _, segments, _ = arguments
    counted = (segments == 1) & (tokens < TEXT)
    labels = torch.from_numpy(np.where(counted, tokens, -100)).long()
    twin(**theirs(family, (0, 1, 2), "right"), labels=labels).loss.backward()
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(p.grad)
    twin.save_pretrained(tmp_path / "theirs")

    def loss(params):
        logp = log_probs(model, params, *arguments)[:, :-1]
        chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
        weight = counted[:, 1:].astype(np.float32)
        return -jnp.sum(chosen * weight) / weight.sum()

    gradients = jax.jit(jax.grad(loss))(params)
    (tmp_path / "ours").mkdir()
    weights = model_weights(model.config, LAYOUTS[family][0])
    write_tensors(tmp_path / "ours", weights, gradients, dtype=None, limit=10**9)
    wanted, got = (read_headers(tmp_path / side) for side in ("theirs", "ours"))
    assert wanted.keys() == got.keys()
    for name in wanted:
        a, b = (x[name].rows(0, x[name].shape[0]) for x in (wanted, got))
        assert np.abs(b - a).max() <= 1e-3 * np.abs(a).max(), name


@SLOW_BUT_QWEN3
def test_greedy_continuation(references, ours, family):
    """64 tokens behind two images, and behind an image and a video."""
    model, params = ours(family)
    rows = documents(family)[:2]
    visual = vision.pack_vision([row.row for row in rows], PATCHES)
    features = jax.device_get(jax.jit(model.visual_features)(params, visual))
    shown = []
    for i, row in enumerate(rows):
        count = len(row.row.patches) // 4
        deep = features["deep_features"][i, :, :count] if "deep_features" in features else None
        shown.append(
            Shown(
                positions=row.row.positions,
                next_position=row.row.next_position,
                visual_index=row.row.visual_index,
                features=features["features"][i, :count],
                deep_features=deep,
            )
        )
    engine = Engine(
        model=model,
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        sampling=SamplingConfig(temperature=0.0),
        stop_ids=(VOCAB,),
        max_prompt_length=128,
        max_completion_length=64,
        max_rows=2,
        page_size=64,
        visual_tokens=64,
    )
    prompts = [row.tokens.tolist() for row in rows]
    rollout = sample(engine, params, prompts, jax.random.key(0), pad_id=0, shown=shown)
    reference = references(family)[0]
    for i, got in enumerate(rollout.tokens):
        reference.model.rope_deltas = None
        made = reference.generate(
            **theirs(family, (i,), "right"), max_new_tokens=64, do_sample=False, pad_token_id=0
        )
        wanted = made[0, len(prompts[i]) :].tolist()
        assert len(set(wanted)) > 3, "one token again and again would prove little"
        assert got.tolist() == wanted


@FAMILIES
def test_export_transformers_import_is_the_identity(references, ours, family, tmp_path):
    (_, published), (model, params) = references(family), ours(family)
    save_pretrained(model, params, tmp_path / "ours", like=published)
    before, after = read_headers(published), read_headers(tmp_path / "ours")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.shape, tensor.dtype) == (after[name].shape, after[name].dtype)
        count = tensor.shape[0]
        assert np.array_equal(tensor.rows(0, count), after[name].rows(0, count)), name
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert {name: getattr(loaded.config, name) for name in IDS} == IDS
    loaded.save_pretrained(tmp_path / "theirs")
    again, back = from_pretrained(tmp_path / "theirs")
    assert again == model
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@FAMILIES
def test_names_with_the_decoder_nested_are_read_too(ours, family, tmp_path):
    """transformers 4.52 to 4.57 wrote Qwen2.5-VL so; Qwen3-VL is published so."""
    model, params = ours(family)
    (tmp_path / "nested").mkdir()
    write_tensors(
        tmp_path / "nested",
        model_weights(model.config, LAYOUTS["qwen3_vl"][0]),
        params,
        dtype=None,
        limit=10**9,
    )
    path = save_pretrained(model, params, tmp_path / "model", check=False)
    (path / "model.safetensors").unlink()
    (tmp_path / "nested" / "model.safetensors").rename(path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(path)[1], params)


@FAMILIES
def test_a_deep_model_has_its_layers_once(ours, family):
    def products(layers, depth):
        c = ours(family)[0].config
        vision = dataclasses.replace(c.vision, depth=depth)
        model = Model(dataclasses.replace(c, num_hidden_layers=layers, vision=vision))
        params = jax.eval_shape(model.init, jax.random.key(0))
        loss = lambda p: jnp.sum(log_probs(model, p, *padded(family, "right")))
        return jax.jit(jax.grad(loss)).lower(params).as_text().count("dot_general")

    assert products(24, 16) == products(4, 5) > 20
