"""Triton's interpreter without its faults: bfloat16, and products that differ from machine to machine.

It cuts float32 off to bfloat16 instead of rounding, multiplies bfloat16 tiles as the integers that they are stored as,
sums products in the order of the machine's BLAS, which differs between x·yᵀ and y·xᵀ, and refuses an argmin over NaN.
Here all products are summed in float64: what is left of a kernel's error is the kernel's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np


def widened(handle: Any) -> np.ndarray:
    """float64 values of a tile."""
    bits = handle.data
    if handle.dtype.scalar.is_bf16():
        bits = (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float64)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16 of float32, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), nearest).astype(np.uint16).reshape(x.shape)


@contextlib.contextmanager
def exact_interpreter() -> Iterator[None]:
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        if (x.dtype.scalar, dtype.scalar) == (float32, bfloat16):
            return TensorHandle(to_bfloat16(x.data), bfloat16)
        return cast(self, x, dtype)

    def create_dot(self: Any, x: Any, y: Any, acc: Any, *_: Any) -> Any:
        product = widened(x) @ widened(y) + acc.data
        return TensorHandle(product.astype(acc.data.dtype), acc.dtype.scalar)

    changes = {"cast_impl": cast_impl, "create_dot": create_dot}
    with mock.patch.multiple(InterpreterBuilder, **changes), mock.patch.object(np, "nanargmin", np.argmin):
        yield


def spare_needless_work() -> None:
    """Triton's language stays patched while a kernel runs; the interpreter patches it anew in every call of a jit
    function inside. It also computes whether each sum and product of integers overflows, and does not look: only where
    its option debug is set. The two take two thirds of its time."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch_lang = interpreter._patch_lang

    def patch(fn: Callable) -> Any:
        languages = [x for x in fn.__globals__.values() if x is interpreter.tl or x is interpreter.tl.core]
        if languages and not any(interpreter.tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return patch_lang(fn)

    interpreter._patch_lang = patch
