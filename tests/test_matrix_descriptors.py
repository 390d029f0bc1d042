"""The attention kernels that multiply by matrix descriptors, compiled ahead of time: every descriptor is written."""

from __future__ import annotations

import pytest
from ahead_of_time import machine_code, unwritten_descriptors
from attention_checks import BF16
from compile_table import compile_class

CODE = """
        /*0000*/                   UMOV UR4, 0x1 ;
        /*0010*/                   UIADD3.64 UR6, UR4, 0x2, URZ ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   UMOV UR5, 0x1 ;
.L_x_1:
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0060*/                   EXIT ;
"""


def test_a_descriptor_that_one_way_leaves_unwritten_is_found() -> None:
    assert unwritten_descriptors(CODE) == ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"]
    assert unwritten_descriptors(CODE.replace("@P0 BRA `(.L_x_1)", "NOP")) == []


@pytest.mark.compile_only
@pytest.mark.parametrize(("index", "width"), [(1, 72), (1, 128), (3, 128)])
def test_every_descriptor_is_written(index: int, width: int) -> None:
    """Of what no test of a kernel of Hopper's compiles; those ask for it too, by assert_products_are_asynchronous."""
    for one in compile_class("sm_90", index, width, BF16, "layer_norm"):
        if "wgmma" in one.asm["ptx"]:
            assert unwritten_descriptors(machine_code(one)) == [], one.name
