"""The LSTM rule's whole step as one Triton kernel: inputs, dense layer, LSTM layers, read-out, update.

A program of the grid takes a block of coordinates. It reads their gradients, parameters and state once, keeps
everything between in registers and shared memory, and writes parameters and state once. Tiles are [units, coordinates],
coordinates last, as the state is stored, so that neighbouring threads touch neighbouring addresses. Units are padded to
a power of two, at least 16, which `tl.dot` asks for; padded units stay zero in every tile.

State is overwritten where it is read. Threads may hold copies of each other's elements, so a barrier stands between the
last read and the first write of each row.

Importable without Triton, which makes its kernels when this module loads; `learned_opt.rules.kernels.fused` loads it
late.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def _jit(function):
    return function if triton is None else triton.jit(function)


def _jit_entry(function):
    # Numbers that change nothing in the code must not make Triton compile it again.
    return function if triton is None else triton.jit(function, do_not_specialize=["n", "correction_stride"])


@_jit
def _tanh(x):
    # A polynomial near zero, where 1 − 2/(e^2x + 1) would lose every digit of a small update.
    s = x * x
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 15.0)) + 1.0)
    large = tl.where(x < 0, -large, large)
    # The last case hands on what is not a number.
    return tl.where(size < 0.625, p * s * x + x, tl.where(size >= 0.625, large, x))


@_jit
def _pair(weights, offset, unit, live, stride: tl.constexpr, first, second):
    """Two weights per unit, in neighbouring columns, times the two inputs: [units, coordinates]."""
    at = weights + offset + unit * stride
    w0 = tl.load(at, mask=live, other=0.0)
    w1 = tl.load(at + 1, mask=live, other=0.0)
    return w0[:, None] * first[None, :] + w1[:, None] * second[None, :]


@_jit
def _product(weights, offset, unit, live, stride: tl.constexpr, x, NUM: tl.constexpr, PRECISION: tl.constexpr):
    """Weights [units, NUM], rows `stride` apart, times x [NUM padded, coordinates]."""
    k = tl.arange(0, x.shape[0])
    at = weights + offset + unit[:, None] * stride + k[None, :]
    w = tl.load(at, mask=live[:, None] & (k < NUM)[None, :], other=0.0)
    return tl.dot(w, x, input_precision=PRECISION)


@_jit
def _gate(
    weights,
    at,
    GATE: tl.constexpr,
    x,
    first,
    second,
    hidden,
    unit,
    live,
    PAIR: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One gate before its nonlinearity [hidden padded, coordinates]; inputs are the pair, or x with WIDTH rows."""
    here = at + GATE * HIDDEN * (WIDTH + HIDDEN)
    z = _product(weights, here + WIDTH, unit, live, WIDTH + HIDDEN, hidden, HIDDEN, PRECISION)
    if PAIR:
        z += _pair(weights, here, unit, live, WIDTH + HIDDEN, first, second)
    else:
        z += _product(weights, here, unit, live, WIDTH + HIDDEN, x, WIDTH, PRECISION)
    bias = weights + at + 4 * HIDDEN * (WIDTH + HIDDEN) + GATE * HIDDEN
    return z + tl.load(bias + unit, mask=live, other=0.0)[:, None]


@_jit
def _layer(
    weights,
    at,
    x,
    first,
    second,
    hidden,
    cell,
    unit,
    live,
    PAIR: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """An LSTM layer: new hidden and cell. Gate after gate, so that few tiles are alive at a time."""
    z = _gate(weights, at, 3, x, first, second, hidden, unit, live, PAIR, WIDTH, HIDDEN, PRECISION)
    candidate = _tanh(z)
    z = _gate(weights, at, 0, x, first, second, hidden, unit, live, PAIR, WIDTH, HIDDEN, PRECISION)
    candidate *= tl.sigmoid(z)
    z = _gate(weights, at, 1, x, first, second, hidden, unit, live, PAIR, WIDTH, HIDDEN, PRECISION)
    cell = cell * tl.sigmoid(z) + candidate
    z = _gate(weights, at, 2, x, first, second, hidden, unit, live, PAIR, WIDTH, HIDDEN, PRECISION)
    return tl.where(live[:, None], _tanh(cell) * tl.sigmoid(z), 0.0), cell


@_jit_entry
def lstm_step(
    params,
    grads,
    rows,
    weights,
    corrections,
    correction_stride,
    n,
    row_stride,
    lr,
    keep,
    direction,
    NORMALIZED: tl.constexpr,
    BETA: tl.constexpr,
    EPS: tl.constexpr,
    LOG_RANGE: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    DENSE: tl.constexpr,
    DENSE_PAD: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    TANH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """params ← keep·params + lr·update, and rows ← the new state, for coordinates [0, n).

    Args:
        params, grads: [n], of any floating type; everything is computed in float32.
        rows: state, `row_stride` elements from row to row: hidden and cell of each layer, then m and v.
        weights: float32, theta's tensors one after the other, in the order of the rule's `init_theta`.
        corrections: 1 − β^t of each coordinate, `correction_stride` apart: 1, or 0 where all share one. float32.
        lr, keep: factors of the update and of the parameter.
        direction: factor of the gradients, 1 or −1.
        SMALLEST, LARGEST: e^−p and e^p of log-and-sign inputs.
        The rest are the rule's settings, sizes padded for tiles, and choices of the launch.
    """
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    unit = tl.arange(0, HIDDEN_PAD)
    live = unit < HIDDEN
    tile = live[:, None] & inside[None, :]
    grad = tl.load(grads + column, mask=inside, other=0.0).to(tl.float32) * direction
    param = tl.load(params + column, mask=inside, other=0.0).to(tl.float32)
    stride = row_stride.to(tl.int64)

    if NORMALIZED:
        averages = rows + stride * (2 * LAYERS * HIDDEN) + column
        m = tl.load(averages, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(averages + stride, mask=inside, other=0.0).to(tl.float32)
        m = m * BETA + grad * (1 - BETA)
        v = v * BETA + grad * grad * (1 - BETA)
        active = v != 0
        unbias = tl.load(corrections + column * correction_stride, mask=inside, other=1.0)
        scale = tl.div_rn(1.0, tl.sqrt_rn(tl.where(active, v / unbias, 1.0)) + EPS)
        first = grad * scale
        second = m / unbias * scale
    else:
        active = grad != 0
        size = tl.abs(grad)
        large = size >= SMALLEST
        first = tl.where(large, tl.log(tl.maximum(size, SMALLEST)) / LOG_RANGE, -1.0)
        second = tl.where(large, tl.where(grad > 0, 1.0, -1.0), grad * LARGEST)

    at = 0
    x = first
    if DENSE > 0:
        wide = tl.arange(0, DENSE_PAD)
        present = wide < DENSE
        bias = tl.load(weights + 2 * DENSE + wide, mask=present, other=0.0)
        x = _pair(weights, at, wide, present, 2, first, second) + bias[:, None]
        x = tl.where(x <= 0, tl.exp(tl.minimum(x, 0.0)) - 1.0, x)
        x = tl.where(present[:, None], x, 0.0)
        at += 3 * DENSE

    for layer in tl.static_range(LAYERS):
        row = (layer * HIDDEN + unit)[:, None] * stride + column[None, :]
        hidden = tl.load(rows + row, mask=tile, other=0.0).to(tl.float32)
        cells = rows + stride * (LAYERS * HIDDEN)
        cell = tl.load(cells + row, mask=tile, other=0.0).to(tl.float32)
        if layer == 0:
            x, cell = _layer(
                weights, at, x, first, second, hidden, cell, unit, live,
                DENSE == 0, DENSE if DENSE > 0 else 2, HIDDEN, PRECISION,
            )  # fmt: skip
            at += 4 * HIDDEN * ((DENSE if DENSE > 0 else 2) + HIDDEN + 1)
        else:
            x, cell = _layer(
                weights, at, x, first, second, hidden, cell, unit, live, False, HIDDEN, HIDDEN, PRECISION
            )  # fmt: skip
            at += 4 * HIDDEN * (2 * HIDDEN + 1)
        tl.debug_barrier()
        tl.store(rows + row, x, mask=tile)
        tl.store(cells + row, cell, mask=tile)

    out = tl.sum(x * tl.load(weights + at + unit, mask=live, other=0.0)[:, None], 0) + tl.load(weights + at + HIDDEN)
    if TANH:
        out = _tanh(out)
    update = tl.where(active, out * SCALE, 0.0)
    # Here no thread has anything left to read.
    tl.debug_barrier()
    tl.store(params + column, param * keep + update * lr, mask=inside)
    if NORMALIZED:
        tl.store(averages, m, mask=inside)
        tl.store(averages + stride, v, mask=inside)
