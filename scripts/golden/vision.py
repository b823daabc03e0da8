"""Records what transformers' processors of images and video give, for tests/data/test_vision.py.

python -m venv /tmp/vision
/tmp/vision/bin/pip install numpy==2.4.6 pillow==13.0.0 torch==2.13.0 torchvision==0.28.0 \
    transformers==5.23.0
/tmp/vision/bin/python scripts/golden/vision.py

Small cases are stored whole, larger ones as the SHA-256 of their patches. The inputs are not
stored: ``picture`` makes them, here and in the test. ``meta`` is a JSON string with the versions
and the cases; see ``Recorder``.
"""

import hashlib
import importlib.metadata
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

TARGET = Path(__file__).resolve().parents[2] / "tests" / "data" / "golden" / "vision.npz"
SMALL = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
VIDEO = {"qwen2_5_vl": Qwen2VLVideoProcessor, "qwen3_vl": Qwen3VLVideoProcessor}
TEXT = "a <|image_pad|> b <|video_pad|>, c <|image_pad|><|video_pad|>"
SPECIALS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def picture(frames: int, height: int, width: int) -> np.ndarray:
    """Frames with smooth parts, edges, and detail finer than a pixel of the resized image."""
    t, y, x, c = np.ogrid[:frames, :height, :width, :3]
    checks = 50 * ((x // 9 + y // 11) % 2)
    return ((x * x * (3 + c) + y * (5 * c + 7) + x * y // 7 + 31 * t + checks) % 256).astype(
        "uint8"
    )


class Recorder:
    """Cases of ``kind`` image, video, sampling and text.

    A case of images or video has the family, the settings that differ from the processor's
    defaults, the shape of the picture, the grid, and either ``patches`` (the name of an array) or
    ``digest``. A case of sampling has arguments and how many frames are taken; they stand one case
    behind the other in the array ``sampling``.
    """

    def __init__(self):
        self.meta: dict[str, Any] = {
            package: importlib.metadata.version(package)
            for package in ("numpy", "torch", "torchvision", "transformers")
        }
        self.meta["cases"] = []
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, case: dict[str, Any], **arrays: np.ndarray) -> None:
        """One case, and arrays by the field that names them."""
        for field, array in arrays.items():
            case[field] = f"{len(self.meta['cases'])}_{field}"
            self.arrays[case[field]] = array
        self.meta["cases"].append(case)

    def patches(self, case: dict[str, Any], patches: np.ndarray) -> None:
        """A case with its patches, whole or by digest."""
        patches = np.ascontiguousarray(patches, np.float32)
        if patches.size <= 5_000:
            self.add(case, patches=patches)
        else:
            self.add({**case, "digest": hashlib.sha256(patches.tobytes()).hexdigest()})


def images(recorder: Recorder) -> None:
    """Images of both families: enlarged, reduced, resized one way, and left as they are."""
    small = {**SMALL, "size": {"shortest_edge": 256, "longest_edge": 768}}
    large = {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    cases = [
        ("qwen2_5_vl", small, (21, 30)),
        ("qwen2_5_vl", small, (7, 90)),
        ("qwen3_vl", {**small, **HALVES}, (60, 17)),
        ("qwen2_5_vl", {}, (200, 333)),
        ("qwen2_5_vl", {}, (30, 41)),
        ("qwen2_5_vl", {}, (1300, 1100)),
        ("qwen2_5_vl", {}, (280, 391)),
        ("qwen2_5_vl", {}, (140, 84)),
        ("qwen3_vl", {**large, **HALVES}, (300, 500)),
        ("qwen3_vl", {**large, **HALVES}, (100, 75)),
    ]
    for family, settings, shape in cases:
        given = picture(1, *shape)[0]
        out = Qwen2VLImageProcessor(**settings)(given, return_tensors="np")
        case = {"kind": "image", "family": family, "settings": settings, "shape": shape}
        case["grid"] = out["image_grid_thw"][0].tolist()
        recorder.patches(case, out["pixel_values"])


def videos(recorder: Recorder) -> None:
    """Video of both families, of odd and even length, capped and not, sampled and not."""
    small = {**SMALL, "size": {"shortest_edge": 256, "longest_edge": 512}}
    clip = {**SMALL, "size": {"shortest_edge": 512, "longest_edge": 1536}}
    published = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}}
    cases = [
        ("qwen2_5_vl", small, (3, 20, 33), 5.0),
        ("qwen2_5_vl", {**small, "do_sample_frames": True, "fps": 2}, (19, 21, 17), 7.5),
        ("qwen2_5_vl", {}, (2, 90, 130), 24.0),
        ("qwen2_5_vl", {"do_sample_frames": True, "num_frames": 5}, (11, 200, 150), 30.0),
        (
            "qwen2_5_vl",
            {"cap_pixels_per_frame": True, "max_video_tokens": 400},
            (3, 400, 600),
            10.0,
        ),
        ("qwen3_vl", {**clip, "do_sample_frames": False}, (5, 22, 34), 4.0),
        ("qwen3_vl", {**clip, "fps": 3}, (31, 9, 6), 6.0),
        ("qwen3_vl", {}, (9, 200, 300), 4.0),
        ("qwen3_vl", published, (40, 120, 90), 25.0),
        (
            "qwen3_vl",
            {**published, "cap_pixels_per_frame": True, "max_video_tokens": 20},
            (8, 160, 250),
            3.0,
        ),
        (
            "qwen3_vl",
            {
                **SMALL,
                "size": {"shortest_edge": 2000, "longest_edge": 100000},
                "cap_pixels_per_frame": True,
                "max_video_tokens": 20,
            },
            (4, 75, 50),
            2.0,
        ),
    ]
    for family, settings, shape, fps in cases:
        settings = {"cap_pixels_per_frame": False, **settings}
        meta = VideoMetadata(
            total_num_frames=shape[0], fps=fps, frames_indices=list(range(shape[0]))
        )
        out = VIDEO[family](**settings)(
            picture(*shape), video_metadata=[meta], return_tensors="np", return_metadata=True
        )
        case = {"kind": "video", "family": family, "settings": settings, "shape": shape, "fps": fps}
        case["grid"] = out["video_grid_thw"][0].tolist()
        case["indices"] = np.asarray(out["video_metadata"][0].frames_indices).tolist()
        recorder.patches(case, out["pixel_values_videos"])


def sampling(recorder: Recorder) -> None:
    """Frames taken by Qwen2.5-VL, all in one array; where transformers fails there is no case."""
    processor = Qwen2VLVideoProcessor()
    taken = []
    asked = [{"fps": fps} for fps in (0.5, 1, 2, 3.7)]
    asked += [{"num_frames": n} for n in (2, 3, 7, 10, 24)]
    for total, source_fps, ask in itertools.product(
        (2, 3, 5, 10, 47, 90, 301), (7.5, 29.97), asked
    ):
        meta = VideoMetadata(total_num_frames=total, fps=source_fps)
        try:
            indices = processor.sample_frames(meta, **ask).numpy()
        except (ValueError, ZeroDivisionError, RuntimeError):
            continue
        case = {
            "kind": "sampling",
            "family": "qwen2_5_vl",
            "total": total,
            "source_fps": source_fps,
        }
        recorder.add({**case, **ask, "count": len(indices)})
        taken.append(indices)
    recorder.arrays["sampling"] = np.concatenate(taken).astype(np.int16)


def texts(recorder: Recorder) -> None:
    """A text with two images and two videos, and how the processor expands it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {chr(i): i for i in range(128)}
    backend = Tokenizer(models.WordLevel(letters, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=SPECIALS, pad_token="~"
    )
    sizes = {"shortest_edge": 64, "longest_edge": 512}
    for family, processor_class in zip(
        FAMILIES, (Qwen2_5_VLProcessor, Qwen3VLProcessor), strict=True
    ):
        sampled = {"do_sample_frames": True, "fps": 2, "cap_pixels_per_frame": False}
        video = VIDEO[family](**SMALL, size=sizes, **sampled)
        processor = processor_class(
            Qwen2VLImageProcessor(**SMALL, size=sizes), tokenizer, video_processor=video
        )
        shapes = [(1, 20, 30), (1, 9, 40), (5, 16, 24), (9, 20, 11)]
        pictures = [picture(*shape) for shape in shapes]
        fps = [3.0, 10.0]
        metas = [
            VideoMetadata(total_num_frames=len(p), fps=f, frames_indices=list(range(len(p))))
            for p, f in zip(pictures[2:], fps, strict=True)
        ]
        out = processor(
            images=[p[0] for p in pictures[:2]],
            videos=pictures[2:],
            text=[TEXT],
            videos_kwargs={"video_metadata": metas},
            return_tensors="pt",
        )
        ids = out["input_ids"][0].tolist()
        case = {"kind": "text", "family": family, "shapes": shapes, "fps": fps, "text": TEXT}
        case["expanded"] = "".join(tokenizer.convert_ids_to_tokens(ids))
        if "second_per_grid_ts" in out:
            case["seconds"] = np.asarray(out["second_per_grid_ts"], np.float64).tolist()
        recorder.add({**case, "size": sizes})


def blending(recorder: Recorder) -> None:
    """Shades 0, 5, ... 255 behind every alpha, on white."""
    layers = np.zeros((52, 256, 4), np.uint8)
    layers[..., :3] = np.arange(0, 256, 5)[:, None, None]
    layers[..., 3] = np.arange(256)
    rgb = Qwen2VLImageProcessor().process_image(layers, do_convert_rgb=True)
    recorder.arrays["blended"] = rgb[0].numpy()


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)
    recorder = Recorder()
    for record in (images, videos, sampling, texts, blending):
        record(recorder)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(TARGET, meta=np.asarray(json.dumps(recorder.meta)), **recorder.arrays)
    print(f"{len(recorder.meta['cases'])} cases, {TARGET.stat().st_size} bytes in {TARGET.name}")


if __name__ == "__main__":
    main()
