"""The causal gradients of queries, keys and values of a block of tokens in one kernel, for heads of many buckets.

Of :mod:`race_attention.backends.triton.causal_gradients` both kernels read the values, grad_out and both sides'
buckets; this one reads them once and compares the tokens of a block once. It serves where blocks are chunks and each
key's head has one of queries. What the queries after a block give to the gradient of its masses must then be known
before the queries' gradient: the adjoint pass adds it up from ``out``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .causal_adjoint import place_of
from .causal_gradients import (
    NEVER,
    by_parts,
    fades_at,
    load_choice,
    load_given,
    load_unhash,
    projection_gradients,
    store_hashes,
    token_gradient,
)
from .device import (
    LOG2_E,
    add_dot,
    as_given_dot,
    ask_for,
    dot,
    keys_inside,
    operand,
    reciprocal,
    store_rows,
    whole_rows,
)
from .narrow import begin_of, begins_of, block_in_run, features_at, load_mass, rows_at
from .projections import load_projections

NEVER_SPECIALIZED = ["T", "RUN", "NC", "G", "vb", "vt", "vh", "ob", "ot", "oh", "mb", "mt", "mh"]


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def block_gradient_kernel(
    query_features, query_hashes, key_features, key_hashes, value, grad_out, key_mask, planes, beta, table,
    before, before_parts, inner, marks, after, after_parts, inner_after, mass_after, fades, fades_after,
    grad_query, grad_key, grad_value, grad_query_hashes, grad_key_hashes, deltas, of_keys, beta_parts,
    vb: tl.int64, vt: tl.int64, vh: tl.int64, ob: tl.int64, ot: tl.int64, oh: tl.int64,
    mb: tl.int64, mt: tl.int64, mh: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, YW: tl.constexpr,
    C: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, JOINED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
    NEED_PLANES: tl.constexpr, ASK: tl.constexpr,
):  # fmt: skip
    """grad_query, grad_key and grad_value of a block, and its part of beta's gradient (programs: blocks * G).

    With decay also ``deltas`` [B, H, T], grad_out . out of the weights as rounded, and ``of_keys`` [B, T, G], phi_k .
    grad phi_k but for what the gradients of masses behind the block add, which finish_kernel does.
    """
    S: tl.constexpr = L << P
    FINE: tl.constexpr = N < 16 or PRECISION == "ieee"
    heads = G.to(tl.int32)
    block = tl.program_id(0) // heads
    head = (tl.program_id(0) - block * heads).to(tl.int64)
    run, batch, row, start, count, first = block_in_run(block, table, T, RUN, NC, C, True, PACKED)
    if first >= count:
        return
    row_of_head = (batch * G + head) * T + start
    query_features += row_of_head * SW
    key_features += row_of_head * SW
    value += whole_rows(batch * vb + head * vh + start * vt, ALIGNED)
    grad_out += whole_rows(batch * ob + head * oh + start * ot, ALIGNED)
    key_mask += batch * mb + head * mh + start * mt
    place = place_of(run, batch, row, start + first, T, C, PACKED) * G + head
    ask_for(inner + place * (V * SW), V * SW * 2, ASK)
    ask_for(inner_after + place * (V * SW), V * SW * 2, ASK)
    ask_for(marks + place * (SW + 8 + VP), (SW + 8 + VP) * 4, ASK)
    ask_for(mass_after + place * SW, SW * 4, ASK)
    state = (run.to(tl.int64) * G + head) * (S * (V + 1))
    parts = (run.to(tl.int64) * G + head) * (2 * V * SW)
    c = tl.arange(0, C)
    s = tl.arange(0, SP)
    here = c < count - first
    inside = keys_inside(key_mask, mt, first, count, C, HAS_MASK)
    past = c[:, None] >= c[None, :]
    kept = 1.0
    if JOINED:  # see narrow.begins_of; the state after the run is of its last token's sequence
        table += start
        begins, begin = begins_of(table, first, count, C)
        past = past & (c[None, :] >= begins[:, None])
        sees = (begins < 0)[:, None]
        left = (c >= begin)[:, None]
        ends = tl.where(begin_of(table, count - 1) < first + C, 1.0, 0.0)
    phi_k = features_at(key_features, first, here, C, SP, SW)
    seen = features_at(query_features, first, here, C, SP, SW)
    v = rows_at(value, vt, first, inside, C, V, VP, ALIGNED)
    do = rows_at(grad_out, ot, first, here, C, V, VP, ALIGNED)
    if HAS_DECAY:
        fades += row_of_head
        now = fades_at(fades, first, here, C, 0.0)  # a chunk is a block: from its start on
        of_block = tl.load(fades + tl.minimum(first + C, count) - 1) * LOG2_E
        left_now = tl.exp2(tl.minimum(of_block - now, 0.0))
        by_row = fades_at(fades, first, here, C, NEVER)
        since = tl.exp2(by_row)
        run_kept = tl.exp(tl.load(fades_after + place))
        weight = tl.exp2(tl.where(past, by_row[:, None] - now[None, :], -1000.0))
    y = load_projections(query_hashes + row_of_head * YW, first, here, C, N, YW)
    key_y = load_projections(key_hashes + row_of_head * YW, first, here, C, N, YW)
    b = tl.load(beta + head)
    choice = load_choice(P, N, SP, FINE, PRECISION)
    hashes = load_unhash(planes, head, L, P, D, DP, N, FINE, PRECISION)

    # Queries: delta = grad_out . out of the weights as rounded, see query_gradient_kernel.
    mass = load_mass(before + state, S, SP, V)
    marks += place * (SW + 8 + VP)
    of_chunk = tl.load(marks + s, mask=s < SW, other=0.0)
    if HAS_DECAY or JOINED:
        kept = tl.exp(tl.load(marks + SW))
        mass *= kept
    mass += of_chunk
    mean = tl.load(marks + (SW + 8) + tl.arange(0, VP))
    of_mean = tl.sum(do.to(tl.float32) * mean[None, :], 1)
    grad_phi = by_parts(
        operand(do, PRECISION), before_parts + parts, inner + place * (V * SW), kept, V, VP, SP, SW, C,
        HAS_DECAY or JOINED,
    )  # fmt: skip
    along = as_given_dot(do, tl.trans(v), PRECISION)  # grad_out_i . v_j
    score = dot(seen, tl.trans(phi_k), PRECISION)
    score = score * weight if HAS_DECAY else tl.where(past, score, 0.0)
    grad_phi += of_mean[:, None] * of_chunk[None, :]
    seen_now = seen.to(tl.float32)
    mass_seen = mass[None, :]
    if JOINED:
        grad_phi = tl.where(sees, grad_phi, 0.0)
        mass_seen = tl.where(sees, mass_seen, 0.0)
    seen_since = seen_now
    if HAS_DECAY:
        seen_since = seen_now * since[:, None]
    if SP == C:  # one sum of each in place of two
        delta = tl.sum(seen_since * grad_phi + score * along, 1)
        total_weight = tl.sum(seen_since * mass_seen + score, 1)
    else:
        delta = tl.sum(seen_since * grad_phi, 1) + tl.sum(score * along, 1)
        total_weight = tl.sum(seen_since * mass_seen, 1) + tl.sum(score, 1)
    delta *= reciprocal(total_weight)  # 1 but for roundings
    weights = operand(score, PRECISION)
    along -= delta[:, None]
    if HAS_DECAY:
        tl.store(deltas + row_of_head + first + c, delta, mask=here)
        of_key = tl.sum(score * along, 0)
        along = operand(along * weight, PRECISION)
    else:
        along = operand(tl.where(past, along, 0.0), PRECISION)
    grad_phi -= delta[:, None] * mass_seen
    if HAS_DECAY:
        grad_phi *= since[:, None]
    grad_phi = add_dot(grad_phi, along, phi_k, PRECISION)
    grad_y, beta_sum = projection_gradients(grad_phi * seen_now, y, b, choice, C, N, SP, FINE, PRECISION)
    if NEED_PLANES:
        store_hashes(grad_query_hashes + row_of_head * YW, first, here, grad_y, C, N, YW)
    to = ((batch * T + start) * G + head) * D
    store_rows(grad_query + to, G * D, first, here, token_gradient(grad_y, hashes, C, N, FINE, PRECISION), C, D, DP)

    # Keys: the gradient of the state after the block.
    grad_mass = load_mass(after + state, S, SP, V)
    phi_left = phi_k
    if JOINED:
        phi_left = tl.where(left, phi_k, 0.0)
    if HAS_DECAY:
        if JOINED:
            run_kept *= ends
        grad_mass *= run_kept
        phi_left = operand(phi_left.to(tl.float32) * left_now[:, None], PRECISION)
    elif JOINED:
        grad_mass *= ends
    grad_mass += tl.load(mass_after + place * SW + s, mask=s < SW, other=0.0)
    high = load_given(after_parts + parts, V, VP, SP, SW)
    low = load_given(after_parts + parts + V * SW, V, VP, SP, SW)
    near = load_given(inner_after + place * (V * SW), V, VP, SP, SW)
    values = operand(v, PRECISION)
    grad_phi = dot(values, low, PRECISION)
    grad_phi = add_dot(grad_phi, values, high, PRECISION)
    if HAS_DECAY:
        grad_phi *= run_kept
    elif JOINED:
        grad_phi *= ends
    grad_phi = add_dot(grad_phi, values, near, PRECISION)
    if not HAS_DECAY:
        grad_phi += grad_mass[None, :]
    if JOINED:
        grad_phi = tl.where(left, grad_phi, 0.0)
    if HAS_DECAY:
        of_key += tl.sum(grad_phi * phi_left.to(tl.float32), 1)
        grad_phi *= left_now[:, None]
    grad_phi = add_dot(grad_phi, tl.trans(along), seen, PRECISION)
    if HAS_DECAY:
        tl.store(of_keys + (batch * T + start + first + c) * G + head, of_key, mask=here)
        grad_mass = grad_mass[None, :] * left_now[:, None]
        if JOINED:
            grad_mass = tl.where(left, grad_mass, 0.0)
        grad_phi += grad_mass
    grad_y, more = projection_gradients(grad_phi * phi_k.to(tl.float32), key_y, b, choice, C, N, SP, FINE, PRECISION)
    beta_sum += more
    if NEED_PLANES:
        store_hashes(grad_key_hashes + row_of_head * YW, first, here, grad_y, C, N, YW)
    store_rows(grad_key + to, G * D, first, here, token_gradient(grad_y, hashes, C, N, FINE, PRECISION), C, D, DP)

    dv = dot(phi_left, tl.trans(high), PRECISION)
    if HAS_DECAY:
        dv *= run_kept
    elif JOINED:
        dv *= ends
    dv = add_dot(dv, phi_left, tl.trans(near), PRECISION)
    dv = add_dot(dv, tl.trans(weights), operand(do, PRECISION), PRECISION)
    to = ((batch * T + start) * G + head) * V
    store_rows(grad_value + to, G * V, first, here, dv, C, V, VP)
    tl.store(beta_parts + place, tl.sum(tl.reshape(beta_sum, [C * N]), 0))
