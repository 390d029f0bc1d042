"""Steps that the forward and backward attention kernels share.

A tile of rows is a tuple of one or two column parts, so that head widths such as 72 are computed as 64 + 16 and not as
128: D1 is the largest power of two ≤ D and D2 the rest rounded up to a power of two (at least 16), or 0. Columns past
D are read as zeros and never written.

NORM codes: 0 none, 1 layer_norm, 2 rms_norm, 3 l2.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)
LAYER_NORM = tl.constexpr(1)
RMS_NORM = tl.constexpr(2)
L2 = tl.constexpr(3)


@triton.jit
def load_rows(ptr, first_row, offs, stride, mask, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Rows first_row + offs, [ROWS, D] as parts; rows outside the mask are zeros."""
    base = ptr + first_row.to(tl.int64) * stride + offs[:, None] * stride
    first = tl.load(base + tl.arange(0, D1)[None, :], mask=mask[:, None], other=0.0)
    if D2 == 0:
        return (first,)
    else:
        cols = D1 + tl.arange(0, D2)
        return (first, tl.load(base + cols[None, :], mask=mask[:, None] & (cols < D)[None, :], other=0.0))


@triton.jit
def store_rows(ptr, first_row, offs, stride, mask, x, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    base = ptr + first_row.to(tl.int64) * stride + offs[:, None] * stride
    tl.store(base + tl.arange(0, D1)[None, :], x[0].to(ptr.dtype.element_ty), mask=mask[:, None])
    if D2 > 0:
        cols = D1 + tl.arange(0, D2)
        mask_2 = mask[:, None] & (cols < D)[None, :]
        tl.store(base + cols[None, :], x[1].to(ptr.dtype.element_ty), mask=mask_2)


@triton.jit
def load_vector(ptr, PRESENT: tl.constexpr, default, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """[D] float32 as parts; `default` everywhere when the vector is absent."""
    if PRESENT:
        first = tl.load(ptr + tl.arange(0, D1)).to(tl.float32)
    else:
        first = tl.full([D1], default, tl.float32)
    if D2 == 0:
        return (first,)
    else:
        cols = D1 + tl.arange(0, D2)
        if PRESENT:
            second = tl.load(ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        else:
            second = tl.full([D2], default, tl.float32)
        return (first, second)


@triton.jit
def store_vector(ptr, x, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    tl.store(ptr + tl.arange(0, D1), x[0])
    if D2 > 0:
        cols = D1 + tl.arange(0, D2)
        tl.store(ptr + cols, x[1], mask=cols < D)


@triton.jit
def load_pairs(ptr, first_row, offs, mask, other):
    """Two numbers per row from a float32 (T, 2) array.

    Inside loops per-row numbers are kept in pairs on purpose: a load of fewer elements than threads would be repeated
    in the layout of the scores, one 4-byte copy per element and thread.
    """
    pairs = (first_row + offs)[:, None] * 2 + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(ptr + pairs, mask=mask[:, None], other=other))


@triton.jit
def store_pairs(ptr, first_row, offs, x, y, mask):
    pairs = (first_row + offs)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(ptr + pairs, tl.join(x, y), mask=mask[:, None])


@triton.jit
def zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    if D2 == 0:
        return (tl.zeros([ROWS, D1], tl.float32),)
    else:
        return (tl.zeros([ROWS, D1], tl.float32), tl.zeros([ROWS, D2], tl.float32))


@triton.jit
def cast(x, dtype: tl.constexpr):
    if len(x) == 1:
        return (x[0].to(dtype),)
    else:
        return (x[0].to(dtype), x[1].to(dtype))


@triton.jit
def row_dot(x, y):
    """Σ over columns of x·y: [ROWS]."""
    total = tl.sum(x[0] * y[0], 1)
    if len(x) == 2:
        total += tl.sum(x[1] * y[1], 1)
    return total


@triton.jit
def column_dot(x, y):
    """Σ over rows of x·y: [D] as parts."""
    if len(x) == 1:
        return (tl.sum(x[0] * y[0], 0),)
    else:
        return (tl.sum(x[0] * y[0], 0), tl.sum(x[1] * y[1], 0))


@triton.jit
def column_sum(x):
    if len(x) == 1:
        return (tl.sum(x[0], 0),)
    else:
        return (tl.sum(x[0], 0), tl.sum(x[1], 0))


@triton.jit
def scale_rows(x, by):
    """x[i, :] · by[i]."""
    if len(x) == 1:
        return (x[0] * by[:, None],)
    else:
        return (x[0] * by[:, None], x[1] * by[:, None])


@triton.jit
def scale_all(x, by):
    if len(x) == 1:
        return (x[0] * by,)
    else:
        return (x[0] * by, x[1] * by)


@triton.jit
def scale_columns(x, by):
    """x[:, c] · by[c]."""
    if len(x) == 1:
        return (x[0] * by[0][None, :],)
    else:
        return (x[0] * by[0][None, :], x[1] * by[1][None, :])


@triton.jit
def add_columns(x, by):
    """x[:, c] + by[c]."""
    if len(x) == 1:
        return (x[0] + by[0][None, :],)
    else:
        return (x[0] + by[0][None, :], x[1] + by[1][None, :])


@triton.jit
def multiply(x, by):
    """Two [D] vectors."""
    if len(x) == 1:
        return (x[0] * by[0],)
    else:
        return (x[0] * by[0], x[1] * by[1])


@triton.jit
def subtract_rows(x, mean, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """x[i, :] − mean[i] in the D true columns; columns past D stay zero."""
    if D2 == 0:
        return (x[0] - mean[:, None],)
    else:
        inside = (D1 + tl.arange(0, D2)) < D
        return (x[0] - mean[:, None], tl.where(inside[None, :], x[1] - mean[:, None], 0.0))


@triton.jit
def centre(x, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    mean = tl.sum(x[0], 1)
    if D2 > 0:
        mean += tl.sum(x[1], 1)
    return subtract_rows(x, mean / D, D, D1, D2)


@triton.jit
def row_statistics(x, eps, NORM: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """(mean, r): x̂ = (x − mean)·r. r is rsqrt(mean(x²) + eps) of the centred row, or √D / max(‖x‖, eps) for l2."""
    x = cast(x, tl.float32)
    mean = tl.zeros([x[0].shape[0]], tl.float32)
    if NORM == LAYER_NORM:
        mean = tl.sum(x[0], 1)
        if D2 > 0:
            mean += tl.sum(x[1], 1)
        mean = mean / D
        x = subtract_rows(x, mean, D, D1, D2)
    if NORM == NONE:
        return mean, mean + 1.0
    else:
        square = row_dot(x, x)
        if NORM == L2:
            return mean, tl.sqrt(D + 0.0) / tl.maximum(tl.sqrt(square), eps)
        else:
            return mean, 1.0 / tl.sqrt(square / D + eps)


@triton.jit
def unit_rows(x, mean, r, NORM: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """x̂ in float32."""
    x = cast(x, tl.float32)
    if NORM == LAYER_NORM:
        x = subtract_rows(x, mean, D, D1, D2)
    if NORM == NONE:
        return x
    else:
        return scale_rows(x, r)


@triton.jit
def unit_rows_backward(grad, x_hat, r, eps, NORM: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """dx from dx̂: r·(C dx̂ − x̂·mean(dx̂·x̂)), C the centring of layer_norm."""
    if NORM == NONE:
        return grad
    else:
        along = row_dot(grad, x_hat) / D
        if NORM == L2:
            along = tl.where(r < tl.sqrt(D + 0.0) / eps, along, 0.0)  # below eps the size is a constant
        if NORM == LAYER_NORM:
            grad = centre(grad, D, D1, D2)
        if len(grad) == 1:
            return (r[:, None] * (grad[0] - x_hat[0] * along[:, None]),)
        else:
            return (
                r[:, None] * (grad[0] - x_hat[0] * along[:, None]),
                r[:, None] * (grad[1] - x_hat[1] * along[:, None]),
            )


@triton.jit
def dot_rows(x, y, PRECISION: tl.constexpr):
    """x · yᵀ: [ROWS_X, ROWS_Y]."""
    product = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    if len(x) == 2:
        product = tl.dot(x[1], tl.trans(y[1]), product, input_precision=PRECISION)
    return product


@triton.jit
def dot_values(p, v, acc, PRECISION: tl.constexpr):
    """acc + p · v, column part by column part."""
    if len(v) == 1:
        return (tl.dot(p, v[0], acc[0], input_precision=PRECISION),)
    else:
        return (
            tl.dot(p, v[0], acc[0], input_precision=PRECISION),
            tl.dot(p, v[1], acc[1], input_precision=PRECISION),
        )


@triton.jit
def fold_query(
    q_hat, gain, shift, fold_scale, dtype: tl.constexpr, CENTRE: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """u = fold_scale · (γq γk ⊙ q̂ + βq γk), rounded to `dtype`; with CENTRE also centred.

    A rounded row of zero mean has a residue, which the scores would multiply by K's mean. CENTRE takes it out of the
    row's smallest element of the first part, whose own rounding is the finest.
    """
    u = q_hat
    if GAIN:
        u = scale_columns(u, gain)
    if SHIFT:
        u = add_columns(u, shift)
    u = scale_all(u, fold_scale)
    if CENTRE:
        u = centre(u, D, D1, D2)
        if dtype != tl.float32:
            rounded = cast(cast(u, dtype), tl.float32)
            residue = tl.sum(rounded[0], 1)
            if D2 > 0:
                residue += tl.sum(rounded[1], 1)
            smallest = tl.argmin(tl.abs(u[0]), 1)
            first = tl.where(tl.arange(0, D1)[None, :] == smallest[:, None], rounded[0] - residue[:, None], rounded[0])
            if D2 == 0:
                u = (first,)
            else:
                u = (first, rounded[1])
    return cast(u, dtype)


@triton.jit
def query_gradient(
    du, q_hat, r, gain, eps, softmax_scale, Q_NORM: tl.constexpr, CENTRE: tl.constexpr, GAIN: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """(dq, dt) from du, the gradient of u without its scale; the weights' gradients follow from sums of dt."""
    dt = scale_all(du, softmax_scale)
    if CENTRE:
        dt = centre(dt, D, D1, D2)
    dq_hat = dt
    if GAIN:
        dq_hat = scale_columns(dt, gain)
    return unit_rows_backward(dq_hat, q_hat, r, eps, Q_NORM, D, D1, D2), dt
