"""What a model's image processor makes of an image: its patches and tokens from its size alone, and its pixels.

`Grids` are processors that keep an image's shape (Qwen2-VL, Wang et al., 2024, arXiv:2409.12191): rows of patches, four
of which become a token. `Squares` are those that squeeze every image into one square (SigLIP's, in Gemma 3, arXiv:
2503.19786), which always becomes as many tokens. Pillow resizes, never torchvision: pixels must not depend on the
machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

Grid = tuple[int, int, int]
"""Patches in time, height and width."""


@dataclass(frozen=True, slots=True)
class Grids:
    """Images keep their shape; pixels are f32[patches, …]."""

    processor: BaseImageProcessor

    @property
    def merge(self) -> int:
        """Patches that become one token, along height and along width."""
        return self.processor.merge_size

    def grid(self, size: tuple[int, int]) -> Grid:
        """Of an image of this height and width."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        patch, limits = self.processor.patch_size, self.processor.size
        height, width = smart_resize(*size, patch * self.merge, limits["shortest_edge"], limits["longest_edge"])
        return 1, height // patch, width // patch

    def tokens(self, grid: Grid) -> int:
        """Visual tokens of an image."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def pixels(self, image: Any) -> tuple[np.ndarray, Grid]:
        """The pixels of a decoded image u8[H, W, 3], and the grid that the processor says."""
        made = self.processor(images=[image], input_data_format="channels_last", return_tensors="np")
        return made["pixel_values"], tuple(made["image_grid_thw"][0].tolist())

    def blank(self) -> tuple[np.ndarray, Grid]:
        """The pixels of the smallest image, all zero."""
        patch = self.processor.patch_size**2 * self.processor.temporal_patch_size * 3
        return np.zeros((self.merge**2, patch), dtype=np.float32), (1, self.merge, self.merge)

    def trial(self) -> tuple[np.ndarray, Grid]:
        """The pixels of a small made-up image, wider than high."""
        grid = (1, 2 * self.merge, 3 * self.merge)
        return _made_up(grid[1] * grid[2], self.blank()[0].shape[1]), grid


@dataclass(frozen=True, slots=True)
class Squares:
    """Every image becomes a square of the same patches and tokens; pixels are f32[1, 3, H, W]."""

    processor: BaseImageProcessor
    patch: int
    """Pixels of a patch's side."""
    count: int
    """Visual tokens of an image."""

    @property
    def side(self) -> int:
        """Pixels of the square's side."""
        return self.processor.size["height"]

    def grid(self, size: tuple[int, int]) -> Grid:
        """Of any image."""
        return 1, self.side // self.patch, self.side // self.patch

    def tokens(self, grid: Grid) -> int:
        """Visual tokens of any image."""
        return self.count

    def pixels(self, image: Any) -> tuple[np.ndarray, Grid]:
        """The pixels of a decoded image u8[H, W, 3]."""
        made = self.processor(images=[image], input_data_format="channels_last", return_tensors="np")
        return made["pixel_values"], self.grid(made["pixel_values"].shape[2:])

    def blank(self) -> tuple[np.ndarray, Grid]:
        """The pixels of an image, all zero."""
        return np.zeros((1, 3, self.side, self.side), dtype=np.float32), self.grid((self.side, self.side))

    def trial(self) -> tuple[np.ndarray, Grid]:
        """The pixels of a made-up image."""
        return _made_up(1, 3, self.side, self.side), self.grid((self.side, self.side))


def _made_up(*shape: int) -> np.ndarray:
    return np.sin(np.arange(np.prod(shape), dtype=np.float64) * 0.7).astype(np.float32).reshape(shape)
