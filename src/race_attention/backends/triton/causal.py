"""The causal readout for heads whose buckets fit one tile, and the pass that leaves the states of runs.

Each program owns a run of tokens and goes through it in blocks of C: scores inside the block, masked, and the state
for all tokens before it, which then takes the block up. Shape letters are those of
:mod:`race_attention.backends.triton.narrow`.

A key's buckets are computed where it is first read and kept for the kernels that follow, S numbers in place of D.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    FORGOTTEN,
    add_dot,
    anew,
    bfloat16_of,
    dot,
    keys_inside,
    operand,
    reciprocal,
    run_bounds,
    whole_rows,
)
from .narrow import (
    begins_of,
    block_decay,
    buckets_of,
    by_bucket,
    chunk_at,
    corners_of,
    decay_so_far,
    fading,
    hashed,
    load_hash,
    load_mass,
    load_sums,
    row_block,
    rows_from,
    running_decay,
    store_block,
    store_chunk,
    store_mass,
    store_sums,
    taken_up,
    taken_up_fully,
)
from .projections import store_projections

NEVER_SPECIALIZED = ["T", "RUN", "NC", "G", "qb", "qt", "qh", "kb", "kt", "kh", "vb", "vt", "vh", "ob", "ot", "oh"]
NEVER_SPECIALIZED += ["mb", "mt", "mh", "gb", "gt", "gh"]


@triton.jit
def mass_of(mass, TILED: tl.constexpr, PRODUCTS: tl.constexpr):
    """[SP] of the forms in which the kernels add it up."""
    if TILED:
        return tl.sum(mass, 0)
    elif PRODUCTS:
        return tl.sum(tl.where(tl.arange(0, 8)[None, :] == 0, mass, 0.0), 1)
    else:
        return mass


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] not in "qo"])
def key_states_kernel(
    key, value, key_mask, log_decay, planes, beta, table, states, totals, key_features, key_hashes, inner, marks, fades,
    kb: tl.int64, kt: tl.int64, kh: tl.int64, vb: tl.int64, vt: tl.int64, vh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, YW: tl.constexpr,
    C: tl.constexpr, CH: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    DESCRIBED: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr, JOINED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """The state that each run of keys alone leaves (programs: runs * G), and its total log decay.

    Leaves for the kernels that follow phi_k, [B, G, T, SW], zero where a key takes no part, and where there are chunks
    and decay ``fades``; with KEEP, for the backward pass, the keys' projections [B, G, T, YW], and of each chunk the
    sums before it and its log decay since the run's start (see plan.py).
    """
    S: tl.constexpr = L << P
    TILED: tl.constexpr = SP <= 32  # a sum over the tokens of a block at the end alone
    PRODUCTS: tl.constexpr = PRECISION == "bf16"  # or by a product, once in eight columns
    width = tl.full([], SW, tl.int64)
    run = tl.program_id(0) // G
    group = tl.program_id(0) - run * G
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    count = (end - start).to(tl.int32)
    key += whole_rows(batch * kb + group * kh + start * kt, ALIGNED)
    value += whole_rows(batch * vb + group * vh + start * vt, ALIGNED)
    key_mask += batch * mb + group * mh + start * mt
    log_decay += batch * gb + group * gh + start * gt
    key_features += ((batch * G + group) * T + start) * SW
    keys = rows_from(key, kt, count, C, D, DP, ALIGNED, DESCRIBED)
    values = rows_from(value, vt, count, C, V, VP, ALIGNED, DESCRIBED)
    features = rows_from(key_features, width, count, C, SW, SP, ALIGNED, DESCRIBED)
    key_hashes += ((batch * G + group) * T + start) * YW
    if CH > 0:
        place = chunk_at(batch, row, start, T, CH, PACKED) * G + group
        so_far = tl.zeros([], tl.float32)
        if HAS_DECAY:
            fades += (batch * G + group) * T + start
            in_chunk = tl.zeros([], tl.float32)
    if JOINED:
        table += start
    b = tl.load(beta + group)
    hashes = load_hash(planes, group, 0, L, P, D, DP, N, PRECISION)
    corners = corners_of(0, 0, SP, P, N, PRECISION)

    sums = tl.zeros([VP, SP], tl.float32)
    if TILED:
        mass = tl.zeros([C, SP], tl.float32)
    elif PRODUCTS:
        mass = tl.zeros([SP, 8], tl.float32)
        ones = operand(tl.full([C, 8], 1.0, tl.float32), PRECISION)
    else:
        mass = tl.zeros([SP], tl.float32)
    total = tl.zeros([], tl.float64)
    for t in range(0, count, C):
        if CH > 0 and (KEEP or HAS_DECAY):
            if t % CH == 0:
                if KEEP:
                    mass_now = mass_of(mass, TILED, PRODUCTS)
                    if HAS_DECAY or HAS_MASK or JOINED:
                        weight = tl.sum(mass_now, 0)
                    else:
                        weight = t * (L * 2.0 ** (LIFT * P))  # the buckets of a table are one, lifted
                    store_chunk(inner, marks, place, sums, mass_now, weight, so_far, S, SP, SW, V, VP, PRECISION)
                    place += G
                if HAS_DECAY:
                    in_chunk = tl.zeros([], tl.float32)
        inside = keys_inside(key_mask, mt, t, count, C, HAS_MASK)
        k = row_block(keys, kt, t, 0, inside, C, D, DP, ALIGNED, DESCRIBED)
        v = row_block(values, vt, t, 0, inside, C, V, VP, ALIGNED, DESCRIBED)
        y = hashed(k, hashes, C, N, PRECISION)
        if KEEP:
            store_projections(key_hashes, t, tl.arange(0, C) < count - t, y, C, N, YW)
        phi = buckets_of(y, b, corners, C, N, S, SP, LIFT, PRECISION)
        phi = tl.where(inside[:, None], phi, 0.0)
        here = tl.arange(0, C) < count - t
        store_block(features, width, t, 0, here, operand(phi, PRECISION), C, SW, SP, DESCRIBED)
        if HAS_DECAY:
            if CH > 0:
                fade, left, log_kept = running_decay(log_decay, gt, t, count, C)
                tl.store(fades + t + tl.arange(0, C), in_chunk + fade, mask=tl.arange(0, C) < count - t)
                kept = tl.exp(log_kept)
                in_chunk += log_kept
                so_far += log_kept
            else:
                whole, part, since, left, kept, log_kept = block_decay(log_decay, gt, t, count, C, PRECISION)
            phi *= left[:, None]
            sums *= kept
            mass *= kept
            total += log_kept.to(tl.float64)
        if JOINED:
            begins, begin = begins_of(table, t, count, C)
            phi = tl.where((tl.arange(0, C) >= begin)[:, None], phi, 0.0)
            goes_on = begin < 0
            sums = tl.where(goes_on, sums, 0.0)
            mass = tl.where(goes_on, mass, 0.0)
            total = tl.where(goes_on, total, FORGOTTEN)
            if CH > 0:
                so_far = tl.where(goes_on, so_far, FORGOTTEN)
        phi = operand(phi, PRECISION)
        sums = taken_up_fully(sums, v, phi, HAS_DECAY, False, PRECISION)
        # Of the rounded weights: mass and sums stay consistent.
        if TILED:
            mass += phi.to(tl.float32)
        elif PRODUCTS:
            mass = add_dot(mass, tl.trans(phi), ones, PRECISION)
        else:
            mass += tl.sum(phi, 0)
    state = states + (run.to(tl.int64) * G + group) * (S * (V + 1))
    store_sums(state, sums, S, SP, V, VP, False)
    store_mass(state, mass_of(mass, TILED, PRODUCTS), S, SP, V)
    if HAS_DECAY or JOINED:
        tl.store(totals + run.to(tl.int64) * G + group, total)


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] not in "ko"])
def readout_kernel(
    query, key_features, value, key_mask, log_decay, fades, planes, beta, table, before, out,
    query_features, query_hashes,
    qb: tl.int64, qt: tl.int64, qh: tl.int64, vb: tl.int64, vt: tl.int64, vh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, gb: tl.int64, gt: tl.int64, gh: tl.int64,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, YW: tl.constexpr,
    C: tl.constexpr, CH: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    DESCRIBED: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr, JOINED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """out of a run of queries (programs: runs * H), contiguous [B, T, H, V].

    With KEEP, for the backward pass, phi_q over its denominator, [B, H, T, SW], and the queries' projections,
    [B, H, T, YW].
    """
    S: tl.constexpr = L << P
    TALL: tl.constexpr = SP >= 64
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    count = (end - start).to(tl.int32)
    if PACKED:
        if count == 0:  # a spare run: no state is before it
            return
    query += whole_rows(batch * qb + head * qh + start * qt, ALIGNED)
    key_features += ((batch * G + group) * T + start) * SW
    value += whole_rows(batch * vb + group * vh + start * vt, ALIGNED)
    key_mask += batch * mb + group * mh + start * mt
    log_decay += batch * gb + group * gh + start * gt
    if JOINED:
        table += start
    if HAS_DECAY and CH > 0:
        fades += (batch * G + group) * T + start
    out += ((batch * T + start) * H + head) * V
    query_features += ((batch * H + head) * T + start) * SW
    query_hashes += ((batch * H + head) * T + start) * YW
    b = tl.load(beta + group)
    hashes = load_hash(planes, group, 0, L, P, D, DP, N, PRECISION)
    corners = corners_of(0, 0, SP, P, N, PRECISION)
    state = before + (run.to(tl.int64) * G + group) * (S * (V + 1))
    VH: tl.constexpr = VP // 2 if TALL else VP  # in halves of Dv where the sums fill the registers
    width = tl.full([], SW, tl.int64)
    queries = rows_from(query, qt, count, C, D, DP, ALIGNED, DESCRIBED)
    features = rows_from(key_features, width, count, C, SW, SP, ALIGNED, DESCRIBED)
    values = rows_from(value, vt, count, C, V, VH, ALIGNED, DESCRIBED)
    outs = rows_from(out, H * V, count, C, V, VH, ALIGNED, DESCRIBED)
    kept_features = rows_from(query_features, width, count, C, SW, SP, ALIGNED, DESCRIBED)
    sums = load_sums(state, 0, S, SP, V, VH, TALL)
    if TALL:
        more_sums = load_sums(state, VH, S, SP, V, VH, TALL)
    mass = load_mass(state, S, SP, V)
    # Sums by products with ones cost the threads nothing: over tokens (with the mass once a token where registers
    # allow, once in eight columns where not), and over the keys of a query.
    TILED: tl.constexpr = SP <= 32
    PRODUCTS: tl.constexpr = PRECISION == "bf16"
    c = tl.arange(0, C)
    eight = tl.arange(0, 8)[None, :]
    if TILED:
        mass = tl.broadcast_to(mass[None, :], [C, SP])
        ones = operand(tl.full([C, C], 1.0, tl.float32), PRECISION)
    elif PRODUCTS:
        mass = tl.broadcast_to(mass[:, None], [SP, 8])
        ones = operand(tl.full([C, 8], 1.0, tl.float32), PRECISION)
    first_of_eight = operand(tl.where((c >= 0)[:, None] & (eight == 0), 1.0, 0.0), PRECISION)

    for t in range(0, count, C):
        here = c < count - t
        past = anew(c)[:, None] >= c[None, :]  # comparisons with constants; kept they would be unpacked each time
        if JOINED:
            begins, begin = begins_of(table, t, count, C)
            past = past & (c[None, :] >= begins[:, None])
            goes_on = begin < 0
        inside = keys_inside(key_mask, mt, t, count, C, HAS_MASK)
        q = row_block(queries, qt, t, 0, here, C, D, DP, ALIGNED, DESCRIBED)
        phi_k = row_block(features, width, t, 0, here, C, SW, SP, ALIGNED, DESCRIBED)
        v = operand(row_block(values, vt, t, 0, inside, C, V, VH, ALIGNED, DESCRIBED), PRECISION)
        if TALL:
            more_v = operand(row_block(values, vt, t, VH, inside, C, V, VH, ALIGNED, DESCRIBED), PRECISION)
        y = hashed(q, hashes, C, N, PRECISION)
        if KEEP:
            store_projections(query_hashes, t, here, y, C, N, YW)
        phi = buckets_of(y, b, corners, C, N, S, SP, LIFT, PRECISION)
        phi_q = operand(phi, PRECISION)
        score = dot(phi_q, tl.trans(phi_k), PRECISION)
        if HAS_DECAY:
            if CH > 0:
                fade, since, left, kept = decay_so_far(fades, t, count, C, CH)
                score *= tl.exp2(fade[:, None] - fade[None, :])
            else:
                whole, part, since, left, kept, total = block_decay(log_decay, gt, t, count, C, PRECISION)
                score *= fading(whole, part, past, False, PRECISION)
            phi_q = operand(phi * since[:, None], PRECISION)
        if JOINED:
            phi_q = tl.where((begins < 0)[:, None], phi_q, 0.0)
        score = operand(tl.where(past, score, 0.0), PRECISION)
        if PRODUCTS:
            within = dot(score, first_of_eight, PRECISION)
            if TILED:
                denominator = tl.sum(phi_q.to(tl.float32) * mass, 1) + tl.sum(within, 1)
            else:  # the mass in two parts
                high = bfloat16_of(mass)
                low = bfloat16_of(mass - high.to(tl.float32))
                parts = tl.where(eight == 0, high, tl.where(eight == 1, low, 0.0))
                denominator = tl.sum(add_dot(within, phi_q, parts, PRECISION), 1)
        else:
            denominator = tl.sum(phi_q * (mass if TILED else mass[None, :]), 1) + tl.sum(score, 1)
        inverse = reciprocal(denominator)
        if KEEP:
            seen = operand(phi * inverse[:, None], PRECISION)
            store_block(kept_features, width, t, 0, here, seen, C, SW, SP, DESCRIBED)

        phi_left = phi_k
        if HAS_DECAY:
            phi_left = operand(phi_k.to(tl.float32) * left[:, None], PRECISION)
            mass *= kept
        if JOINED:
            phi_left = tl.where((c >= begin)[:, None], phi_left, 0.0)
            mass = tl.where(goes_on, mass, 0.0)
        if TILED:
            mass = add_dot(mass, ones, phi_left, PRECISION)
        elif PRODUCTS:
            mass = add_dot(mass, tl.trans(phi_left), ones, PRECISION)
        else:
            mass += tl.sum(phi_left, 0)
        o = add_dot(dot(phi_q, by_bucket(operand(sums, PRECISION), TALL), PRECISION), score, v, PRECISION)
        store_block(outs, H * V, t, 0, here, o * inverse[:, None], C, V, VH, DESCRIBED)
        if HAS_DECAY:
            sums *= kept
        if JOINED:
            sums = tl.where(goes_on, sums, 0.0)
        sums = taken_up(sums, v, phi_left, TALL, PRECISION)
        if TALL:
            o = add_dot(dot(phi_q, operand(more_sums, PRECISION), PRECISION), score, more_v, PRECISION)
            store_block(outs, H * V, t, VH, here, o * inverse[:, None], C, V, VH, DESCRIBED)
            if HAS_DECAY:
                more_sums *= kept
            if JOINED:
                more_sums = tl.where(goes_on, more_sums, 0.0)
            more_sums = taken_up(more_sums, more_v, phi_left, TALL, PRECISION)
