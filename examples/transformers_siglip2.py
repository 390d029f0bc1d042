"""SigLIP 2 NaFlex: padded as transformers runs it, with flash_navit, and packed. Random weights, so nothing loads.

pip install 'navit-kernels[transformers]'
With a checkpoint on disk: navit embed --weights FOLDER IMAGES, or navit.integrations.siglip2.from_checkpoint(FOLDER).
"""

import torch
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from navit.integrations.siglip2 import from_transformers
from navit.integrations.transformers import register

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
config = Siglip2VisionConfig(hidden_size=192, intermediate_size=384, num_hidden_layers=3, num_attention_heads=3)
model = Siglip2VisionModel(config).eval().to(device)

shapes = torch.tensor([(16, 16), (6, 20), (3, 4)])  # patches of three images, rows and columns
valid = torch.arange(256) < shapes.prod(1, keepdim=True)
inputs = {  # what their image processor gives: 768 values a patch, padded to 256 patches
    "pixel_values": torch.randn(3, 256, 768, device=device),
    "pixel_attention_mask": valid.int().to(device),
    "spatial_shapes": shapes,
}

with torch.inference_mode():
    before = model(**inputs).pooler_output

    register()
    model.set_attn_implementation("flash_navit")  # or attn_implementation="flash_navit" in from_pretrained
    print(f"flash_navit: {(model(**inputs).pooler_output - before).abs().max():.1e} from before")

    packed = from_transformers(model)  # a NaViT with copies of the weights
    print(f"packed: {(packed(inputs) - before).abs().max():.1e} from before")
    images = [torch.randint(256, (3, 96, 64), dtype=torch.uint8), torch.randint(256, (3, 16, 480), dtype=torch.uint8)]
    vectors, features = packed(images, dense=True)
    print("vectors", tuple(vectors.shape), "features", [tuple(each.shape) for each in features])
