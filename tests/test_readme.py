"""What the README says runs, and the files it names exist."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_model_example_runs() -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    assert names["logits"].shape == (2, 10)


def test_the_migration_computes_the_same_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 12, 2, 16, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    norms = [torch.nn.LayerNorm(16).double() for _ in "qk"]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    names = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "q_norm": norms[0], "k_norm": norms[1]}
    exec(BLOCKS[1], names)
    heads_first = [x.transpose(0, 1) for x in (norms[0](q), norms[1](k), v)]
    for begin, end in ((0, 5), (5, 12)):
        parts = [x[:, begin:end] for x in heads_first]
        expected = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1)
        torch.testing.assert_close(names["out"][begin:end], expected)


def test_files_that_the_readme_names_exist() -> None:
    named = re.findall(r"(?:navit|navit_kernels|data)/[\w/.-]+", README) + re.findall(r"\]\(([^):]+)\)", README)
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]
