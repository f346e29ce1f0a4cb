"""What the causal kernels of one tile share: soft buckets in few dependent steps, rows and states of a run.

A program waits for each product before it goes on, so that what counts is how many products follow each other. Parts
that add up are therefore put side by side and go through one product: the high and low halves of hyperplanes, the
logarithms of both sides of a plane, the halves of a sum. Shape letters are those of
:mod:`race_attention.backends.triton.device`; besides them SW, the buckets of a stored row, and N at least 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    LOG2_E,
    add_dot,
    bfloat16_of,
    factor_logs,
    float16_of,
    inverse_of,
    load_decay,
    operand,
    run_bounds,
    sides,
    store_rows,
    whole_rows,
)

# ------------------------------------------------------------------------------------------- rows of a run


@triton.jit
def block_in_run(block, table, T, RUN, NC, C: tl.constexpr, CUT: tl.constexpr, PACKED: tl.constexpr):
    """(run, batch, row, the run's first token, its tokens, the first of them here) of a program's block of C tokens.

    CUT, runs are cut into blocks, and that of a short run may begin at its end or past it; else they are one each.
    """
    per_run = (RUN // C).to(tl.int32) if CUT else 1
    run = block // per_run
    first = (block - run * per_run) * C
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    return run, batch, row, start, (end - start).to(tl.int32), first


@triton.jit
def rows_at(base, stride, t, here, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ALIGNED: tl.constexpr):
    """[C, DP] elements of the tokens from the run's t-th on; zeros where not ``here`` [C], and past D."""
    c = tl.arange(0, C)
    d = tl.arange(0, DP)
    step = whole_rows(stride.to(tl.int32), ALIGNED)
    pointer = (base + t * whole_rows(stride, ALIGNED)) + ((c * step)[:, None] + d[None, :])
    mask = here[:, None]
    if DP != D:
        mask = mask & (d < D)[None, :]
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def rows_from(
    base, stride, count, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ALIGNED: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """What :func:`row_block` and :func:`store_block` take of the ``count`` rows from ``base`` on, in blocks of C by DP.

    DESCRIBED, it is a descriptor: the hardware then copies whole blocks to and from shared memory, with zeros past the
    last row and column, and no thread spends registers and instructions on addresses. Else it is ``base``.
    """
    if DESCRIBED:
        one: tl.constexpr = 1
        return tl.make_tensor_descriptor(base, [count, D], [whole_rows(stride, ALIGNED), one], [C, DP])
    else:
        return base


@triton.jit
def row_block(
    rows, stride, t, column: tl.constexpr, here, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ALIGNED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """[C, DP] elements from ``column`` on of the tokens from the run's t-th on; zeros past D, and where not ``here``.

    DESCRIBED, of the latter only those past the run's end.
    """
    if DESCRIBED:
        return rows.load([t, column])
    else:
        width: tl.constexpr = D - column if D - column < DP else DP
        return rows_at(rows + column, stride, t, here, C, width, DP, ALIGNED)


@triton.jit
def store_block(
    rows, stride, t, column: tl.constexpr, here, x, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Writes x [C, DP] from ``column`` on to the tokens from the run's t-th on that are ``here`` [C]."""
    if DESCRIBED:
        rows.store([t, column], x.to(rows.dtype))
    else:
        width: tl.constexpr = D - column if D - column < DP else DP
        store_rows(rows + column, stride, t, here, x, C, width, DP)


@triton.jit
def features_at(base, t, here, C: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr):
    """phi [C, SP] of the tokens from the run's t-th on, from rows SW apart; zero where not ``here`` [C]."""
    s = tl.arange(0, SP)
    mask = here[:, None]
    if SP != SW:
        mask = mask & (s < SW)[None, :]
    return tl.load((base + t * SW) + (tl.arange(0, C)[:, None] * SW + s[None, :]), mask=mask, other=0.0)


@triton.jit
def store_features(base, t, here, phi, C: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr):
    s = tl.arange(0, SP)
    mask = here[:, None]
    if SP != SW:
        mask = mask & (s < SW)[None, :]
    tl.store((base + t * SW) + (tl.arange(0, C)[:, None] * SW + s[None, :]), phi, mask=mask)


# --------------------------------------------------------------------------- sequences joined end to end


@triton.jit
def begin_of(ages, t):
    """The token of the run with which the sequence of its t-th one begins; negative where that is before the run."""
    return t - tl.load(ages + t)


@triton.jit
def begins_of(ages, t, count, C: tl.constexpr):
    """([C], one): where in the block from t on the sequence of each of its tokens begins, and that of its last one.

    Negative where before the block: such a query sees the state before it, and with a last token like that the state
    goes on. What the block leaves is that of the keys from its last token's beginning on.
    """
    c = tl.arange(0, C)
    begins = c - tl.load(ages + t + c, mask=c < count - t, other=0)
    return begins, begin_of(ages, tl.minimum(t + C, count) - 1) - t


# ----------------------------------------------------------------------------------------------- the state


@triton.jit
def load_sums(
    base, first: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, TALL: tl.constexpr
):
    """Columns ``first`` and on of the value sums of a state, [SP, VP], or [VP, SP] where not TALL.

    A warp-group product has 64 rows: the buckets go down where there are so many, and Dv where not.
    """
    s = tl.arange(0, SP)
    v = first + tl.arange(0, VP)
    if TALL:
        return tl.load(base + s[:, None] * V + v[None, :], mask=(s < S)[:, None] & (v < V)[None, :], other=0.0)
    else:
        return tl.load(base + s[None, :] * V + v[:, None], mask=(s < S)[None, :] & (v < V)[:, None], other=0.0)


@triton.jit
def load_mass(base, S: tl.constexpr, SP: tl.constexpr, V: tl.constexpr):
    s = tl.arange(0, SP)
    return tl.load(base + S * V + s, mask=s < S, other=0.0)


@triton.jit
def store_sums(base, sums, S: tl.constexpr, SP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, TALL: tl.constexpr):
    s = tl.arange(0, SP)
    v = tl.arange(0, VP)
    if TALL:
        tl.store(base + s[:, None] * V + v[None, :], sums, mask=(s < S)[:, None] & (v < V)[None, :])
    else:
        tl.store(base + s[None, :] * V + v[:, None], sums, mask=(s < S)[None, :] & (v < V)[:, None])


@triton.jit
def store_mass(base, mass, S: tl.constexpr, SP: tl.constexpr, V: tl.constexpr):
    s = tl.arange(0, SP)
    tl.store(base + S * V + s, mass, mask=s < S)


@triton.jit
def chunk_at(batch, row, t, T, CH: tl.constexpr, PACKED: tl.constexpr):
    """The place of the chunk that begins at token t of all, int64, see plan.py."""
    first = row if PACKED else batch * ((T + (CH - 1)) // CH)
    return first + t // CH


@triton.jit
def store_chunk(
    inner, marks, place, sums, mass, weight, log_kept,
    S: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes value sums [VP, SP], masses [SP] and the log decay so far of a run as of a chunk's first token.

    The sums are about their mean value, which is written as it is: rounded, a mean of three deviations would leave the
    gradients of queries, from which it is taken away again, 1e-2 off and more.
    """
    s = tl.arange(0, SP)
    v = tl.arange(0, VP)
    mask = (v < V)[:, None] & (s < SW)[None, :]
    mean = tl.sum(sums, 1) * inverse_of(tl.where(weight > 1e-30, weight, 1.0))
    about = operand(sums - mean[:, None] * mass[None, :], PRECISION)
    tl.store((inner + place * (V * SW)) + (v[:, None] * SW + s[None, :]), about, mask=mask)
    marks += place * (SW + 8 + VP)
    tl.store(marks + (SW + 8) + v, mean)
    tl.store(marks + s, mass, mask=s < SW)
    i = tl.arange(0, 8)
    tl.store(marks + SW + i, tl.where(i == 0, log_kept, 0.0))


@triton.jit
def by_bucket(sums, TALL: tl.constexpr):
    """Value sums as [SP, VP]."""
    return sums if TALL else tl.trans(sums)


@triton.jit
def by_value(sums, TALL: tl.constexpr):
    """Value sums as [VP, SP]."""
    return tl.trans(sums) if TALL else sums


@triton.jit
def taken_up(sums, rows, weights, TALL: tl.constexpr, PRECISION: tl.constexpr):
    """Value sums and the tokens' rows [C, VP] with their weights [C, SP] added."""
    if TALL:
        return add_dot(sums, tl.trans(weights), rows, PRECISION)
    else:
        return add_dot(sums, tl.trans(rows), weights, PRECISION)


@triton.jit
def taken_up_fully(sums, rows, weights, FULLY: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr):
    """The same of rows as given. FULLY, with the three bits that float16 has more than bfloat16.

    A log decay's gradient needs those: it adds up differences of what a mean of all values, or grad_outs, gives.
    """
    sums = taken_up(sums, operand(rows, PRECISION), weights, TALL, PRECISION)
    if FULLY and PRECISION == "bf16" and rows.dtype == tl.float16:
        rest = rows.to(tl.float32) - operand(rows, PRECISION).to(tl.float32)
        sums = taken_up(sums, operand(rest, PRECISION), weights, TALL, PRECISION)
    return sums


# --------------------------------------------------------------------------------------------- soft buckets


@triton.jit
def load_hash(
    planes, head, table, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A head's hyperplanes from a table on, in two parts of bfloat16, the high ones and below them the low ones.

    [2N, DP]. In float32 as they are, and below them zeros.
    """
    d = tl.arange(0, DP)
    row = tl.arange(0, 2 * N)
    n = table * P + row % N
    pointer = planes + (head.to(tl.int64) * (L * P) + n)[:, None] * D + d[None, :]
    w = tl.load(pointer, mask=(n < L * P)[:, None] & (d < D)[None, :], other=0.0)
    if PRECISION == "ieee":
        return tl.where((row < N)[:, None], w, 0.0)
    else:
        high = w.to(tl.bfloat16)
        return tl.where((row < N)[:, None], high, (w - high.to(tl.float32)).to(tl.bfloat16))


@triton.jit
def corners_of(at, table, W: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """Which planes are on the +1 side of the buckets at .. at + W - 1, and below them which on the -1 side.

    0 or 1, [2N, W]; the planes are those from ``table`` on.
    """
    row = tl.arange(0, 2 * N)[:, None]
    s = at + tl.arange(0, W)[None, :]
    n = row % N
    chosen = (n // P == (s >> P) - table) & ((((s >> (n % P)) & 1) == 1) == (row < N))
    corners = tl.where(chosen, 1.0, 0.0)
    return corners if PRECISION == "ieee" else corners.to(tl.float16)


@triton.jit
def beside(a, b, C: tl.constexpr, N: tl.constexpr):
    """[C, 2N] of two [C, N]: no element leaves its thread."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [C, 2 * N])


@triton.jit
def hashed(x, hashes, C: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """x [C, DP] by the hyperplanes, [C, N], to float32's accuracy."""
    if PRECISION == "ieee":
        both = tl.dot(x.to(tl.float32), tl.trans(hashes), input_precision="ieee")
    else:
        coarse = x.to(tl.bfloat16)
        both = tl.dot(coarse, tl.trans(hashes))
        if x.dtype != tl.bfloat16:  # float16 has three bits more
            both = tl.dot((x.to(tl.float32) - coarse.to(tl.float32)).to(tl.bfloat16), tl.trans(hashes), both)
    return tl.sum(tl.reshape(both, [C, 2, N]), 1)


@triton.jit
def buckets_of(
    y, beta, corners, C: tl.constexpr, N: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, LIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """phi [C, SP] times 2**(LIFT * P), float32, as :func:`~.device.buckets`."""
    r, rest, odds = sides(y, beta, PRECISION)
    log_up, log_down = factor_logs(odds, LIFT, PRECISION)
    logs = beside(log_up, log_down, C, N)
    if PRECISION == "ieee":
        logit = tl.dot(logs, corners, input_precision="ieee")
    else:
        logit = tl.dot(float16_of(logs), corners)
    if S % SP != 0:
        # A sum and not a mask, whose predicates would be kept through the loop.
        logit += (tl.minimum(S - 1 - tl.arange(0, SP), 0) * 1024).to(tl.float32)[None, :]
    return tl.exp2(logit)


@triton.jit
def unhashed(grad_y, hashes, C: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of x [C, DP] in :func:`hashed`."""
    if PRECISION == "ieee":
        return tl.dot(beside(grad_y, grad_y, C, N), hashes, input_precision="ieee")
    else:
        grad = bfloat16_of(grad_y)
        return tl.dot(beside(grad, grad, C, N), hashes)


@triton.jit
def store_hash_gradient(base, part, x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Writes x [DP, N] as part number ``part`` of the sums for the hyperplanes' gradient, [parts, ROWS, D] float32."""
    n = tl.arange(0, N)
    d = tl.arange(0, DP)
    row = part * ROWS + n
    tl.store(base + row[None, :] * D + d[:, None], x, mask=(d < D)[:, None] & (n >= 0)[None, :])


# ----------------------------------------------------------------------------------------- decay in a block


@triton.jit
def block_decay(base, stride, start, end, C: tl.constexpr, PRECISION: tl.constexpr):
    """(whole, part, since, left, kept, total) of a block.

    Running sums of log_decay as :func:`fading` takes them; what the state before the block keeps at each token [C];
    what each token keeps at the end [C]; what the state keeps in all, and that one's logarithm.

    In bfloat16 one plain sum does: a token that forgets more than a float32 can tell counts as 88, so that sums stay
    below 2**13 and their differences good to 2**-10 at the very worst.
    """
    if PRECISION == "bf16":
        c = tl.arange(0, C)
        x = tl.load(base + (start + c) * stride, mask=start + c < end, other=0.0).to(tl.float32)
        x = tl.maximum(x, -88.0)
        whole = tl.cumsum(x, 0)
        total = tl.sum(x, 0)
        return whole * LOG2_E, whole, tl.exp(whole), tl.exp(total - whole), tl.exp(total), total
    else:
        whole, part, all_whole, all_part = load_decay(base, stride, start, end, C)
        left = tl.exp((all_whole - whole) + (all_part - part))
        return whole, part, tl.exp(whole + part), left, tl.exp(all_whole + all_part), all_whole + all_part


@triton.jit
def running_decay(base, stride, start, end, C: tl.constexpr):
    """(running sums of log_decay over a block, what each token keeps at its end, [C] each; the sum of all)."""
    c = tl.arange(0, C)
    x = tl.load(base + (start + c) * stride, mask=start + c < end, other=0.0).to(tl.float32)
    x = tl.maximum(x, -88.0)
    fade = tl.cumsum(x, 0)
    total = tl.sum(x, 0)
    return fade, tl.exp(total - fade), total


@triton.jit
def decay_so_far(fades, t, count, C: tl.constexpr, CH: tl.constexpr):
    """(fade, since, left, kept) of a block from the sums that the keys' pass left; ``fade`` from the chunk's start.

    The last three as :func:`block_decay`; fade is log2 of what is left, so that exp2 of a difference is the decay
    between two tokens of the block. Past the end it is 0.
    """
    c = tl.arange(0, C)
    past = tl.load(fades + t - 1, mask=t % CH > 0, other=0.0)
    total = tl.load(fades + tl.minimum(t + C, count) - 1)
    fade = tl.load(fades + t + c, mask=c < count - t, other=0.0)
    return fade * LOG2_E, tl.exp(fade - past), tl.exp(total - fade), tl.exp(total - past)


@triton.jit
def fading(whole, part, past, KEYS_DOWN: tl.constexpr, PRECISION: tl.constexpr):
    """[C, C] what is left of a key at a query, and 0 where the key is not past. Queries down, or KEYS_DOWN."""
    age = whole[None, :] - whole[:, None] if KEYS_DOWN else whole[:, None] - whole[None, :]
    if PRECISION == "bf16":
        return tl.exp2(tl.where(past, age, -1000.0))
    else:
        age += part[None, :] - part[:, None] if KEYS_DOWN else part[:, None] - part[None, :]
        return tl.exp(tl.where(past, age, -1000.0))
