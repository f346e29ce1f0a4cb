// What the passes share: the problem seen from one key head, states in and out, the decays of a run.
#pragma once

#include "room.hpp"

namespace race {
namespace RACE_NAMESPACE {
namespace {

template <class T>
class Base {
 public:
  Base(const Problem& problem, const Work& work, void* scratch)
      : p(problem), a(*problem.a), work(work), cut(scratch), room(problem, cut) {
    take_up(work.g);
  }

 protected:
  const Problem& p;
  const Args& a;
  const Work& work;
  Cutter cut;
  Room<T> room;
  i64 g;  // the key head at hand
  Hash<T> f;
  Row row{};
  i64 row_index = 0;
  bool from_the_end = false;  // whether blocks are taken from the last to the first

  bool stopped() const { return __atomic_load_n(p.stop, __ATOMIC_RELAXED) != 0; }
  void take_up(i64 head) {
    g = head;
    room.use(head - work.g);
    const i64 size = p.projections * room.size.dim;
    const T* const planes = static_cast<const T*>(p.packed_planes);
    f = {a.tables, a.planes, p.buckets, room.size.dim, planes + g * size, planes + (a.groups + g) * size,
         static_cast<const T*>(a.beta)[g * a.beta_stride], a.store == kBFloat16};
  }
  template <class Do>
  void for_heads(Do&& work_on) {
    for (i64 head = work.g; head < work.g + work.heads; ++head) {
      take_up(head);
      work_on();
    }
  }
  // What Work gives and takes, of the head at hand.
  i64 further() const { return (g - work.g) * p.slots; }
  const double* given() const { return work.given + further() * p.states * (a.value_dim + 1); }
  double* left() const { return work.left + further() * p.states * (a.value_dim + 1); }
  void enter(const Piece& piece) {
    row_index = piece.row;
    row = p.rows[piece.row];
  }

  // ---- states: [S][ld] here, mass at `value`; outside mass and value_sum, or [S][Dv + 1] with mass last ------

  void read_state(const State& from, Running<T>& state) const {
    if (!from.mass && !from.value_sum) return;
    double* const to = state.base();
    const i64 S = p.states, Dv = a.value_dim, R = p.buckets;
    for (i64 s = 0; s < S; ++s) {
      const i64* m = from.mass_stride;
      const i64* v = from.value_sum_stride;
      double* to_row = to + s * room.size.ld;
      const i64 l = s / R, r = s % R;
      if (from.mass) to_row[room.size.value] = from.mass[row_index * m[0] + g * m[1] + l * m[2] + r * m[3]];
      if (!from.value_sum) continue;
      const double* values = from.value_sum + row_index * v[0] + g * v[1] + l * v[2] + r * v[3];
      for (i64 d = 0; d < Dv; ++d) to_row[d] = values[d * v[4]];
    }
  }
  void write_state(const double* from, double* mass, double* value_sum) const {
    const i64 S = p.states, Dv = a.value_dim, at = (row_index * a.groups + g) * S;
    for (i64 s = 0; s < S; ++s) {
      const double* values = from + s * room.size.ld;
      if (mass) mass[at + s] = values[room.size.value];
      if (value_sum)
        for (i64 d = 0; d < Dv; ++d) value_sum[(at + s) * Dv + d] = values[d];
    }
  }
  template <class From, class Into>
  void spread(const From* from, Into* to) const {  // [S][Dv + 1] -> [S][ld]
    const i64 Dv = a.value_dim;
    for (i64 s = 0; s < p.states; ++s, from += Dv + 1, to += room.size.ld) {
      for (i64 d = 0; d < Dv; ++d) to[d] = static_cast<Into>(from[d]);
      for (i64 d = Dv; d < room.size.value; ++d) to[d] = 0;  // read as the values of padded tokens are
      to[room.size.value] = static_cast<Into>(from[Dv]);
    }
  }
  template <class From, class Into>
  void gather(const From* from, Into* to) const {  // [S][ld] -> [S][Dv + 1]
    const i64 Dv = a.value_dim;
    for (i64 s = 0; s < p.states; ++s, to += Dv + 1, from += room.size.ld) {
      for (i64 d = 0; d < Dv; ++d) to[d] = static_cast<Into>(from[d]);
      to[Dv] = static_cast<Into>(from[room.size.value]);
    }
  }
  T* saved(i64 run) const {  // the state before a run of this row that is not its first
    const i64 at = (row.saved + run - 1) * a.groups + g;
    return static_cast<T*>(a.saved) + at * p.states * (a.value_dim + 1);
  }

  // ---- which tokens take part, and decay ----------------------------------------------------------------

  bool present(i64 t) const {  // key t of the row
    if (!a.mask) return true;
    return a.mask[row.batch * a.mask_stride[0] + (row.k0 + t) * a.mask_stride[1] + g * a.mask_stride[2]] != 0;
  }
  double log_decay(i64 t) const {
    const T* x = static_cast<const T*>(a.log_decay);
    const i64* s = a.log_decay_stride;
    return static_cast<double>(x[row.batch * s[0] + (row.k0 + t) * s[1] + g * s[2]]);
  }

  // Cuts tokens [begin, end) into blocks. With decay, g runs over the block from the state before it; exp(-g) stays
  // below exp(16), so that buckets may carry exp(g) and exp(-g) themselves. A first token whose decay alone is
  // larger is applied to the state by itself.
  void cut_blocks(i64 begin, i64 end, Running<T>& state) {
    room.block_count = 0;
    add_blocks(begin, end, begin, state);
  }
  void add_blocks(i64 begin, i64 end, i64 run_begin, Running<T>& state) {
    for (i64 t = begin; t < end;) {
      Block<T>& block = room.blocks[room.block_count++];
      block = {t, min_of(C, end - t), T(1), T(1)};
      if (a.log_decay) decay_block(block, run_begin, state);
      t += block.count;
    }
  }
  void decay_block(Block<T>& block, i64 run_begin, Running<T>& state) {
    double running = 0;
    for (i64 i = 0; i < block.count; ++i) {
      const double step = log_decay(block.begin + i);
      if (i == 0 && step < -kMostDecay) {
        const double before = __builtin_exp(step);
        block.before = static_cast<T>(before);
        state.run_factor *= before;
      } else if (running + step < -kMostDecay) {
        block.count = i;
        break;
      } else {
        running += step;
      }
      const i64 at = block.begin + i - run_begin;
      room.query_factor[at] = static_cast<T>(__builtin_exp(running));
      room.key_factor[at] = static_cast<T>(__builtin_exp(-running));
    }
    block.over = static_cast<T>(__builtin_exp(running));
    state.run_factor *= __builtin_exp(running);
  }
  static constexpr double kMostDecay = 16;

  // The factors of a block's keys (0 where absent) and queries, and 0 behind them.
  void key_parts(i64 begin, i64 count, const T* factor) {
    fill_parts(room.part_k, count, factor);
    room.some_absent = false;
    for (i64 i = 0; a.mask && i < count; ++i)
      if (!present(begin + i)) {
        room.part_k[i] = 0;
        room.some_absent = true;
      }
  }
  void query_parts(i64 count, const T* factor) { fill_parts(room.part_q, count, factor); }
  static void fill_parts(T* part, i64 count, const T* factor) {
    for (i64 i = 0; i < count; ++i) part[i] = factor ? factor[i] : T(1);
    for (i64 i = count; i < C; ++i) part[i] = 0;
  }

  // ---- gradients of hyperplanes and beta: in T over a run, float64 over a slot -----------------------------

  bool wants_hash() const { return a.dplanes || a.dbeta; }
  void clear_hash_gradients() {
    for (i64 i = 0; i < p.projections * room.size.dim; ++i) room.dw[i] = 0;
    for (i64 i = 0; i < W<T>; ++i) room.dbeta[i] = 0;
  }
  void add_hash_gradients(i64 slot, int which) { add_hash_gradients(slot, which, room.dw, room.dbeta); }
  void add_hash_gradients(i64 slot, int which, const T* dw, const T* dbeta) {
    if (!wants_hash()) return;
    const i64 LP = p.projections, D = a.dim;
    double* to = p.partial + ((g * p.slots + slot) * 2 + which) * (LP * D + 1);
    for (i64 i = 0; i < LP; ++i)
      for (i64 d = 0; d < D; ++d) to[i * D + d] += static_cast<double>(dw[i * room.size.dim + d]);
    for (i64 i = 0; i < W<T>; ++i) to[LP * D] += static_cast<double>(dbeta[i]);
  }

  // ---- blocks --------------------------------------------------------------------------------------------

  void next_block() {
    room.ahead.near.clear();
  }
  // Each load asks for the next block's as well: behind this one, or before it where the pass runs backward. Where
  // heads take turns `ask_far` has asked: nearer than the second cache there is no room for rows that lie 2 KiB apart.
  // Keys and queries are read themselves only for the gradient of the hyperplanes.
  Tile<T> load_keys(const Block<T>& b, i64 rows) {
    ask_ahead(a.k, row.k0, b, g, a.dim, row.klen);
    if (!a.dplanes && !room.some_absent && reads_half<T>(p, a.k, b.count, rows, a.dim))
      return {nullptr, a.k.t, at<T, std::uint16_t>(a.k, row.batch, row.k0 + b.begin, g)};
    return load_tile<T>(p, a.k, row.batch, row.k0 + b.begin, g, b.count, rows, a.dim, room.size.dim, absent(), room.x);
  }
  Tile<T> load_values(const Block<T>& b, i64 rows) {
    ask_ahead(a.v, row.k0, b, g, a.value_dim, row.klen);
    return load_tile<T>(p, a.v, row.batch, row.k0 + b.begin, g, b.count, rows, a.value_dim, room.size.value,
                        absent(), room.v);
  }
  Tile<T> load_queries(const Block<T>& b, i64 h, i64 rows) {
    ask_ahead(a.q, row.q0, b, h, a.dim, row.qlen);
    if (!a.dplanes && reads_half<T>(p, a.q, b.count, rows, a.dim))
      return {nullptr, a.q.t, at<T, std::uint16_t>(a.q, row.batch, row.q0 + b.begin, h)};
    return load_tile<T>(p, a.q, row.batch, row.q0 + b.begin, h, b.count, rows, a.dim, room.size.dim, nullptr, room.q);
  }
  Tile<T> load_grad_out(const Block<T>& b, i64 h, i64 rows, T* to) {
    ask_ahead(a.grad_out, row.q0, b, h, a.value_dim, row.qlen);
    return load_tile<T>(p, a.grad_out, row.batch, row.q0 + b.begin, h, b.count, rows, a.value_dim, room.size.value,
                        nullptr, to);
  }
  const T* absent() const { return room.some_absent ? room.part_k : nullptr; }  // what `load_tile` fills with zeros
  void ask_ahead(const Tokens& x, i64 first, const Block<T>& b, i64 h, i64 size, i64 length) {
    const i64 t = from_the_end ? b.begin - C : b.begin + b.count;
    if (t < 0 || x.d != 1 || work.heads > 1 || !p.large) return;
    const i64 bytes = a.store == kBFloat16 ? 2 : static_cast<i64>(sizeof(T));
    const char* to = static_cast<const char*>(x.data) + (row.batch * x.b + (first + t) * x.t + h * x.h) * bytes;
    room.ahead.near.add(to, x.t * bytes, min_of(C, length - t), size * bytes);
  }
  // Asks for tokens [begin, end) of `x` of every head of this work, from a few places at a time, at each in the order in
  // which they lie in memory: read head by head, each read would open another page, and the processor could not guess
  // the next.
  static constexpr i64 kPlaces = 4;
  void ask_far(const Tokens& x, i64 first, i64 begin, i64 end, i64 heads_each, i64 size) {
    if (x.d != 1 || x.h != size) return;
    const i64 bytes = a.store == kBFloat16 ? 2 : static_cast<i64>(sizeof(T));
    const char* to = static_cast<const char*>(x.data) +
                     (row.batch * x.b + (first + begin) * x.t + work.g * heads_each * x.h) * bytes;
    const i64 part = (end - begin + kPlaces - 1) / kPlaces;
    for (i64 t = begin; t < end; t += part, to += part * x.t * bytes)
      room.ahead.far.add(to, x.t * bytes, min_of(part, end - t), work.heads * heads_each * size * bytes);
  }
  void store(const Tokens& to, i64 first, const Block<T>& b, i64 h, i64 size, i64 ld, const T* factor = nullptr) {
    store_tile<T>(p, to, row.batch, first + b.begin, h, b.count, size, room.out, ld, factor);
  }

  // Sums of products, times `factor`, to the tokens of a block: from the registers, where that is possible.
  void emit_product(const Tokens& to, i64 first, const Block<T>& b, i64 h, i64 size, i64 ld, const Pair<T>& x,
                    const Pair<T>& y = {}, Terms terms = Terms::kAll, const T* factor = nullptr) {
#if RACE_BYTES == 64
    if constexpr (sizeof(T) == 4)
      if (emits(p, to, size))
        return combine<T, Emit>({emit(p, to, row.batch, first + b.begin, h, factor), x, y, terms}, b.count, ld, &room.ahead);
#endif
    set_product<T>(room.out, ld, b.count, ld, x, y, terms, &room.ahead);
    store(to, first, b, h, size, ld, factor);
  }
  // The same together with a sum into a state, in turns: what both read is read once from further away. False where rows
  // cannot go straight from the registers: then they are in `out`.
  bool emit_both(const Tokens& to, i64 first, const Block<T>& b, i64 ld, T* out, const Pair<T>& x, const Pair<T>& y,
                 Terms terms, const T* factor, const Combine<T, Add<T>>& also) {
#if RACE_BYTES == 64
    if constexpr (sizeof(T) == 4)
      if (emits(p, to, a.value_dim)) {
        combine_both<T, Emit, Add<T>>({emit(p, to, row.batch, first + b.begin, g, factor), x, y, terms}, b.count, also,
                                      p.states, ld, &room.ahead);
        return true;
      }
#endif
    (void)to, (void)first, (void)factor;
    combine_both<T, Set<T>, Add<T>>({{out, ld}, x, y, terms}, b.count, also, p.states, ld, &room.ahead);
    return false;
  }

  // state += buckets^T rows: values here, masses `weight` (1 where null) besides.
  void add_to_state(T* w, T* second, const T* buckets, const T* rows, i64 ld, i64 count, const T* weight, T factor) {
    add_product<T>(w, room.size.ld, p.states, room.size.value, {buckets, 1, C, rows, ld, count}, factor, second, &room.ahead);
    add_masses(w, second, buckets, count, weight, factor);
  }
  void add_masses(T* w, T* second, const T* buckets, i64 count, const T* weight, T factor) {
    // The sums of W buckets at a time; behind the last token of the block buckets are 0.
    const i64 lanes = round_up(count, W<T>), at = room.size.value;
    for (i64 s = 0; s < p.states; s += W<T>) {
      V<T> partial[W<T>];
      const i64 n = min_of(W<T>, p.states - s);
      for (i64 k = 0; k < W<T>; ++k) {
        V<T> sum = {};
        for (i64 t = 0; k < n && t < lanes; t += W<T>) {
          const V<T> x = load(buckets + (s + k) * C + t);
          sum += weight ? x * load(weight + t) : x;
        }
        partial[k] = sum;
      }
      const V<T> mass = sums<T>(partial);
      for (i64 k = 0; k < n; ++k) {
        T* to = w + (s + k) * room.size.ld + at;
        *to = factor * (*to + mass[k]);
        if (!second) continue;
        to = second + (s + k) * room.size.ld + at;
        *to = factor * (*to + mass[k]);
      }
    }
  }

  // scores[j][i] = pk_j . pq_i for keys j <= i of one block, else 0.
  void score(i64 count, i64 rows) {
    set_product<T>(room.scores, C, count, rows, {room.pk, C, 1, room.pq, C, p.states});
    keep_later<T>(room.scores, count, rows);
  }

  // den[i] = pq_i . mass, and with `inside` what the block's own keys add; inverse[i] = 1 / den[i], or 0 where no key
  // is seen (NaN stays NaN). An output does not change when pq_i is scaled: where den is so small that 1 / den would
  // overflow (10 planes, all of opposite signs; or decay), pq_i, its scores and den are scaled by lift[i].
  void denominators(const T* w, i64 states, i64 rows, i64 inside) {
    IV<T> small = {};
    for (i64 t = 0; t < rows; t += W<T>) {
      const T* mass = w + room.size.value;
      V<T> part[4] = {};  // four sums, for the processor to have more than one addition under way
      for (i64 s = 0; s < states; ++s, mass += room.size.ld) part[s & 3] += *mass * load(room.pq + s * C + t);
      for (i64 j = 0; j < inside; ++j) part[j & 3] += load(room.scores + j * C + t);
      const V<T> den = (part[0] + part[1]) + (part[2] + part[3]);
      put(room.den + t, den);
      small |= (den > T(0)) & (den < kSmall);
      put(room.inverse + t, select<T>(den <= T(0), V<T>{}, T(1) / den));
      put(room.lift + t, splat<T>(1));
    }
    if (any<T>(small)) lift(rows, inside);
  }
  static constexpr bool kSingle = sizeof(T) == 4;
  static constexpr T kSmall = kSingle ? T(0x1p-60) : T(0x1p-500);
  static constexpr T kLift = kSingle ? T(0x1p80) : T(0x1p560);
  static constexpr T kLargest = kSingle ? T(0x1p90) : T(0x1p900);  // of a query's share in the state's adjoint

  __attribute__((noinline)) void lift(i64 rows, i64 inside) {
    for (i64 i = 0; i < rows; ++i) {
      if (!(room.den[i] > 0 && room.den[i] < kSmall)) continue;
      room.lift[i] = kLift;
      room.den[i] *= kLift;
      room.inverse[i] = T(1) / room.den[i];
      for (i64 s = 0; s < p.states; ++s) room.pq[s * C + i] *= kLift;
    }
    if (inside) score(inside, rows);  // the keys' pass finds them so: from buckets that are lifted already
  }

  // sum over s of a[s][t ..] * b[s][t ..].
  RACE_INLINE static V<T> column_dot(const T* left, const T* right, i64 t, i64 count) {
    V<T> part[4] = {};
    for (i64 s = 0; s < count; ++s) part[s & 3] += load(left + s * C + t) * load(right + s * C + t);
    return (part[0] + part[1]) + (part[2] + part[3]);
  }

  // Whether the gradient of query i can be formed: the state it reads has not decayed out of the dtype's range.
  bool within_range(i64 i) const {
    if (room.lift[i] == T(1)) return true;
    T most = 0;
    for (i64 s = 0; s < p.states; ++s) most = room.pq[s * C + i] > most ? room.pq[s * C + i] : most;
    return most * room.inverse[i] < kLargest;
  }
  void drop_gradients_out_of_range(i64 count) {
    for (i64 i = 0; i < count; ++i)
      if (!within_range(i)) room.inverse[i] = 0;
  }

  // What the keys' pass needs of the queries': 1 / den, the adjoint of den, lift.
  T* inverse_of(i64 t, i64 h) const {
    return static_cast<T*>(p.inverse) + ((row.batch * a.tq + row.q0 + t) * a.heads + h) * 3;
  }

  // From dphi of one block to the gradients of its tokens, hyperplanes and beta.
  void hash_gradients(const T* phi, const Slopes<T>& slopes, const Tile<T>& x, const Tokens& to, i64 first,
                      const Block<T>& b, i64 h, i64 rows) {
    hash_backward<T>(f, rows, phi, room.dphi, slopes, room.dy, room.dbeta, room.total);
    if (to.data) {
      emit_product(to, first, b, h, a.dim, room.size.dim, {room.dy, C, 1, f.w, room.size.dim, p.projections});
    }
    if (a.dplanes)
      add_product<T>(room.dw, room.size.dim, p.projections, room.size.dim, {room.dy, 1, C, x.p, x.ld, b.count});
  }
};

}  // namespace
}  // namespace RACE_NAMESPACE
}  // namespace race
