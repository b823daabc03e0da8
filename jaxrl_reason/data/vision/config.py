"""How a checkpoint wants its images and video, read from and written to Hugging Face's files."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxrl_reason.errors import InputError

Family = Literal["qwen2_5_vl", "qwen3_vl"]
FAMILIES: Mapping[str, Family] = {
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
}
_BICUBIC = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionProcessorConfig:
    """Sizes, limits and token ids of one checkpoint; every field but the ids has HF's meaning."""

    family: Family
    """Which of the two families resizes, samples, expands and numbers positions."""
    patch_size: int
    """Height and width of a patch in pixels."""
    temporal_patch_size: int
    """Frames in a patch; an image is repeated this often."""
    merge_size: int
    """A token stands for merge_size x merge_size patches."""
    min_pixels: int
    """Images of fewer pixels are enlarged to this many."""
    max_pixels: int
    """Images of more pixels are reduced to this many."""
    video_min_pixels: int
    """As `min_pixels`: of a frame for Qwen2.5-VL, of all frames together for Qwen3-VL."""
    video_max_pixels: int
    """As `max_pixels`: of a frame for Qwen2.5-VL, of all frames together for Qwen3-VL."""
    image_mean: tuple[float, float, float]
    """Mean of a channel, on the scale 0 to 1."""
    image_std: tuple[float, float, float]
    """Standard deviation of a channel, on the scale 0 to 1."""
    do_sample_frames: bool
    """Whether a video is thinned to `fps` or `num_frames` when the caller asks for neither."""
    fps: float | None
    """Frames taken per second of a video; None: as `num_frames` says."""
    num_frames: int | None
    """Frames taken of a video; None: as `fps` says."""
    min_frames: int
    """Least number of frames when `fps` decides."""
    max_frames: int
    """Largest number of frames when `fps` decides."""
    cap_pixels_per_frame: bool
    """Limit a frame also by its share of `max_video_tokens`, as qwen-vl-utils does."""
    max_video_tokens: int
    """The budget of `cap_pixels_per_frame`: of a video for Qwen2.5-VL, of a frame for Qwen3-VL."""
    window_size: int | None
    """Side of an attention window in pixels (Qwen2.5-VL)."""
    tokens_per_second: float | None
    """Temporal positions in a second of video (Qwen2.5-VL)."""
    image_token_id: int
    """`<|image_pad|>`."""
    video_token_id: int
    """`<|video_pad|>`."""
    vision_start_token_id: int
    """`<|vision_start|>`."""
    vision_end_token_id: int
    """`<|vision_end|>`."""

    def __post_init__(self) -> None:
        if self.family not in ("qwen2_5_vl", "qwen3_vl"):
            raise InputError(f"family={self.family!r} is unknown; use 'qwen2_5_vl' or 'qwen3_vl'")
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_frames"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}; it must be at least 1")
        for low, high in (
            ("min_pixels", "max_pixels"),
            ("video_min_pixels", "video_max_pixels"),
            ("min_frames", "max_frames"),
        ):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise InputError(
                    f"{low}={getattr(self, low)} and {high}={getattr(self, high)}; the first must "
                    "be positive and at most the second"
                )
        if self.fps is not None and self.num_frames is not None:
            raise InputError(f"fps={self.fps} and num_frames={self.num_frames}; set one of them")
        if self.family == "qwen2_5_vl" and (not self.window_size or not self.tokens_per_second):
            raise InputError(
                f"window_size={self.window_size} and tokens_per_second={self.tokens_per_second}; "
                "Qwen2.5-VL needs both"
            )
        if self.window_size is not None and self.window_size < self.factor:
            raise InputError(
                f"window_size={self.window_size} is smaller than a merged patch of {self.factor}"
            )

    @property
    def factor(self) -> int:
        """Side of what one token shows, in pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2


# Defaults of transformers' processors, for what a file leaves out.
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_SWITCHES = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": _BICUBIC,
}
_IMAGE = {
    **_SWITCHES,
    **_CLIP,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
}
_VIDEO: Mapping[Family, Mapping[str, Any]] = {
    "qwen2_5_vl": {
        **_IMAGE,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
        "min_frames": 4,
        "max_frames": 768,
        "fps": None,
        "num_frames": None,
        "do_sample_frames": False,
        "cap_pixels_per_frame": False,
        "max_video_tokens": 128000,
    },
    "qwen3_vl": {
        **_SWITCHES,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
        "min_frames": 4,
        "max_frames": 768,
        "fps": 2,
        "num_frames": None,
        "do_sample_frames": True,
        "cap_pixels_per_frame": False,
        "max_video_tokens": 768,
    },
}
_SHARED = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")


def read_vision_processor(directory: str | Path) -> VisionProcessorConfig:
    """Read `config.json` and the processor's files of a checkpoint, as transformers reads them.

    Images follow `processor_config.json`, or `preprocessor_config.json`. Video follows the former,
    or `video_preprocessor_config.json`, or `preprocessor_config.json`, whose limits of images it
    then shares. Of a setting that no file names, the processor's own default counts.

    Raises:
        InputError: a file is missing or broken, the model is of another family, or a setting asks
            for what is not done here.
    """
    directory = Path(directory)
    model = _read(directory / "config.json")
    if model is None:
        raise InputError(f"no config.json in {directory}; give the directory of a checkpoint")
    family = FAMILIES.get(str(model.get("model_type")))
    if family is None:
        raise InputError(
            f"{directory / 'config.json'}: model_type={model.get('model_type')!r}; images and "
            f"video are prepared for {', '.join(FAMILIES)}"
        )
    nested = _read(directory / "processor_config.json") or {}
    images = _read(directory / "preprocessor_config.json")
    videos = _read(directory / "video_preprocessor_config.json")
    image = nested.get("image_processor", images)
    video = nested.get("video_processor", videos if videos is not None else images)
    if image is None or video is None:
        raise InputError(
            f"{directory} has no processor_config.json with image_processor and video_processor, "
            "nor preprocessor_config.json; copy them from the checkpoint the model came from"
        )
    image = _settings(image, _IMAGE, f"the image processor in {directory}")
    # transformers reads min_pixels and max_pixels for Qwen2.5-VL's video alone.
    renamed = family == "qwen2_5_vl"
    video = _settings(video, _VIDEO[family], f"the video processor in {directory}", pixels=renamed)
    for name in _SHARED:
        if image[name] != video[name]:
            raise InputError(
                f"{directory}: {name} is {image[name]} for images and {video[name]} for video; "
                "one vision tower needs them to be equal"
            )
    vision = model.get("vision_config", {})
    # What the file of a published checkpoint may leave out, from transformers' configurations.
    windowed = {"window_size": 112, "tokens_per_second": 4}
    ids = {"image": 151655, "video": 151656, "vision_start": 151652, "vision_end": 151653}
    return VisionProcessorConfig(
        family=family,
        min_pixels=image["size"]["shortest_edge"],
        max_pixels=image["size"]["longest_edge"],
        video_min_pixels=video["size"]["shortest_edge"],
        video_max_pixels=video["size"]["longest_edge"],
        **{name: image[name] for name in _SHARED},
        **{name: video[name] for name in _OF_VIDEO},
        **{k: vision.get(k, v) if family == "qwen2_5_vl" else None for k, v in windowed.items()},
        **{f"{k}_token_id": model.get(f"{k}_token_id", v) for k, v in ids.items()},
    )


_OF_VIDEO = ("min_frames", "max_frames", "fps", "num_frames")
_OF_VIDEO += ("do_sample_frames", "cap_pixels_per_frame", "max_video_tokens")


def write_vision_processor(config: VisionProcessorConfig, directory: str | Path) -> None:
    """Write `preprocessor_config.json` and `video_preprocessor_config.json` for transformers.

    What is not of the processor (family, windows, token ids) stands in the model's `config.json`.
    """
    shared = {**_SWITCHES, **{name: _plain(getattr(config, name)) for name in _SHARED}}
    two = config.family == "qwen2_5_vl"
    image = {
        **shared,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor" if two else "Qwen3VLProcessor",
        "size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
    }
    video = {
        **shared,
        "video_processor_type": "Qwen2VLVideoProcessor" if two else "Qwen3VLVideoProcessor",
        "processor_class": image["processor_class"],
        "size": {"shortest_edge": config.video_min_pixels, "longest_edge": config.video_max_pixels},
        **{name: getattr(config, name) for name in _OF_VIDEO},
    }
    for name, content in (("preprocessor", image), ("video_preprocessor", video)):
        path = Path(directory) / f"{name}_config.json"
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}; it must hold an object")
    return content


def _settings(
    given: Mapping[str, Any], defaults: Mapping[str, Any], where: str, *, pixels: bool = True
) -> dict[str, Any]:
    """What a file says, completed by defaults; sizes in one form, lists as tuples."""
    settings = {
        name: default if given.get(name) is None else given[name]
        for name, default in defaults.items()
    }
    for name, wanted in _SWITCHES.items():
        got = settings[name]
        if got != wanted and not (name == "rescale_factor" and abs(got - wanted) < 1e-9):
            raise InputError(f"{where}: {name}={got}; only {wanted} is supported")
    size = dict(settings["size"])
    if pixels:
        for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if given.get(old) is not None:
                size[new] = given[old]
    if not size.get("shortest_edge") or not size.get("longest_edge"):
        raise InputError(
            f"{where}: size={size}; it must have shortest_edge and longest_edge, which are numbers "
            "of pixels"
        )
    settings["size"] = size
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
