// The two products on the matrix tiles of AMX, for bfloat16 tokens. Included by products.hpp where RACE_TILES is set.
//
// A tile is 16 rows of 64 bytes. One instruction adds to C (16 x 16 float32) the product of A (16 x 32 bfloat16) and B
// (32 x 16, two rows of it side by side in one row of the tile): sixteen times what vectors do in that time. What is
// not bfloat16 by itself is taken in two parts, x = high + low, both bfloat16, so that 16 bits of it count. Sums are
// float32. Preparing the tiles takes longer than multiplying them.
#pragma once

namespace race {
namespace RACE_NAMESPACE {
namespace {

constexpr i64 kTile = 512;  // bfloat16 numbers of a tile of A or B

#ifdef RACE_TILES_EMULATED  // for machines without them: the same arithmetic, slowly
struct TileRegister {
  float c[16][16];
  std::uint16_t ab[16][32];
};
inline thread_local TileRegister tile_register[8];
inline float of_half(std::uint16_t x) {
  const std::uint32_t bits = std::uint32_t(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
#define RACE_TILE_ZERO(n) __builtin_memset(tile_register[n].c, 0, 1024)
#define RACE_TILE_LOAD(n, at, stride)     \
  for (int tile_i = 0; tile_i < 16; ++tile_i) \
  __builtin_memcpy(tile_register[n].ab[tile_i], (const char*)(at) + tile_i * (stride), 64)
#define RACE_TILE_STORE(n, at, stride)    \
  for (int tile_i = 0; tile_i < 16; ++tile_i) \
  __builtin_memcpy((char*)(at) + tile_i * (stride), tile_register[n].c[tile_i], 64)
inline void emulate(int c, int a, int b) {
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 32; ++k)
      for (int j = 0; j < 16; ++j)
        tile_register[c].c[i][j] += of_half(tile_register[a].ab[i][k]) * of_half(tile_register[b].ab[k / 2][2 * j + k % 2]);
}
#define RACE_TILE_MULTIPLY(c, a, b) emulate(c, a, b)
inline void tiles_begin() {}
inline void tiles_end() {}
#else
#define RACE_TILE_ZERO(n) _tile_zero(n)
#define RACE_TILE_LOAD(n, at, stride) _tile_loadd(n, at, stride)
#define RACE_TILE_STORE(n, at, stride) _tile_stored(n, at, stride)
#define RACE_TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
inline void tiles_begin() {
  struct alignas(64) {
    std::uint8_t palette, start, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
  } shape = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  _tile_loadconfig(&shape);
}
inline void tiles_end() { _tile_release(); }
#endif

typedef std::uint32_t Words __attribute__((vector_size(64)));
using Vf = V<float>;

// Where the calling thread prepares tiles; `work` sets it.
struct TileRoom {
  std::uint16_t *a, *b, *right;
  float* c;  // [16][32]
};
inline thread_local TileRoom tile_room;

RACE_INLINE i64 tiles_of(i64 n, i64 unit) { return (n + unit - 1) / unit; }
// How many tiles the largest product of a problem takes, on each side.
RACE_INLINE i64 most_tiles(i64 states, i64 projections, i64 size) {
  return 6 * (tiles_of(max_of(states, projections), 32) + tiles_of(size, 32) + 2);
}

// x as high + low: the high part keeps the leading 8 bits, and what is left is exact.
RACE_INLINE Vf high_part(Vf x) { return (Vf)((Words)x & 0xffff0000u); }
RACE_INLINE Vf low_part(Vf x) { return x - high_part(x); }
RACE_INLINE Vf rounded(Vf x) {  // to bfloat16
  const Words bits = (Words)x;
  return (Vf)((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}
RACE_INLINE Vf load_part(const float* p, i64 n) {  // the first n numbers of 16, 0 behind them
  if (n >= 16) return load(p);
  Vf x = {};
  for (i64 i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
// Lane by lane x and y side by side, cut to bfloat16.
RACE_INLINE Vf side_by_side(Vf x, Vf y) { return (Vf)(((Words)x >> 16) | ((Words)y & 0xffff0000u)); }
// x[0 .. 15], y[0 .. 15] in a row, rounded to bfloat16.
RACE_INLINE Vf in_a_row(Vf x, Vf y) {
#if defined(__AVX512BF16__)
  return (Vf)_mm512_cvtne2ps_pbh(y, x);
#else
  typedef std::uint16_t Half __attribute__((vector_size(32)));
  const Words p = (Words)x, q = (Words)y;
  const Half h[2] = {__builtin_convertvector((p + 0x7fffu + ((p >> 16) & 1u)) >> 16, Half),
                     __builtin_convertvector((q + 0x7fffu + ((q >> 16) & 1u)) >> 16, Half)};
  Vf z;
  __builtin_memcpy(&z, h, 64);
  return z;
#endif
}

RACE_INLINE void transpose(Vf (&x)[16]) {
  Vf y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    y[i] = shuffle<float>(x[i], x[i + 1], Lanes<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>{});
    y[i + 1] = shuffle<float>(x[i], x[i + 1], Lanes<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>{});
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 16
    for (int j = 0; j < 2; ++j) {
      const Vf p = y[i + j], q = y[i + j + 2];
      x[i + 2 * j] = shuffle<float>(p, q, Lanes<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>{});
      x[i + 2 * j + 1] = shuffle<float>(p, q, Lanes<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>{});
    }
  // x[4 n + m] holds in its four quarters columns m, m + 4, m + 8, m + 12 of rows 4 n .. 4 n + 3.
#pragma GCC unroll 16
  for (int m = 0; m < 4; ++m) {
    const Vf a = x[m], b = x[m + 4], c = x[m + 8], d = x[m + 12];
    const Vf ab = shuffle<float>(a, b, Lanes<0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23>{});
    const Vf cd = shuffle<float>(c, d, Lanes<0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23>{});
    const Vf ab2 = shuffle<float>(a, b, Lanes<8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31>{});
    const Vf cd2 = shuffle<float>(c, d, Lanes<8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31>{});
    using First = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>;
    using Second = Lanes<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>;
    y[m] = shuffle<float>(ab, cd, First{});
    y[m + 4] = shuffle<float>(ab, cd, Second{});
    y[m + 8] = shuffle<float>(ab2, cd2, First{});
    y[m + 12] = shuffle<float>(ab2, cd2, Second{});
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}
RACE_INLINE void put_tile(std::uint16_t* to, const Vf (&x)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store<float>(reinterpret_cast<float*>(to + i * 32), x[i]);
}

// How the parts of both sides meet. Where the sum has at most 16 terms, a tile holds two parts of each.
struct Parts {
  bool folded, low_a, low_b;
  i64 chunks;  // of 32 terms
  i64 a_tiles() const { return folded ? 1 : chunks * (low_a ? 2 : 1); }
  i64 b_tiles() const { return folded ? (low_a && low_b ? 2 : 1) : chunks * (low_b ? 2 : 1); }
};
template <class T>
RACE_INLINE Parts parts_of(const Pair<T>& p) {
  return {p.k <= 16, !p.exact_x, !p.exact_rows, tiles_of(p.k, 32)};
}

// A of rows i .. i + 15 (of `count`) from x[k * xk + i * xi]. Terms behind the last and rows behind the last are 0.
RACE_INLINE void make_a(std::uint16_t* to, const Pair<float>& p, const Parts& parts, i64 i, i64 count) {
  const float* x = p.x + i * p.xi;
  const i64 rows = min_of(16, count - i);
  for (i64 chunk = 0; chunk < parts.chunks; ++chunk) {
    const i64 k0 = chunk * 32, terms = min_of(32, p.k - k0);
    Vf high[16] = {}, low[16] = {};
    if (p.xi == 1) {  // x is [k][16]: lanes along i
      for (i64 r = 0; 2 * r < terms; ++r) {
        const Vf even = load(x + (k0 + 2 * r) * p.xk);
        const Vf odd = 2 * r + 1 < terms ? load(x + (k0 + 2 * r + 1) * p.xk) : Vf{};
        high[r] = side_by_side(even, odd);
        // The low parts are rounded: cut, all of them would err to one side.
        if (parts.low_a) low[r] = side_by_side(rounded(low_part(even)), rounded(low_part(odd)));
      }
      if (parts.folded)
        for (int r = 0; r < 8; ++r) high[r + 8] = parts.low_a ? low[r] : parts.low_b ? high[r] : Vf{};
      transpose(high);
      if (parts.low_a && !parts.folded) transpose(low);
    } else {  // x is [i][k]
      for (i64 m = 0; m < rows; ++m) {
        const float* at = x + m * p.xi + k0;
        const Vf first = load_part(at, terms), second = parts.folded ? Vf{} : load_part(at + 16, terms - 16);
        if (parts.folded) {
          high[m] = in_a_row(high_part(first), parts.low_a ? low_part(first) : parts.low_b ? first : Vf{});
        } else {
          high[m] = in_a_row(high_part(first), high_part(second));
          if (parts.low_a) low[m] = in_a_row(low_part(first), low_part(second));
        }
      }
    }
    put_tile(to, high);
    to += kTile;
    if (!parts.low_a || parts.folded) continue;
    put_tile(to, low);
    to += kTile;
  }
}

// B of columns `column` .. + 15 from rows[k * ld + column].
RACE_INLINE void make_b(std::uint16_t* to, const Pair<float>& p, const Parts& parts, i64 column) {
  const float* rows = p.rows + column;
  for (i64 chunk = 0; chunk < parts.chunks; ++chunk) {
    const i64 k0 = chunk * 32, terms = min_of(32, p.k - k0);
    float* const high = reinterpret_cast<float*>(to);
    float* const low = reinterpret_cast<float*>(to + kTile);
    for (i64 r = 0; r < (parts.folded ? 8 : 16); ++r) {
      const Vf even = 2 * r < terms ? load(rows + (k0 + 2 * r) * p.ld) : Vf{};
      const Vf odd = 2 * r + 1 < terms ? load(rows + (k0 + 2 * r + 1) * p.ld) : Vf{};
      const Vf x = side_by_side(even, odd);
      store<float>(high + r * 16, x);
      const Vf rest = parts.low_b ? side_by_side(low_part(even), low_part(odd)) : Vf{};
      if (!parts.folded) {
        if (parts.low_b) store<float>(low + r * 16, rest);
      } else if (parts.low_a && parts.low_b) {  // two tiles: high twice, low twice
        store<float>(high + (r + 8) * 16, x);
        store<float>(low + r * 16, rest);
        store<float>(low + (r + 8) * 16, rest);
      } else {
        store<float>(high + (r + 8) * 16, parts.low_b ? rest : x);
      }
    }
    to += parts.b_tiles() / parts.chunks * kTile;
  }
}

// C (tiles 0 and 1: two tiles of columns) += A B.
template <int N>
RACE_INLINE void multiply(const Parts& parts, const std::uint16_t* a, const std::uint16_t* b, i64 b_further) {
  const i64 as = parts.a_tiles() / parts.chunks * kTile, bs = parts.b_tiles() / parts.chunks * kTile;
  for (i64 chunk = 0; chunk < parts.chunks; ++chunk, a += as, b += bs) {
    RACE_TILE_LOAD(4, a, 64);
    RACE_TILE_LOAD(6, b, 64);
    RACE_TILE_MULTIPLY(0, 4, 6);
    if (N == 2) {
      RACE_TILE_LOAD(7, b + b_further, 64);
      RACE_TILE_MULTIPLY(1, 4, 7);
    }
    if (parts.low_a && !parts.folded) {
      RACE_TILE_LOAD(5, a + kTile, 64);
      RACE_TILE_MULTIPLY(0, 5, 6);
      if (N == 2) RACE_TILE_MULTIPLY(1, 5, 7);
    }
    if (parts.low_b && (!parts.folded || parts.low_a)) {
      RACE_TILE_LOAD(6, b + kTile, 64);
      RACE_TILE_MULTIPLY(0, 4, 6);
      if (N == 2) {
        RACE_TILE_LOAD(7, b + b_further + kTile, 64);
        RACE_TILE_MULTIPLY(1, 4, 7);
      }
    }
  }
}

// Both pairs of one product: their parts, and where their tiles lie.
template <class Into>
struct TileCombine {
  const Combine<float, Into>& c;
  i64 m;
  const Parts pa, pb;
  const std::uint16_t* a;

  TileCombine(const Combine<float, Into>& combine, i64 rows, std::uint16_t* to)
      : c(combine), m(rows), pa(parts_of(combine.a)), pb(parts_of(combine.b)), a(to) {
    for (i64 i = 0; i < m; i += 16) {
      make_a(to, c.a, pa, i, m);
      to += pa.a_tiles() * kTile;
      if (!c.b.k) continue;
      make_a(to, c.b, pb, i, m);
      to += pb.a_tiles() * kTile;
    }
  }
  std::uint16_t* behind() const {
    return const_cast<std::uint16_t*>(a) + tiles_of(m, 16) * (pa.a_tiles() + (c.b.k ? pb.a_tiles() : 0)) * kTile;
  }
  template <int N>
  std::uint16_t* make_columns(const Pair<float>& pair, const Parts& parts, i64 column, std::uint16_t* to) const {
    for (int n = 0; n < N; ++n, to += parts.b_tiles() * kTile) make_b(to, pair, parts, column + n * 16);
    return to;
  }
  template <int N>
  void columns(i64 column, const std::uint16_t* of_a, const std::uint16_t* of_b) const {
    const std::uint16_t* at = a;
    for (i64 i = 0; i < m; i += 16) {
      RACE_TILE_ZERO(0);
      if (N == 2) RACE_TILE_ZERO(1);
      multiply<N>(pa, at, of_a, pa.b_tiles() * kTile);
      at += pa.a_tiles() * kTile;
      if (c.b.k) {
        multiply<N>(pb, at, of_b, pb.b_tiles() * kTile);
        at += pb.a_tiles() * kTile;
      }
      RACE_TILE_STORE(0, tile_room.c, 128);
      if (N == 2) RACE_TILE_STORE(1, tile_room.c + 16, 128);
      for (i64 r = 0; r < min_of(16, m - i); ++r) {
        Vf row[1][N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) row[0][n] = load(tile_room.c + r * 32 + n * 16);
        c.into(i + r, column, row);
      }
    }
  }
};

template <class Into, int N>
RACE_INLINE void tile_columns(const TileCombine<Into>& one, i64 column) {
  std::uint16_t* const of_b = one.template make_columns<N>(one.c.a, one.pa, column, tile_room.b);
  if (one.c.b.k) one.template make_columns<N>(one.c.b, one.pb, column, of_b);
  one.template columns<N>(column, tile_room.b, of_b);
}
template <class Into>
__attribute__((noinline)) void tile_combine(const Combine<float, Into>& c, i64 m, i64 columns, Ahead* ahead) {
  const TileCombine<Into> one(c, m, tile_room.a);
  i64 column = 0;
  for (; column + 32 <= columns; column += 32) {
    tile_columns<Into, 2>(one, column);
    if (ahead) ahead->ask(12);
  }
  if (column < columns) tile_columns<Into, 1>(one, column);
}

// Two products in turns, the second with the rows of the first's second pair: their tiles are made once.
template <class Into, class Also, int N>
RACE_INLINE void tile_columns_both(const TileCombine<Into>& one, const TileCombine<Also>& two, i64 column, bool shared) {
  std::uint16_t* const of_b = one.template make_columns<N>(one.c.a, one.pa, column, tile_room.b);
  std::uint16_t* const behind = one.template make_columns<N>(one.c.b, one.pb, column, of_b);
  if (!shared) two.template make_columns<N>(two.c.a, two.pa, column, behind);
  one.template columns<N>(column, tile_room.b, of_b);
  two.template columns<N>(column, shared ? of_b : behind, nullptr);
}
template <class Into, class Also>
__attribute__((noinline)) void tile_combine_both(const Combine<float, Into>& c, i64 m, const Combine<float, Also>& d,
                                                 i64 n, i64 columns, Ahead* ahead) {
  const TileCombine<Into> one(c, m, tile_room.a);
  const TileCombine<Also> two(d, n, one.behind());
  const bool shared = c.b.rows == d.a.rows && one.pb.folded && two.pa.folded && one.pb.low_b == two.pa.low_b &&
                      one.pb.low_a == two.pa.low_a;
  i64 column = 0;
  for (; column + 32 <= columns; column += 32) {
    tile_columns_both<Into, Also, 2>(one, two, column, shared);
    if (ahead) ahead->ask(24);
  }
  if (column < columns) tile_columns_both<Into, Also, 1>(one, two, column, shared);
}

// B of 16 rows that others are multiplied with along their dimension.
inline void make_right(std::uint16_t* b, const float* right, i64 ld, i64 d, bool exact) {
  for (i64 chunk = 0; chunk < tiles_of(d, 32); ++chunk) {
    Vf high[16], low[16];
    for (int n = 0; n < 16; ++n) {
      const float* at = right + n * ld + chunk * 32;
      const Vf first = load(at), second = d - chunk * 32 > 16 ? load(at + 16) : Vf{};
      high[n] = in_a_row(high_part(first), high_part(second));
      if (!exact) low[n] = in_a_row(low_part(first), low_part(second));
    }
    transpose(high);
    put_tile(b, high);
    b += kTile;
    if (exact) continue;
    transpose(low);
    put_tile(b, low);
    b += kTile;
  }
}
// out[a * ldo + b] = sum over d of left[a][d] right[b][d].
__attribute__((noinline)) inline void tile_dots(float* out, i64 ldo, const float* left, i64 ldl, i64 na,
                                                const std::uint16_t* right, i64 d, bool exact_left, bool exact_right,
                                                Ahead* ahead) {
  const Pair<float> p{left, 1, ldl, nullptr, 0, d, exact_left, exact_right};
  const Parts parts{false, !exact_left, !exact_right, tiles_of(d, 32)};
  for (i64 i = 0; i < na; i += 16) {
    make_a(tile_room.a, p, parts, i, na);
    RACE_TILE_ZERO(0);
    multiply<1>(parts, tile_room.a, right, 0);
    if (na - i >= 16) {
      RACE_TILE_STORE(0, out + i * ldo, ldo * 4);
    } else {
      RACE_TILE_STORE(0, tile_room.c, 64);
      for (i64 r = 0; r < na - i; ++r) store<float>(out + (i + r) * ldo, load(tile_room.c + r * 16));
    }
    if (ahead) ahead->ask(24);
  }
}

}  // namespace
}  // namespace RACE_NAMESPACE
}  // namespace race
