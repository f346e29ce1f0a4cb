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

// A block of rows of tokens in the arithmetic's dtype.
template <class T>
struct Tile {
  const T* p;
  i64 ld;
  RACE_INLINE const T* row(i64 i) const { return p + i * ld; }
};

template <class T, class Stored>
RACE_INLINE const Stored* at(const Tokens& x, i64 b, i64 t, i64 h) {
  return static_cast<const Stored*>(x.data) + b * x.b + t * x.t + h * x.h;
}

// Tokens t .. t + n - 1 of head h, each of `size` numbers, as `rows` rows of `padded` numbers: filled with zeros
// behind, and where `part` is 0 (what takes no part may hold anything, NaN included). Read in place where possible.
template <class T>
__attribute__((noinline)) Tile<T> load_tile(const Problem& p, const Tokens& x, i64 b, i64 t, i64 h, i64 n, i64 rows,
                                            i64 size, i64 padded, const T* part, T* room) {
  const bool half = p.a->store == kBFloat16;
  bool all = true;
  if (part)
    for (i64 i = 0; i < n; ++i) all = all && part[i] != 0;
  if (!half && x.d == 1 && size == padded && n == rows && all) return {at<T, T>(x, b, t, h), x.t};
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
  const T* w;  // [L * P][padded D]
  T beta;
};

template <class T>
__attribute__((noinline)) void hash(const Hash<T>& f, Tile<T> x, i64 rows, const T* part, T* y, T* phi,
                                    const Slopes<T>* slopes, Ahead* ahead) {
  const T floor = T(1) / 8192;
  const i64 projections = f.tables * f.planes;
  dots<T>(y, C, f.w, f.padded_dim, projections, x.p, x.ld, rows, f.padded_dim, ahead);
  for (i64 t = 0; t < rows; t += W<T>)
    for (i64 l = 0; l < f.tables; ++l) {
      T* table = phi + l * f.buckets * C + t;
      store<T>(table, load(part + t));
      for (i64 k = 0; k < f.planes; ++k) {
        const i64 at = (l * f.planes + k) * C + t;
        V<T> slope;
        V<T> sign = tanh_and_slope<T>(load(y + at), &slope);
        V<T> z = (T(2) * f.beta) * sign;
        V<T> e = exp_negative(select<T>(z < T(0), z, -z));
        V<T> r = reciprocal(e + T(1));
        V<T> near = (1 - floor) * r + floor / 2, far = (1 - floor) * (e * r) + floor / 2;
        V<T> up = select<T>(z < T(0), far, near), down = select<T>(z < T(0), near, far);
        if (slopes) {
          V<T> dz = (1 - floor) * e * (r * r);
          store<T>(slopes->inverse_up + at, reciprocal(up));
          store<T>(slopes->inverse_down + at, reciprocal(down));
          store<T>(slopes->to_projection + at, dz * (T(2) * f.beta) * slope);
          store<T>(slopes->to_beta + at, dz * (T(2) * sign));
        }
        const i64 half = i64(1) << k;
        for (i64 i = 0; i < half; ++i) {
          V<T> before = load(table + i * C);
          store<T>(table + (half + i) * C, before * up);
          store<T>(table + i * C, before * down);
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
