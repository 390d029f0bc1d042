"""flash-attn's function on packed segments, with another import; then with the QK norm inside."""

import torch

from navit_kernels import HeadNorm
from navit_kernels.flash_attn_interface import flash_attn_varlen_func  # before: from flash_attn import …

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
lengths = [70, 196, 9]
cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
q, k, v = torch.randn(3, sum(lengths), 4, 64, device=device, dtype=dtype).requires_grad_()

out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths))
print("attention", tuple(out.shape), out.dtype)

queries = torch.arange(len(lengths) + 1, device=device, dtype=torch.int32)  # one query per segment
pooled = flash_attn_varlen_func(q[: len(lengths)], k, v, queries, cu_seqlens, 1, max(lengths))
print("cross lengths", tuple(pooled.shape))

norms = {"q_norm": HeadNorm("layer_norm"), "k_norm": HeadNorm("layer_norm")}
normed = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths), **norms)
print("with QK norm", tuple(normed.shape))

try:
    flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths), causal=True)
except NotImplementedError as error:
    print("refused:", error)
