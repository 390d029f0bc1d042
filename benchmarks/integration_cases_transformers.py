"""transformers' vision towers before and after.

Siglip2 NaFlex gets images at their own sizes, padded to the largest of the batch; "before" is its sdpa. "packed" cuts
its patches from uint8 images inside the step; the others get patches that were cut before. "captured" is "packed" as
one CUDA graph, for a single image.
Qwen2.5-VL's tower as shipped calls sdpa window by window; "torch_varlen" gives it torch's varlen_attn instead.
Its attention alone, 7 windowed layers to 1 over whole images, is chained: each layer's output is the next one's values.
There, "before" is varlen_attn.
"""

import copy
import functools
from typing import Any

import peers
import torch
from integration_cases import Case, Grids, Side, kept
from torch import Tensor, nn

from navit import pack
from navit.graphs import Captured, pad_pack
from navit.integrations.siglip2 import from_transformers
from navit.integrations.transformers import NAME, attention, register

TORCH_VARLEN = "flash_torch_varlen"  # "flash" in its name, so that towers say where images begin
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIGLIP2: dict[str, dict[str, int]] = {"so400m": SO400M, "base": {}}
TINY = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3}
QWEN = {"hidden_size": 1280, "num_heads": 16, "depth": 32, "intermediate_size": 3420}
TINY_QWEN = {"hidden_size": 48, "num_heads": 3, "depth": 8, "intermediate_size": 80}
PATCH, WINDOW = 14, 8  # of Qwen2.5-VL: pixels, and patches a side of a window


def models() -> Any:
    """The modelling files of transformers, with flash_navit and torch's varlen_attn registered."""
    try:
        register()
    except ImportError as error:
        raise peers.PeerMissing(str(error)) from error
    import transformers
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    transformers.AttentionInterface.register(TORCH_VARLEN, torch_varlen)
    return modeling_qwen2_5_vl


@kept
def siglip2_models(size: str, device: str, small: bool) -> tuple[Any, Any, Any]:
    """Padded, unpadded once, packed."""
    models()
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(0)
    config = Siglip2VisionConfig(**(TINY if small else SIGLIP2[size]))
    with torch.device(device):
        padded = Siglip2VisionModel._from_config(config, attn_implementation="sdpa")
    unpadded = copy.deepcopy(padded)
    unpadded.set_attn_implementation(NAME)
    return padded, unpadded, from_transformers(padded)


def siglip2(size: str, grids: Grids, device: str, small: bool) -> dict[str, Side]:
    padded, unpadded, packed = siglip2_models(size, device, small)
    torch.manual_seed(0)
    images = [
        torch.randint(256, (3, 16 * rows, 16 * columns), dtype=torch.uint8, device=device) for rows, columns in grids
    ]
    lengths = torch.tensor([rows * columns for rows, columns in grids], device=device)
    inputs = {
        "pixel_values": torch.zeros(len(grids), int(lengths.max()), 768, device=device),
        "pixel_attention_mask": (torch.arange(int(lengths.max()), device=device) < lengths[:, None]).int(),
        "spatial_shapes": torch.tensor(grids),
    }
    for row, image in zip(inputs["pixel_values"], images, strict=True):
        values = (image.float() / 127.5 - 1).unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 3, 4, 0)
        row[: values.shape[0] * values.shape[1]] = values.reshape(-1, 768)
    (whole,) = pack(images, None, **packed.config.pack_options)
    named = nn.ModuleDict(
        {"post_layernorm": packed.norm, "packed": packed}
    )  # a name on both sides, to compare gradients
    sides = {
        "before": Side(padded, lambda: padded(**inputs).pooler_output),
        "flash_navit": Side(unpadded, lambda: unpadded(**inputs).pooler_output),
        "packed": Side(named, lambda: packed(whole)),
    }
    if size == "so400m" and device == "cuda" and len(images) == 1:
        (budgeted,) = pack([images[0].cpu()], int(lengths), image_budget=1, **packed.config.pack_options)
        fixed = pad_pack(budgeted, image_budget=1).to(device)
        replay = functools.cache(lambda: Captured(packed, fixed))  # under the step's autocast
        sides["captured"] = Side(named, lambda: replay()(fixed)[:1].clone())
    return sides


@kept
def qwen_model(device: str, small: bool) -> Any:
    modeling = models()
    torch.manual_seed(0)
    config = modeling.Qwen2_5_VLVisionConfig(**(TINY_QWEN if small else QWEN))
    with torch.device(device):
        return modeling.Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa")


def qwen_tower(grids: Grids, device: str, small: bool) -> dict[str, Side]:
    tower = qwen_model(device, small)
    grid_thw = torch.tensor([(1, rows + rows % 2, columns + columns % 2) for rows, columns in grids])
    pixels = torch.randn(int(grid_thw.prod(1).sum()), 3 * 2 * PATCH**2, device=device)
    grid_thw = grid_thw.to(device)

    def run(implementation: str) -> Tensor:
        tower.config._attn_implementation = implementation
        return tower(pixels, grid_thw).pooler_output

    names = {"before": "sdpa", "torch_varlen": TORCH_VARLEN, "flash_navit": NAME}
    if device == "cpu":
        del names["torch_varlen"]  # it needs a GPU
    return {name: Side(tower, functools.partial(run, chosen)) for name, chosen in names.items()}


class Attention(nn.Module):
    """Queries, keys and values (1, H, T, D) as a tower passes them."""

    is_causal = False

    def __init__(self, heads: int, tokens: int, width: int, device: str) -> None:
        super().__init__()
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.qkv = nn.Parameter(torch.randn(3, tokens, heads, width, device=device, dtype=dtype))


def qwen_attention(grids: Grids, device: str, small: bool) -> dict[str, Side]:
    models()
    torch.manual_seed(0)
    windows = [
        min(WINDOW, rows - row) * min(WINDOW, columns - column)
        for rows, columns in grids
        for row in range(0, rows, WINDOW)
        for column in range(0, columns, WINDOW)
    ]
    module = Attention(*((2, sum(windows), 24) if small else (16, sum(windows), 80)), device)
    layers = []
    for lengths, count in ((windows, 7), ([rows * columns for rows, columns in grids], 1)):
        ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
        layers += [{"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths)}] * count

    def run(attend: Any) -> Tensor:
        query, key, value = module.qkv.transpose(1, 2)[:, None].unbind(0)
        for layer in layers:
            value = attend(module, query, key, value, None, scaling=0.1, is_causal=False, **layer)[0].transpose(1, 2)
        return value

    contenders = {"before": torch_varlen if device == "cuda" else attention, "flash_navit": attention}
    return {name: Side(module, functools.partial(run, attend), autocast=False) for name, attend in contenders.items()}


def torch_varlen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> Any:
    """torch's varlen_attn as transformers calls an attention."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = options["cu_seq_lens_q"], options["max_length_q"]
    parts = [part[0].transpose(0, 1).to(torch.bfloat16) for part in (query, key, value)]
    out = varlen_attn(*parts, ends, ends, longest, longest, scale=options["scaling"])
    assert isinstance(out, Tensor)
    return out[None], None


CASES = {
    "siglip2 so400m": Case(16, functools.partial(siglip2, "so400m"), directions=("forward",)),
    "siglip2 base": Case(16, functools.partial(siglip2, "base")),
    "qwen2.5-vl tower": Case(PATCH, qwen_tower, directions=("forward",)),
    "qwen2.5-vl attention": Case(PATCH, qwen_attention),
}
