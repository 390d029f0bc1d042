"""What a NaViT is: NaViTConfig, its presets and its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from navit_kernels._checks import check_option, fail

SIZES = {  # width, depth, heads, MLP width
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
}
OPTIONS = {
    "norm": ("layer_norm", "rms_norm"),
    "qk_norm": ("layer_norm", "rms_norm", "l2", "none"),
    "mlp": ("gelu_tanh", "gelu", "swiglu"),
    "positions": ("learned", "sinusoidal", "fourier"),
    "combine": ("sum", "concat", "product"),
    "coordinates": ("absolute", "fractional"),
    "pool": ("map", "mean", "max", "cls"),
    "checkpointing": ("none", "mlp", "block"),
}


@dataclass(frozen=True)
class NaViTConfig:
    """What a NaViT is; the defaults are the paper's B/16. OPTIONS lists the values of each choice."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    patch_size: int = 16  # pixels
    channels: int = 3
    num_classes: int = 0  # 0: the model returns embeddings
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # per channel, of pixels scaled to [0, 1]
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    bias: bool = False  # in linear layers and norms; keys have no norm bias, which attention would not see
    norm: str = "layer_norm"
    qk_norm: str = "layer_norm"
    mlp: str = "gelu_tanh"
    embed_norm: bool = False  # norm the patch embeddings before positions are added
    positions: str = "learned"
    combine: str = "sum"  # of a row's and a column's position
    coordinates: str = "absolute"  # fractional: the position tables span every image
    table_length: int = 64  # rows of a position table; absolute: the most patches per side that an image may have
    pool: str = "map"
    registers: int = 0  # learned tokens beside each image's patches
    drop_path: float = 0.0  # stochastic depth: rate of the last block, linear from 0
    layer_scale: float | None = None  # initial value
    checkpointing: str = "none"  # what the backward computes again: nothing, each MLP's inside, or each block's

    def __post_init__(self) -> None:
        for name, options in OPTIONS.items():
            check_option(name, getattr(self, name), options)
        if self.width % self.heads:
            fail("width", f"a multiple of heads = {self.heads}", self.width)
        even = (self.combine == "concat") + 1 if self.positions == "learned" else (self.combine == "concat") * 2 + 2
        if self.width % even:
            fail("width", f"a multiple of {even} for {self.combine} of {self.positions} positions", self.width)
        if not len(self.mean) == len(self.std) == self.channels:
            fail("mean and std", f"of {self.channels} numbers, one per channel", (self.mean, self.std))
        if not 0 <= self.drop_path < 1:
            fail("drop_path", "in [0, 1)", self.drop_path)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> NaViTConfig:
        """A size of SIZES with a patch size, such as "B/16" or "So400m/14", with any changes."""
        size, _, patch = name.partition("/")
        if size not in SIZES or not patch.isdigit():
            fail("preset", f"one of {', '.join(SIZES)}, a slash and the patch size (such as 'B/16')", repr(name))
        width, depth, heads, mlp_width = SIZES[size]
        shape = {"width": width, "depth": depth, "heads": heads, "mlp_width": mlp_width, "patch_size": int(patch)}
        return cls(**{**shape, **changes})

    @property
    def prefix_tokens(self) -> int:
        """Tokens that the model puts before each image's patches."""
        return self.registers + (self.pool == "cls")

    @property
    def pack_options(self) -> dict[str, Any]:
        """What `pack` must know of the model."""
        max_side = self.table_length if self.coordinates == "absolute" else None
        return {"patch_size": self.patch_size, "prefix_tokens": self.prefix_tokens, "max_side": max_side}

    def flops_per_image(self, rows: int, columns: int, training: bool = True) -> int:
        """Floating point operations for one image of rows × columns patches, nothing dropped, nothing recomputed.

        Forward: 2 · parameters of the matrix products · tokens, and 4 · depth · width · tokens² for attention.
        Backward: twice that. Left out: norms, activations and the pool's scores.
        """
        tokens = rows * columns + self.prefix_tokens
        mlp = self.width * self.mlp_width * (3 if self.mlp == "swiglu" else 2)
        block = 4 * self.width**2 + mlp
        products = self.channels * self.patch_size**2 * self.width * rows * columns + self.depth * block * tokens
        if self.pool == "map":
            products += 2 * self.width**2 * rows * columns + self.width**2 + mlp
        products += self.width * self.num_classes
        forward = 2 * products + 4 * self.depth * self.width * tokens**2
        return 3 * forward if training else forward
