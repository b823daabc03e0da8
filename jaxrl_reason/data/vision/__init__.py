"""Images and video for Qwen2.5-VL and Qwen3-VL, in NumPy: pixels to patches, tokens, positions."""

from jaxrl_reason.data.vision.config import (
    VisionProcessorConfig,
    read_vision_processor,
    write_vision_processor,
)
from jaxrl_reason.data.vision.images import load_image
from jaxrl_reason.data.vision.patches import Visual, process_image, process_video
from jaxrl_reason.data.vision.positions import RopeIndex, mrope_positions
from jaxrl_reason.data.vision.resize import resize, smart_resize, smart_resize_clip
from jaxrl_reason.data.vision.rows import (
    VisionRow,
    join_rows,
    pack_vision,
    vision_row,
    without_patches,
)
from jaxrl_reason.data.vision.tokens import Expanded, expand_text, expand_tokens
from jaxrl_reason.data.vision.videos import Video, load_video, sample_frames

__all__ = [
    "Expanded",
    "RopeIndex",
    "Video",
    "VisionProcessorConfig",
    "VisionRow",
    "Visual",
    "expand_text",
    "expand_tokens",
    "join_rows",
    "load_image",
    "load_video",
    "mrope_positions",
    "pack_vision",
    "process_image",
    "process_video",
    "read_vision_processor",
    "resize",
    "sample_frames",
    "smart_resize",
    "smart_resize_clip",
    "vision_row",
    "without_patches",
    "write_vision_processor",
]
