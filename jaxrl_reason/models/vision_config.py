"""The shape of a vision encoder: those of Qwen2.5-VL and Qwen3-VL, which differ in a few fields.

Field names are those of Hugging Face's `vision_config` where it has one. Dtypes and remat policy
are those of the `ModelConfig` that holds a `VisionConfig`.
"""

import dataclasses
import math
from typing import Literal, get_args

NormKind = Literal["rms", "layer"]
VisionActivation = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Architecture of a transformer over patches of images and videos.

    As Qwen2.5-VL needs it by default; Qwen3-VL has `norm="layer"`, `gated_mlp=False`,
    `patch_bias=True`, `hidden_act="gelu_tanh"`, no windows, position embeddings and deepstack.
    """

    depth: int
    """Number of blocks L."""
    hidden_size: int
    """Width D of a patch."""
    intermediate_size: int
    """Width F of the MLP of a block."""
    num_heads: int
    """Attention heads N; D must be a multiple of it."""
    out_hidden_size: int
    """Width of a merged feature, which is that of the decoder."""
    in_channels: int = 3
    """Colours of a pixel."""
    patch_size: int = 14
    """Height and width of a patch in pixels."""
    temporal_patch_size: int = 2
    """Frames of a patch."""
    spatial_merge_size: int = 2
    """Height and width, in patches, of what becomes one token of the decoder."""
    hidden_act: VisionActivation = "silu"
    """Of the MLP of a block."""
    norm: NormKind = "rms"
    """RMSNorm, or LayerNorm with a bias."""
    gated_mlp: bool = True
    """down(act(gate(x)) * up(x)), or down(act(up(x)))."""
    patch_bias: bool = False
    """Add a vector to embedded patches."""
    window_size: int | None = None
    """Height and width of a window in pixels; patches see their window only. Null: no windows."""
    fullatt_block_indexes: tuple[int, ...] = ()
    """Blocks in which patches see their whole segment in spite of windows."""
    num_position_embeddings: int = 0
    """Entries of the learned square of positions, stretched over every image; 0: there is none."""
    deepstack_visual_indexes: tuple[int, ...] = ()
    """Blocks after which patches are merged too, for the first layers of the decoder."""
    tokens_per_second: int | None = None
    """Temporal positions of a second of video (Qwen2.5-VL)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""

    def __post_init__(self):
        for name in (
            "depth",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "out_hidden_size",
            "in_channels",
            "patch_size",
            "temporal_patch_size",
            "spatial_merge_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 4 x num_heads="
                f"{4 * self.num_heads}: rotary pairs channels, half for rows and half for columns"
            )
        for name, kinds in (("norm", NormKind), ("hidden_act", VisionActivation)):
            value = getattr(self, name)
            if value not in get_args(kinds):
                raise ValueError(
                    f"{name}={value!r} is unknown; one of {', '.join(get_args(kinds))}"
                )
        for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            self._check_blocks(name)
        self._check_windows()
        positions = self.num_position_embeddings
        if positions < 0 or self.position_side**2 != positions:
            raise ValueError(f"num_position_embeddings={positions} must be a square number")

    def _check_blocks(self, name: str) -> None:
        blocks = tuple(getattr(self, name))
        object.__setattr__(self, name, blocks)  # a list of JSON would not hash
        if list(blocks) != sorted(set(blocks) & set(range(self.depth))):
            raise ValueError(
                f"{name}={blocks} must increase and lie in 0..{self.depth - 1} (depth={self.depth})"
            )

    def _check_windows(self) -> None:
        if self.window_size is None:
            if self.fullatt_block_indexes:
                raise ValueError(
                    f"fullatt_block_indexes={self.fullatt_block_indexes} needs a window_size; "
                    "without one all blocks attend in full"
                )
        elif self.window_size < self.patch_size * self.spatial_merge_size:
            raise ValueError(
                f"window_size={self.window_size} must be at least patch_size x spatial_merge_size="
                f"{self.patch_size * self.spatial_merge_size}: a window holds whole merged patches"
            )

    @property
    def head_dim(self) -> int:
        """Size H of one head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch, in the order channel, frame, row, column."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches in a merged feature."""
        return self.spatial_merge_size**2

    @property
    def position_side(self) -> int:
        """Rows and columns of the square of learned positions."""
        return math.isqrt(self.num_position_embeddings)

    @property
    def full_layers(self) -> tuple[bool, ...]:
        """For every block whether patches see their whole segment."""
        full = range(self.depth) if self.window_size is None else self.fullatt_block_indexes
        return tuple(i in full for i in range(self.depth))

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        positions = self.num_position_embeddings * self.hidden_size
        return positions + self._of_patches + self._of_features

    @property
    def active_parameters(self) -> float:
        """Parameters that a patch is multiplied with; `merge_unit` of them share the mergers."""
        return self._of_patches + self._of_features / self.merge_unit

    @property
    def _of_patches(self) -> int:
        d, f = self.hidden_size, self.intermediate_size
        norm = 1 if self.norm == "rms" else 2
        mlp = (3 * d * f + 2 * f if self.gated_mlp else 2 * d * f + f) + d
        layer = 4 * d * (d + 1) + mlp + 2 * norm * d
        return (self.patch_dim + self.patch_bias) * d + self.depth * layer + norm * d

    @property
    def _of_features(self) -> int:
        wide, norm = self.hidden_size * self.merge_unit, 1 if self.norm == "rms" else 2
        merger = wide * (wide + 1) + (wide + 1) * self.out_hidden_size
        deep = len(self.deepstack_visual_indexes) * (merger + norm * wide)
        return merger + deep
