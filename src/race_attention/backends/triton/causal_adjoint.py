"""The passes of the backward half that add up along a run, for heads whose buckets fit one tile.

:func:`adjoint_kernel` goes through grad_out and the queries' buckets, which the readout kept, and leaves the gradients
of the value sums at the end of each chunk, and from out those of the masses where one kernel takes a block's queries,
keys and values. Elsewhere those need the queries' kernel first, which leaves each block's part, and
:func:`masses_kernel` adds those up. What the keys' kernel leaves by block or token, :func:`finish_kernel` adds up.
:func:`planes_kernel` is for hyperplanes that learn. Layouts are those of :mod:`race_attention.backends.triton.plan`;
besides them, of each block of C tokens

    blocks       place * (CH / C) + the block's number in its chunk; a run where there are no chunks
    mass_parts   [blocks, H, SW] float32  what the block's queries give to the gradient of the mass before it
    mass_after   [blocks, H, SW] float32  the gradient of the mass after the block that the run's queries give
    fades_after  [blocks, H] float32      the log decay from the block's end to the run's
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import add_by_tokens, add_dot, anew, as_given_dot, operand, run_bounds, whole_rows
from .narrow import (
    begin_of,
    begins_of,
    block_decay,
    block_in_run,
    chunk_at,
    features_at,
    load_mass,
    load_sums,
    row_block,
    rows_at,
    rows_from,
    running_decay,
    store_hash_gradient,
    store_mass,
    store_sums,
    taken_up_fully,
)

NEVER_SPECIALIZED = ["T", "RUN", "NC", "G", "xb", "xt", "xh", "ob", "ot", "oh", "gb", "gt", "gh"]


@triton.jit
def block_at(place, t, C: tl.constexpr, CH: tl.constexpr):
    """The number of the block that begins at a run's token t, in the chunk of this place."""
    if CH > 0:
        return place * (CH // C) + t % CH // C
    else:
        return place


@triton.jit
def place_of(run, batch, row, token, T, CH: tl.constexpr, PACKED: tl.constexpr):
    """The place of the chunk of a token; of runs where there are no chunks."""
    if CH > 0:
        return chunk_at(batch, row, token, T, CH, PACKED)
    else:
        return run.to(tl.int64)


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] != "x"])
def adjoint_kernel(
    query_features, grad_out, out, log_decay, table, adjoints, inner_after, mass_after, fades_after,
    ob: tl.int64, ot: tl.int64, oh: tl.int64,
    gb: tl.int64, gt: tl.int64, gh: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr,
    C: tl.constexpr, CH: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    DESCRIBED: tl.constexpr, PACKED: tl.constexpr, JOINED: tl.constexpr, HAS_DECAY: tl.constexpr, MASSES: tl.constexpr,
):  # fmt: skip
    """The gradient of the value sums before each run that its own queries give (programs: runs * H).

    It goes from a run's last block to its first, and leaves what later queries of the run give to the value sums at
    each chunk's end, [places, H, V, SW]. With MASSES, where blocks are chunks, the same of the masses, [places, H, SW]:
    minus the sum of phi_q / den times grad_out . out, which is as good as out is rounded. And with decay then the log
    decay from there to the run's end, ``fades_after``.
    """
    S: tl.constexpr = L << P
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    group = head // SHARE
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    count = (end - start).to(tl.int32)
    grad_out += whole_rows(batch * ob + head * oh + start * ot, ALIGNED)
    out += ((batch * T + start) * H + head) * V
    log_decay += batch * gb + group * gh + start * gt
    query_features += ((batch * H + head) * T + start) * SW
    if JOINED:
        table += start
    place = place_of(run, batch, row, start, T, CH, PACKED)
    width = tl.full([], SW, tl.int64)
    features = rows_from(query_features, width, count, C, SW, SP, ALIGNED, DESCRIBED)
    grad_outs = rows_from(grad_out, ot, count, C, V, VP, ALIGNED, DESCRIBED)
    grads = tl.zeros([VP, SP], tl.float32)
    c = tl.arange(0, C)
    s = tl.arange(0, SP)
    v = tl.arange(0, VP)
    if MASSES:
        outs = rows_from(out, H * V, count, C, V, VP, ALIGNED, DESCRIBED)
        eight = tl.arange(0, 8)[None, :]
        of_mass = tl.zeros([SP, 8], tl.float32)
        so_far = tl.zeros([], tl.float32)

    blocks = (count + (C - 1)) // C
    for i in range(blocks):
        t = (blocks - 1 - i) * C
        if CH > 0:
            if (t + C) % CH == 0 or i == 0:
                at = (place + t // CH) * H + head
                mask = (v < V)[:, None] & (s < SW)[None, :]
                inner = inner_after + at * (V * SW)
                rounded = grads
                if inner.dtype.element_ty != tl.float32:
                    rounded = operand(grads, PRECISION)
                tl.store(inner + (v[:, None] * SW + s[None, :]), rounded, mask=mask)
                if MASSES:
                    tl.store(mass_after + at * SW + s, tl.sum(of_mass, 1), mask=s < SW)
                    if HAS_DECAY:
                        tl.store(fades_after + at, so_far)
        here = c < count - t
        do = row_block(grad_outs, ot, t, 0, here, C, V, VP, ALIGNED, DESCRIBED)
        seen = row_block(features, width, t, 0, here, C, SW, SP, ALIGNED, DESCRIBED)
        if HAS_DECAY:
            if CH > 0:
                fade, left, total = running_decay(log_decay, gt, t, count, C)
                since = tl.exp(fade)
                kept = tl.exp(total)
            else:
                whole, part, since, left, kept, total = block_decay(log_decay, gt, t, count, C, PRECISION)
            seen = operand(seen.to(tl.float32) * since[:, None], PRECISION)
            grads *= kept
            if MASSES:
                of_mass *= kept
                so_far += total
        if JOINED:
            begins, begin = begins_of(table, t, count, C)
            seen = tl.where((begins < 0)[:, None], seen, 0.0)
            grads = tl.where(begin < 0, grads, 0.0)
            if MASSES:
                of_mass = tl.where(begin < 0, of_mass, 0.0)
        grads = taken_up_fully(grads, do, seen, HAS_DECAY, False, PRECISION)
        if MASSES:
            o = row_block(outs, H * V, t, 0, here, C, V, VP, ALIGNED, DESCRIBED)
            same = anew(c)[:, None] == c[None, :]
            delta = tl.sum(tl.where(same, as_given_dot(do, tl.trans(o), PRECISION), 0.0), 1)
            # A product of eight columns, of which two are delta in two parts of bfloat16.
            high = operand(delta, PRECISION).to(tl.float32)
            both = tl.where(eight == 0, -high[:, None], tl.where(eight == 1, (high - delta)[:, None], 0.0))
            of_mass = add_dot(of_mass, tl.trans(seen), operand(both, PRECISION), PRECISION)

    state = adjoints + (run.to(tl.int64) * H + head) * (S * (V + 1))
    store_sums(state, grads, S, SP, V, VP, False)
    if MASSES:
        store_mass(state, tl.sum(of_mass, 1), S, SP, V)


@triton.jit
def parts_kernel(
    states, others, parts, S: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """The value sums of states in two parts of bfloat16, transposed, [1 or 2, runs, G, 2, V, SW].

    Programs: runs * G, and 1 for ``states`` or 2 for ``others`` as well.
    """
    program = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SP)
    v = tl.arange(0, VP)
    if tl.program_id(1) == 0:
        sums = load_sums(states + program * (S * (V + 1)), 0, S, SP, V, VP, False)
    else:
        sums = load_sums(others + program * (S * (V + 1)), 0, S, SP, V, VP, False)
    program += tl.program_id(1).to(tl.int64) * tl.num_programs(0)
    at = (parts + program * (2 * V * SW)) + (v[:, None] * SW + s[None, :])
    mask = (v < V)[:, None] & (s < SW)[None, :]
    high = sums.to(parts.dtype.element_ty)
    tl.store(at, high, mask=mask)
    tl.store(at + V * SW, (sums - high.to(tl.float32)).to(parts.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] in "TRNG"])
def mass_parts_kernel(
    query_features, deltas, fades, table, mass_parts, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SP: tl.constexpr, SW: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``mass_parts`` where blocks are chunks, from ``deltas`` [B, H, T] (programs: blocks * H).

    For heads that have keys of their own, with decay.
    """
    block = tl.program_id(0) // G.to(tl.int32)
    head = tl.program_id(0) - block * G
    run, batch, row, start, count, first = block_in_run(block, table, T, RUN, NC, C, True, PACKED)
    if first >= count:
        return
    tokens = (batch * G + head) * T + start
    c = tl.arange(0, C)
    s = tl.arange(0, SP)
    here = c < count - first
    seen = features_at(query_features + tokens * SW, first, here, C, SP, SW)
    delta = tl.load(deltas + tokens + first + c, mask=here, other=0.0)
    since = tl.exp(tl.load(fades + tokens + first + c, mask=here, other=0.0))
    seen = operand(seen.to(tl.float32) * since[:, None], PRECISION).to(tl.float32)
    if JOINED:
        begins, begin = begins_of(table + start, first, count, C)
        seen = tl.where((begins < 0)[:, None], seen, 0.0)
    at = (place_of(run, batch, row, start + first, T, C, PACKED) * G + head) * SW
    tl.store(mass_parts + at + s, -tl.sum(seen * delta[:, None], 0), mask=s < SW)


@triton.jit
def _then(kept_a, sum_a, kept_b, sum_b):
    """Block a, then block b before it: kept_b * (kept_a * x + sum_a) + sum_b."""
    return kept_a * kept_b, sum_a * kept_b + sum_b


@triton.jit
def _then_both(kept_a, sum_a, count_a, kept_b, sum_b, count_b):
    """:func:`_then` of two sums."""
    return kept_a * kept_b, sum_a * kept_b + sum_b, count_a * kept_b + count_b


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] in "TRNG"])
def masses_kernel(
    mass_parts, fades, beta_blocks, table, adjoints, mass_after, fades_after, beta_parts,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    SHARE: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, CH: tl.constexpr, RB: tl.constexpr, PACKED: tl.constexpr, JOINED: tl.constexpr,
    HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """The gradients of the masses before a run and after each block of it (programs: runs * H).

    RB is at least the blocks of a run. Also adds up the blocks' parts of beta's gradient.
    """
    H = G * SHARE
    run = tl.program_id(0) // H
    head = tl.program_id(0) - run * H
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    count = (end - start).to(tl.int32)
    place = place_of(run, batch, row, start, T, CH, PACKED)
    blocks = (count + (C - 1)) // C if CH > 0 else tl.minimum(count, 1)
    s = tl.arange(0, SP)
    r = tl.arange(0, RB)
    block = blocks - 1 - r  # from the last to the first
    inside = r < blocks
    at = block_at(place, 0, C, CH) + block
    mask = inside[:, None] & (s < SW)[None, :]
    x = tl.load(mass_parts + (at * H + head)[:, None] * SW + s[None, :], mask=mask, other=0.0)
    if HAS_DECAY and CH > 0:
        fades += (batch * G + head // SHARE) * T + start
        ends = tl.minimum((block + 1) * C, count) - 1
        faded = tl.load(fades + ends, mask=inside, other=0.0)
        faded -= tl.load(fades + block * C - 1, mask=inside & (block % (CH // C) > 0), other=0.0)
        tl.store(fades_after + at * H + head, tl.cumsum(faded, 0) - faded, mask=inside)
        kept = tl.exp(faded)
    if JOINED and CH > 0:
        table += start
        last_one = tl.minimum((block + 1) * C, count) - 1
        goes_on = tl.load(table + last_one, mask=inside, other=0) > last_one - block * C
        kept = tl.where(goes_on, kept if HAS_DECAY else 1.0, 0.0)
    if (HAS_DECAY or JOINED) and CH > 0:
        kept = tl.zeros([RB, SP], tl.float32) + kept[:, None]
        all_kept, sums = tl.associative_scan((kept, x), 0, _then)
    else:
        sums = tl.cumsum(x, 0)
    total = tl.sum(tl.where((r == blocks - 1)[:, None], sums, 0.0), 0)
    store_mass(adjoints + (run.to(tl.int64) * H + head) * (S * (V + 1)), total, S, SP, V)
    if CH > 0:
        # After the last block comes nothing of the run; what the r last blocks give is after the one before them.
        after = mass_after + (at * H + head)[:, None] * SW + s[None, :]
        tl.store(after - H * SW, sums, mask=mask & (block > 0)[:, None])
        tl.store(after, tl.zeros([RB, SP], tl.float32), mask=mask & (r == 0)[:, None])
    of_beta = tl.load(beta_blocks + at * H + head, mask=inside, other=0.0)
    tl.store(beta_parts + run.to(tl.int64) * H + head, tl.sum(of_beta, 0))


@triton.jit
def crossing_inside(
    before, after, inner, marks, inner_after, mass_after, fades_after, place, block, from_run, group, G,
    SHARE: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """The inner product of the state before a chunk of a run with its gradient.

    The state is the run's, ``before``, and what the run's keys have left, at ``place``; the gradient that of the state
    after the run, ``after``, if ``from_run``, and what the run's queries give, behind the chunk's last ``block``.
    """
    H = G * SHARE
    s = tl.arange(0, SP)
    mark = marks + (place * G + group) * (SW + 8 + VP)
    of_chunk = tl.load(mark + s, mask=s < SW, other=0.0)
    kept = tl.exp(tl.load(mark + SW))
    left = tl.where(from_run, tl.exp(tl.load(fades_after + block * H + group * SHARE)), 0.0)
    grad_mass = load_mass(after, S, SP, V) * left
    for share in range(SHARE):
        grad_mass += tl.load(mass_after + (block * H + group * SHARE + share) * SW + s, mask=s < SW, other=0.0)
    total = tl.sum((load_mass(before, S, SP, V) * kept + of_chunk) * grad_mass, 0)
    inner += (place * G + group) * (V * SW)
    inner_after += ((place - 1) * H + group * SHARE) * (V * SW)
    AT_ONCE: tl.constexpr = VP if VP * SP <= 4096 else 4096 // SP
    for first in range(0, V, AT_ONCE):
        v = first + tl.arange(0, AT_ONCE)
        mean = tl.load(mark + (SW + 8) + v, mask=v < V, other=0.0)
        mask = (v < V)[:, None] & (s < S)[None, :]
        of_state = s[None, :] * V + v[:, None]
        of_inner = v[:, None] * SW + s[None, :]
        sums = tl.load(before + of_state, mask=mask, other=0.0) * kept + mean[:, None] * of_chunk[None, :]
        sums += tl.load(inner + of_inner, mask=mask, other=0.0).to(tl.float32)
        grads = tl.load(after + of_state, mask=mask, other=0.0) * left
        for share in range(SHARE):
            grads += tl.load(inner_after + share * (V * SW) + of_inner, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(tl.sum(sums * grads, 1), 0)
    return total


@triton.jit(do_not_specialize=[*[name for name in NEVER_SPECIALIZED if name[0] in "TRNG"], "STRETCHES"])
def crossings_kernel(
    before, after, at_the_end, table, inner, marks, inner_after, mass_after, fades_after, crossings,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64, STRETCHES: tl.int64,
    SHARE: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, CH: tl.constexpr, RT: tl.constexpr, PACKED: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """The inner product of the state with its gradient at the end of each stretch of RT tokens of a run.

    crossings [runs, STRETCHES, G], as many programs. At a row's end it is given, ``at_the_end`` [rows, G].
    """
    group = tl.program_id(0) % G
    run = tl.program_id(0) // G // STRETCHES
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    stop = (tl.program_id(0) // G - run * STRETCHES + 1) * RT
    count = end - start
    size: tl.constexpr = S * (V + 1)
    here = (run * G + group) * size
    if stop < count + RT:
        if stop < count:
            if CH > 0:
                from_run = stop >= 0
                if JOINED:
                    from_run = begin_of(table + start, count - 1) < stop
                chunk = place_of(run, batch, row, start + stop, T, CH, PACKED)
                crossing = crossing_inside(
                    before + here, after + here, inner, marks, inner_after, mass_after, fades_after, chunk,
                    block_at(chunk - 1, CH - C, C, CH), from_run, group, G, SHARE, S, SP, SW, V, VP,
                )  # fmt: skip
                tl.store(crossings + tl.program_id(0), crossing)
        elif last:
            tl.store(crossings + tl.program_id(0), tl.load(at_the_end + row * G + group))
        else:
            crossing = tl.zeros([], tl.float32)
            v = tl.arange(0, VP * 4)
            for e in range(0, size, VP * 4):
                x = tl.load(before + here + G * size + e + v, mask=e + v < size, other=0.0)
                crossing += tl.sum(x * tl.load(after + here + e + v, mask=e + v < size, other=0.0), 0)
            tl.store(crossings + tl.program_id(0), crossing)


@triton.jit
def masses_at(
    key_features, fades, after, mass_after, fades_after, place, ages, first, count, group, G,
    S: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, V: tl.constexpr, C: tl.constexpr, RT: tl.constexpr,
    JOINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi_k by the gradient of the mass after its block, of RT tokens from ``first`` on; blocks are chunks."""
    BLOCKS: tl.constexpr = RT // C
    i = tl.arange(0, BLOCKS)[:, None]
    s = tl.arange(0, SP)
    begin = first + i * C
    t = begin + tl.arange(0, C)[None, :]
    ends = tl.minimum(begin + C, count)
    here = t < count
    at = (place + begin // C) * G + group
    there = begin < count
    left = tl.load(fades + (ends - 1), mask=there, other=0.0) - tl.load(fades + t, mask=here, other=0.0)
    run_kept = tl.exp(tl.load(fades_after + at, mask=there, other=0.0))
    masks = there & (s < SW)[None, :]
    grad_mass = tl.load(mass_after + at * SW + s[None, :], mask=masks, other=0.0)
    if JOINED:
        run_kept = tl.where(begin_of(ages, count - 1) < ends, run_kept, 0.0)
    grad_mass += load_mass(after, S, SP, V)[None, :] * run_kept
    mask = here[:, :, None] & (s < SW)[None, None, :]
    phi = tl.load(key_features + t[:, :, None] * SW + s[None, None, :], mask=mask, other=0.0)
    phi = operand(phi.to(tl.float32) * tl.exp(tl.minimum(left, 0.0))[:, :, None], PRECISION).to(tl.float32)
    of_key = tl.sum(phi * grad_mass[:, None, :], 2)
    if JOINED:
        last = tl.load(ages + (ends - 1), mask=there, other=0)
        of_key = tl.where(t >= ends - 1 - last, of_key, 0.0)
    return tl.reshape(of_key, [RT])


@triton.jit(do_not_specialize=[*[name for name in NEVER_SPECIALIZED if name[0] in "TRNG"], "STRETCHES"])
def finish_kernel(
    crossings, table, grad_decay, beta_blocks, beta_parts, key_features, fades, after, mass_after, fades_after,
    T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64, STRETCHES: tl.int64,
    C: tl.constexpr, CH: tl.constexpr, RB: tl.constexpr, RT: tl.constexpr, PACKED: tl.constexpr,
    JOINED: tl.constexpr, HAS_DECAY: tl.constexpr, FROM_NOTHING: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, SW: tl.constexpr, V: tl.constexpr,
    MASSES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_log_decay in the place of phi_k . grad phi_k, [B, T, G], and beta's gradient.

    Programs: runs * G, and where there is a decay by STRETCHES. The gradient of a log decay is the sum, over the pairs
    of a key before it and a query from it on, of weight times the weight's gradient: what ``crossings`` has for the end
    of the stretch, minus the sum of phi_k . grad phi_k from it to there.

    That takes a query's own sum over all keys to be 0. It is, of weights as the queries' kernel rounds them, but not as
    the keys' kernel does, and so errors add up from token to token: over runs of 2,048 a head's decay of -0.1 was
    47 % off in bfloat16. Hence the stretches; and what the beginning of one is off, as known from the stretch before,
    or where a row begins FROM_NOTHING, is taken off its tokens, in proportion to their distance from the end. With
    MASSES, what the gradients of masses add to phi_k . grad phi_k is not in it and worked out here.
    """
    group = tl.program_id(0) % G
    stretch = (tl.program_id(0) // G % STRETCHES).to(tl.int32)
    run = tl.program_id(0) // G // STRETCHES
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    count = (end - start).to(tl.int32)
    if stretch == 0:
        place = place_of(run, batch, row, start, T, CH, PACKED)
        blocks = (count + (C - 1)) // C if CH > 0 else tl.minimum(count, 1)
        r = tl.arange(0, RB)
        at = block_at(place, 0, C, CH) + r
        of_beta = tl.load(beta_blocks + at * G + group, mask=r < blocks, other=0.0)
        tl.store(beta_parts + run * G + group, tl.sum(of_beta, 0))
    if HAS_DECAY:
        first = stretch * RT
        if first >= count:
            return
        stop = tl.minimum(first + RT, count)
        crossing = tl.load(crossings + tl.program_id(0))
        t = first + tl.arange(0, RT)
        at_token = grad_decay + (batch * T + start + t) * G + group
        of_key = tl.load(at_token, mask=t < stop, other=0.0)
        if MASSES:
            of_key += masses_at(
                key_features + ((batch * G + group) * T + start) * SW, fades + (batch * G + group) * T + start,
                after + (run * G + group) * (S * (V + 1)), mass_after, fades_after,
                place_of(run, batch, row, start, T, CH, PACKED), table + start, first, count, group, G,
                S, SP, SW, V, C, RT, JOINED, PRECISION,
            )  # fmt: skip
        if PACKED:
            begins = run == 0
            if run > 0:
                begins = tl.load(table + (run - 1) * 4) != row
        else:
            begins = start == 0
        begins = begins & (stretch == 0)
        of_begin = tl.load(crossings + tl.program_id(0) - G, mask=begins == 0, other=0.0)
        if JOINED:  # likewise of the pairs of the token's own sequence; nothing comes before its first one
            table += start
            age = tl.load(table + t, mask=t < stop, other=0)
            following = tl.load(table + t + 1, mask=t + 1 < stop, other=0)
            goes_on = tl.where(following > 0, 1.0, 0.0)
            change = tl.where(t >= begin_of(table, stop - 1), crossing, 0.0)
            if CH > 0:
                ones = tl.where(t < stop, 1.0, 0.0)
                kept, later, left = tl.associative_scan((goes_on, of_key, ones), 0, _then_both, reverse=True)
                came = tl.where((age > 0) & (t > first), 1.0, 0.0)
                kept, earlier, passed = tl.associative_scan((came, of_key, ones), 0, _then_both)
                change -= later
                off = tl.where(age > t - first, of_begin, 0.0) - (change - (earlier - of_key))
                change += off * (left / tl.maximum(left + passed - 1, 1.0))
            else:
                kept, later = tl.associative_scan((goes_on, of_key), 0, _then, reverse=True)
                change -= later
            tl.store(at_token, tl.where(age > 0, change, 0.0), mask=t < stop)
        else:
            later = crossing - tl.cumsum(of_key, 0, reverse=True)
            if CH > 0:
                off = of_begin - crossing + tl.sum(of_key, 0)
                if not FROM_NOTHING:
                    off = tl.where(begins, 0.0, off)
                later += off * ((stop - t).to(tl.float32) / (stop - first).to(tl.float32))
            tl.store(at_token, later, mask=t < stop)


@triton.jit(do_not_specialize=[name for name in NEVER_SPECIALIZED if name[0] in "xTRNG"])
def planes_kernel(
    x, grad_hashes, table, planes_parts,
    xb: tl.int64, xt: tl.int64, xh: tl.int64, T: tl.int64, RUN: tl.int64, NC: tl.int64, G: tl.int64,
    D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, YW: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The hyperplanes' gradient of a run: its tokens x by the gradients of their projections (programs: runs * G)."""
    run = tl.program_id(0) // G
    head = tl.program_id(0) - run * G
    batch, row, start, end, last = run_bounds(run, table, T, RUN, NC, PACKED)
    count = (end - start).to(tl.int32)
    x += whole_rows(batch * xb + head * xh + start * xt, ALIGNED)
    grad_hashes += ((batch * G + head) * T + start) * YW
    c = tl.arange(0, C)
    n = tl.arange(0, N)
    planes_sum = tl.zeros([DP, N], tl.float32)
    for t in range(0, count, C):
        here = c < count - t
        rows = rows_at(x, xt, t, here, C, D, DP, ALIGNED)
        at = (grad_hashes + t * YW) + (c[:, None] * YW + n[None, :])
        grad_y = tl.load(at, mask=here[:, None] & (n < YW)[None, :], other=0.0)
        planes_sum = add_by_tokens(planes_sum, rows, grad_y, PRECISION)
    store_hash_gradient(planes_parts, run.to(tl.int64) * G + head, planes_sum, N, D, DP, ROWS)
