// The two small matrix products that everything is made of.
#pragma once

#include "simd.hpp"

namespace race {
namespace RACE_NAMESPACE {
namespace {

// Lines of memory to be asked for while products run. A core keeps some sixteen reads under way; asked for all at
// once, the rows of a block (400 lines) would be waited for instead of fetched behind the arithmetic.
//
// Places take turns every few lines: the processor's own prefetcher sees a page being read and runs ahead of it into the
// second cache, with queues of its own, for as long as the turn is elsewhere. One page after the other it has no time to.
class Lines {
 public:
  RACE_INLINE bool any() const { return count_ > 0; }
  RACE_INLINE void clear() { count_ = at_ = 0; }
  RACE_INLINE void add(const char* row, i64 stride, i64 rows, i64 bytes) {
    if (count_ < kMost && rows > 0) rows_[count_++] = {row, stride, rows, (bytes + 63) / 64, 0};
  }
  RACE_INLINE i64 lines() const {
    i64 total = 0;
    for (int i = 0; i < count_; ++i) total += rows_[i].left * rows_[i].lines;
    return total;
  }
  template <int Nearness>  // 3: into every cache; 2: into the second
  RACE_INLINE void ask(i64 lines) {
    while (lines > 0 && count_ > 0) {
      if (at_ >= count_) at_ = 0;
      Rows& r = rows_[at_];
      const char* p = r.row + r.line * 64;
      const i64 n = min_of(min_of(lines, kTurn), r.lines - r.line);
      for (i64 i = 0; i < n; ++i, p += 64) __builtin_prefetch(p, 0, Nearness);
      lines -= n;
      r.line += n;
      if (r.line == r.lines) {
        r.line = 0;
        r.row += r.stride;
        if (--r.left == 0) {
          for (int k = at_; k + 1 < count_; ++k) rows_[k] = rows_[k + 1];
          --count_;
          continue;
        }
      }
      ++at_;
    }
  }

  static constexpr i64 kTurn = 4;

 private:
  static constexpr int kMost = 16;
  struct Rows {
    const char* row;
    i64 stride, left, lines, line;
  };
  Rows rows_[kMost];
  int count_ = 0, at_ = 0;
};

class Ahead {
 public:
  Lines near, far;  // the next block of this head; the next chunk of every head at hand, token by token

  // After `steps` of a product: a processor has room for some sixteen lines under way, and what is asked for beyond
  // them stops it. So a few lines are asked for after each large tile; whole turns of them, since a call costs as well.
  RACE_INLINE void ask(i64 steps) {
    asked_ += steps;
    credit_ += steps * rate_;
    if (credit_ >= kTurn || near.any()) ask_some(steps);
  }
  // A new chunk: the lines put into `far` between these two are spread over as many steps as the last chunk made.
  void start() {
    far.clear();
  }
  void pace() {
    rate_ = asked_ > 0 ? min_of((far.lines() << 8) / asked_ + 1, kFastest) : kFastest / 4;
    asked_ = credit_ = 0;
  }

 private:
  __attribute__((noinline)) void ask_some(i64 steps) {
    near.ask<3>(steps / 2);
    far.ask<2>(credit_ / kTurn * Lines::kTurn);
    credit_ %= kTurn;
  }
  static constexpr i64 kFastest = 8 << 8, kTurn = Lines::kTurn << 8;
  i64 rate_ = 0, asked_ = 0, credit_ = 0;  // lines of `far` a step, times 256
};

// Rows as `dots` reads them: floats as they are, or bfloat16s in pairs, of which one vector holds the even ones and the next
// the odd ones: no shuffle. What they are multiplied with has to lie in that order (`split_rows`).
template <class T>
struct PlainRows {
  const T* p;
  i64 ld;
  static constexpr int kVectors = 1;
  RACE_INLINE void read(i64 row, i64 k, V<T>* to) const { to[0] = load(p + row * ld + k); }
};
struct HalfRows {
  const std::uint16_t* p;
  i64 ld;
  static constexpr int kVectors = 2;
  RACE_INLINE void read(i64 row, i64 k, V<float>* to) const {
    typedef std::uint32_t Bits __attribute__((vector_size(RACE_BYTES)));
    Bits both;
    __builtin_memcpy(&both, p + row * ld + k, sizeof both);
    to[0] = (V<float>)(both << 16);
    to[1] = (V<float>)(both & 0xffff0000u);
  }
};

template <class T>
RACE_INLINE void split_rows(T* to, const T* from, i64 count) {
  for (i64 d = 0; d < count; d += 2 * W<T>)
    for (i64 i = 0; i < W<T>; ++i) {
      to[d + i] = from[d + 2 * i];
      to[d + W<T> + i] = from[d + 2 * i + 1];
    }
}

// W sums, of A rows of `left` and B of `right`, so that the sums across lanes cost 3 (W - 1) operations for W results.
template <class T, int A, class Right>
RACE_INLINE V<T> dot_tile(const T* left, i64 ldl, i64 na, const Right& right, i64 b0, i64 d) {
  constexpr int B = W<T> / A, kVectors = Right::kVectors;
  const T* rows[A];
  for (int i = 0; i < A; ++i) rows[i] = left + min_of(i, na - 1) * ldl;
  V<T> acc[A * B] = {};
  for (i64 k = 0; k < d; k += kVectors * W<T>) {
    V<T> y[B][kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < B; ++j) right.read(b0 + j, k, y[j]);
#pragma GCC unroll 16
    for (int i = 0; i < A; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        V<T> x = load(rows[i] + k + v * W<T>);
#pragma GCC unroll 16
        for (int j = 0; j < B; ++j) acc[i * B + j] += x * y[j][v];
      }
  }
  return sums<T>(acc);
}

// The last few rows of `left`, where a tile of several would be half empty.
template <class T, class Right>
RACE_INLINE void last_dots(T* out, i64 ldo, const T* left, i64 ldl, i64 begin, i64 end, const Right& right, i64 nb, i64 d,
                           Ahead* ahead) {
  for (i64 a = begin; a < end; ++a)
    for (i64 b = 0; b < nb; b += W<T>) {
      store<T>(out + a * ldo + b, dot_tile<T, 1>(left + a * ldl, ldl, 1, right, b, d));
      if (ahead) ahead->ask(d / W<T>);
    }
}

// Of four tiles the rows: [tile][i][j] to [i][tile][j], with j of 128 bits.
#if RACE_BYTES == 64
RACE_INLINE void turn_quarters(V<float> (&x)[4]) {
  using Low = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>;
  using High = Lanes<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>;
  using Even = Lanes<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>;
  using Odd = Lanes<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>;
  const V<float> a = shuffle<float>(x[0], x[1], Low{}), b = shuffle<float>(x[2], x[3], Low{});
  const V<float> c = shuffle<float>(x[0], x[1], High{}), e = shuffle<float>(x[2], x[3], High{});
  x[0] = shuffle<float>(a, b, Even{});
  x[1] = shuffle<float>(a, b, Odd{});
  x[2] = shuffle<float>(c, e, Even{});
  x[3] = shuffle<float>(c, e, Odd{});
}
#endif

// out[a * ldo + b] = sum over d of left[a][d] * right[b][d]: rows against rows, lanes along d. `d` is a multiple of the
// vectors that a read takes, `nb` of W. With `triangular` only b >= a is wanted, and tiles without any are 0.
template <class T>
RACE_INLINE void dots(T* out, i64 ldo, const T* left, i64 ldl, i64 na, const PlainRows<T>& right, i64 nb, i64 d,
                      Ahead* ahead = nullptr, bool triangular = false) {
  constexpr int A = W<T> / (W<T> >= 8 ? 4 : 2), B = W<T> / A, kFew = W<T> >= 16 ? 2 : 1;
  const i64 whole = na % A > kFew ? na : na / A * A;
  for (i64 b0 = 0; b0 < nb; b0 += B)
    for (i64 a0 = 0; a0 < whole; a0 += A) {
      const i64 n = min_of(A, na - a0);
      V<T> result = {};
      if (!triangular || b0 + B > a0) {
        result = dot_tile<T, A>(left + a0 * ldl, ldl, n, right, b0, d);
        if (ahead) ahead->ask(d / W<T>);
      }
      for (int i = 0; i < A && i < n; ++i)
        for (int j = 0; j < B; ++j) out[(a0 + i) * ldo + b0 + j] = result[i * B + j];
    }
  last_dots(out, ldo, left, ldl, whole, na, right, nb, d, ahead);
}
#if RACE_BYTES == 64
// Here the rows of `right` are outside: they lie closer together, and less far apart than the ways of a cache.
RACE_INLINE void dots(float* out, i64 ldo, const float* left, i64 ldl, i64 na, const HalfRows& right, i64 nb, i64 d,
                      Ahead* ahead = nullptr) {
  const i64 whole = na % 4 > 2 ? na : na / 4 * 4;
  for (i64 a0 = 0; a0 < whole; a0 += 4)
    for (i64 b = 0; b < nb; b += 16) {
      const i64 n = min_of(4, na - a0);
      V<float> result[4];
      for (int m = 0; m < 4; ++m) {
        result[m] = dot_tile<float, 4>(left + a0 * ldl, ldl, n, right, b + m * 4, d);
        if (ahead) ahead->ask(d / 16);
      }
      turn_quarters(result);
      for (i64 i = 0; i < n; ++i) store<float>(out + (a0 + i) * ldo + b, result[i]);
    }
  last_dots(out, ldo, left, ldl, whole, na, right, nb, d, ahead);
}
#endif

// One factor pair of `combine`: sum over k of x[k * xk + i * xi] * rows[k * ld + column].
template <class T>
struct Pair {
  const T* x;
  i64 xk, xi;
  const T* rows;
  i64 ld, k;
};

template <class T, int M, int N>
RACE_INLINE void take(V<T> (&acc)[M][N], const Pair<T>& p, i64 i, i64 column, i64 count) {
  const T* x = p.x + i * p.xi;
  const T* r = p.rows + column;
  for (i64 k = 0; k < count; ++k, x += p.xk, r += p.ld) {
    V<T> y[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) y[j] = load(r + j * W<T>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      V<T> c = splat<T>(x[m * p.xi]);
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) acc[m][j] += c * y[j];
    }
  }
}

// What becomes of a tile of sums.
template <class T>
struct Set {
  T* out;
  i64 ld;
  template <int M, int N>
  RACE_INLINE void operator()(i64 i, i64 column, V<T> (&acc)[M][N]) const {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) store<T>(out + (i + m) * ld + column + j * W<T>, acc[m][j]);
  }
};
// Rows times their factors, past the caches from the registers: where a vector fills a line. Spread over the products
// like the reads, and no pass over a buffer of sums.
#if RACE_BYTES == 64
struct Emit {
  char* out;  // row 0
  i64 stride, bytes;  // between rows; of a number: 4, or 2 for bfloat16
  const float* factor;  // null: 1
  bool native;          // see narrow_pair
  template <int M, int N>
  RACE_INLINE void operator()(i64 i, i64 column, V<float> (&acc)[M][N]) const {
    char* row = out + i * stride + column * bytes;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m, row += stride) {
      if (factor)
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) acc[m][j] *= factor[i + m];
      if (bytes == 2) {
        if constexpr (N % 2 == 0)
#pragma GCC unroll 2
          for (int j = 0; j < N; j += 2) stream(row + j * 32, narrow_pair(acc[m][j], acc[m][j + 1], native));
        continue;
      }
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) stream(row + j * 64, acc[m][j]);
    }
  }
};
#endif
template <class T>
struct Add {  // out = factor * (out + sum), and `second` likewise where not null
  T* out;
  i64 ld;
  T *second = nullptr;
  T factor = 1;
  template <int M, int N>
  RACE_INLINE void operator()(i64 i, i64 column, V<T> (&acc)[M][N]) const {
    if (factor == T(1)) return add<false>(i, column, acc);
    add<true>(i, column, acc);
  }
  template <bool Scaled, int M, int N>
  RACE_INLINE void add(i64 i, i64 column, V<T> (&acc)[M][N]) const {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) {
        T* o = out + (i + m) * ld + column + j * W<T>;
        store<T>(o, Scaled ? factor * (load(o) + acc[m][j]) : load(o) + acc[m][j]);
        if (!second) continue;
        T* s = second + (i + m) * ld + column + j * W<T>;
        store<T>(s, Scaled ? factor * (load(s) + acc[m][j]) : load(s) + acc[m][j]);
      }
  }
};

enum class Terms { kAll, kUpToRow, kFromRow };

template <class T, class Into>
struct Combine {
  Into into;
  Pair<T> a, b;
  Terms terms;  // of b, which row i takes: its tile takes what any of its rows does

  template <int M, int N>
  RACE_INLINE i64 tile(i64 i, i64 column) const {  // the steps it took
    V<T> acc[M][N] = {};
    take<T, M, N>(acc, a, i, column, a.k);
    i64 steps = a.k;
    if (b.k) {
      const i64 end = terms == Terms::kUpToRow ? min_of(b.k, i + M) : b.k;
      const i64 begin = terms == Terms::kFromRow ? i : 0;
      const Pair<T> some{b.x + begin * b.xk, b.xk, b.xi, b.rows + begin * b.ld, b.ld, end - begin};
      take<T, M, N>(acc, some, i, column, some.k);
      steps += some.k;
    }
    into(i, column, acc);
    return steps;
  }
  template <int N>
  RACE_INLINE void panel(i64 m, i64 column, Ahead* ahead) const {
    constexpr int M = RACE_BYTES == 64 && N < 4 ? 8 : 4;
    i64 i = 0, steps = 0;
    for (; i + M <= m; i += M) {
      steps += tile<M, N>(i, column);
      if (M * N == 16 && ahead) {  // smaller tiles are too short for it
        ahead->ask(steps);
        steps = 0;
      }
    }
    if (M == 8 && i + 4 <= m) {
      steps += tile<4, N>(i, column);
      i += 4;
    }
    if (i + 2 <= m) {
      steps += tile<2, N>(i, column);
      i += 2;
    }
    if (i < m) steps += tile<1, N>(i, column);
    if (steps && ahead) ahead->ask(steps);
  }
};

// For m rows i and `columns` columns (a multiple of W), lanes along columns: both pairs' sums, into `into`.
template <class T, class Into>
__attribute__((noinline)) void combine(const Combine<T, Into>& c, i64 m, i64 columns, Ahead* ahead) {
  const Combine<T, Into> copy = c;
  i64 column = 0;
  if constexpr (RACE_BYTES == 64)
    for (; column + 4 * W<T> <= columns; column += 4 * W<T>) copy.template panel<4>(m, column, ahead);
  for (; column + 2 * W<T> <= columns; column += 2 * W<T>)
    copy.template panel<2>(m, column, ahead);
  if (column < columns) copy.template panel<1>(m, column, ahead);
}
// Two of them in turns, panel by panel: rows that both read are read once from further away.
template <class T, class Into, class Also>
__attribute__((noinline)) void combine_both(const Combine<T, Into>& c, i64 m, const Combine<T, Also>& d, i64 n,
                                            i64 columns, Ahead* ahead) {
  const Combine<T, Into> one = c;
  const Combine<T, Also> two = d;
  i64 column = 0;
  if constexpr (RACE_BYTES == 64)
    for (; column + 4 * W<T> <= columns; column += 4 * W<T>) {
      one.template panel<4>(m, column, ahead);
      two.template panel<4>(n, column, ahead);
    }
  for (; column + 2 * W<T> <= columns; column += 2 * W<T>) {
    one.template panel<2>(m, column, ahead);
    two.template panel<2>(n, column, ahead);
  }
  if (column < columns) {
    one.template panel<1>(m, column, ahead);
    two.template panel<1>(n, column, ahead);
  }
}

template <class T>
RACE_INLINE void set_product(T* out, i64 ldo, i64 m, i64 columns, Pair<T> a, Pair<T> b = {}, Terms terms = Terms::kAll,
                             Ahead* ahead = nullptr) {
  combine<T, Set<T>>({{out, ldo}, a, b, terms}, m, columns, ahead);
}
template <class T>
RACE_INLINE void add_product(T* out, i64 ldo, i64 m, i64 columns, Pair<T> a, T factor = 1, T* second = nullptr,
                             Ahead* ahead = nullptr) {
  combine<T, Add<T>>({{out, ldo, second, factor}, a, {}, Terms::kAll}, m, columns, ahead);
}

}  // namespace
}  // namespace RACE_NAMESPACE
}  // namespace race
