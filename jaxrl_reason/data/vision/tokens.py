"""Placeholders of images and videos, each replaced by as many pad tokens as it has features.

A chat template writes `<|vision_start|><|image_pad|><|vision_end|>`, or the same with `video_pad`.
An image, and a video of Qwen2.5-VL, has its pad repeated. A video of Qwen3-VL becomes, in place of
its pad, for every temporal slice `<0.5 seconds><|vision_start|>`, pads and `<|vision_end|>`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_reason.data.vision.config import VisionProcessorConfig
from jaxrl_reason.data.vision.patches import Visual
from jaxrl_reason.errors import InputError

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
_PADS = re.compile(f"{re.escape(IMAGE_PAD)}|{re.escape(VIDEO_PAD)}")


def expand_text(
    text: str, images: Sequence[Visual], videos: Sequence[Visual], config: VisionProcessorConfig
) -> str:
    """Text whose placeholders are as long as their images and videos, in order.

    Raises:
        InputError: as many placeholders as images, or as videos, there are not.
    """
    found = _PADS.findall(text)
    check_counts(found.count(IMAGE_PAD), found.count(VIDEO_PAD), images, videos)
    rest = {IMAGE_PAD: iter(images), VIDEO_PAD: iter(videos)}

    def replacement(match: re.Match[str]) -> str:
        pad = match.group()
        visual = next(rest[pad])
        if _is_timed(visual, config):
            block = VISION_START + pad * slice_tokens(visual, config) + VISION_END
            return "".join(stamp + block for stamp in _stamps(visual))
        return pad * (visual.grid[0] * slice_tokens(visual, config))

    return _PADS.sub(replacement, text)


class Expanded(NamedTuple):
    """Tokens with long placeholders, and where each came from."""

    tokens: Int[np.ndarray, " T"]
    sources: Int[np.ndarray, " T"]
    """Place in the tokens given; `mask[sources]` carries a mask over."""


def expand_tokens(
    tokens: Sequence[int] | Int[np.ndarray, " S"],
    images: Sequence[Visual],
    videos: Sequence[Visual],
    config: VisionProcessorConfig,
    encode: Callable[[str], Sequence[int]] | None = None,
) -> Expanded:
    """As `expand_text`, on token ids.

    The same ids as from the expanded text, wherever a video's placeholder follows a token that text
    cannot merge with, such as `<|vision_start|>`.

    Args:
        encode: ids of plain text, without special tokens around them; for a video of Qwen3-VL.

    Raises:
        InputError: as `expand_text`, or `encode` is missing.
    """
    ids = np.asarray(tokens, np.int64)
    is_image, is_video = ids == config.image_token_id, ids == config.video_token_id
    check_counts(int(is_image.sum()), int(is_video.sum()), images, videos)
    rest = {True: iter(images), False: iter(videos)}
    pieces: list[np.ndarray] = []
    sources: list[np.ndarray] = []
    at = 0
    for place in np.flatnonzero(is_image | is_video).tolist():
        visual = next(rest[bool(is_image[place])])
        block = np.asarray(_replacement(visual, int(ids[place]), config, encode), np.int64)
        pieces += [ids[at:place], block]
        sources += [np.arange(at, place), np.full(len(block), place)]
        at = place + 1
    pieces.append(ids[at:])
    sources.append(np.arange(at, len(ids)))
    return Expanded(
        np.concatenate(pieces).astype(np.int32), np.concatenate(sources).astype(np.int32)
    )


def _replacement(
    visual: Visual,
    pad: int,
    config: VisionProcessorConfig,
    encode: Callable[[str], Sequence[int]] | None,
) -> list[int]:
    pads = [pad] * slice_tokens(visual, config)
    if not _is_timed(visual, config):
        return pads * visual.grid[0]
    if encode is None:
        raise InputError("a video of Qwen3-VL has times as text; give encode, text to token ids")
    block = [config.vision_start_token_id, *pads, config.vision_end_token_id]
    return [token for stamp in _stamps(visual) for token in (*encode(stamp), *block)]


def slice_tokens(visual: Visual, config: VisionProcessorConfig) -> int:
    """Tokens of one temporal slice."""
    _, height, width = visual.grid
    return height * width // config.merge_size**2


def _is_timed(visual: Visual, config: VisionProcessorConfig) -> bool:
    return visual.kind == "video" and config.family == "qwen3_vl"


def _stamps(visual: Visual) -> Iterator[str]:
    return (f"<{seconds:.1f} seconds>" for seconds in visual.timestamps)


def check_counts(
    image_pads: int, video_pads: int, images: Sequence[Visual], videos: Sequence[Visual]
) -> None:
    """Refuse other numbers of images or videos than there are placeholders."""
    for pads, visuals, kind in ((image_pads, images, "image"), (video_pads, videos, "video")):
        wrong = [visual.kind for visual in visuals if visual.kind != kind]
        if wrong:
            raise InputError(f"{wrong[0]} among the {kind}s; images and videos are given apart")
        if pads != len(visuals):
            raise InputError(
                f"{pads} <|{kind}_pad|> placeholders but {len(visuals)} {kind}s; every {kind} "
                f"needs one placeholder in the prompt, and every placeholder its {kind}"
            )
