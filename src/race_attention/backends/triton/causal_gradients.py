"""The causal gradients for heads whose buckets fit one tile: of the keys and values, and of the queries.

A program owns a block of C tokens and waits for no other: it puts the state before its block (for keys the gradient of
the state after it) together from the run's, from what the passes before have left of its chunk, and from the blocks
between. Where there are no chunks it owns a run and carries the state from block to block. The two kernels mirror each
other. Buckets and projections come from the passes before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .causal_adjoint import block_at, place_of
from .device import (
    LOG2_E,
    add_dot,
    add_fine_dot,
    as_given_dot,
    ask_for,
    bfloat16_of,
    dot,
    fine_dot,
    keys_inside,
    operand,
    reciprocal,
    side_gradients,
    store_rows,
    whole_rows,
)
from .narrow import (
    begin_of,
    begins_of,
    beside,
    block_decay,
    block_in_run,
    by_bucket,
    by_value,
    fading,
    features_at,
    load_hash,
    load_mass,
    load_sums,
    rows_at,
    taken_up,
    taken_up_fully,
    unhashed,
)
from .projections import load_projections

NEVER_SPECIALIZED = ["T", "RUN", "NC", "G", "vb", "vt", "vh", "ob", "ot", "oh"]
NEVER_SPECIALIZED += ["mb", "mt", "mh", "gb", "gt", "gh"]

# A query past the end sees nothing, and no key may then count with the exponential of a positive number.
NEVER = tl.constexpr(-1e30)


@triton.jit
def load_inner(base, V: tl.constexpr, VP: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, TALL: tl.constexpr):
    """The value sums of a chunk, float32, as :func:`~.narrow.load_sums` has them, from [V, SW]."""
    s = tl.arange(0, SP)
    v = tl.arange(0, VP)
    if TALL:
        x = tl.load(base + v[None, :] * SW + s[:, None], mask=(s < SW)[:, None] & (v < V)[None, :], other=0.0)
    else:
        x = load_given(base, V, VP, SP, SW)
    return x.to(tl.float32)


@triton.jit
def load_given(base, V: tl.constexpr, VP: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr):
    """Value sums [VP, SP] as they lie in memory, the operand of a product without going through registers."""
    s = tl.arange(0, SP)
    v = tl.arange(0, VP)
    return tl.load(base + v[:, None] * SW + s[None, :], mask=(s < SW)[None, :] & (v < V)[:, None], other=0.0)


@triton.jit
def by_parts(
    x, parts, chunk, kept, V: tl.constexpr, VP: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, C: tl.constexpr,
    HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """x [C, VP] by value sums that lie in memory: ``kept`` times the two parts of a run's, and a chunk's. [C, SP].

    A loop, since its loads are then under way together and reach the products past the registers.
    """
    y = tl.zeros([C, SP], tl.float32)
    size: tl.constexpr = V * SW
    width: tl.constexpr = parts.dtype.element_ty.primitive_bitwidth // 8
    apart = (chunk.to(tl.int64) - parts.to(tl.int64)) // width - 2 * size
    for i in tl.range(0, 3, num_stages=3):
        if HAS_DECAY:
            y *= tl.where(i == 2, kept, 1.0)
        at = tl.multiple_of(tl.where(i < 2, 0, apart) + i * size, 8)
        y = tl.dot(x, load_given(parts + at, V, VP, SP, SW), y)
    return y


@triton.jit
def store_hashes(base, t, here, x, C: tl.constexpr, N: tl.constexpr, YW: tl.constexpr):
    n = tl.arange(0, N)
    at = (base + t * YW) + (tl.arange(0, C)[:, None] * YW + n[None, :])
    tl.store(at, x.to(base.dtype.element_ty), mask=here[:, None] & (n < YW)[None, :])


@triton.jit
def sums_dot(a, sums, C: tl.constexpr, VP: tl.constexpr, SP: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr):
    """a [C, VP] by value sums, to float32's accuracy: :func:`~.device.fine_dot` in one product where that is small."""
    if PRECISION == "ieee" or SP > 32 or a.dtype != tl.bfloat16:
        return fine_dot(a, by_value(sums, TALL), PRECISION)
    else:
        x = by_value(sums, TALL)
        high = bfloat16_of(x)
        both = tl.dot(a, beside(high, bfloat16_of(x - high.to(tl.float32)), VP, SP))
        return tl.sum(tl.reshape(both, [C, 2, SP]), 1)


@triton.jit
def load_unhash(
    planes, head, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    FINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A head's hyperplanes for gradients of tokens: in two parts as :func:`~.narrow.load_hash` has them where FINE.

    Else rounded, [N, DP]: what is multiplied by them is rounded as well.
    """
    if FINE:
        return load_hash(planes, head, 0, L, P, D, DP, N, PRECISION)
    else:
        n = tl.arange(0, N)
        d = tl.arange(0, DP)
        at = planes + (head.to(tl.int64) * (L * P) + n)[:, None] * D + d[None, :]
        return operand(tl.load(at, mask=(n < L * P)[:, None] & (d < D)[None, :], other=0.0), PRECISION)


@triton.jit
def load_choice(P: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, FINE: tl.constexpr, PRECISION: tl.constexpr):
    """Which buckets are on the +1 side of which planes, and beside them which on the -1 side: 0 or 1, [SP, 2N].

    Twice over, [2SP, 2N], where FINE. A bucket is chosen by its table's number and one bit.
    """
    column = tl.arange(0, 2 * N)
    n = column % N
    bit = 1 << (n % P)
    wanted = (n // P << P) | tl.where(column < N, bit, 0)
    s = tl.arange(0, 2 * SP if FINE else SP) % SP
    chosen = (s[:, None] & ((-1 << P) | bit)[None, :]) == wanted[None, :]
    return operand(tl.where(chosen, 1.0, 0.0), PRECISION)


@triton.jit
def projection_gradients(
    dphi_phi, y, beta, choice, C: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, FINE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From dphi * phi [C, SP]: the gradient of the projections, and of beta by token and plane, [C, N] twice.

    As :func:`~.device.bucket_gradients`; dphi * phi in one part where not FINE.
    """
    if FINE:
        high = dphi_phi
        if PRECISION != "ieee":
            high = bfloat16_of(dphi_phi)
        both = dot(beside(high, operand(dphi_phi - high.to(tl.float32), PRECISION), C, SP), choice, PRECISION)
    else:
        both = dot(operand(dphi_phi, PRECISION), choice, PRECISION)
    of_up, of_down = tl.split(tl.permute(tl.reshape(both, [C, 2, N]), (0, 2, 1)))
    return side_gradients(of_up, of_down, y, beta, PRECISION)


@triton.jit
def token_gradient(grad_y, hashes, C: tl.constexpr, N: tl.constexpr, FINE: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of the tokens [C, DP], from that of their projections."""
    return unhashed(grad_y, hashes, C, N, PRECISION) if FINE else dot(operand(grad_y, PRECISION), hashes, PRECISION)


@triton.jit
def fades_at(fades, t, here, C: tl.constexpr, OTHER: tl.constexpr):
    """``fades`` of a block's tokens in powers of two."""
    return tl.load(fades + t + tl.arange(0, C), mask=here, other=OTHER) * LOG2_E


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] != "k"])
def query_gradient_kernel(
    query_hashes, query_features, key_features, value, grad_out, key_mask, log_decay, planes, beta, table,
    before, before_parts, inner, marks, fades, mass_parts, deltas, grad_query, grad_hashes, beta_parts,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, YW: tl.constexpr,
    C: tl.constexpr, CH: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, JOINED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
    NEED_PLANES: tl.constexpr, SPLIT: tl.constexpr, ASK: tl.constexpr,
):  # fmt: skip
    """grad_query, and what each block's queries give to the gradient of the mass before it (programs: blocks * H).

    With den_i the denominator and delta_i = grad_out_i . out_i, the weight of query i and key j has the gradient
    (grad_out_i . v_j - delta_i) / den_i. delta, [B, H, T], is added up here from the weights as rounded, so that of a
    query's weights' gradients nothing is left over, and left for :func:`key_gradient_kernel`; out itself is rounded,
    which the gradient of log_decay, a sum over many tokens, does not forgive.

    That gradient sums up weights times their gradients, of keys before a token and queries from it on. In float32 what
    each query has of keys before itself is left behind delta, [B, H, 2, T], and the keys' pass adds up that of queries
    behind the key. Together with a token's own weight either would be the other's negative or 0, but where a token sees
    hardly more than itself, grad_out . v - delta of its own is all rounding: 6e-5 of the gradient at -6 a token.
    """
    S: tl.constexpr = L << P
    TALL: tl.constexpr = SP >= 64
    H = G * SHARE
    block = tl.program_id(0) // H.to(tl.int32)
    head = tl.program_id(0) - block * H
    group = head // SHARE
    run, batch, row, start, count, first = block_in_run(block, table, T, RUN, NC, C, CH > 0, PACKED)
    if first >= count:
        return
    key_features += ((batch * G + group) * T + start) * SW
    value += whole_rows(batch * vb + group * vh + start * vt, ALIGNED)
    grad_out += whole_rows(batch * ob + head * oh + start * ot, ALIGNED)
    key_mask += batch * mb + group * mh + start * mt
    log_decay += batch * gb + group * gh + start * gt
    fades += (batch * G + group) * T + start
    TERMS: tl.constexpr = 2 if HAS_DECAY and PRECISION == "ieee" else 1
    deltas += (batch * H + head) * TERMS * T + start
    query_features += ((batch * H + head) * T + start) * SW
    query_hashes += ((batch * H + head) * T + start) * YW
    grad_hashes += ((batch * H + head) * T + start) * YW
    grad_query += ((batch * T + start) * H + head) * D
    if JOINED:
        table += start
    place = place_of(run, batch, row, start + (first // CH * CH if CH > 0 else 0), T, CH, PACKED)
    if CH > 0:
        ask_for(query_hashes + first * YW, tl.minimum(count - first, C) * (YW * 2), ASK)
        if SPLIT:
            ask_for(inner + (place * G + group) * (V * SW), V * SW * 2, ASK)
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    s = tl.arange(0, SP)
    past = c[:, None] >= c[None, :]

    state = before + (run.to(tl.int64) * G + group) * (S * (V + 1))
    kept = tl.full([], 1.0, tl.float32)
    mass = load_mass(state, S, SP, V)
    if SPLIT:
        sums = tl.zeros([VP, SP], tl.float32)
    else:
        sums = load_sums(state, 0, S, SP, V, VP, TALL)
    if CH > 0:
        marks += (place * G + group) * (SW + 8 + VP)
        of_chunk = tl.load(marks + s, mask=s < SW, other=0.0)
        mean = tl.load(marks + (SW + 8) + tl.arange(0, VP))
        inner += (place * G + group) * (V * SW)
        if HAS_DECAY or JOINED:
            kept = tl.exp(tl.load(marks + SW))
            mass *= kept
        if not SPLIT:
            if HAS_DECAY or JOINED:
                sums *= kept
            sums += load_inner(inner, V, VP, SP, SW, TALL)
            sums += of_chunk[:, None] * mean[None, :] if TALL else mean[:, None] * of_chunk[None, :]
        mass += of_chunk
    if CH > C:  # the blocks between the chunk's first token and this one
        faded = tl.full([], 0.0, tl.float32)
        if HAS_DECAY:
            if first % CH > 0:
                faded = tl.load(fades + first - 1) * LOG2_E
                mass *= tl.exp2(faded)
                if not SPLIT:
                    sums *= tl.exp2(faded)
        if JOINED:
            ours = begin_of(table, tl.maximum(first - 1, 0))  # of the state before this block
            from_before = (ours < first // CH * CH) | (first % CH == 0)
            mass = tl.where(from_before, mass, 0.0)
            sums = tl.where(from_before, sums, 0.0)
        for t in range(first // CH * CH, first, C):
            here = c < count - t
            inside = keys_inside(key_mask, mt, t, count, C, HAS_MASK)
            phi_left = features_at(key_features, t, here, C, SP, SW)
            if JOINED:
                phi_left = tl.where((t + c >= ours)[:, None], phi_left, 0.0)
            v = rows_at(value, vt, t, inside, C, V, VP, ALIGNED)
            if HAS_DECAY:
                left = tl.exp2(faded - fades_at(fades, t, here, C, 0.0))
                phi_left = operand(phi_left.to(tl.float32) * left[:, None], PRECISION)
            sums = taken_up_fully(sums, v, phi_left, HAS_DECAY, False if SPLIT else TALL, PRECISION)
            mass += tl.sum(phi_left.to(tl.float32), 0)

    FINE: tl.constexpr = N < 16 or PRECISION == "ieee" or value.dtype.element_ty != tl.bfloat16
    hashes = load_unhash(planes, group, L, P, D, DP, N, FINE, PRECISION)
    choice = load_choice(P, N, SP, FINE, PRECISION)
    beta_sum = tl.zeros([C, N], tl.float32)
    grad_mass = tl.zeros([SP], tl.float32)
    kept_so_far = tl.full([], 1.0, tl.float32)
    blocks = 1 if CH > 0 else (count + (C - 1)) // C
    for i in range(blocks):
        t = first + i * C
        here = c < count - t
        inside = keys_inside(key_mask, mt, t, count, C, HAS_MASK)
        phi_k = features_at(key_features, t, here, C, SP, SW)
        seen = features_at(query_features, t, here, C, SP, SW)
        v = rows_at(value, vt, t, inside, C, V, VP, ALIGNED)
        do = rows_at(grad_out, ot, t, here, C, V, VP, ALIGNED)
        along = as_given_dot(do, tl.trans(v), PRECISION)  # grad_out_i . v_j
        score = dot(seen, tl.trans(phi_k), PRECISION)
        visible = past
        if JOINED:
            begins, begin = begins_of(table, t, count, C)
            sees = (begins < 0)[:, None]
            visible = past & (c[None, :] >= begins[:, None])
        if SPLIT:
            parts = before_parts + (run.to(tl.int64) * G + group) * (2 * V * SW)
            grad_phi = by_parts(do, parts, inner, kept, V, VP, SP, SW, C, HAS_DECAY or JOINED)
            of_mean = tl.sum(do.to(tl.float32) * mean[None, :], 1)
            grad_phi += of_mean[:, None] * of_chunk[None, :]
            if CH > C:
                if first % CH > 0:
                    if HAS_DECAY:
                        grad_phi *= tl.exp2(faded)
                    if JOINED:
                        grad_phi = tl.where(from_before, grad_phi, 0.0)
                    grad_phi = tl.dot(do, bfloat16_of(sums), grad_phi)
                    if HAS_DECAY:  # the keys' kernel has its own share of the pair, and what is left over adds up
                        grad_phi = tl.dot(do, bfloat16_of(sums - bfloat16_of(sums).to(tl.float32)), grad_phi)
        else:
            grad_phi = sums_dot(do, sums, C, VP, SP, TALL, PRECISION)
        seen_now = seen.to(tl.float32)
        if JOINED:
            grad_phi = tl.where(sees, grad_phi, 0.0)
            seen_now = tl.where(sees, seen_now, 0.0)
            if not HAS_DECAY:
                seen_now *= kept_so_far
        if HAS_DECAY:
            if CH > 0:
                now = fades_at(fades, t, here, C, NEVER)
                age = now[:, None] - fades_at(fades, t, here, C, 0.0)[None, :]
                weight = tl.exp2(tl.where(visible, age, -1000.0))
                since = tl.exp2(now - faded if CH > C else now)
            else:
                whole, part, since, left, kept, total = block_decay(log_decay, gt, t, count, C, PRECISION)
                weight = fading(whole, part, visible, False, PRECISION)
            score *= weight
            grad_phi *= since[:, None]
            seen_now = operand(seen_now * (since * kept_so_far)[:, None], PRECISION).to(tl.float32)
        else:
            score = tl.where(visible, score, 0.0)
        weights = seen.to(tl.float32) * mass[None, :]
        if HAS_DECAY:
            weights *= since[:, None]
        if JOINED:
            weights = tl.where(sees, weights, 0.0)
        if SP == C:  # one sum of each in place of two
            delta = tl.sum(seen.to(tl.float32) * grad_phi + score * along, 1)
            total_weight = tl.sum(weights + score, 1)
        else:
            delta = tl.sum(seen.to(tl.float32) * grad_phi, 1) + tl.sum(score * along, 1)
            total_weight = tl.sum(weights, 1) + tl.sum(score, 1)
        delta *= reciprocal(total_weight)  # 1 but for roundings
        tl.store(deltas + t + c, delta, mask=here)
        grad_mass -= tl.sum(seen_now * delta[:, None], 0)
        mass_seen = delta[:, None] * mass[None, :]
        if JOINED:
            mass_seen = tl.where(sees, mass_seen, 0.0)
        along -= delta[:, None]
        if TERMS == 2:
            of_query = tl.sum(seen.to(tl.float32) * (grad_phi - mass_seen * since[:, None]), 1)
            of_query += tl.sum(tl.where(c[:, None] > c[None, :], score * along, 0.0), 1)
            tl.store(deltas + T + t + c, of_query, mask=here)
        if HAS_DECAY:
            along *= weight
            mass_seen *= since[:, None]
        else:
            along = tl.where(visible, along, 0.0)
        grad_phi = add_fine_dot(grad_phi - mass_seen, along, phi_k, v.dtype == tl.float16, PRECISION)
        if CH == 0:
            if HAS_DECAY:
                phi_k = operand(phi_k.to(tl.float32) * left[:, None], PRECISION)
                sums *= kept
                mass *= kept
                kept_so_far *= kept
            if JOINED:
                phi_k = tl.where((c >= begin)[:, None], phi_k, 0.0)
                sums = tl.where(begin < 0, sums, 0.0)
                mass = tl.where(begin < 0, mass, 0.0)
                kept_so_far = tl.where(begin < 0, kept_so_far, 0.0)
            sums = taken_up(sums, operand(v, PRECISION), phi_k, TALL, PRECISION)
            mass += tl.sum(phi_k.to(tl.float32), 0)

        y = load_projections(query_hashes, t, here, C, N, YW)
        dphi_phi = grad_phi * seen.to(tl.float32)
        grad_y, grad_beta = projection_gradients(dphi_phi, y, b, choice, C, N, SP, FINE, PRECISION)
        beta_sum += grad_beta
        if NEED_PLANES:
            store_hashes(grad_hashes, t, here, grad_y, C, N, YW)
        store_rows(grad_query, H * D, t, here, token_gradient(grad_y, hashes, C, N, FINE, PRECISION), C, D, DP)

    program = block_at(place, first, C, CH) * H + head
    tl.store(mass_parts + program * SW + s, grad_mass, mask=s < SW)
    tl.store(beta_parts + program, tl.sum(tl.reshape(beta_sum, [C * N]), 0))


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] != "q"])
def key_gradient_kernel(
    query_features, key_features, key_hashes, value, grad_out, key_mask, log_decay, planes, beta, table,
    after, after_parts, inner_after, mass_after, fades_after, fades, deltas, grad_key, grad_value, of_keys, grad_hashes,
    beta_parts,
    vb: tl.int64, vt: tl.int64, vh: tl.int64,
    ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, YW: tl.constexpr,
    C: tl.constexpr, CH: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, JOINED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
    NEED_PLANES: tl.constexpr, SPLIT: tl.constexpr, ASK: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value, and phi_k . grad phi_k of each key (programs: blocks * G).

    ``after`` is the gradient of the state after each run; that after a block takes up the queries between as a state
    takes up keys.
    """
    S: tl.constexpr = L << P
    TALL: tl.constexpr = SP >= 128  # never: fewer registers here
    H = G * SHARE
    block = tl.program_id(0) // G.to(tl.int32)
    group = tl.program_id(0) - block * G
    run, batch, row, start, count, first = block_in_run(block, table, T, RUN, NC, C, CH > 0, PACKED)
    if CH > C:
        if (first >= count) & (first // CH * CH < count):  # the rest of a row's last chunk
            rest = block_at(place_of(run, batch, row, start + first // CH * CH, T, CH, PACKED), first, C, CH)
            tl.store(beta_parts + rest * G + group, 0.0)
    if first >= count:
        return
    query_features += ((batch * H + group * SHARE) * T + start) * SW
    value += whole_rows(batch * vb + group * vh + start * vt, ALIGNED)
    grad_out += whole_rows(batch * ob + group * SHARE * oh + start * ot, ALIGNED)
    key_mask += batch * mb + group * mh + start * mt
    log_decay += batch * gb + group * gh + start * gt
    fades += (batch * G + group) * T + start
    TERMS: tl.constexpr = 2 if HAS_DECAY and PRECISION == "ieee" else 1
    deltas += (batch * H + group * SHARE) * TERMS * T + start
    key_features += ((batch * G + group) * T + start) * SW
    key_hashes += ((batch * G + group) * T + start) * YW
    grad_hashes += ((batch * G + group) * T + start) * YW
    grad_key += ((batch * T + start) * G + group) * D
    grad_value += ((batch * T + start) * G + group) * V
    of_keys += (batch * T + start) * G + group
    if JOINED:
        table += start
    place = place_of(run, batch, row, start + (first // CH * CH if CH > 0 else 0), T, CH, PACKED)
    program = block_at(place, first, C, CH)
    if CH > 0:
        ask_for(key_hashes + first * YW, tl.minimum(count - first, C) * (YW * 2), ASK)
        if SPLIT:
            ask_for(inner_after + (place * H + group * SHARE) * (V * SW), SHARE * (V * SW * 2), ASK)
    b = tl.load(beta + group)
    c = tl.arange(0, C)
    s = tl.arange(0, SP)
    past = c[:, None] <= c[None, :]  # keys down, queries across

    adjoint = after + (run.to(tl.int64) * G + group) * (S * (V + 1))
    grad_mass = load_mass(adjoint, S, SP, V)
    if SPLIT:
        grads = tl.zeros([VP, SP], tl.float32)
    else:
        grads = load_sums(adjoint, 0, S, SP, V, VP, TALL)
    if CH > 0:
        stop = tl.minimum(first // CH * CH + CH, count)  # of the chunk
        ours = tl.minimum(first + C, stop)
        if HAS_DECAY:
            kept = tl.exp(tl.load(fades_after + program * H + group * SHARE))
            grad_mass *= kept
            faded = tl.load(fades + ours - 1) * LOG2_E
            chunk_kept = tl.exp2(tl.load(fades + stop - 1) * LOG2_E - faded)
            if SPLIT:
                ends = block_at(place, (stop - 1) // C * C, C, CH)  # the chunk's last block
                run_kept = tl.exp(tl.load(fades_after + ends * H + group * SHARE))
            else:
                grads *= kept
        if JOINED:  # the state after the run, or the chunk, is of its last token's sequence
            from_run = begin_of(table, count - 1)
            from_chunk = begin_of(table, stop - 1) < ours
            grad_mass = tl.where(from_run < ours, grad_mass, 0.0)
            grads = tl.where(from_run < ours, grads, 0.0)
        for share in range(SHARE):
            head = group * SHARE + share
            grad_mass += tl.load(mass_after + (program * H + head) * SW + s, mask=s < SW, other=0.0)
            if not SPLIT:
                of_chunk = load_inner(inner_after + (place * H + head) * (V * SW), V, VP, SP, SW, TALL)
                if HAS_DECAY:
                    of_chunk *= chunk_kept
                if JOINED:
                    of_chunk = tl.where(from_chunk, of_chunk, 0.0)
                grads += of_chunk
            if CH > C:  # the blocks between this one and the chunk's end
                for t in range(first + C, stop, C):
                    here = c < count - t
                    seen = features_at(query_features + share * T * SW, t, here, C, SP, SW)
                    rows = grad_out + whole_rows(share * oh, ALIGNED)
                    do = rows_at(rows, ot, t, here, C, V, VP, ALIGNED)
                    if JOINED:
                        begins, begin = begins_of(table, t, count, C)
                        seen = tl.where((t + begins < ours)[:, None], seen, 0.0)
                    if HAS_DECAY:
                        since = tl.exp2(fades_at(fades, t, here, C, NEVER) - faded)
                        seen = operand(seen.to(tl.float32) * since[:, None], PRECISION)
                    grads = taken_up_fully(grads, do, seen, HAS_DECAY, TALL, PRECISION)

    FINE: tl.constexpr = N < 16 or PRECISION == "ieee" or value.dtype.element_ty != tl.bfloat16
    hashes = load_unhash(planes, group, L, P, D, DP, N, FINE, PRECISION)
    choice = load_choice(P, N, SP, FINE, PRECISION)
    beta_sum = tl.zeros([C, N], tl.float32)
    blocks = 1 if CH > 0 else (count + (C - 1)) // C
    for i in range(blocks):
        t = first + (blocks - 1 - i) * C
        here = c < count - t
        inside = keys_inside(key_mask, mt, t, count, C, HAS_MASK)
        phi_k = features_at(key_features, t, here, C, SP, SW)
        v = rows_at(value, vt, t, inside, C, V, VP, ALIGNED)
        do = rows_at(grad_out, ot, t, here, C, V, VP, ALIGNED)
        seen = features_at(query_features, t, here, C, SP, SW)
        delta = tl.load(deltas + t + c, mask=here, other=0.0)
        phi_left = phi_k
        visible = past
        if JOINED:
            begins, begin = begins_of(table, t, count, C)
            follows = (c >= begin)[:, None]
            visible = past & (c[:, None] >= begins[None, :])
            phi_left = tl.where(follows, phi_k, 0.0)
        if HAS_DECAY:
            if CH > 0:
                now = fades_at(fades, t, here, C, 0.0)
                age = fades_at(fades, t, here, C, NEVER)[None, :] - now[:, None]
                weight = tl.exp2(tl.where(visible, age, -1000.0))
                left = tl.exp2(tl.minimum(faded - now, 0.0))
            else:
                whole, part, since, left, kept, total = block_decay(log_decay, gt, t, count, C, PRECISION)
                weight = fading(whole, part, visible, True, PRECISION)
            phi_left = operand(phi_left.to(tl.float32) * left[:, None], PRECISION)

        # The gradient of phi_k, to the end: dk is stored before dv needs the registers.
        if SPLIT:
            high = load_given(after_parts + (run.to(tl.int64) * G + group) * (2 * V * SW), V, VP, SP, SW)
            low = load_given(after_parts + (run.to(tl.int64) * G + group) * (2 * V * SW) + V * SW, V, VP, SP, SW)
            near = bfloat16_of(grads)
            grad_phi = tl.dot(v, low, tl.dot(v, high))
            if HAS_DECAY:
                grad_phi *= run_kept
            if JOINED:
                grad_phi = tl.where(from_run < stop, grad_phi, 0.0)
            for share in tl.static_range(SHARE):
                of_chunk = load_given(inner_after + (place * H + group * SHARE + share) * (V * SW), V, VP, SP, SW)
                grad_phi = tl.dot(v, of_chunk, grad_phi)
            if CH > C:
                if first + C < stop:
                    if HAS_DECAY:
                        grad_phi *= chunk_kept
                    if JOINED:
                        grad_phi = tl.where(from_chunk, grad_phi, 0.0)
                    grad_phi = tl.dot(v, near, grad_phi)
                    if HAS_DECAY:
                        grad_phi = tl.dot(v, bfloat16_of(grads - near.to(tl.float32)), grad_phi)
            grad_phi += grad_mass[None, :]
        else:
            grad_phi = sums_dot(v, grads, C, VP, SP, TALL, PRECISION) + grad_mass[None, :]
        if JOINED:
            grad_phi = tl.where(follows, grad_phi, 0.0)
        if HAS_DECAY:
            of_key = tl.sum(grad_phi * phi_left.to(tl.float32), 1)  # phi_k . grad phi_k, of the weights as rounded
            grad_phi *= left[:, None]
        along = as_given_dot(v, tl.trans(do), PRECISION) - delta[None, :]
        if HAS_DECAY:
            along *= weight
            later = tl.where(c[:, None] < c[None, :], along, 0.0) if TERMS == 2 else along
            of_key += tl.sum(later * dot(phi_k, tl.trans(seen), PRECISION), 1)
            if TERMS == 2:
                of_key -= tl.load(deltas + T + t + c, mask=here, other=0.0)
        else:
            along = tl.where(visible, along, 0.0)
        grad_phi = add_fine_dot(grad_phi, along, seen, v.dtype == tl.float16, PRECISION)
        for share in range(1, SHARE):
            rows = grad_out + whole_rows(share * oh, ALIGNED)
            other = rows_at(rows, ot, t, here, C, V, VP, ALIGNED)
            other_seen = features_at(query_features + share * T * SW, t, here, C, SP, SW)
            other_delta = tl.load(deltas + share * TERMS * T + t + c, mask=here, other=0.0)
            along = tl.where(visible, as_given_dot(v, tl.trans(other), PRECISION) - other_delta[None, :], 0.0)
            if HAS_DECAY:
                along *= weight
                later = tl.where(c[:, None] < c[None, :], along, 0.0) if TERMS == 2 else along
                of_key += tl.sum(later * dot(phi_k, tl.trans(other_seen), PRECISION), 1)
            if TERMS == 2:
                of_key -= tl.load(deltas + (share * TERMS + 1) * T + t + c, mask=here, other=0.0)
            grad_phi = add_fine_dot(grad_phi, along, other_seen, v.dtype == tl.float16, PRECISION)
        if HAS_DECAY:
            tl.store(of_keys + (t + c) * G, of_key, mask=here)
        y = load_projections(key_hashes, t, here, C, N, YW)
        grad_y, grad_beta = projection_gradients(
            grad_phi * phi_k.to(tl.float32), y, b, choice, C, N, SP, FINE, PRECISION
        )
        beta_sum += grad_beta
        if NEED_PLANES:
            store_hashes(grad_hashes, t, here, grad_y, C, N, YW)
        store_rows(grad_key, G * D, t, here, token_gradient(grad_y, hashes, C, N, FINE, PRECISION), C, D, DP)

        score = dot(phi_k, tl.trans(seen), PRECISION)
        score = score * weight if HAS_DECAY else tl.where(visible, score, 0.0)
        if SPLIT:
            dv = tl.dot(phi_left, tl.trans(high))
            if HAS_DECAY:
                dv *= run_kept
            if JOINED:
                dv = tl.where(from_run < stop, dv, 0.0)
            for share in tl.static_range(SHARE):
                of_chunk = load_given(inner_after + (place * H + group * SHARE + share) * (V * SW), V, VP, SP, SW)
                dv = tl.dot(phi_left, tl.trans(of_chunk), dv)
            if CH > C:
                if first + C < stop:
                    if HAS_DECAY:
                        dv *= chunk_kept
                    if JOINED:
                        dv = tl.where(from_chunk, dv, 0.0)
                    dv = tl.dot(phi_left, tl.trans(near), dv)
        else:
            dv = dot(phi_left, by_bucket(operand(grads, PRECISION), TALL), PRECISION)
        dv = add_dot(dv, operand(score, PRECISION), operand(do, PRECISION), PRECISION)
        for share in range(1, SHARE):
            rows = grad_out + whole_rows(share * oh, ALIGNED)
            other = rows_at(rows, ot, t, here, C, V, VP, ALIGNED)
            other_seen = features_at(query_features + share * T * SW, t, here, C, SP, SW)
            score = tl.where(visible, dot(phi_k, tl.trans(other_seen), PRECISION), 0.0)
            if HAS_DECAY:
                score *= weight
            dv = add_dot(dv, operand(score, PRECISION), operand(other, PRECISION), PRECISION)
        store_rows(grad_value, G * V, t, here, dv, C, V, VP)

        if CH == 0:
            if HAS_DECAY:
                grads *= kept
                grad_mass *= kept
            if JOINED:
                grads = tl.where(begin < 0, grads, 0.0)
                grad_mass = tl.where(begin < 0, grad_mass, 0.0)
            for share in range(SHARE):
                rows = grad_out + whole_rows(share * oh, ALIGNED)
                other = rows_at(rows, ot, t, here, C, V, VP, ALIGNED)
                other_seen = features_at(query_features + share * T * SW, t, here, C, SP, SW)
                other_delta = tl.load(deltas + share * TERMS * T + t + c, mask=here, other=0.0)
                if JOINED:
                    other_seen = tl.where((begins < 0)[:, None], other_seen, 0.0)
                if HAS_DECAY:
                    other_seen = operand(other_seen.to(tl.float32) * since[:, None], PRECISION)
                grads = taken_up(grads, operand(other, PRECISION), other_seen, TALL, PRECISION)
                grad_mass -= tl.sum(other_seen.to(tl.float32) * other_delta[:, None], 0)

    tl.store(beta_parts + program * G + group, tl.sum(tl.reshape(beta_sum, [C * N]), 0))
