"""Sizes of resized images, and bicubic resizing with antialiasing, to the bit that of torch.

transformers resizes uint8 tensors through torchvision, which calls torch's `interpolate` for uint8:
two passes, columns first, with weights rounded to 16-bit integers and each pass rounded to uint8.
Sums of such products are exact in floating point, so matrix products give the same integers.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxrl_reason.errors import InputError

_LARGEST_RATIO = 200
_BLOCK = 32


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width that `factor` divides, with min_pixels to max_pixels pixels.

    The ratio of the sides is kept as well as that allows. Images, and frames of Qwen2.5-VL.

    Raises:
        InputError: one side is more than 200 times the other, or a side is empty.
    """
    _check_sides(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        return _smaller(height, width, shrink, factor)
    if new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return _larger(height, width, grow, factor)
    return new_height, new_width


def smart_resize_clip(
    num_frames: int,
    height: int,
    width: int,
    *,
    factor: int,
    temporal_factor: int,
    min_pixels: int,
    max_pixels: int,
) -> tuple[int, int]:
    """As `smart_resize`, with limits on the pixels of all frames together. Frames of Qwen3-VL.

    Raises:
        InputError: as `smart_resize`, or fewer frames than a patch is deep.
    """
    if num_frames < temporal_factor:
        raise InputError(
            f"a video of {num_frames} frames; Qwen3-VL needs at least {temporal_factor}, so give "
            "an image instead or sample more frames"
        )
    _check_sides(height, width, ratio=False)
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_sides(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    frames = round(num_frames / temporal_factor) * temporal_factor
    if frames * new_height * new_width > max_pixels:
        shrink = math.sqrt((num_frames * height * width) / max_pixels)
        return _smaller(height, width, shrink, factor)
    if frames * new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        return _larger(height, width, grow, factor)
    return new_height, new_width


def _check_sides(height: int, width: int, *, ratio: bool = True) -> None:
    if min(height, width) < 1:
        raise InputError(f"an image of {height} x {width} pixels is empty")
    if ratio and max(height, width) / min(height, width) > _LARGEST_RATIO:
        raise InputError(
            f"an image of {height} x {width} pixels: one side may be at most {_LARGEST_RATIO} "
            "times the other; crop it"
        )


def _smaller(height: int, width: int, shrink: float, factor: int) -> tuple[int, int]:
    side = lambda length: max(factor, math.floor(length / shrink / factor) * factor)
    return side(height), side(width)


def _larger(height: int, width: int, grow: float, factor: int) -> tuple[int, int]:
    side = lambda length: math.ceil(length * grow / factor) * factor
    return side(height), side(width)


def resize(
    image: UInt8[np.ndarray, "height width channels"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} channels"]:
    """Bicubic with antialiasing (a = -1/2), equal to torch's for uint8."""
    if width != image.shape[1]:
        image = _resize_first(image.swapaxes(0, 1), width).swapaxes(0, 1)
    if height != image.shape[0]:
        image = _resize_first(image, height)
    return np.ascontiguousarray(image)


class _Weights(NamedTuple):
    """Output i is the sum over k of values[i, k] * input[first[i] + k], divided by 2**bits."""

    first: Int[np.ndarray, " outputs"]
    values: Int[np.ndarray, "outputs taps"]
    bits: int


@functools.lru_cache(maxsize=64)
def _weights(inputs: int, outputs: int) -> _Weights:
    """Integer weights of the cubic filter, stretched by the scale where the size shrinks."""
    scale = inputs / outputs
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    taps = math.ceil(support) * 2 + 1
    centers = scale * (np.arange(outputs) + 0.5)
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), inputs)
    offsets = np.arange(taps)
    x = np.abs((offsets + first[:, None] - centers[:, None] + 0.5) * (1.0 / stretch))
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weights = np.where(offsets < (last - first)[:, None], weights, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    # As many bits as the largest weight leaves room for in 16, at most 22.
    largest, bits = weights.max(), 0
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    scaled = weights * (1 << bits)
    return _Weights(first, np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64), bits)


@functools.lru_cache(maxsize=64)
def _blocks(inputs: int, outputs: int) -> list[tuple[slice, slice, Float[np.ndarray, "o i"]]]:
    """The weights as small dense matrices: which outputs, of which inputs, by which matrix."""
    first, values, bits = _weights(inputs, outputs)
    # In float32 a sum of integers is exact below 2**24, in any order; 2**-bits is exact too.
    bound = int(np.abs(values).sum(axis=1).max()) * 255 + (1 << bits)
    dtype = np.float32 if bound < 1 << 24 else np.float64
    taps = np.arange(values.shape[1])
    blocks = []
    for start in range(0, outputs, _BLOCK):
        rows = slice(start, min(start + _BLOCK, outputs))
        places = first[rows, None] + taps
        columns = slice(int(places.min()), min(int(places.max()) + 1, inputs))
        matrix = np.zeros((places.shape[0], columns.stop - columns.start), dtype)
        row, tap = np.nonzero(values[rows])
        matrix[row, places[row, tap] - columns.start] = values[rows][row, tap] * 2.0**-bits
        blocks.append((rows, columns, matrix))
    return blocks


def _resize_first(
    image: UInt8[np.ndarray, "inputs other channels"], size: int
) -> UInt8[np.ndarray, "{size} other channels"]:
    inputs, other, channels = image.shape
    blocks = _blocks(inputs, size)
    flat = image.reshape(inputs, -1).astype(blocks[0][2].dtype)
    out = np.empty((size, other * channels), np.uint8)
    for rows, columns, matrix in blocks:
        sums = matrix @ flat[columns]
        sums += flat.dtype.type(0.5)
        # Cutting off behind the point is rounding down here, for nothing is below 0.
        out[rows] = np.clip(sums, 0, 255, out=sums)
    return out.reshape(size, other, channels)
