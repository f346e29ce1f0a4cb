// Blocks of tokens: in and out of memory in any dtype and strides, and from tokens to soft buckets and back.
#pragma once

#include "products.hpp"

namespace race {
namespace RACE_NAMESPACE {
namespace {

constexpr int C = 16;  // tokens a block: a multiple of every W

// ---- in and out -----------------------------------------------------------------------------------------

RACE_INLINE float widen(std::uint16_t x) {
  std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
template <class T>
RACE_INLINE void read(T* __restrict out, const T* __restrict in, i64 n, i64 stride) {
  if (stride == 1)
    for (i64 i = 0; i < n; ++i) out[i] = in[i];
  else
    for (i64 i = 0; i < n; ++i) out[i] = in[i * stride];
}
template <class T>
RACE_INLINE void read(T* __restrict out, const std::uint16_t* __restrict in, i64 n, i64 stride) {
  i64 i = 0;
  if constexpr (sizeof(T) == 4 && RACE_BYTES > 16)
    for (; stride == 1 && i + 2 * W<T> <= n; i += 2 * W<T>) {
      const V<T> x = widen_row(in + i), y = widen_row(in + i + W<T>);
      store<T>(out + i, x);
      store<T>(out + i + W<T>, y);
    }
  if (stride == 1)
    for (; i < n; ++i) out[i] = widen(in[i]);
  else
    for (; i < n; ++i) out[i] = widen(in[i * stride]);
}
template <class T>
RACE_INLINE void write(T* __restrict out, const T* __restrict in, i64 n, i64 stride, T factor) {
  if (stride == 1)
    for (i64 i = 0; i < n; ++i) out[i] = in[i] * factor;
  else
    for (i64 i = 0; i < n; ++i) out[i * stride] = in[i] * factor;
}
// A row to bfloat16; it may be read up to a multiple of W. Copies of a length that only the call knows are slow: whole
// vectors go straight to where they belong.
RACE_INLINE void write_half(char* to, const float* row, i64 size, i64 stride, float factor, bool past_caches,
                            bool native) {
  constexpr i64 w = W<float>;
  i64 d = 0;
  if (past_caches) {  // `size` is a multiple of two vectors
    for (; d < size; d += 2 * w)
      stream(to + d * 2, narrow_pair(load(row + d) * factor, load(row + d + w) * factor, native));
    return;
  }
  for (; d < size; d += w) {
    const Half half = narrow(load(row + d) * factor);
    if (stride == 1 && d + w <= size)
      __builtin_memcpy(to + d * 2, &half, sizeof half);
    else
      for (i64 k = 0; k < min_of(w, size - d); ++k) {
        const std::uint16_t one = half[k];
        __builtin_memcpy(to + (d + k) * stride * 2, &one, 2);
      }
  }
}
RACE_INLINE void write_half(char*, const double*, i64, i64, double, bool, bool) {}  // no bfloat16 has float64 arithmetic

// A block of rows of tokens in the arithmetic's dtype; where only their projections are wanted, as they lie in memory.
template <class T>
struct Tile {
  const T* p;
  i64 ld;
  const std::uint16_t* half = nullptr;
  RACE_INLINE const T* row(i64 i) const { return p + i * ld; }
};

template <class T, class Stored>
RACE_INLINE const Stored* at(const Tokens& x, i64 b, i64 t, i64 h) {
  return static_cast<const Stored*>(x.data) + b * x.b + t * x.t + h * x.h;
}

// Whether `dots` can read so many tokens as they lie in memory.
template <class T>
RACE_INLINE bool reads_half(const Problem& p, const Tokens& x, i64 n, i64 rows, i64 size) {
  return sizeof(T) == 4 && RACE_BYTES == 64 && p.a->store == kBFloat16 && x.d == 1 && n == rows && size % (2 * W<T>) == 0;
}

// Tokens t .. t + n - 1 of head h, each of `size` numbers, as `rows` rows of `padded` numbers: filled with zeros
// behind, and where `part` is given and 0 (what takes no part may hold anything, NaN included). Read in place where possible.
template <class T>
__attribute__((noinline)) Tile<T> load_tile(const Problem& p, const Tokens& x, i64 b, i64 t, i64 h, i64 n, i64 rows,
                                            i64 size, i64 padded, const T* part, T* room) {
  const bool half = p.a->store == kBFloat16;
  if (!half && x.d == 1 && size == padded && n == rows && !part) return {at<T, T>(x, b, t, h), x.t};
  for (i64 i = 0; i < rows; ++i) {
    T* row = room + i * padded;
    if (i >= n || (part && part[i] == 0)) {
      for (i64 d = 0; d < padded; ++d) row[d] = 0;
      continue;
    }
    if (half)
      read<T>(row, at<T, std::uint16_t>(x, b, t + i, h), size, x.d);
    else
      read<T>(row, at<T, T>(x, b, t + i, h), size, x.d);
    for (i64 d = size; d < padded; ++d) row[d] = 0;
  }
  return {room, padded};
}

// Whether rows may be streamed: many of them, and each begins at a vector.
RACE_INLINE bool streams(const Problem& p, const Tokens& x, i64 size, i64 bytes) {
  const i64 ends = reinterpret_cast<i64>(x.data) | (x.b * bytes) | (x.t * bytes) | (x.h * bytes) | (size * bytes);
  return p.large && x.d == 1 && ends % RACE_BYTES == 0;
}

#if RACE_BYTES == 64
// Where rows may go straight from the registers to tokens t .. of head h.
RACE_INLINE bool emits(const Problem& p, const Tokens& x, i64 size) {
  const bool half = p.a->store == kBFloat16;
  return x.data && streams(p, x, size, half ? 2 : 4) && size % (half ? 2 * W<float> : W<float>) == 0;
}
RACE_INLINE Emit emit(const Problem& p, const Tokens& x, i64 b, i64 t, i64 h, const float* factor) {
  const i64 bytes = p.a->store == kBFloat16 ? 2 : 4;
  return {static_cast<char*>(x.data) + (b * x.b + t * x.t + h * x.h) * bytes, x.t * bytes, bytes, factor, p.bfloat16 != 0};
}
#endif

// Rows of `tile`, each multiplied by its factor, to tokens t .. t + n - 1.
template <class T>
__attribute__((noinline)) void store_tile(const Problem& p, const Tokens& x, i64 b, i64 t, i64 h, i64 n, i64 size,
                                          const T* tile, i64 ld, const T* factor) {
  const bool half = p.a->store == kBFloat16;
  const i64 bytes = half ? 2 : static_cast<i64>(sizeof(T));
  const bool past_caches = streams(p, x, size, bytes);
  for (i64 i = 0; i < n; ++i) {
    const T f = factor ? factor[i] : T(1);
    const T* row = tile + i * ld;
    char* to = static_cast<char*>(x.data) + (b * x.b + (t + i) * x.t + h * x.h) * bytes;
    if (half) {
      write_half(to, row, size, x.d, f, past_caches, p.bfloat16);
    } else if (past_caches) {
      for (i64 d = 0; d < size; d += W<T>) stream(to + d * bytes, (V<float>)(load(row + d) * f));
    } else {
      write<T>(reinterpret_cast<T*>(to), row, size, x.d, f);
    }
  }
}

// Of a block's matrix [j][i] what lies at i >= j; the rest is 0.
template <class T>
RACE_INLINE void keep_later(T* matrix, i64 count, i64 rows) {
  IV<T> lane;
  for (int i = 0; i < W<T>; ++i) lane[i] = i;
  for (i64 t = 0; t < rows; t += W<T>)
    for (i64 j = t + 1; j < count; ++j) {
      const IV<T> from = IV<T>{} + static_cast<typename Simd<T>::Int>(j - t);
      store<T>(matrix + j * C + t, select<T>(lane >= from, load(matrix + j * C + t), V<T>{}));
    }
}

// ---- soft buckets -----------------------------------------------------------------------------------------

// phi = prod_p u_{p, sign}, u = (1 - FLOOR) sigmoid(+-z) + FLOOR / 2, z = 2 beta tanh(w.x): features.py's
// factorised form of Algorithm 1, step 3. Arrays are [S or L * P][C], lanes along tokens.
template <class T>
struct Slopes {  // of each plane and token, what the backward needs
  T *inverse_up, *inverse_down;  // 1 / u
  T *to_projection, *to_beta;    // du+/dy and du+/dbeta; those of u- are their negatives
};

template <class T>
struct Hash {
  i64 tables, planes, buckets, padded_dim;
  const T *w, *split;  // [L * P][padded D], in order and in that of HalfRows
  T beta;
  bool coarse;  // tokens came in bfloat16
};

// Of N projections of W tokens: both factors in the place of the projection and in `down`.
template <class T, bool Sloped, bool Coarse, int N>
RACE_INLINE void factors(T beta, T* y, T* down, const Slopes<T>* slopes, i64 at) {
  const T floor = T(1) / 8192;
  V<T> sign[N], slope[N], e[N], z[N];
  for (int i = 0; i < N; ++i) sign[i] = load(y + at + i * C);
  if constexpr (Coarse)
    coarse_tanh_of<Sloped, N>(sign, slope);
  else
    tanh_of<Sloped, N>(sign, slope);
  for (int i = 0; i < N; ++i) {
    z[i] = (T(2) * beta) * sign[i];
    e[i] = select<T>(z[i] < T(0), z[i], -z[i]);
  }
  if constexpr (Coarse)
    coarse_exp_negative<N>(e);
  else
    exp_negative<N>(e);
  for (int i = 0; i < N; ++i) {
    const V<T> r = quotient<Coarse>(e[i] + T(1));
    const V<T> far = (1 - floor) * (e[i] * r) + floor / 2;
    const V<T> near = Coarse ? T(1) - far : (1 - floor) * r + floor / 2;  // either way their sum is 1
    const V<T> up = select<T>(z[i] < T(0), far, near), low = select<T>(z[i] < T(0), near, far);
    const i64 here = at + i * C;
    store<T>(y + here, up);
    store<T>(down + here, low);
    if constexpr (Sloped) {
      const V<T> dz = (1 - floor) * e[i] * (r * r);
      store<T>(slopes->inverse_up + here, quotient<Coarse>(up));
      store<T>(slopes->inverse_down + here, quotient<Coarse>(low));
      store<T>(slopes->to_projection + here, dz * (T(2) * beta) * slope[i]);
      store<T>(slopes->to_beta + here, dz * (T(2) * sign[i]));
    }
  }
}
template <class T, bool Sloped, bool Coarse>
RACE_INLINE void all_factors(T beta, i64 projections, T* y, T* down, const Slopes<T>* slopes, i64 t) {
  constexpr int kMost = sizeof(T) == 4 && RACE_BYTES == 64 ? 4 : 2;  // as the registers allow
  i64 n = 0;
  for (; n + kMost <= projections; n += kMost) factors<T, Sloped, Coarse, kMost>(beta, y, down, slopes, n * C + t);
  for (; n < projections; ++n) factors<T, Sloped, Coarse, 1>(beta, y, down, slopes, n * C + t);
}
template <class T>
RACE_INLINE void all_factors(const Hash<T>& f, T* y, T* down, const Slopes<T>* slopes, i64 t) {
  const i64 projections = f.tables * f.planes;
  if constexpr (sizeof(T) == 4)
    if (f.coarse)
      return slopes ? all_factors<T, true, true>(f.beta, projections, y, down, slopes, t)
                    : all_factors<T, false, true>(f.beta, projections, y, down, slopes, t);
  slopes ? all_factors<T, true, false>(f.beta, projections, y, down, slopes, t)
         : all_factors<T, false, false>(f.beta, projections, y, down, slopes, t);
}

// `y` and `down` are room for the projections.
template <class T>
__attribute__((noinline)) void hash(const Hash<T>& f, Tile<T> x, i64 rows, const T* part, T* y, T* down, T* phi,
                                    const Slopes<T>* slopes, Ahead* ahead) {
  const i64 projections = f.tables * f.planes;
#if RACE_BYTES == 64
  if constexpr (sizeof(T) == 4)
    if (x.half) dots(y, C, f.split, f.padded_dim, projections, HalfRows{x.half, x.ld}, rows, f.padded_dim, ahead);
#endif
  if (!x.half) dots<T>(y, C, f.w, f.padded_dim, projections, {x.p, x.ld}, rows, f.padded_dim, ahead);
  for (i64 t = 0; t < rows; t += W<T>) {
    all_factors(f, y, down, slopes, t);
    for (i64 l = 0; l < f.tables; ++l) {
      T* table = phi + l * f.buckets * C + t;
      store<T>(table, load(part + t));
      for (i64 k = 0; k < f.planes; ++k) {
        const i64 at = (l * f.planes + k) * C + t, half = i64(1) << k;
        const V<T> up = load(y + at), low = load(down + at);
        for (i64 i = 0; i < half; ++i) {
          V<T> before = load(table + i * C);
          store<T>(table + (half + i) * C, before * up);
          store<T>(table + i * C, before * low);
        }
      }
    }
  }
}

// From dphi (overwritten) to dy, the adjoint of the projections. With q = phi dphi, which no scale of phi changes,
// du+ = sum of q over the buckets of sign +, divided by u+. Adds to dbeta[lane]; total[t] = sum of q over all buckets.
template <class T>
__attribute__((noinline)) void hash_backward(const Hash<T>& f, i64 rows, const T* phi, T* dphi, const Slopes<T>& slopes,
                                             T* dy, T* dbeta, T* total) {
  V<T> beta = load(dbeta);
  for (i64 t = 0; t < rows; t += W<T>) {
    V<T> all = {};
    for (i64 l = 0; l < f.tables; ++l) {
      T* q = dphi + l * f.buckets * C + t;
      const T* weight = phi + l * f.buckets * C + t;
      for (i64 r = 0; r < f.buckets; ++r) store<T>(q + r * C, load(q + r * C) * load(weight + r * C));
      for (i64 k = f.planes - 1; k >= 0; --k) {
        const i64 half = i64(1) << k, at = (l * f.planes + k) * C + t;
        V<T> up = {}, down = {};
        for (i64 r = 0; r < half; ++r) {
          V<T> low = load(q + r * C), high = load(q + (half + r) * C);
          up += high;
          down += low;
          store<T>(q + r * C, low + high);
        }
        V<T> d = up * load(slopes.inverse_up + at) - down * load(slopes.inverse_down + at);
        store<T>(dy + at, d * load(slopes.to_projection + at));
        beta += d * load(slopes.to_beta + at);
      }
      all += load(q);
    }
    store<T>(total + t, all);
  }
  store<T>(dbeta, beta);
}

}  // namespace
}  // namespace RACE_NAMESPACE
}  // namespace race
