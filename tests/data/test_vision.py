"""Images and video against transformers: sizes, pixels, patches, frames, tokens, positions.

`golden/vision.npz` holds what transformers' processors gave through torchvision; it is made by
`scripts/golden/vision.py`. What needs neither torch nor torchvision is compared with transformers
itself, the resizing with torch, and all of it once more with the processors where torchvision is
installed.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxrl_reason.data.vision import (
    VisionProcessorConfig,
    Visual,
    expand_text,
    expand_tokens,
    join_rows,
    load_image,
    load_video,
    mrope_positions,
    pack_vision,
    process_image,
    process_video,
    read_vision_processor,
    resize,
    sample_frames,
    smart_resize,
    smart_resize_clip,
    vision_row,
    write_vision_processor,
)
from jaxrl_reason.data.vision.patches import normalize
from jaxrl_reason.data.vision.resize import _blocks, _weights
from jaxrl_reason.errors import InputError

GOLDEN = np.load(Path(__file__).parent / "golden" / "vision.npz")
META = json.loads(str(GOLDEN["meta"]))
SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
HALVES = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_SHARED = {
    "temporal_patch_size": 2,
    "merge_size": 2,
    "num_frames": None,
    "min_frames": 4,
    "max_frames": 768,
    "cap_pixels_per_frame": False,
    "vision_start_token_id": 128,
    "vision_end_token_id": 129,
    "image_token_id": 130,
    "video_token_id": 131,
}
DEFAULTS = {
    "qwen2_5_vl": VisionProcessorConfig(
        family="qwen2_5_vl",
        patch_size=14,
        min_pixels=56 * 56,
        max_pixels=28 * 28 * 1280,
        video_min_pixels=128 * 28 * 28,
        video_max_pixels=28 * 28 * 768,
        do_sample_frames=False,
        fps=None,
        max_video_tokens=128000,
        window_size=112,
        tokens_per_second=2,
        **CLIP,
        **_SHARED,
    ),
    "qwen3_vl": VisionProcessorConfig(
        family="qwen3_vl",
        patch_size=16,
        min_pixels=65536,
        max_pixels=16777216,
        video_min_pixels=128 * 32 * 32,
        video_max_pixels=32 * 32 * 768,
        do_sample_frames=True,
        fps=2,
        max_video_tokens=768,
        window_size=None,
        tokens_per_second=None,
        **HALVES,
        **_SHARED,
    ),
}
of_family = pytest.mark.parametrize("family", DEFAULTS)


def picture(frames: int, height: int, width: int) -> np.ndarray:
    """As in `scripts/golden/vision.py`."""
    t, y, x, c = np.ogrid[:frames, :height, :width, :3]
    checks = 50 * ((x // 9 + y // 11) % 2)
    waves = x * x * (3 + c) + y * (5 * c + 7) + x * y // 7
    return ((waves + checks + 31 * t) % 256).astype(np.uint8)


def configured(family: str, settings: dict, kind: str) -> VisionProcessorConfig:
    """Our configuration for settings of a processor of transformers."""
    changes = dict(settings)
    size = changes.pop("size", None)
    prefix = "video_" if kind == "video" else ""
    if size:
        changes[f"{prefix}min_pixels"] = size["shortest_edge"]
        changes[f"{prefix}max_pixels"] = size["longest_edge"]
    for name in ("image_mean", "image_std"):
        if name in changes:
            changes[name] = tuple(changes[name])
    return dataclasses.replace(DEFAULTS[family], **changes)


def small(family: str, **changes) -> VisionProcessorConfig:
    """Patches of 4 x 4 pixels, windows of 2 x 2 tokens."""
    window = {"window_size": 16} if family == "qwen2_5_vl" else {}
    limits = {"min_pixels": 64, "max_pixels": 512, "video_min_pixels": 64, "video_max_pixels": 512}
    return dataclasses.replace(DEFAULTS[family], **{"patch_size": 4, **limits, **window, **changes})


def visual(config, kind, grid, *, fps=2.0) -> Visual:
    """Patches that are numbered, of a grid."""
    count = int(np.prod(grid))
    patches = np.repeat(np.arange(count, dtype=np.float32)[:, None], config.patch_dim, axis=1)
    seconds = config.temporal_patch_size / fps
    stamps = tuple((np.arange(grid[0]) * seconds).tolist())
    return Visual(kind, patches, grid, seconds, stamps if kind == "video" else ())


@functools.lru_cache
def characters() -> PreTrainedTokenizerFast:
    """A token a character, and the four special tokens from 128 on."""
    backend = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=list(SPECIALS), pad_token="~"
    )


def encode(text: str) -> list[int]:
    return characters().encode(text, add_special_tokens=False)


# Golden vectors


def cases(kind: str) -> list:
    found = [case for case in META["cases"] if case["kind"] == kind]
    name = lambda case: f"{case['family']}-{'x'.join(map(str, case['shape']))}"
    return [pytest.param(case, id=name(case)) for case in found]


def check_patches(case: dict, result: Visual) -> None:
    assert list(result.grid) == case["grid"]
    assert result.patches.dtype == np.float32
    if "digest" in case:
        assert hashlib.sha256(result.patches.tobytes()).hexdigest() == case["digest"]
    else:
        np.testing.assert_array_equal(result.patches, GOLDEN[case["patches"]])


@pytest.mark.parametrize("case", cases("image"))
def test_images_are_those_of_transformers(case):
    config = configured(case["family"], case["settings"], "image")
    check_patches(case, process_image(picture(1, *case["shape"])[0], config))


@pytest.mark.parametrize("case", cases("video"))
def test_videos_are_those_of_transformers(case):
    config = configured(case["family"], case["settings"], "video")
    video = load_video(picture(*case["shape"]), config, source_fps=case["fps"])
    assert video.indices.tolist() == case["indices"]
    check_patches(case, process_video(video, config))


def test_frames_of_qwen2_5_vl_are_those_of_transformers():
    taken, at = GOLDEN["sampling"], 0
    found = [case for case in META["cases"] if case["kind"] == "sampling"]
    for case in found:
        ask = {name: case[name] for name in ("fps", "num_frames") if name in case}
        theirs = taken[at : at + case["count"]]
        at += case["count"]
        ours = sample_frames(
            case["total"], DEFAULTS["qwen2_5_vl"], source_fps=case["source_fps"], **ask
        )
        np.testing.assert_array_equal(ours, theirs, err_msg=str(case))
    assert at == len(taken)
    assert len(found) > 80


def test_spans_of_qwen2_5_vl_are_rounded_as_by_torch():
    torch = pytest.importorskip("torch")
    sensitive = 0
    for total in range(2, 60):
        for count in range(2, total + 1, 2):
            step = total / count
            ours = sample_frames(total, DEFAULTS["qwen2_5_vl"], source_fps=None, num_frames=count)
            # One more than asked for, at times, which is then behind the end.
            theirs = torch.arange(0, total, step).int().numpy()
            np.testing.assert_array_equal(ours, theirs[:count])
            sensitive += bool((ours != (np.arange(count) * step).astype(np.int64)).any())
    assert sensitive


@pytest.mark.parametrize("case", [c for c in META["cases"] if c["kind"] == "text"])
def test_text_is_expanded_as_by_transformers(case):
    config = small(case["family"], do_sample_frames=True, fps=2)
    pictures = [picture(*shape) for shape in case["shapes"]]
    images = [process_image(pixels[0], config) for pixels in pictures[:2]]
    videos = [
        process_video(pixels, config, source_fps=fps)
        for pixels, fps in zip(pictures[2:], case["fps"], strict=True)
    ]
    assert expand_text(case["text"], images, videos, config) == case["expanded"]
    tokens = expand_tokens(encode(case["text"]), images, videos, config, encode).tokens
    assert tokens.tolist() == encode(case["expanded"])
    if "seconds" in case:
        seconds = [video.seconds_per_slice for video in videos]
        np.testing.assert_allclose(seconds, case["seconds"], rtol=1e-7)


# Sizes and pixels


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.sampled_from([8, 28, 32]),
    st.integers(1, 40),
    st.integers(1, 400),
)
def test_sizes_of_images_are_those_of_transformers(height, width, factor, low, more):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    limits = {"min_pixels": low * factor**2, "max_pixels": (low + more) * factor**2}
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InputError, match="at most 200 times the other"):
            smart_resize(height, width, factor=factor, **limits)
        return
    ours = smart_resize(height, width, factor=factor, **limits)
    assert ours == theirs(height, width, factor, **limits)
    assert all(side % factor == 0 and side > 0 for side in ours)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(2, 60),
    st.integers(1, 2000),
    st.integers(1, 2000),
    st.sampled_from([8, 32]),
    st.integers(1, 400),
    st.integers(1, 4000),
)
def test_sizes_of_clips_are_those_of_transformers(frames, height, width, factor, low, more):
    pytest.importorskip("torch")
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as theirs

    limits = {"min_pixels": low * factor**2, "max_pixels": (low + more) * factor**2}
    call = {"factor": factor, "temporal_factor": 2, **limits}
    try:
        wanted = theirs(frames, height, width, **call)
    except ValueError:
        with pytest.raises(InputError, match="at most 200 times the other"):
            smart_resize_clip(frames, height, width, **call)
    else:
        assert smart_resize_clip(frames, height, width, **call) == wanted


def test_a_clip_shorter_than_a_patch_is_refused():
    config = small("qwen3_vl", do_sample_frames=False)
    with pytest.raises(InputError, match="a video of 1 frames; Qwen3-VL needs at least 2"):
        process_video(picture(1, 16, 16), config)
    assert process_video(picture(1, 16, 16), small("qwen2_5_vl")).grid[0] == 1


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(*[st.integers(2, 300)] * 2),  # torch fails at images one pixel wide
    st.tuples(*[st.integers(2, 200)] * 2),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_resizing_is_that_of_torch_to_the_bit(old, new, binary, seed):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(seed).integers(0, 256, (*old, 3), dtype=np.uint8)
    if binary:  # the filter overshoots at edges
        image = np.where(image < 128, 0, 255).astype(np.uint8)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    theirs = torch.nn.functional.interpolate(tensor, size=new, mode="bicubic", antialias=True)
    before = image.copy()
    ours = resize(image, *new)
    np.testing.assert_array_equal(ours, theirs[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(("inputs", "outputs"), [(700, 20), (300, 149), (100, 99), (60, 200)])
def test_sums_of_resizing_are_exact(inputs, outputs):
    """Or the result would depend on the order of a matrix product's additions."""
    column = np.random.default_rng(0).integers(0, 256, (inputs, 400))
    first, values, bits = _weights(inputs, outputs)
    for rows, columns, matrix in _blocks(inputs, outputs):
        sums = matrix @ column[columns].astype(matrix.dtype) + matrix.dtype.type(0.5)
        for i, got in zip(range(outputs)[rows], sums, strict=True):
            taken = column[first[i] : first[i] + values.shape[1]]
            exact = values[i, : len(taken)] @ taken + (1 << (bits - 1))
            np.testing.assert_array_equal(got.astype(np.float64) * 2.0**bits, exact)


def test_resizing_differs_little_from_pillow():
    """The bound that docs/vision.md states for photographs."""
    y, x = np.mgrid[:240, :330] / 40
    smooth = np.stack([np.sin(x + y), np.cos(x * 1.7), np.sin(y * x / 5)], axis=-1)
    image = np.round(127.5 + 127.5 * smooth).astype(np.uint8)
    for height, width in ((224, 308), (112, 168), (56, 84)):
        pillow = PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BICUBIC)
        gap = np.abs(np.asarray(pillow, np.int32) - resize(image, height, width))
        assert gap.max() <= 1
        assert 0 < (gap > 0).mean() < 0.02


@of_family
def test_patches_are_in_the_order_of_transformers(family):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    config = small(family)
    image = picture(1, 24, 40)[0]
    theirs = Qwen2VLImageProcessorPil(
        patch_size=4,
        do_resize=False,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
    )(image, return_tensors="np")
    config = dataclasses.replace(config, min_pixels=1, max_pixels=10**6)
    ours = process_image(image, config)
    assert list(ours.grid) == theirs["image_grid_thw"][0].tolist()
    # Pillow's processor scales by 1/255 before it subtracts, in two roundings more.
    np.testing.assert_allclose(ours.patches, theirs["pixel_values"], rtol=0, atol=1e-6)


def test_normalisation_is_fused():
    pixels = np.arange(256, dtype=np.uint8)[None, None, :].repeat(3, axis=1)
    got = normalize(pixels, *CLIP.values())[0]
    for channel, (mean, std) in enumerate(zip(*CLIP.values(), strict=True)):
        mean, std = (np.float32(x) * np.float32(255) for x in (mean, std))
        wanted = [(np.float32(p) - mean) / std for p in range(256)]
        np.testing.assert_array_equal(got[channel], np.asarray(wanted, np.float32))


def test_with_torchvision_processors_agree_on_arrays_and_pil():
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    rng = np.random.default_rng(0)
    config = DEFAULTS["qwen2_5_vl"]
    processor = Qwen2VLImageProcessor()
    sizes = [(50, 70), (300, 200), (57, 56), (900, 640)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    images += [rng.integers(0, 256, (60, 90, 4), dtype=np.uint8)]
    images += [rng.integers(0, 256, (60, 90, 1), dtype=np.uint8)]
    images += [PIL.Image.fromarray(images[-2]), PIL.Image.fromarray(images[0]).convert("P")]
    for image in images:
        theirs = processor(image, return_tensors="np")
        ours = process_image(image, config)
        assert list(ours.grid) == theirs["image_grid_thw"][0].tolist()
        np.testing.assert_array_equal(ours.patches, theirs["pixel_values"])


# Files


def encoded(image, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_an_image_is_the_same_from_everywhere(tmp_path):
    image = picture(1, 20, 30)[0]
    content = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    for source in (
        image,
        PIL.Image.fromarray(image),
        path,
        str(path),
        f"file://{path}",
        content,
        {"path": None, "bytes": content},
        {"path": str(path), "bytes": None},
        {"path": str(path)},
        text,
        f"data:image/png;base64,{text}",
    ):
        np.testing.assert_array_equal(load_image(source), image)


def test_modes_become_rgb_on_white():
    image = picture(1, 6, 5)[0]
    gray = image[..., 0]
    three = np.repeat(gray[..., None], 3, axis=2)
    np.testing.assert_array_equal(load_image(gray), three)
    np.testing.assert_array_equal(load_image(gray[..., None]), three)
    np.testing.assert_array_equal(load_image(PIL.Image.fromarray(gray)), three)
    clear = np.concatenate([image, np.zeros_like(gray)[..., None]], axis=2)
    clear[0, :, 3] = 255
    wanted = np.full_like(image, 255)
    wanted[0] = image[0]
    np.testing.assert_array_equal(load_image(clear), wanted)
    np.testing.assert_array_equal(load_image(encoded(clear)), wanted)
    palette = PIL.Image.fromarray(image).quantize(4)
    np.testing.assert_array_equal(load_image(palette), np.asarray(palette.convert("RGB")))


def test_layers_blend_as_in_transformers():
    layers = np.zeros((52, 256, 4), np.uint8)
    layers[..., :3] = np.arange(0, 256, 5)[:, None, None]
    layers[..., 3] = np.arange(256)
    blended = load_image(layers)
    assert blended.shape == (52, 256, 3)
    for channel in range(3):
        np.testing.assert_array_equal(blended[..., channel], GOLDEN["blended"])


def test_a_photograph_is_turned_upright():
    image = picture(1, 8, 12)[0]
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(load_image(encoded(image, exif=exif)), np.rot90(image, -1))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"no image", "the bytes: no image that Pillow can read"),
        (encoded(picture(1, 30, 30)[0])[:300], "the bytes: a broken image"),
        ("missing.png", "missing.png: no such file, and not base64"),
        ("https://example.org/a.png", "nothing is downloaded here"),
        ("data:image/png,abc", "must be base64"),
        ({"path": None, "bytes": None}, "one of 'path' and 'bytes' must be given"),
        (3, "int is no image or video"),
        (np.zeros((4, 4, 3)), "image array of float64 and shape"),
        (np.zeros((4, 4, 2), np.uint8), "with 1, 3 or 4 channels"),
    ],
)
def test_what_is_no_image_is_named(source, message):
    with pytest.raises(InputError, match=message):
        load_image(source)


def test_shapes_that_cannot_be_resized_are_named():
    config = DEFAULTS["qwen2_5_vl"]
    with pytest.raises(InputError, match="an image of 2 x 500 pixels: one side may be at most 200"):
        process_image(np.zeros((2, 500, 3), np.uint8), config)
    with pytest.raises(InputError, match="an image of 0 x 5 pixels is empty"):
        process_image(np.zeros((0, 5, 3), np.uint8), config)


# Video


@of_family
def test_a_video_is_the_same_from_everywhere(family, tmp_path):
    config = small(family, do_sample_frames=False)
    frames = picture(12, 10, 14)
    for i, frame in enumerate(frames):
        # Numbers count as numbers: 10 stands behind 9.
        PIL.Image.fromarray(frame).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".frame99.png").write_bytes(b"")
    first, *rest = [PIL.Image.fromarray(frame) for frame in frames]
    animation = encoded(first, save_all=True, append_images=rest, duration=125)
    for source, fps in (
        (frames, 8.0),
        (list(frames), 8.0),
        ([encoded(frame) for frame in frames], 8.0),
        (tmp_path, 8.0),
        (animation, None),
        ({"bytes": animation, "path": "a.png"}, None),
    ):
        video = load_video(source, config, source_fps=fps)
        np.testing.assert_array_equal(video.frames, frames)
        assert (video.total, video.fps, video.sampled_fps) == (12, 8.0, 8.0)
        thin = load_video(source, config, source_fps=fps, fps=4)
        np.testing.assert_array_equal(thin.frames, frames[thin.indices])
        assert len(thin.indices) == 6
        assert thin.sampled_fps == 4.0


def test_a_gif_with_uneven_frames_and_clear_parts():
    colours = np.asarray([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    frames = [np.broadcast_to(c, (8, 8, 3)).copy() for c in colours]
    images = [PIL.Image.fromarray(f) for f in frames]
    content = encoded(
        images[0], "GIF", save_all=True, append_images=images[1:], duration=[100, 200, 300]
    )
    video = load_video(content, small("qwen2_5_vl"))
    np.testing.assert_array_equal(video.frames, np.stack(frames))
    assert video.fps == pytest.approx(3 / 0.6)


def test_an_mp4_is_read_with_pyav(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    shades = [20, 80, 140, 200, 250]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 32, 16
        for shade in shades:
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), shade, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = load_video(path, small("qwen3_vl"), num_frames=3)
    assert video.indices.tolist() == [0, 2, 4]
    assert (video.total, video.fps) == (5, 10.0)
    means = video.frames.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, [20, 140, 250], atol=6)


def test_without_pyav_the_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match="pip install av"):
        load_video(b"\0\0\0\x18ftypmp42", small("qwen3_vl"))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (np.zeros((3, 4, 4), np.uint8), {}, "video array of uint8 and shape"),
        (np.zeros((0, 4, 4, 3), np.uint8), {}, "a video without frames"),
        ([], {}, "a video without frames"),
        ([picture(1, 4, 4)[0], picture(1, 4, 5)[0]], {}, r"frames of 2 sizes, \(4, 4\) and"),
        (picture(4, 8, 8), {"fps": 1, "num_frames": 2}, "give one of them"),
        (picture(4, 8, 8), {"num_frames": 0}, "must be positive"),
        (picture(4, 8, 8), {"num_frames": 6}, "6 frames, a multiple of 2, cannot be taken"),
        (picture(4, 8, 8), {"num_frames": 1}, "ask for more frames"),
        (picture(4, 8, 8), {"fps": 1}, "whose own rate is not known"),
        (Path(__file__).parent / "golden", {}, "no images there"),
    ],
)
def test_what_is_no_video_is_named(source, options, message):
    with pytest.raises(InputError, match=message):
        process_video(source, small("qwen2_5_vl"), **options)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 2000),
    st.sampled_from([None, 1.0, 7.5, 24.0, 29.97]),
    st.one_of(st.tuples(st.just("fps"), st.floats(0.1, 30)), st.just(None)),
)
def test_frames_of_qwen3_vl_are_those_of_transformers(total, source_fps, ask):
    pytest.importorskip("torch")
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    keywords = dict([ask]) if ask else {}
    theirs = Qwen3VLVideoProcessor.sample_frames(
        SimpleNamespace(fps=2, min_frames=4, max_frames=768),
        VideoMetadata(total_num_frames=total, fps=source_fps),
        **keywords,
    )
    ours = sample_frames(total, DEFAULTS["qwen3_vl"], source_fps=source_fps, **keywords)
    np.testing.assert_array_equal(ours, theirs)


def test_an_odd_video_repeats_its_last_frame():
    config = small("qwen3_vl", do_sample_frames=False)
    odd = process_video(picture(5, 16, 16), config, source_fps=2)
    even = process_video(
        np.concatenate([picture(5, 16, 16), picture(5, 16, 16)[-1:]]), config, source_fps=2
    )
    assert odd.grid == even.grid == (3, *odd.grid[1:])
    np.testing.assert_array_equal(odd.patches, even.patches)
    assert odd.timestamps == (0.25, 1.25, 2.0)


# Tokens


def test_masks_follow_expanded_tokens():
    config = small("qwen3_vl")
    image = visual(config, "image", (1, 4, 2))
    video = visual(config, "video", (2, 2, 2), fps=2.0)
    tokens = encode("ab<|image_pad|>c<|vision_start|><|video_pad|>")
    expanded = expand_tokens(tokens, [image], [video], config, encode)
    wanted = "ab<|image_pad|><|image_pad|>c<|vision_start|>"
    for stamp in ("<0.0 seconds>", "<1.0 seconds>"):
        wanted += f"{stamp}<|vision_start|><|video_pad|><|vision_end|>"
    assert expanded.tokens.tolist() == encode(wanted)
    assert expanded.sources.tolist() == [0, 1, 2, 2, 3, 4] + [5] * 32
    with pytest.raises(InputError, match="give encode"):
        expand_tokens(tokens, [image], [video], config)
    # Text alone stays as it is.
    assert expand_tokens([1, 2], [], [], config).tokens.tolist() == [1, 2]
    assert expand_text("none", [], [], config) == "none"


@pytest.mark.parametrize(
    ("text", "images", "videos", "message"),
    [
        ("<|image_pad|><|image_pad|>", 1, 0, r"2 <\|image_pad\|> placeholders but 1 images"),
        ("x", 1, 0, r"0 <\|image_pad\|> placeholders but 1 images"),
        ("<|image_pad|><|video_pad|>", 1, 2, r"1 <\|video_pad\|> placeholders but 2 videos"),
    ],
)
def test_placeholders_are_counted(text, images, videos, message):
    config = small("qwen2_5_vl")
    lists = (
        [visual(config, "image", (1, 2, 2))] * images,
        [visual(config, "video", (1, 2, 2))] * videos,
    )
    with pytest.raises(InputError, match=message):
        expand_text(text, *lists, config)
    with pytest.raises(InputError, match=message):
        expand_tokens(encode(text), *lists, config, encode)


def test_an_image_among_the_videos_is_named():
    config = small("qwen2_5_vl")
    with pytest.raises(InputError, match="image among the videos"):
        expand_text("<|video_pad|>", [], [visual(config, "image", (1, 2, 2))], config)


# Positions

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
WORDS = st.text("abc", min_size=1, max_size=6)
PARTS = st.lists(
    st.one_of(
        WORDS.map(lambda text: ("text", text, 0.0)),
        GRIDS.map(lambda grid: ("image", (1, 2 * grid[1], 2 * grid[2]), 0.0)),
        st.tuples(
            st.just("video"),
            GRIDS.map(lambda grid: (grid[0], 2 * grid[1], 2 * grid[2])),
            st.sampled_from([0.3, 1.0, 2.0, 3.0, 7.5, 23.976]),
        ),
    ),
    min_size=1,
    max_size=7,
)


def assemble(parts, config):
    """Expanded tokens, images and videos of parts, each visual between its markers."""
    text, images, videos = "", [], []
    for kind, content, fps in parts:
        if kind == "text":
            text += content
        else:
            (images if kind == "image" else videos).append(
                visual(config, kind, content, fps=fps or 1.0)
            )
            text += f"<|vision_start|><|{kind}_pad|><|vision_end|>"
    tokens = expand_tokens(encode(text), images, videos, config, encode).tokens
    return tokens, images, videos


def transformers_rope_index(family, tokens, images, videos, config, padding):
    """`get_rope_index`, which reads of its model no more than the configuration."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLModel, Qwen3VLModel

    model = {"qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}[family]
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=config.tokens_per_second)
    stand_in = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision),
        get_vision_position_ids=functools.partial(model.get_vision_position_ids, None),
    )
    ids = torch.tensor([[7] * padding + tokens.tolist()])
    mask = torch.tensor([[0] * padding + [1] * len(tokens)])
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    grids = lambda visuals: torch.tensor([v.grid for v in visuals]) if visuals else None
    seconds = torch.tensor([v.seconds_per_slice for v in videos])
    positions, delta = model.get_rope_index(
        stand_in,
        ids,
        types,
        grids(images),
        grids(videos),
        attention_mask=mask,
        **({"second_per_grid_ts": seconds} if family == "qwen2_5_vl" else {}),
    )
    return positions[:, 0, padding:].T.numpy(), int(delta[0, 0])


@of_family
@settings(max_examples=60, deadline=None)
@given(parts=PARTS, padding=st.integers(0, 3))
def test_positions_are_those_of_transformers(family, parts, padding):
    config = small(family)
    tokens, images, videos = assemble(parts, config)
    theirs, delta = transformers_rope_index(family, tokens, images, videos, config, padding)
    ours = mrope_positions(tokens, images, videos, config)
    np.testing.assert_array_equal(ours.positions, theirs)
    assert ours.delta == delta
    assert ours.positions.dtype == np.int32


def test_positions_of_an_example():
    config = small("qwen2_5_vl")
    video = visual(config, "video", (2, 4, 2), fps=0.8)
    tokens = encode("ab" + "<|video_pad|>" * 4 + "c")
    positions, delta = mrope_positions(tokens, [], [video], config)
    # 2 positions a second and slices 2.5 seconds apart.
    assert positions.T.tolist() == [
        [0, 1, 2, 2, 7, 7, 4],
        [0, 1, 2, 3, 2, 3, 4],
        [0, 1, 2, 2, 2, 2, 4],
    ]
    assert delta == 8 - 7


def test_tokens_of_other_images_are_refused():
    config = small("qwen2_5_vl")
    image = visual(config, "image", (1, 4, 4))
    with pytest.raises(InputError, match="3 image tokens but 1 images with 4 features"):
        mrope_positions([130] * 3, [image], [], config)
    with pytest.raises(InputError, match="begin at 0 and end at 4"):
        mrope_positions([130, 130, 5, 130, 130], [image], [], config)


# Rows


@settings(max_examples=40, deadline=None)
@given(st.lists(GRIDS, min_size=1, max_size=4), st.sampled_from([16, 24, 32]))
def test_windows_and_segments_are_those_of_transformers(grids, window):
    torch = pytest.importorskip("torch")
    from transformers import vision_utils

    config = small("qwen2_5_vl", window_size=window)
    grids = [(t, 2 * h, 2 * w) for t, h, w in grids]
    videos = [visual(config, "video", grid) for grid in grids]
    count = sum(int(np.prod(grid)) // 4 for grid in grids)
    row = vision_row([131] * count, [], videos, config)
    thw = torch.tensor(grids)
    order, bounds = vision_utils.get_vision_window_index(thw, 2, window, 4)
    # Their patches sorted by window, and the windows' ends among them.
    unit = (order[:, None] * 4 + torch.arange(4)).reshape(-1).numpy()
    theirs = [frozenset(part.tolist()) for part in np.split(unit, bounds[1:-1].numpy())]
    ours = [
        frozenset(np.flatnonzero(row.patch_windows == number).tolist())
        for number in range(1, row.patch_windows.max() + 1)
    ]
    assert set(ours) == set(theirs)
    assert len(ours) == len(theirs)
    lengths = np.diff(vision_utils.get_vision_cu_seqlens(thw).numpy())
    np.testing.assert_array_equal(
        row.patch_segments, np.repeat(np.arange(1, len(lengths) + 1), lengths)
    )
    coords = vision_utils.get_vision_position_ids(thw, 2).numpy()
    np.testing.assert_array_equal(row.patch_coords, coords)
    sizes = np.repeat([g[1:] for g in grids], [int(np.prod(g)) for g in grids], axis=0)
    np.testing.assert_array_equal(row.patch_grids, sizes)


def test_qwen3_vl_has_a_window_a_segment():
    config = small("qwen3_vl")
    image = visual(config, "image", (1, 8, 8))
    row = vision_row([130] * 32, [image, image], [], config)
    np.testing.assert_array_equal(row.patch_windows, row.patch_segments)
    assert row.patch_segments.max() == 2


@of_family
@settings(max_examples=30, deadline=None)
@given(parts=PARTS)
def test_tokens_take_their_features_in_order(family, parts):
    config = small(family)
    tokens, images, videos = assemble(parts, config)
    row = vision_row(tokens, images, videos, config)
    # As `masked_scatter` does it: image features to image tokens, video features to video tokens.
    features = row.patches[::4, 0]
    wanted = np.full(len(tokens), -1.0)
    for pad, visuals in ((130, images), (131, videos)):
        wanted[tokens == pad] = np.concatenate([[], *(v.patches[::4, 0] for v in visuals)])
    taken = row.visual_index >= 0
    np.testing.assert_array_equal(features[row.visual_index[taken]], wanted[taken])
    assert (wanted[~taken] == -1).all()
    rope = mrope_positions(tokens, images, videos, config)
    np.testing.assert_array_equal(row.positions, rope.positions)
    assert row.next_position == len(tokens) + rope.delta


def documents(config):
    image = visual(config, "image", (1, 4, 4))
    video = visual(config, "video", (2, 2, 6))
    first = encode("a" + "<|image_pad|>" * 4 + "b")
    third = encode("<|video_pad|>" * 6 + "c" + "<|image_pad|>" * 4)
    return [
        vision_row(first, [image], [], config),
        vision_row(encode("text"), [], [], config),
        vision_row(third, [image], [video], config),
    ]


def test_documents_of_a_row_keep_to_themselves():
    config = small("qwen2_5_vl")
    parts = documents(config)
    row = join_rows(parts, starts=[0, 8, 13], row_length=26)
    assert [len(p.patches) for p in parts] == [16, 0, 40]
    np.testing.assert_array_equal(row.patches, np.concatenate([p.patches for p in parts]))
    # Documents are apart, and inside each the numbers differ where they did.
    for name in ("patch_segments", "patch_windows"):
        first, last = getattr(row, name)[:16], getattr(row, name)[16:]
        assert first.min() == 1
        assert last.min() == first.max() + 1
        np.testing.assert_array_equal(last - first.max(), getattr(parts[2], name))
    assert row.visual_index.tolist() == [
        *[-1, 0, 1, 2, 3, -1, -1, -1],
        *[-1, -1, -1, -1, -1],
        *[8, 9, 10, 11, 12, 13, -1, 4, 5, 6, 7, -1, -1],
    ]
    np.testing.assert_array_equal(row.positions[13:24], parts[2].positions)
    assert (row.positions[24:] == 0).all()
    assert row.next_position == parts[2].next_position
    behind = join_rows(parts)
    assert len(behind.visual_index) == 6 + 4 + 11
    np.testing.assert_array_equal(behind.visual_index[10:], row.visual_index[13:24])
    with pytest.raises(InputError, match="overlap or leave the row of 20"):
        join_rows(parts, row_length=20)
    with pytest.raises(InputError, match="overlap"):
        join_rows(parts, starts=[0, 3, 13])


def test_rows_are_padded_to_one_shape():
    config = small("qwen2_5_vl")
    rows = documents(config)
    batch = pack_vision(rows, 44, row_length=12)
    d = config.patch_dim
    shapes = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert shapes == {
        "patches": ((3, 44, d), np.float32),
        "patch_coords": ((3, 44, 2), np.int32),
        "patch_grids": ((3, 44, 2), np.int32),
        "patch_segments": ((3, 44), np.int32),
        "patch_windows": ((3, 44), np.int32),
        "visual_index": ((3, 12), np.int32),
    }
    for r, row in enumerate(rows):
        size = len(row.patches)
        for name in set(batch) - {"visual_index"}:
            np.testing.assert_array_equal(batch[name][r, :size], getattr(row, name))
            assert not batch[name][r, size:].any()
        length = len(row.visual_index)
        np.testing.assert_array_equal(batch["visual_index"][r, :length], row.visual_index)
        assert (batch["visual_index"][r, length:] == -1).all()
    assert (batch["patch_segments"][2] > 0).sum() == 40
    with pytest.raises(InputError, match="row 2 has 40 patches but a row holds num_patches=39"):
        pack_vision(rows, 39)
    with pytest.raises(InputError, match="row 2 has 11 tokens but a row holds row_length=10"):
        pack_vision(rows, 44, row_length=10)
    with pytest.raises(InputError, match="no rows"):
        pack_vision([], 4)


# Configuration


def write(directory: Path, **files) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def test_the_files_of_qwen2_5_vl(tmp_path):
    """What its checkpoints have: one file, whose limits of images are those of video too."""
    write(
        tmp_path,
        config={
            "model_type": "qwen2_5_vl",
            **IDS,
            "vision_config": {"window_size": 112, "tokens_per_second": 2},
        },
        preprocessor_config={
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": list(CLIP["image_mean"]),
            "image_std": list(CLIP["image_std"]),
            "image_processor_type": "Qwen2VLImageProcessor",
        },
    )
    limits = {"min_pixels": 3136, "max_pixels": 12845056}
    limits |= {f"video_{name}": value for name, value in limits.items()}
    wanted = dataclasses.replace(DEFAULTS["qwen2_5_vl"], **limits, **IDS)
    assert read_vision_processor(tmp_path) == wanted


def test_the_files_of_qwen3_vl(tmp_path):
    shared = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    image = {**shared, "size": {"longest_edge": 16777216, "shortest_edge": 65536}}
    video = {**shared, "size": {"longest_edge": 25165824, "shortest_edge": 4096}, "fps": 2}
    video["min_pixels"] = 99  # which the processor of this family does not read
    write(
        tmp_path,
        config={"model_type": "qwen3_vl_moe", **IDS, "vision_config": {}},
        preprocessor_config=image,
        video_preprocessor_config=video,
    )
    wanted = dataclasses.replace(
        DEFAULTS["qwen3_vl"], video_min_pixels=4096, video_max_pixels=25165824, **IDS
    )
    assert read_vision_processor(tmp_path) == wanted
    # The nested file goes before the others.
    bigger = {**image, "size": {"longest_edge": 2**25, "shortest_edge": 65536}}
    nested = {"image_processor": bigger, "video_processor": {**video, "max_frames": 99}}
    write(tmp_path, processor_config=nested)
    changed = dataclasses.replace(wanted, max_pixels=2**25, max_frames=99)
    assert read_vision_processor(tmp_path) == changed


@of_family
def test_what_is_written_is_read_by_us_and_by_transformers(family, tmp_path):
    pytest.importorskip("torch")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    config = small(family, max_frames=33, video_max_pixels=480)
    vision = {"window_size": 16, "tokens_per_second": 2} if family == "qwen2_5_vl" else {}
    ids = {name: getattr(config, name) for name in IDS}
    write(tmp_path, config={"model_type": family, "vision_config": vision, **ids})
    write_vision_processor(config, tmp_path)
    assert read_vision_processor(tmp_path) == config
    image = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    assert dict(image.size) == {"shortest_edge": 64, "longest_edge": 512}
    assert (image.patch_size, tuple(image.image_mean)) == (4, config.image_mean)
    if family == "qwen3_vl":
        video = Qwen3VLVideoProcessor.from_pretrained(tmp_path)
        assert dict(video.size) == {"shortest_edge": 64, "longest_edge": 480}
        assert (video.max_frames, video.fps, video.patch_size) == (33, 2, 4)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json in"),
        ({"config": {"model_type": "llama"}}, "model_type='llama'"),
        ({"config": {"model_type": "qwen3_vl"}}, "has no processor_config.json"),
        ({"config": ["qwen3_vl"]}, "holds list; it must hold an object"),
        (
            {"config": {"model_type": "qwen2_5_vl"}, "preprocessor_config": {"do_resize": False}},
            "do_resize=False; only True is supported",
        ),
        (
            {"config": {"model_type": "qwen2_5_vl"}, "preprocessor_config": {"resample": 2}},
            "resample=2; only 3 is supported",
        ),
        (
            {
                "config": {"model_type": "qwen2_5_vl"},
                "preprocessor_config": {"size": {"height": 1}},
            },
            "must have shortest_edge and longest_edge",
        ),
        (
            {
                "config": {"model_type": "qwen3_vl"},
                "preprocessor_config": {"patch_size": 14},
                "video_preprocessor_config": {"patch_size": 16},
            },
            "patch_size is 14 for images and 16 for video",
        ),
    ],
)
def test_files_that_cannot_be_followed_are_named(files, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_vision_processor(write(tmp_path, **files))


def test_broken_files_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        read_vision_processor(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "llava"}, "family='llava' is unknown"),
        ({"patch_size": 0}, "patch_size=0; it must be at least 1"),
        ({"min_pixels": 10**9}, "min_pixels=1000000000 and max_pixels"),
        ({"fps": 2, "num_frames": 4}, "set one of them"),
        ({"window_size": None}, "Qwen2.5-VL needs both"),
        ({"window_size": 20}, "smaller than a merged patch of 28"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(DEFAULTS["qwen2_5_vl"], **changes)
