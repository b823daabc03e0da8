"""An image or a video as the patches a vision tower reads, in Hugging Face's order."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jaxrl_reason.data.vision.config import VisionProcessorConfig
from jaxrl_reason.data.vision.images import load_image
from jaxrl_reason.data.vision.resize import resize, smart_resize, smart_resize_clip
from jaxrl_reason.data.vision.videos import Video, load_video
from jaxrl_reason.errors import InputError


class Visual(NamedTuple):
    """One image or video, ready for the tower, and what its tokens and positions need."""

    kind: Literal["image", "video"]
    patches: Float[np.ndarray, "P d"]
    """The merge_size x merge_size patches of a token stand together; d runs over channel, frame,
    row and column."""
    grid: tuple[int, int, int]
    """Temporal slices, rows and columns of patches: `grid_thw`."""
    seconds_per_slice: float
    """Time between temporal slices (`second_per_grid_ts` of Qwen2.5-VL); 0 for an image."""
    timestamps: tuple[float, ...]
    """Seconds in the middle of each temporal slice (text of Qwen3-VL); none for an image."""


def process_image(source: Any, config: VisionProcessorConfig) -> Visual:
    """Load, resize and cut what `load_image` takes.

    Raises:
        InputError: the image is broken, empty or too long for its width.
    """
    image = load_image(source)
    height, width = smart_resize(
        *image.shape[:2],
        factor=config.factor,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )
    frames = resize(image, height, width)[None]
    return Visual("image", *_cut(frames, config), seconds_per_slice=0.0, timestamps=())


def process_video(
    source: Any,
    config: VisionProcessorConfig,
    *,
    source_fps: float | None = None,
    fps: float | None = None,
    num_frames: int | None = None,
) -> Visual:
    """Resize and cut a `Video`, or what `load_video` takes, with the same keywords.

    Raises:
        InputError: as `load_video`, or the frames are too few, empty or too long for their width.
    """
    sampling = {"source_fps": source_fps, "fps": fps, "num_frames": num_frames}
    if isinstance(source, Video):
        if any(value is not None for value in sampling.values()):
            raise InputError(f"{sampling} of a Video, whose frames are taken already; leave it out")
        video = source
    else:
        video = load_video(source, config, source_fps=source_fps, fps=fps, num_frames=num_frames)
    height, width = _frame_size(video.frames.shape, config)
    frames = np.stack([resize(frame, height, width) for frame in video.frames])
    depth = config.temporal_patch_size
    indices = np.append(video.indices, [video.indices[-1]] * (-len(video.indices) % depth))
    seconds = (indices / video.fps).reshape(-1, depth)
    return Visual(
        "video",
        *_cut(frames, config),
        seconds_per_slice=depth / video.sampled_fps,
        timestamps=tuple(((seconds[:, 0] + seconds[:, -1]) / 2).tolist()),
    )


def _frame_size(shape: Sequence[int], config: VisionProcessorConfig) -> tuple[int, int]:
    num_frames, height, width = shape[:3]
    low, high = config.video_min_pixels, config.video_max_pixels
    factor, depth = config.factor, config.temporal_patch_size
    floor = int(low * 1.05)
    if config.family == "qwen2_5_vl":
        if config.cap_pixels_per_frame:
            budget = int(config.max_video_tokens * factor * factor * 0.9)
            high = max(min(high, budget * depth // num_frames), floor)
        return smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
    if config.cap_pixels_per_frame:
        frame = config.max_video_tokens * factor * factor
        high = max(min(frame, high // num_frames), floor) * num_frames
    limits = {"factor": factor, "temporal_factor": depth, "min_pixels": low, "max_pixels": high}
    return smart_resize_clip(num_frames, height, width, **limits)


def _cut(
    frames: UInt8[np.ndarray, "T height width 3"], config: VisionProcessorConfig
) -> tuple[Float[np.ndarray, "P d"], tuple[int, int, int]]:
    """Patches and their grid; the last frame is repeated until a patch's depth divides T."""
    p, m, depth = config.patch_size, config.merge_size, config.temporal_patch_size
    missing = -len(frames) % depth
    if missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    count, height, width, channels = frames.shape
    t, h, w = count // depth, height // p, width // p
    pixels = frames.reshape(t, depth, h // m, m, p, w // m, m, p, channels)
    # Slice, block, patch in block; then channel, frame, row, column of the patch.
    pixels = pixels.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, channels, -1)
    patches = normalize(pixels, config.image_mean, config.image_std)
    return patches.reshape(len(patches), -1), (t, h, w)


def normalize(
    pixels: UInt8[np.ndarray, "P C n"], mean: Sequence[float], std: Sequence[float]
) -> Float[np.ndarray, "P C n"]:
    """Subtract mean and divide by deviation, both taken on the scale of the pixels, in float32."""
    scaled = lambda x: (np.asarray(x, np.float32) * np.float32(255))[:, None]
    values = pixels.astype(np.float32)
    values -= scaled(mean)
    values /= scaled(std)
    return values
