"""Frames of a video, from arrays, lists, folders and files, thinned as transformers thins them."""

import functools
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Int, UInt8

from jaxrl_reason.data.vision.config import VisionProcessorConfig
from jaxrl_reason.data.vision.images import (
    flatten_channels,
    load_image,
    open_bytes,
    open_pil,
    to_rgb,
)
from jaxrl_reason.errors import InputError

ASSUMED_FPS = 24.0
"""Frames per second of a video that does not say, as in transformers."""
Choice = Callable[[int, float | None], Int[np.ndarray, " n"]]
"""Which frames are taken of so many, at so many a second."""


class Video(NamedTuple):
    """The frames that were taken of a video."""

    frames: UInt8[np.ndarray, "n height width 3"]
    indices: Int[np.ndarray, " n"]
    """Their numbers in the whole video."""
    total: int
    """Frames of the whole video."""
    fps: float
    """Frames per second of the whole video."""

    @property
    def sampled_fps(self) -> float:
        """Frames taken per second."""
        return len(self.indices) / self.total * self.fps


def load_video(
    source: Any,
    config: VisionProcessorConfig,
    *,
    source_fps: float | None = None,
    fps: float | None = None,
    num_frames: int | None = None,
) -> Video:
    """Read a video and take frames of it.

    Args:
        source: a uint8 array [T, H, W, C]; a list of what `load_image` takes; a folder of images,
            in the order of the numbers in their names; an animated GIF, PNG or WebP; with PyAV
            installed an MP4 or what else it reads. Files also as bytes, or as a row with 'path' or
            'bytes'.
        config: says which frames are taken where the caller does not.
        source_fps: frames per second of an array, a list or a folder; 24 if nobody knows.
        fps: take so many frames per second.
        num_frames: take so many frames.

    Raises:
        InputError: nothing readable there, frames of several sizes, or too few frames.
    """
    asked = fps is not None or num_frames is not None

    def choose(total: int, rate: float | None) -> Int[np.ndarray, " n"]:
        if not (asked or config.do_sample_frames):
            return np.arange(total)
        return sample_frames(total, config, source_fps=rate, fps=fps, num_frames=num_frames)

    if isinstance(source, np.ndarray):
        return _from_array(source, choose, source_fps)
    if isinstance(source, (list, tuple)):
        return _from_list(source, choose, source_fps)
    if isinstance(source, (str, Path)) and len(str(source)) < 4096 and Path(source).is_dir():
        return _from_list(_images_in(Path(source)), choose, source_fps)
    content, name = open_bytes(source)
    try:
        image = open_pil(content, name)
    except InputError:
        return _from_av(content, name, choose)
    return _from_animation(image, name, choose)


def sample_frames(
    total: int,
    config: VisionProcessorConfig,
    *,
    source_fps: float | None,
    fps: float | None = None,
    num_frames: int | None = None,
) -> Int[np.ndarray, " n"]:
    """Numbers of the frames that are taken of `total`, as transformers' video processors do it.

    Qwen2.5-VL takes the first of equal spans, in numbers that a patch's depth divides. Qwen3-VL
    takes both ends and what lies evenly between.

    Raises:
        InputError: both `fps` and `num_frames`, a video that is too short, or of unknown rate.
    """
    if fps is not None and num_frames is not None:
        raise InputError(f"fps={fps} and num_frames={num_frames}; give one of them")
    if total < 1:
        raise InputError("a video without frames")
    if num_frames is None and fps is None:
        fps, num_frames = config.fps, config.num_frames
    if (fps is not None and fps <= 0) or (num_frames is not None and num_frames < 1):
        raise InputError(f"fps={fps} and num_frames={num_frames}; the one given must be positive")
    if config.family == "qwen3_vl":
        return _even_frames(total, config, source_fps or ASSUMED_FPS, fps, num_frames)
    return _first_of_spans(total, config, source_fps, fps, num_frames)


def _even_frames(
    total: int,
    config: VisionProcessorConfig,
    source_fps: float,
    fps: float | None,
    num_frames: int | None,
) -> Int[np.ndarray, " n"]:
    if num_frames is None and fps is not None:
        wanted = max(int(total / source_fps * fps), config.min_frames)
        num_frames = min(wanted, config.max_frames, total)
    if num_frames is None:
        num_frames = min(max(total, config.min_frames), config.max_frames)
    return np.linspace(0, total - 1, num_frames).round().astype(np.int64)


def _first_of_spans(
    total: int,
    config: VisionProcessorConfig,
    source_fps: float | None,
    fps: float | None,
    num_frames: int | None,
) -> Int[np.ndarray, " n"]:
    depth = config.temporal_patch_size
    if num_frames is not None:
        count = round(num_frames / depth) * depth
    elif fps is not None:
        if source_fps is None:
            raise InputError(
                f"fps={fps} of a video whose own rate is not known; give source_fps, or num_frames"
            )
        most = math.floor(min(config.max_frames, total) / depth) * depth
        wanted = max(total / source_fps * fps, config.min_frames)
        count = math.floor(min(wanted, most, total) / depth) * depth
    else:
        return np.arange(total)
    if not 0 < count <= total:
        raise InputError(
            f"{count} frames, a multiple of {depth}, cannot be taken of a video of {total}; "
            + ("ask for more frames" if count == 0 else "ask for fewer, or give a longer video")
        )
    # float32, as torch.arange has it: it turns 4.9999999 to 5 before the rest is cut off.
    return (np.arange(count) * (total / count)).astype(np.float32).astype(np.int64)


def _from_array(array: np.ndarray, choose: Choice, fps: float | None) -> Video:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3, 4):
        raise InputError(
            f"a video array of {array.dtype} and shape {array.shape}; give uint8 of shape "
            "[T, H, W, C] with 1, 3 or 4 channels"
        )
    if not len(array):
        raise InputError("a video without frames")
    indices = choose(len(array), fps)
    return Video(flatten_channels(array[indices]), indices, len(array), fps or ASSUMED_FPS)


def _from_list(sources: Sequence[Any], choose: Choice, fps: float | None) -> Video:
    if not sources:
        raise InputError("a video without frames")
    indices = choose(len(sources), fps)
    frames = [load_image(sources[i]) for i in indices]
    return Video(_stack(frames, "the list"), indices, len(sources), fps or ASSUMED_FPS)


def _stack(frames: Sequence[np.ndarray], name: str) -> np.ndarray:
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) != 1:
        raise InputError(
            f"{name}: frames of {len(sizes)} sizes, {sizes[0]} and {sizes[-1]} of them"
        )
    return np.stack(frames)


def _images_in(folder: Path) -> list[Path]:
    known = PIL.Image.registered_extensions()
    names = [p for p in folder.iterdir() if p.suffix.lower() in known and p.name[0] != "."]
    if not names:
        raise InputError(f"{folder}: no images there")
    number = lambda part: (0, int(part), "") if part.isdecimal() else (1, 0, part)
    return sorted(names, key=lambda p: [number(part) for part in re.split(r"(\d+)", p.name)])


def _from_animation(image: PIL.Image.Image, name: str, choose: Choice) -> Video:
    total = getattr(image, "n_frames", 1)
    try:
        # A first look at all frames, for how long each is shown.
        shown = [image.info.get("duration", 0) for _ in _frames(image, total)]
        fps = 1000 * total / sum(shown) if sum(shown) > 0 else None
        indices = choose(total, fps)
        taken = set(indices.tolist())
        pictures = {i: to_rgb(frame) for i, frame in enumerate(_frames(image, total)) if i in taken}
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name}: a broken animation: {error}") from error
    frames = _stack([pictures[i] for i in indices.tolist()], name)
    return Video(frames, indices, total, fps or ASSUMED_FPS)


def _frames(image: PIL.Image.Image, total: int) -> Iterator[PIL.Image.Image]:
    for i in range(total):
        image.seek(i)
        image.load()
        yield image


def _from_av(content: bytes, name: str, choose: Choice) -> Video:
    try:
        import av  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"{name}: neither an animation that Pillow reads nor, without PyAV, a video; install "
            "it (pip install av), or give the frames"
        ) from error
    opened = functools.partial(av.open, mode="r")
    try:
        with opened(io.BytesIO(content)) as container:
            stream = container.streams.video[0]
            total, rate = stream.frames, stream.average_rate
        if not total:
            with opened(io.BytesIO(content)) as container:
                total = sum(1 for _ in container.decode(video=0))
        fps = float(rate) if rate else None
        indices = choose(total, fps)
        taken, pictures = set(indices.tolist()), {}
        with opened(io.BytesIO(content)) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if i in taken:
                    pictures[i] = frame.to_ndarray(format="rgb24")
                if i >= max(taken):
                    break
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name}: no video that PyAV can read: {error}") from error
    if len(pictures) < len(taken):
        raise InputError(f"{name}: the header promises {total} frames but fewer can be decoded")
    frames = _stack([pictures[i] for i in indices.tolist()], name)
    return Video(frames, indices, total, fps or ASSUMED_FPS)
