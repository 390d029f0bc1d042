"""A NaFlexVit of timm, accelerated in one line. pip install 'navit-kernels[timm]'"""

import timm
import torch

from navit.integrations.timm import accelerate

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
# pretrained=True where the weights can be downloaded
model = timm.create_model("naflexvit_base_patch16_gap", num_classes=10, embed_dim=128, depth=2, num_heads=2).to(device)

grids = [(6, 9), (16, 4), (2, 2), (10, 10)]  # rows and columns of patches, as timm's NaFlex loader gives them, padded
longest = max(rows * columns for rows, columns in grids)
batch = {
    "patches": torch.randn(len(grids), longest, 16 * 16 * 3),
    "patch_coord": torch.zeros(len(grids), longest, 2, dtype=torch.int64),
    "patch_valid": torch.zeros(len(grids), longest, dtype=torch.bool),
}
for image, (rows, columns) in enumerate(grids):
    batch["patch_coord"][image, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    batch["patch_valid"][image, : rows * columns] = True
batch = {name: tensor.to(device) for name, tensor in batch.items()}
before = model(batch)

accelerate(model)  # in place: same parameters, same methods, same inputs

after = model(batch)
print(f"largest difference of {before.numel()} logits: {(before - after).abs().max():.1e}")
after.square().mean().backward()
print(f"parameters with a gradient: {sum(p.grad is not None for p in model.parameters())}")
