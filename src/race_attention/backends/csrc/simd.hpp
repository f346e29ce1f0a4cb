// Vectors of T, RACE_BYTES wide, on the vector extensions of GCC and clang; exp and tanh on them.
//
// Everything lies in an unnamed namespace inside the instruction set's own, so that no copy of a function compiled
// for one instruction set can be linked into another. For the same reason no function of the standard library is
// called here that might be inlined from a template.
#pragma once

#include "problem.hpp"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define RACE_INLINE inline __attribute__((always_inline))

namespace race {
namespace RACE_NAMESPACE {
namespace {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using Int = std::int32_t;
  typedef float V __attribute__((vector_size(RACE_BYTES)));
  typedef float U __attribute__((vector_size(RACE_BYTES), aligned(4), may_alias));
  typedef Int I __attribute__((vector_size(RACE_BYTES)));
};
template <>
struct Simd<double> {
  using Int = std::int64_t;
  typedef double V __attribute__((vector_size(RACE_BYTES)));
  typedef double U __attribute__((vector_size(RACE_BYTES), aligned(8), may_alias));
  typedef Int I __attribute__((vector_size(RACE_BYTES)));
};
template <class T>
using V = typename Simd<T>::V;
template <class T>
using IV = typename Simd<T>::I;
template <class T>
constexpr int W = RACE_BYTES / sizeof(T);

template <class T>
RACE_INLINE V<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::U*>(p);
}
template <class T>
RACE_INLINE void store(T* p, V<T> x) {
  *reinterpret_cast<typename Simd<T>::U*>(p) = x;
}
template <class T>
RACE_INLINE void put(T* p, V<T> x) {  // `store` inside classes that have a member of that name
  store<T>(p, x);
}

// Stores past the caches to memory nobody reads soon: without reading the lines first, which would be a fifth of a
// forward's traffic. `p` is aligned to a vector. `finish_streams` before another thread may look.
#if RACE_BYTES == 64 && defined(__AVX512F__)
RACE_INLINE void stream(void* p, V<float> x) { _mm512_stream_ps(static_cast<float*>(p), x); }
#elif RACE_BYTES == 32 && defined(__AVX2__)
RACE_INLINE void stream(void* p, V<float> x) { _mm256_stream_ps(static_cast<float*>(p), x); }
#elif RACE_BYTES == 16 && defined(__SSE2__)
RACE_INLINE void stream(void* p, V<float> x) { _mm_stream_ps(static_cast<float*>(p), x); }
#else
RACE_INLINE void stream(void* p, V<float> x) { *static_cast<V<float>*>(p) = x; }
#endif
RACE_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
RACE_INLINE V<T> splat(T x) {
  return x - V<T>{};  // x + 0 would be an addition: it is not x where x is -0
}
RACE_INLINE i64 min_of(i64 a, i64 b) { return a < b ? a : b; }
RACE_INLINE i64 max_of(i64 a, i64 b) { return a > b ? a : b; }
RACE_INLINE i64 round_up(i64 n, i64 unit) { return (n + unit - 1) / unit * unit; }

// ---- bfloat16 ---------------------------------------------------------------------------------------

// To bfloat16: to nearest, ties to even; NaN stays NaN.
typedef std::uint16_t Half __attribute__((vector_size(RACE_BYTES / 2)));
RACE_INLINE Half narrow(V<float> x) {
  typedef std::uint32_t Bits __attribute__((vector_size(RACE_BYTES)));
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits kept = (bits & 0x7fffffffu) > 0x7f800000u ? Bits{} + 0x7fc0u : rounded;
  return __builtin_convertvector(kept, Half);
}
// Two of them side by side, without a way through memory that the next load would wait for. `native`: the processor
// has an instruction for it (one for twenty), which writes 0 for what is denormal.
RACE_INLINE V<float> narrow_pair(V<float> x, V<float> y, bool native) {
#if RACE_BYTES == 64 && defined(__AVX512F__)
  if (native) {  // by name: this file is compiled for processors without, too
    V<float> z;
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(z) : "v"(x), "v"(y));
    return z;
  }
  return (V<float>)_mm512_inserti64x4(_mm512_zextsi256_si512((__m256i)narrow(x)), (__m256i)narrow(y), 1);
#elif RACE_BYTES == 32 && defined(__AVX2__)
  (void)native;
  return (V<float>)_mm256_set_m128i((__m128i)narrow(y), (__m128i)narrow(x));
#else
  (void)native;
  const Half both[2] = {narrow(x), narrow(y)};
  V<float> z;
  __builtin_memcpy(&z, both, sizeof z);
  return z;
#endif
}
// W bfloat16s from memory.
RACE_INLINE V<float> widen_row(const std::uint16_t* p) {
#if RACE_BYTES == 64 && defined(__AVX512F__)
  return (V<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif RACE_BYTES == 32 && defined(__AVX2__)
  return (V<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  typedef std::uint32_t Bits __attribute__((vector_size(RACE_BYTES)));
  Half x;
  __builtin_memcpy(&x, p, sizeof x);
  return (V<float>)(__builtin_convertvector(x, Bits) << 16);
#endif
}

// ---- sums across lanes --------------------------------------------------------------------------------

template <int... Is>
struct Lanes {};

template <class T, int... Is>
RACE_INLINE V<T> shuffle(V<T> a, V<T> b, Lanes<Is...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Is...);
#else
  return __builtin_shuffle(a, b, IV<T>{Is...});
#endif
}

// For W vectors the vector of their W sums, in order: W - 1 additions and twice as many shuffles. First halves are
// added until each 128 bits belong to one vector, then within them.
template <class T, int Width>
struct Sums;

#if RACE_BYTES == 16
template <>
struct Sums<float, 4> {
  static RACE_INLINE V<float> within(V<float>* z) {
    using A = Lanes<0, 1, 4, 5>;
    using B = Lanes<2, 3, 6, 7>;
    V<float> x = shuffle<float>(z[0], z[1], A{}) + shuffle<float>(z[0], z[1], B{});
    V<float> y = shuffle<float>(z[2], z[3], A{}) + shuffle<float>(z[2], z[3], B{});
    return shuffle<float>(x, y, Lanes<0, 2, 4, 6>{}) + shuffle<float>(x, y, Lanes<1, 3, 5, 7>{});
  }
  static RACE_INLINE V<float> of(V<float>* a) { return within(a); }
};
template <>
struct Sums<double, 2> {
  static RACE_INLINE V<double> of(V<double>* z) {
    return shuffle<double>(z[0], z[1], Lanes<0, 2>{}) + shuffle<double>(z[0], z[1], Lanes<1, 3>{});
  }
};
#elif RACE_BYTES == 32
template <>
struct Sums<float, 8> {
  static RACE_INLINE V<float> of(V<float>* a) {
    V<float> z[4];
    for (int i = 0; i < 4; ++i)
      z[i] = shuffle<float>(a[i], a[i + 4], Lanes<0, 1, 2, 3, 8, 9, 10, 11>{}) +
             shuffle<float>(a[i], a[i + 4], Lanes<4, 5, 6, 7, 12, 13, 14, 15>{});
    using A = Lanes<0, 1, 8, 9, 4, 5, 12, 13>;
    using B = Lanes<2, 3, 10, 11, 6, 7, 14, 15>;
    V<float> x = shuffle<float>(z[0], z[1], A{}) + shuffle<float>(z[0], z[1], B{});
    V<float> y = shuffle<float>(z[2], z[3], A{}) + shuffle<float>(z[2], z[3], B{});
    return shuffle<float>(x, y, Lanes<0, 2, 8, 10, 4, 6, 12, 14>{}) +
           shuffle<float>(x, y, Lanes<1, 3, 9, 11, 5, 7, 13, 15>{});
  }
};
template <>
struct Sums<double, 4> {
  static RACE_INLINE V<double> of(V<double>* a) {
    V<double> z[2];
    for (int i = 0; i < 2; ++i)
      z[i] = shuffle<double>(a[i], a[i + 2], Lanes<0, 1, 4, 5>{}) + shuffle<double>(a[i], a[i + 2], Lanes<2, 3, 6, 7>{});
    return shuffle<double>(z[0], z[1], Lanes<0, 4, 2, 6>{}) + shuffle<double>(z[0], z[1], Lanes<1, 5, 3, 7>{});
  }
};
#elif RACE_BYTES == 64
template <>
struct Sums<float, 16> {
  static RACE_INLINE V<float> halves(V<float> a, V<float> b) {
    return shuffle<float>(a, b, Lanes<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>{}) +
           shuffle<float>(a, b, Lanes<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>{});
  }
  static RACE_INLINE V<float> of(V<float>* a) {
    V<float> z[4];
    for (int i = 0; i < 4; ++i) {
      V<float> x = halves(a[i], a[i + 4]), y = halves(a[i + 8], a[i + 12]);
      z[i] = shuffle<float>(x, y, Lanes<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>{}) +
             shuffle<float>(x, y, Lanes<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>{});
    }
    using A = Lanes<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>;
    using B = Lanes<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>;
    V<float> x = shuffle<float>(z[0], z[1], A{}) + shuffle<float>(z[0], z[1], B{});
    V<float> y = shuffle<float>(z[2], z[3], A{}) + shuffle<float>(z[2], z[3], B{});
    return shuffle<float>(x, y, Lanes<0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30>{}) +
           shuffle<float>(x, y, Lanes<1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31>{});
  }
};
template <>
struct Sums<double, 8> {
  static RACE_INLINE V<double> halves(V<double> a, V<double> b) {
    return shuffle<double>(a, b, Lanes<0, 1, 2, 3, 8, 9, 10, 11>{}) +
           shuffle<double>(a, b, Lanes<4, 5, 6, 7, 12, 13, 14, 15>{});
  }
  static RACE_INLINE V<double> of(V<double>* a) {
    V<double> z[2];
    for (int i = 0; i < 2; ++i) {
      V<double> x = halves(a[i], a[i + 2]), y = halves(a[i + 4], a[i + 6]);
      z[i] = shuffle<double>(x, y, Lanes<0, 1, 4, 5, 8, 9, 12, 13>{}) +
             shuffle<double>(x, y, Lanes<2, 3, 6, 7, 10, 11, 14, 15>{});
    }
    return shuffle<double>(z[0], z[1], Lanes<0, 8, 2, 10, 4, 12, 6, 14>{}) +
           shuffle<double>(z[0], z[1], Lanes<1, 9, 3, 11, 5, 13, 7, 15>{});
  }
};
#endif

template <class T>
RACE_INLINE V<T> sums(V<T>* a) {
  return Sums<T, W<T>>::of(a);
}
template <class T>
RACE_INLINE T sum(V<T> a) {
  T total = 0;
  for (int i = 0; i < W<T>; ++i) total += a[i];
  return total;
}

// ---- exp and tanh --------------------------------------------------------------------------------------

template <class T>
RACE_INLINE V<T> select(IV<T> mask, V<T> yes, V<T> no) {
  return mask ? yes : no;
}
template <class T>
RACE_INLINE bool any(IV<T> mask) {
#if RACE_BYTES == 64 && defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif RACE_BYTES == 32 && defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  bool found = false;
  for (int i = 0; i < W<T>; ++i) found |= mask[i] != 0;
  return found;
#endif
}
RACE_INLINE V<float> coarse_reciprocal(V<float> x) {  // to 6e-5
#if RACE_BYTES == 64 && defined(__AVX512F__)
  return _mm512_rcp14_ps(x);
#else
  return 1.0f / x;
#endif
}
// 1 / x for x far from the ends of the range, within 1 ulp: a division of 16 numbers holds a processor's unit for 16 cycles.
RACE_INLINE V<float> reciprocal(V<float> x) {
#if RACE_BYTES == 64 && defined(__AVX512F__)
  const V<float> y = _mm512_rcp14_ps(x);
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}
RACE_INLINE V<double> reciprocal(V<double> x) { return 1.0 / x; }
template <bool Coarse, class Vector>
RACE_INLINE Vector quotient(Vector x) {
  if constexpr (Coarse)
    return coarse_reciprocal(x);
  else
    return reciprocal(x);
}
// exp(x) for x <= 0: within 1 ulp, and at least exp(-87) (float32) or exp(-708) (float64), which stand for 0; NaN of NaN.
// Several vectors side by side: each is a chain of operations that wait for each other.
template <int N>
RACE_INLINE void step(V<float> (&p)[N], const V<float> (&x)[N], float c) {  // of a polynomial in x
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + c;
}
template <int N>
RACE_INLINE void exp_negative(V<float> (&x)[N]) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  V<float> shifted[N], r[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    x[i] = select<float>(x[i] < -87.0f, splat<float>(-87.0f), x[i]);
    shifted[i] = x[i] * 1.44269504088896341f + magic;
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const V<float> n = shifted[i] - magic;
    r[i] = x[i] - n * 0.693359375f;
    r[i] = r[i] - n * -2.12194440e-4f;
    p[i] = r[i] * 1.9875691500e-4f + 1.3981999507e-3f;
  }
  step<N>(p, r, 8.3334519073e-3f);
  step<N>(p, r, 4.1665795894e-2f);
  step<N>(p, r, 1.6666665459e-1f);
  step<N>(p, r, 5.0000001201e-1f);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const V<float> y = p[i] * (r[i] * r[i]) + r[i] + 1.0f;
    x[i] = y * (V<float>)(((IV<float>)shifted[i] + 127) << 23);
  }
}
// The same to 8e-5, for tokens that come in bfloat16, which are themselves rounded by up to 2e-3.
template <int N>
RACE_INLINE void coarse_exp_negative(V<float> (&x)[N]) {
  const float magic = 12582912.0f;
  V<float> shifted[N], r[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    x[i] = select<float>(x[i] < -87.0f, splat<float>(-87.0f), x[i]);
    shifted[i] = x[i] * 1.44269504088896341f + magic;
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    r[i] = x[i] * 1.44269504088896341f - (shifted[i] - magic);
    p[i] = r[i] * 5.51715516e-2f + 2.42611357e-1f;
  }
  step<N>(p, r, 6.93261019e-1f);
  step<N>(p, r, 9.99928060e-1f);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = p[i] * (V<float>)(((IV<float>)shifted[i] + 127) << 23);
}

RACE_INLINE V<double> exp_negative_of(V<double> x) {
  x = select<double>(x < -708.0, splat<double>(-708.0), x);
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  V<double> shifted = x * 1.4426950408889634074 + magic;
  V<double> n = shifted - magic;
  V<double> r = x - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  V<double> p = splat<double>(1.0 / 6227020800.0);  // Taylor: |r| <= ln(2) / 2 leaves 5e-18
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  V<double> y = p * (r * r) + r + 1.0;
  return y * (V<double>)(((IV<double>)shifted + 1023) << 52);
}

template <int N>
RACE_INLINE void exp_negative(V<double> (&x)[N]) {
  for (int i = 0; i < N; ++i) x[i] = exp_negative_of(x[i]);
}

// tanh(x) / x - 1 for |x| < 0.625, as a function of x^2 (Cephes).
RACE_INLINE V<double> tanh_small(V<double> z) {
  V<double> p = splat<double>(-9.64399179425052238628e-1);
  p = p * z - 9.92877231001918586564e1;
  p = p * z - 1.61468768441708447952e3;
  V<double> q = z + 1.12811678491632931402e2;
  q = q * z + 2.23548839060100448583e3;
  q = q * z + 4.84406305325125486048e3;
  return p / q * z;
}

// tanh(x) within 2 ulp, and where asked for its derivative 4e / (1 + e)^2 with e = exp(-2 |x|), which never cancels.
template <bool Slope, int N>
RACE_INLINE void tanh_of(V<float> (&x)[N], V<float> (&slope)[N]) {
  V<float> size[N], e[N], z[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    size[i] = select<float>(x[i] < 0.0f, -x[i], x[i]);
    e[i] = size[i] * -2.0f;
    z[i] = size[i] * size[i];
    p[i] = z[i] * -5.70498872745e-3f + 2.06390887954e-2f;  // tanh(x) / x - 1 for |x| < 0.625 (Cephes)
  }
  exp_negative<N>(e);
  step<N>(p, z, -5.37397155531e-2f);
  step<N>(p, z, 1.33314422036e-1f);
  step<N>(p, z, -3.33332819422e-1f);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const V<float> r = reciprocal(e[i] + 1.0f);
    if (Slope) slope[i] = 4.0f * e[i] * (r * r);
    const V<float> large = 1.0f - 2.0f * e[i] * r, small = size[i] * (p[i] * z[i]) + size[i];
    const V<float> t = select<float>(size[i] < 0.625f, small, large);
    x[i] = select<float>(x[i] < 0.0f, -t, t);
  }
}
// The same to 1.4e-4: x P(x^2) / Q(x^2), fitted to the least relative error up to where tanh is 1.
template <bool Slope, int N>
RACE_INLINE void coarse_tanh_of(V<float> (&x)[N], V<float> (&slope)[N]) {
  V<float> p[N], q[N], z[N], e[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const V<float> most = splat<float>(9.02f);
    if (Slope) e[i] = select<float>(x[i] < 0.0f, x[i], -x[i]) * 2.0f;
    x[i] = select<float>(x[i] > most, most, select<float>(x[i] < -most, -most, x[i]));
    z[i] = x[i] * x[i];
    p[i] = z[i] * 1.16914764e-3f + 1.08635783e-1f;
    q[i] = z[i] * 3.66009535e-5f + 1.53976829e-2f;
  }
  step<N>(p, z, 9.99924244e-1f);
  step<N>(q, z, 4.41568941e-1f);
  step<N>(q, z, 1.0f);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = x[i] * p[i] * coarse_reciprocal(q[i]);
  if (!Slope) return;
  coarse_exp_negative<N>(e);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const V<float> r = coarse_reciprocal(e[i] + 1.0f);
    slope[i] = 4.0f * e[i] * (r * r);
  }
}
template <bool Slope, int N>
RACE_INLINE void tanh_of(V<double> (&x)[N], V<double> (&slope)[N]) {
  for (int i = 0; i < N; ++i) {
    const V<double> size = select<double>(x[i] < 0.0, -x[i], x[i]);
    const V<double> e = exp_negative_of(size * -2.0), r = reciprocal(e + 1.0);
    if (Slope) slope[i] = 4.0 * e * (r * r);
    const V<double> large = 1.0 - 2.0 * e * r, small = size * tanh_small(size * size) + size;
    const V<double> t = select<double>(size < 0.625, small, large);
    x[i] = select<double>(x[i] < 0.0, -t, t);
  }
}

}  // namespace
}  // namespace RACE_NAMESPACE
}  // namespace race
