"""Images from files, bytes, data URLs, rows of data sets, PIL and arrays, as RGB arrays."""

import base64
import binascii
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import UInt8

from jaxrl_reason.errors import InputError

RGB = UInt8[np.ndarray, "height width 3"]


def load_image(source: Any) -> RGB:
    """An image as RGB; what is transparent shows white, as in transformers.

    Args:
        source: a path, encoded bytes, `{"path": ..., "bytes": ...}` as the columns of data sets
            have it, a data URL, base64 text, a PIL image, or a uint8 array [H, W] or [H, W, C] with
            1, 3 or 4 channels. Files are turned upright by their EXIF orientation.

    Raises:
        InputError: nothing readable there, a broken file, or an array of another kind.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, PIL.Image.Image):
        return _from_pil(source, "the image")
    return _decode(*open_bytes(source))


def open_bytes(source: Any) -> tuple[bytes, str]:
    """Encoded content of a path, bytes, row or text, and how a message names it."""
    if isinstance(source, Mapping):
        if source.get("bytes") is not None:
            return bytes(source["bytes"]), str(source.get("path") or "the bytes of a row")
        if source.get("path") is not None:
            return open_bytes(source["path"])
        raise InputError(f"a row {dict(source)!r}; one of 'path' and 'bytes' must be given")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source), "the bytes"
    if isinstance(source, os.PathLike):
        return _from_file(Path(source))
    if isinstance(source, str):
        return _from_text(source)
    raise InputError(
        f"{type(source).__name__} is no image or video; give a path, bytes, a data URL, a row with "
        "'path' or 'bytes', a PIL image or a uint8 array"
    )


def _from_text(text: str) -> tuple[bytes, str]:
    if text.startswith(("http://", "https://")):
        raise InputError(
            f"{text[:80]}: nothing is downloaded here; save the file and give its path"
        )
    if text.startswith("data:"):
        head, _, payload = text.partition(",")
        if not head.endswith(";base64"):
            raise InputError(f"the data URL {text[:40]!r}... must be base64")
        return _from_base64(payload, "a data URL")
    path = Path(text.removeprefix("file://"))
    # A name is much shorter than base64 text, whose length alone makes some systems fail.
    if len(text) < 4096 and path.is_file():
        return _from_file(path)
    try:
        return _from_base64(text, "base64 text")
    except InputError:
        raise InputError(f"{text[:80]}: no such file, and not base64 text either") from None


def _from_base64(text: str, name: str) -> tuple[bytes, str]:
    try:
        return base64.b64decode("".join(text.split()), validate=True), name
    except binascii.Error as error:
        raise InputError(f"{name} is not base64: {error}") from error


def _from_file(path: Path) -> tuple[bytes, str]:
    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        raise InputError(f"{path}: not readable: {error.strerror}") from error


def open_pil(content: bytes, name: str) -> PIL.Image.Image:
    """The image or animation in a file's content, not decoded yet."""
    try:
        return PIL.Image.open(io.BytesIO(content))
    except Exception as error:  # Pillow's readers raise whatever a broken file leads them to.
        raise InputError(f"{name}: no image that Pillow can read: {error}") from error


def _decode(content: bytes, name: str) -> RGB:
    image = open_pil(content, name)
    try:
        image.load()
        upright = PIL.ImageOps.exif_transpose(image)
    except Exception as error:
        raise InputError(f"{name}: a broken image: {error}") from error
    return _from_pil(upright, name)


def _from_pil(image: PIL.Image.Image, name: str) -> RGB:
    try:
        return to_rgb(image)
    except Exception as error:
        raise InputError(f"{name}: a broken image: {error}") from error


def to_rgb(image: PIL.Image.Image) -> RGB:
    """A decoded image on a white ground."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        ground = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(ground, layer)
    return np.array(image.convert("RGB"))


def _from_array(array: np.ndarray) -> RGB:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise InputError(
            f"an image array of {array.dtype} and shape {array.shape}; give uint8 of shape [H, W] "
            "or [H, W, C] with 1, 3 or 4 channels"
        )
    return flatten_channels(array)


def flatten_channels(array: UInt8[np.ndarray, "*B C"]) -> UInt8[np.ndarray, "*B 3"]:
    """One channel three times, or four channels on white, rounded as torchvision rounds."""
    if array.shape[-1] == 1:
        return np.repeat(array, 3, axis=-1)
    if array.shape[-1] == 3:
        return array
    scaled = array.astype(np.float32) / np.float32(255)
    alpha = scaled[..., 3:]
    blended = scaled[..., :3] * alpha + (1 - alpha)
    return (blended * np.float32(255 + 1.0 - 1e-3)).astype(np.uint8)
