"""A NaViT of vit-pytorch, accelerated in one line. pip install 'navit-kernels[vit-pytorch]'"""

import torch
from vit_pytorch.na_vit import NaViT

from navit.integrations.vit_pytorch import accelerate, load

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = NaViT(image_size=256, patch_size=16, num_classes=10, dim=128, depth=2, heads=2, mlp_dim=256).to(device)
images = [
    torch.randn(3, 16 * rows, 16 * columns, device=device) for rows, columns in [(6, 9), (16, 4), (2, 2), (10, 10)]
]
before = model(images, group_images=True)

fast = accelerate(model)  # shares the parameters: optimizers and checkpoints stay valid

after = fast(images)
print(f"largest difference of {before.numel()} logits: {(before - after).abs().max():.1e}")
after.square().mean().backward()
print(f"parameters with a gradient: {sum(p.grad is not None for p in model.parameters())}")

again = load(model.state_dict())  # from a checkpoint alone, without vit-pytorch
print(f"from the state dict: {(again.to(device)(images) - after).abs().max():.1e}")
