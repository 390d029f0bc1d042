"""Qwen2.5-VL's vision tower, windows and all, with flash_navit. Random weights, so nothing loads.

pip install 'navit-kernels[transformers]'
For a whole model only its vision tower takes it, and the text tower keeps its own attention:
from_pretrained(folder, attn_implementation={"vision_config": "flash_navit"}).
"""

import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from navit.integrations.transformers import register

register()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
config = qwen.Qwen2_5_VLVisionConfig(
    depth=4, hidden_size=160, num_heads=2, intermediate_size=320, out_hidden_size=64, fullatt_block_indexes=[3]
)
tower = qwen.Qwen2_5_VisionTransformerPretrainedModel(config).to(device)

grids = torch.tensor([(1, 20, 26), (1, 8, 8), (2, 12, 6)], device=device)  # frames, rows, columns of patches
pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 14 * 14, device=device)

before = tower(pixels, grids).pooler_output
tower.set_attn_implementation("flash_navit")
after = tower(pixels, grids).pooler_output
print(f"{len(pixels)} patches, {len(after)} merged tokens: {(after - before).abs().max():.1e} from before")

after.square().mean().backward()
print("parameters with a gradient:", sum(part.grad is not None for part in tower.parameters()))

text = qwen.Qwen2_5_VLTextConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=99, bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]},
)  # fmt: skip
try:
    qwen.Qwen2_5_VLTextModel._from_config(text, attn_implementation="flash_navit")(torch.ones(1, 3, dtype=torch.long))
except NotImplementedError as error:
    print("refused:", error)
