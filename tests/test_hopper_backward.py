"""Hopper's backward of long segments, compiled ahead of time: that its rows fit registers and its products stay
asynchronous. What it computes is tested with varlen_attention's other kernels, on a GPU."""

from __future__ import annotations

import re

import pytest
import torch
from ahead_of_time import SHARED_MEMORY_LIMIT, Compiled, compile_launches, machine_code
from attention_checks import BF16, FP16, Case
from compile_table import call_on_meta

from navit_kernels.plan import CLASSES
from navit_kernels.self_attention.config import choose_config


def compile_case(case: Case) -> list[Compiled]:
    from navit_kernels.self_attention import hopper_backward

    tensors = case.inputs("meta")
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    call = call_on_meta(case, tensors)
    config = choose_config(90, case.width, CLASSES - 1, 16, gluon=True)
    floats = torch.empty(16, device="meta")

    def backward() -> None:
        grads = (torch.empty_like(x) for x in (q, k, v))
        hopper_backward.backward_stream(
            call, CLASSES - 1, dout, *grads, floats, floats, floats, floats, 2, call.norms.q_weight is not None,
            stages=config.backward.stages,
        )  # fmt: skip

    return compile_launches("sm_90", backward)


@pytest.mark.compile_only
@pytest.mark.parametrize(
    "case",
    [
        Case((300,), 16, 64, BF16),
        Case((300,), 16, 64, FP16, "l2", "rms_norm", "per head", bias=False),
        Case((300,), 16, 64, BF16, None, None),
    ],
    ids=str,
)
def test_rows_stay_in_registers(case: Case) -> None:
    allowed = choose_config(90, case.width, CLASSES - 1, 16, gluon=True).backward.spills
    for one in compile_case(case):
        assert one.spills <= allowed, f"{one.name} spills {one.spills} bytes"  # none with Triton 3.6.0
        assert one.shared <= SHARED_MEMORY_LIMIT["sm_90"]
        code, text = machine_code(one), one.asm["ptx"]
        # two warpgroups' first block, loop and last products
        assert text.count("wgmma.mma_async") == (64 if one.name == "hopper_keys" else 48)
        assert "HGMMA" in code
        # a wait for each that the code waits for: the compiler can serialize products, with a wait after every one
        assert code.count("WARPGROUP.DEPBAR") <= text.count("wgmma.wait_group")


@pytest.mark.compile_only
def test_products_run_under_the_softmax() -> None:
    """In the loops all exponentials stand before the last wait for the products that were started before them."""
    for one in compile_case(Case((300,), 16, 64, BF16)):
        code = "".join(re.findall(r"(HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR)", machine_code(one)))
        code = code.replace("HGMMA", "p").replace("MUFU.EX2", "e").replace("WARPGROUP.DEPBAR", "w")
        products = 16 if one.name == "hopper_keys" else 12
        loops = re.findall(f"p{{{products}}}(w[ew]*?w[ew]*?w)", code)
        assert [loop.count("e") for loop in loops] == [32, 32], f"{one.name}: {code}"
