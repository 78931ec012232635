// Products on the matrix unit, of four kinds of operands.
//
// Int8x6, fp32-grade: every factor as three signed digits of 8 bits,
//
//     z = r (h + m / 256 + l / 65536),    r a power of two of its row,
//
// and six of the nine products of digits in three sums that int32 holds exactly: hh; hm + mh; hl +
// mm + lh. What is left out, ml + lm + ll, is told beforehand by `digit_scales`. The digits of a row
// are its own and the sums exact, so s_ij is a function of the two rows alone, the same in every
// body, tile and thread.
//
// Int8x8, where that would show: S has ml and lm as well, of a second sweep.
//
// Int8x3, no coarser than TF32: h and m, and three of their products in two sums: hh; hm + mh.
//
// Bf16: z itself, rounded. Here the order of additions is the instruction's.
//
// A packed operand is steps of 64 along k for 16 rows or columns, K::TILES tiles each: one for every
// digit, or one for each 32 of k. Values along k that share a word lie 16 apart, since then the four
// vectors that hold them need no permutation, and the order of k is free as long as both sides have
// it. The same words are the left operand as they come and the right one transposed, for z by rows
// (S) as well as by columns (the products with G).
//
// A block of C is 32 x K::WIDTH: its sums and two operands (bf16: four) are the eight tiles, and the
// 32 rows stay in L1 while the columns pass. Its epilogue runs between the products of the next
// block, a row after each two.
#pragma once
#include "tile.h"
#include "weights.h"

namespace directclr::DCLR_ISA {

constexpr int TV = 16 / VL;                     // vectors across a tile
constexpr int64_t kMostStep = 3 * kTileBytes;   // of any kind
constexpr int64_t kSteps = 6;                   // of 64 along k, whose 32 rows stay in L1
constexpr int64_t kHalf = 3 * 256;              // words of the sums of 16 rows of a block of C
constexpr int64_t kBlockWords = 2 * kHalf;      // int8x8: twice, the second half of ml and lm
constexpr int64_t kPanel = kTileRows;           // rows of a block of C
constexpr int64_t kGBlock = 256, kSumsBlock = 512;  // columns of a block; of G, rows as well

DCLR_INLINE int64_t steps_of(int64_t k) { return (k + 63) / 64; }

// Rows packed at a time: as many as 384 columns take 1.2 MiB for.
DCLR_INLINE int64_t packed_rows(int64_t pitch) {
  const int64_t rows = 1024 * kSteps / steps_of(pitch) / kGBlock * kGBlock;
  return rows < kGBlock ? kGBlock : rows;
}

DCLR_INLINE int64_t packed_bytes(int64_t pitch) { return steps_of(pitch) * (kMostStep / 16); }

// ---------------------------------------------------------------------------- operands

DCLR_INLINE vi nearest(vf x) {  // halves away from zero, in every instruction set
  const vi half = ((vi)x & int32_t(0x80000000)) | 0x3F000000;
  return __builtin_convertvector(x + (vf)half, vi);
}

// In bytes 0, 1 and 2 of each lane: l, m, h.
DCLR_INLINE vi balanced(vi x) { return (x + 0x808080) ^ 0x808080; }

// Digit s of values[q], in units of the last, to byte q of tile s; the most significant first.
template <int DIGITS>
DCLR_INLINE void store_digits(const vf (&values)[4], char* to) {
  vi x[4];
  DCLR_UNROLL
  for (int q = 0; q < 4; ++q) x[q] = balanced(nearest(values[q]));
  const vi even = (x[0] & 0x00FF00FF) | (x[1] << 8 & int32_t(0xFF00FF00));
  const vi odd = (x[0] >> 8 & 0x00FF00FF) | (x[1] & int32_t(0xFF00FF00));
  const vi even2 = (x[2] & 0x00FF00FF) | (x[3] << 8 & int32_t(0xFF00FF00));
  const vi odd2 = (x[2] >> 8 & 0x00FF00FF) | (x[3] & int32_t(0xFF00FF00));
  const auto put = [&](int tile, vi word) __attribute__((always_inline)) {
    *reinterpret_cast<vi_mem*>(to + tile * kTileBytes) = word;
  };
  if (DIGITS == 3) put(0, (even >> 16 & 0xFFFF) | (even2 & int32_t(0xFFFF0000)));
  put(DIGITS - 2, (odd & 0xFFFF) | odd2 << 16);
  put(DIGITS - 1, (even & 0xFFFF) | even2 << 16);
}

DCLR_INLINE vf nearest_bf16(vf x) {  // halves to even
  const vi bits = (vi)x, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & int32_t(0xFFFF0000);
  return x == x ? (vf)rounded : splat(__builtin_nanf(""));
}

// A 16 x 16 matrix of words, transposed where it lies.
DCLR_INLINE void turn_tile(float* p) {
  float copy[256];
  __builtin_memcpy(copy, p, kTileBytes);
  for (int i = 0; i < 16; i += VL) {
    for (int j = 0; j < 16; j += VL) {
      vf r[VL];
      for (int l = 0; l < VL; ++l) r[l] = load(copy + (i + l) * 16 + j);
      transpose(r);
      for (int l = 0; l < VL; ++l) store(p + (j + l) * 16 + i, r[l]);
    }
  }
}

// 16 x 64 values as a step of an operand: value(r, q, v) is vector v of row r's q-th 16, in units of
// the last digit or rounded to bf16.
template <class K, class Value>
DCLR_INLINE void pack_step(Value value, bool turn, char* to) {
  for (int r = 0; r < 16; ++r) {
    for (int v = 0; v < TV; ++v) {
      const vf x[4] = {value(r, 0, v), value(r, 1, v), value(r, 2, v), value(r, 3, v)};
      K::put(x, to + r * 64 + v * VL * 4);
    }
  }
  for (int s = 0; turn && s < K::TILES; ++s) {
    turn_tile(reinterpret_cast<float*>(to + s * kTileBytes));
  }
}

// `count` rows of z for S from `first` on, k along d: as the left side, or transposed as the right
// one. From there to the next `to_rows` they are zero. `scale` is of digits only.
template <class K>
static void pack_for_s(const Pair& pair, const float* z, const float* scale, int64_t first,
                       int64_t count, int64_t to_rows, bool turn, char* out) {
  const int64_t pitch = pair.pitch, steps = steps_of(pair.d);
  for (int64_t i = 0; i < round_up(count, to_rows); i += 16) {
    float unit[16];
    for (int r = 0; K::DIGITS && r < 16; ++r) {
      unit[r] = i + r < count ? K::UNITS / scale[first + i + r] : 0.0f;
    }
    for (int64_t step = 0; step < steps; ++step, out += K::STEP) {
      pack_step<K>(
          [&](int r, int q, int v) __attribute__((always_inline)) {
            const int64_t k = step * 64 + q * 16 + v * VL;
            if (i + r >= count || k >= pitch) return vf{};
            const vf x = load(z + (first + i + r) * pitch + k);
            if constexpr (!K::DIGITS) return nearest_bf16(x);
            return x * unit[r];
          },
          turn, out);
    }
  }
}

DCLR_INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }
DCLR_INLINE vi larger(vi a, vi b) { return a > b ? a : b; }
DCLR_INLINE int32_t largest_lane(vi x) {
  int32_t top = 0;
  for (int l = 0; l < VL; ++l) top = x[l] > top ? x[l] : top;
  return top;
}
DCLR_INLINE bool any_lane(vi x) {
  int32_t all = 0;
  for (int l = 0; l < VL; ++l) all |= x[l];
  return all;
}
constexpr int32_t kInfinityBits = 0x7F800000;  // magnitudes as integers: NaN lies above all numbers

// The unit of digits whose largest magnitude has these bits: x / unit is in [-127, 127]. NaN where
// there is one, so that it reaches what the digits add to; magnitudes below 2^-100 count as that.
DCLR_INLINE float unit_of(int32_t bits) {
  float most;
  __builtin_memcpy(&most, &bits, 4);
  if (bits >= kInfinityBits) return __builtin_nanf("");
  return (most > 0x1p-100f ? most : 0x1p-100f) / 127.0f;
}

DCLR_INLINE int32_t largest_bits(const float* row, int64_t d) {
  vi most = {};
  for (int64_t k = 0; k < d; k += VL) most = larger((vi)magnitude(load(row + k)), most);
  return largest_lane(most);
}

// Rows of z for a product with G, k along the rows: its right side, or transposed the left one.
// Here the digits' unit need not be a power of two, and goes to `scale`. 16 columns of z are `side`
// bytes from the next.
template <class K>
static void pack_for_g(const Pair& pair, const float* z, int64_t count, bool turn, float* scale,
                       char* to, int64_t side) {
  const int64_t pitch = pair.pitch, columns = round_up(pair.d, 32);
  float per_unit[kGBlock];
  for (int64_t i = 0; K::DIGITS && i < count; ++i) {
    scale[i] = unit_of(largest_bits(z + i * pitch, pair.d));
    per_unit[i] = K::UNITS / scale[i];
  }
  for (int64_t c = 0; c < columns; c += 16, to += side) {
    for (int64_t i = 0; i < count; i += 64) {
      pack_step<K>(
          [&](int l, int q, int v) __attribute__((always_inline)) {
            const int64_t row = i + q * 16 + l;
            if (row >= count || c >= pitch) return vf{};
            const vf x = load(z + row * pitch + c + v * VL);
            if constexpr (!K::DIGITS) return nearest_bf16(x);
            return x * per_unit[row];
          },
          turn, to + i / 64 * K::STEP);
    }
  }
}

// Where row i lies, if it does, and how far 16 columns for G are from the next.
template <class K>
DCLR_INLINE char* row_for_s(const Packed& p, int64_t d, int64_t i) {
  return p.for_s ? p.for_s + (i - p.begin) / 16 * steps_of(d) * K::STEP : nullptr;
}
template <class K>
DCLR_INLINE char* row_for_g(const Packed& p, int64_t i) {
  return p.for_g ? p.for_g + (i - p.begin) / 64 * K::STEP : nullptr;
}
template <class K>
DCLR_INLINE int64_t side_for_g(const Packed& p) {
  return steps_of(p.count) * K::STEP;
}

// Rows [begin, end) of the first view, a left side for S, or of the second.
template <class K>
static void pack_view(const Pair& pair, bool first, int64_t begin, int64_t end, const Packed& to) {
  const float* const z = first ? pair.z1 : pair.z2;
  if (to.for_s) {
    pack_for_s<K>(pair, z, first ? pair.scale1 : pair.scale2, begin, end - begin,
                  first ? kPanel : K::WIDTH, !first, row_for_s<K>(to, pair.d, begin));
  }
  for (int64_t i = begin; to.for_g && i < end; i += kGBlock) {
    pack_for_g<K>(pair, z + i * pair.pitch, smaller(kGBlock, end - i), first,
                  to.scale + i - to.begin, row_for_g<K>(to, i), side_for_g<K>(to));
  }
}

// r of each row, and what six products leave out of z . z: m and l of one row as they are, or, of
// rows that have little in common, as independent digits would add up (74^2 = 5476 a term). NaN
// where a row has one, or an infinity.
static void digit_scales(const float* z, int64_t d, int64_t pitch, int64_t begin, int64_t end,
                         float* scale, float* left_out) {
  const float typical = 7744.0f * float(__builtin_sqrt(double(d)));
  for (int64_t i = begin; i < end; ++i) {
    const float* row = z + i * pitch;
    int32_t bits = largest_bits(row, d);
    if (bits >= kInfinityBits) {
      scale[i] = left_out[i] = __builtin_nanf("");
      continue;
    }
    // |z| <= 0x7F7F7F units of 2^(e - 23), the exponent e at least -100.
    bits = (bits + 0x010101) >> 23 << 23;
    bits = bits < 26 << 23 ? 26 << 23 : bits;
    const int32_t r_bits = bits - (6 << 23);
    float r;
    __builtin_memcpy(&r, &r_bits, 4);
    const vf unit = splat(65536.0f / r);
    vf sum = {};
    for (int64_t k = 0; k < d; k += VL) {
      const vi x = balanced(nearest(load(row + k) * unit));
      const vf m = __builtin_convertvector(x << 16 >> 24, vf);
      sum += m * __builtin_convertvector(x << 24 >> 24, vf);
    }
    const double alike = 2.0 * __builtin_fabs(sum_lanes(sum));
    scale[i] = r;
    left_out[i] = r * r * 0x1p-24f * float(alike > typical ? alike : typical);
  }
}

// ---------------------------------------------------------------------------- products

// Sums of rows 0 to 15 of a block of C, of rows 16 to 31, and operands.
constexpr Tile<0> C0{};
constexpr Tile<1> C1{};
constexpr Tile<2> C2{};
constexpr Tile<3> D0{};
constexpr Tile<4> D1{};
constexpr Tile<5> D2{};
constexpr Tile<6> A{};
constexpr Tile<7> B{};
constexpr int64_t M = kTileBytes, L = 2 * kTileBytes;  // where digits m and l lie

// `step` adds the products of 64 of k to the sums, rows from a and a2, columns from b (and b2, where
// WIDTH is 32), and calls `between` after every two.
struct Int8x6 {
  static constexpr bool REST = false;
  static constexpr int DIGITS = 3, TILES = 3, SUMS = 3, WIDTH = 16, CALLS = 6;
  static constexpr int64_t STEP = TILES * kTileBytes;
  static constexpr float UNITS = 65536.0f;  // of the last digit in one of the first
  DCLR_INLINE void put(const vf (&x)[4], char* to) { store_digits<3>(x, to); }

  template <class T, class Between>
  DCLR_INLINE void step(T& t, const char* a, const char* a2, const char* b, const char*,
                        Between between) {
    t.load_once(B, b + L), t.load(A, a), t.multiply_bytes(C2, A, B);  // h l
    t.load(A, a2), t.multiply_bytes(D2, A, B);
    between();
    t.load_once(B, b + M), t.multiply_bytes(D1, A, B);  // h m
    t.load(A, a), t.multiply_bytes(C1, A, B);
    between();
    t.load(A, a + M), t.multiply_bytes(C2, A, B);  // m m
    t.load(A, a2 + M), t.multiply_bytes(D2, A, B);
    between();
    t.load_once(B, b), t.multiply_bytes(D1, A, B);  // m h
    t.load(A, a + M), t.multiply_bytes(C1, A, B);
    between();
    t.load(A, a + L), t.multiply_bytes(C2, A, B);  // l h
    t.load(A, a2 + L), t.multiply_bytes(D2, A, B);
    between();
    t.load(A, a), t.multiply_bytes(C0, A, B);  // h h
    t.load(A, a2), t.multiply_bytes(D0, A, B);
    between();
  }
};

struct Int8x8 : Int8x6 {
  static constexpr bool REST = true;
};

struct Rest : Int8x6 {
  static constexpr int SUMS = 2;

  template <class T, class Between>
  DCLR_INLINE void step(T& t, const char* a, const char* a2, const char* b, const char*,
                        Between between) {
    t.load_once(B, b + L), t.load(A, a + M), t.multiply_bytes(C0, A, B);  // m l
    t.load(A, a2 + M), t.multiply_bytes(D0, A, B);
    between();
    t.load_once(B, b + M), t.load(A, a + L), t.multiply_bytes(C1, A, B);  // l m
    t.load(A, a2 + L), t.multiply_bytes(D1, A, B);
    between();
  }
};

struct Int8x3 {
  static constexpr bool REST = false;
  static constexpr int DIGITS = 2, TILES = 2, SUMS = 2, WIDTH = 16, CALLS = 3;
  static constexpr int64_t STEP = TILES * kTileBytes;
  static constexpr float UNITS = 256.0f;
  DCLR_INLINE void put(const vf (&x)[4], char* to) { store_digits<2>(x, to); }

  template <class T, class Between>
  DCLR_INLINE void step(T& t, const char* a, const char* a2, const char* b, const char*,
                        Between between) {
    t.load_once(B, b + M), t.load(A, a), t.multiply_bytes(C1, A, B);  // h m
    t.load(A, a2), t.multiply_bytes(D1, A, B);
    between();
    t.load_once(B, b), t.multiply_bytes(D0, A, B);  // h h
    t.load(A, a), t.multiply_bytes(C0, A, B);
    between();
    t.load(A, a + M), t.multiply_bytes(C1, A, B);  // m h
    t.load(A, a2 + M), t.multiply_bytes(D1, A, B);
    between();
  }
};

// Four loads for four products, so that two sums of each half are 16 columns apart.
struct Bf16Tiles {
  static constexpr bool REST = false;
  static constexpr int DIGITS = 0, TILES = 2, SUMS = 2, WIDTH = 32, CALLS = 4;
  static constexpr int64_t STEP = TILES * kTileBytes;
  static constexpr float UNITS = 1.0f;

  DCLR_INLINE void put(const vf (&x)[4], char* to) {
    const auto pair = [&](int q) __attribute__((always_inline)) {
      return ((vi)x[q] >> 16 & 0xFFFF) | (vi)x[q + 1];
    };
    *reinterpret_cast<vi_mem*>(to) = pair(0);
    *reinterpret_cast<vi_mem*>(to + kTileBytes) = pair(2);
  }

  template <class T, class Between>
  DCLR_INLINE void step(T& t, const char* a, const char* a2, const char* b, const char* b2,
                        Between between) {
    for (int64_t k = 0; k < STEP; k += kTileBytes) {
      t.load_once(B, b + k), t.load(A, a + k), t.multiply_bf16(C0, A, B);
      t.load_once(C2, b2 + k), t.multiply_bf16(C1, A, C2);  // the tiles 2 and 5 are operands here
      between();
      t.load(D2, a2 + k), t.multiply_bf16(D0, D2, B), t.multiply_bf16(D1, D2, C2);
      between();
    }
  }
};

// run(kind) for what is multiplied on tiles. False: nothing here is.
template <class Run>
DCLR_INLINE bool with_kind(Operands operands, Run run) {
  if (operands == kInt8x6) return run(Int8x6{}), true;
  if (operands == kInt8x8) return run(Int8x8{}), true;
  if (operands == kInt8x3) return run(Int8x3{}), true;
  if (operands == kBf16) return run(Bf16Tiles{}), true;
  return false;
}

// The sums of a block of C: += A B over `steps`, A in two halves of 16 rows, B in K::WIDTH / 16 of
// as many columns, `b_side` bytes apart.
template <class K, class T, class Between>
DCLR_INLINE void multiply(T& t, const char* a, const char* a2, const char* b, int64_t b_side,
                          int64_t steps, bool add, int32_t* sums, Between between) {
  char *c = reinterpret_cast<char*>(sums), *d = c + 4 * kHalf;
  if (add) {
    t.load(C0, c), t.load(C1, c + M), t.load(D0, d), t.load(D1, d + M);
    if (K::SUMS > 2) t.load(C2, c + L), t.load(D2, d + L);
  } else {
    t.zero(C0), t.zero(C1), t.zero(D0), t.zero(D1);
    if (K::SUMS > 2) t.zero(C2), t.zero(D2);
  }
  for (int64_t k = 0; k < steps; ++k, a += K::STEP, a2 += K::STEP, b += K::STEP) {
    K::step(t, a, a2, b, b + b_side, between);
  }
  t.store(C1, c + M), t.store(D1, d + M);
  if (K::SUMS > 2) t.store(C2, c + L), t.store(D2, d + L);
  t.store(C0, c), t.store(D0, d);
}

// Vector v of row r of A B. Of digits only the last additions round, fused or not.
template <class K, bool REST = false>
DCLR_INLINE vf combined(const int32_t* sums, int64_t r, int v) {
  const int32_t* p = sums + r / 16 * kHalf + v / TV * 256 + r % 16 * 16 + v % TV * VL;
  if constexpr (!K::DIGITS) return load(reinterpret_cast<const float*>(p));
  const auto sum = [&](int c) __attribute__((always_inline)) {
    return __builtin_convertvector(*reinterpret_cast<const vi_mem*>(p + c * 256), vf);
  };
  if constexpr (K::SUMS == 2) return sum(0) + sum(1) * 0x1p-8f;
  vf low = sum(2);
  if constexpr (REST) low += (sum(kBlockWords / 256) + sum(kBlockWords / 256 + 1)) * 0x1p-8f;
  return sum(0) + (sum(1) + low * 0x1p-8f) * 0x1p-8f;
}

// Whether `Tiles` compute what their emulation does, by two blocks of C: of arbitrary bytes, and of
// whole numbers as bf16, which are small enough that no order of additions rounds them.
static bool tiles_work() {
  alignas(64) char bytes[6 * kMostStep], numbers[6 * kMostStep];
  alignas(64) int32_t sums[4][kBlockWords];
  uint32_t x = 1;
  for (char& b : bytes) b = char((x = x * 1664525u + 1013904223u) >> 24);
  for (int64_t k = 0; k < 3 * kMostStep; ++k) {
    const float whole = float(bytes[k] % 8);
    __builtin_memcpy(numbers + 2 * k, reinterpret_cast<const char*>(&whole) + 2, 2);
  }
  const auto run = [&](auto& t, int32_t* to) __attribute__((always_inline)) {
    t.configure();
    for (int times = 0; times < 2; ++times) {
      multiply<Int8x6>(t, bytes, bytes + 2 * kMostStep, bytes + 4 * kMostStep, 0, 2, times > 0, to,
                       [] {});
      multiply<Bf16Tiles>(t, numbers, numbers + 4096, numbers + 8192, 4096, 2, times > 0,
                          to + kBlockWords, [] {});
    }
    t.release();
  };
  Tiles tiles;
  EmulatedTiles emulated;
  __builtin_memset(sums, 0, sizeof sums);
  run(tiles, sums[0]);
  run(emulated, sums[2]);
  return __builtin_memcmp(sums[0], sums[2], 2 * sizeof sums[0]) == 0;
}

// Products of tiles on data from L1, with a load for each or for every two: operations done.
static double tile_loop(bool bf16, bool few_loads, int64_t iterations) {
  alignas(64) char data[4 * kTileBytes];
  uint32_t x = 1;
  for (int64_t k = 0; k < 4 * kTileBytes; k += 2) {
    x = x * 1664525u + 1013904223u;
    const uint16_t word = uint16_t(bf16 ? 0x3F80 | (x >> 16 & 0x807F) : x >> 16);  // +-[1, 2)
    __builtin_memcpy(data + k, &word, 2);
  }
  Tiles t;
  t.configure();
  t.zero(C0), t.zero(C1), t.zero(D0), t.zero(D1);
  t.load(A, data), t.load(B, data + kTileBytes);
  const auto loop = [&](auto product, auto first, auto second) __attribute__((always_inline)) {
    for (int64_t n = 0; n < iterations; ++n) {
      t.load(A, data), product(C0), first(), product(C1);
      t.load_once(B, data + 2 * kTileBytes), product(D0), second(), product(D1);
    }
  };
  const auto bytes = [&](auto c) __attribute__((always_inline)) { t.multiply_bytes(c, A, B); };
  const auto halves = [&](auto c) __attribute__((always_inline)) { t.multiply_bf16(c, A, B); };
  const auto with = [&](auto product) __attribute__((always_inline)) {
    if (few_loads) return loop(product, [] {}, [] {});
    loop(product, [&] { t.load_once(B, data + kTileBytes); },
         [&] { t.load(A, data + 3 * kTileBytes); });
  };
  if (bf16) {
    with(halves);
  } else {
    with(bytes);
  }
  t.release();
  return 4.0 * 2 * 16 * 16 * (bf16 ? 32 : 64) * double(iterations);
}

// Brings lines into L2 while others are at work, one a call.
struct Prefetch {
  const char *next, *end;
  inline __attribute__((always_inline)) void one() {
    if (next >= end) return;
    __builtin_prefetch(next, 0, 2);
    next += 64;
  }
};

// The blocks of C of one stage after another: row(r) of each runs between the products of the next.
template <class Row>
struct Epilogue {
  Row row;
  int64_t next = kPanel, rows = kPanel;

  inline __attribute__((always_inline)) void some(int64_t count) {
    for (; count > 0 && next < rows; --count, ++next) row(next);
  }
  inline __attribute__((always_inline)) void all() { some(kPanel); }
};
template <class Row>
DCLR_INLINE Epilogue<Row> make_epilogue(Row row) {
  return {row};
}

// Rows of the epilogue to a call of `between`.
template <class K>
DCLR_INLINE int64_t rows_per_call(int64_t steps) {
  return (kPanel + K::CALLS * steps - 1) / (K::CALLS * steps);
}

// ---------------------------------------------------------------------------- S

DCLR_INLINE int64_t kept_floats(int64_t n) { return kPanel * round_up(n, 32); }

// Tiles of S in fp32 for kPanel rows from `row` on and nc columns from j0 on, from the packed `a`
// and `columns`, or kept ones: to.begin(j), to.row(r, s) for each row, to.end(j). Tiles with entries
// that are left out, and all where `to.whole_tiles`, are made whole first, and to.whole(j, tile)
// sees them. `ahead` comes into L2 meanwhile.
template <class K, class To>
DCLR_INLINE void similarity_panel(Tiles& t, const Pair& pair, int64_t row, int64_t j0, int64_t nc,
                                  const char* a, const char* columns, int32_t* sums,
                                  bool reuse_kept, Prefetch ahead, To& to) {
  constexpr int W = K::WIDTH, V = W / VL;
  const int64_t steps = steps_of(pair.d), chunks = (steps + kSteps - 1) / kSteps;
  const int64_t chunk = (steps + chunks - 1) / chunks;
  const int64_t slot = pair.keep_panels ? kept_slot(pair, row, kPanel) : -1;
  float* kept = slot < 0 ? nullptr : pair.keep + slot * kept_floats(pair.n) + j0 * kPanel;
  const auto left_of_diagonal = [&](int64_t j) __attribute__((always_inline)) {
    return below_diagonal(pair, row, j0 + smaller(j + W, nc));
  };
  const auto take = [&](int64_t j, const float* tile) __attribute__((always_inline)) {
    to.begin(j);
    to.whole(j, tile);
    for (int64_t r = 0; r < kPanel; ++r) {
      vf s[V];
      DCLR_UNROLL
      for (int v = 0; v < V; ++v) s[v] = load(tile + r * W + v * VL);
      to.row(r, s);
    }
    to.end(j);
  };
  if (kept && reuse_kept) {
    for (int64_t j = 0; j < nc; j += W) {
      if (!left_of_diagonal(j)) take(j, kept + j * kPanel);
    }
    return;
  }
  float row_scale[kPanel];
  if (K::DIGITS) padded(row_scale, pair.scale1 + row, pair.m - row);
  const int64_t first = row + pair.row_offset;  // column that `row` leaves out
  for (int64_t k = 0; k < steps; k += chunk) {
    const bool last = k + chunk >= steps;
    const int64_t count = smaller(chunk, steps - k), per_call = rows_per_call<K>(count);
    const int32_t* from = nullptr;
    int64_t at = 0;
    vf col_scale[V];
    const auto similarity = [&](const int32_t* c, int64_t r, int v) __attribute__((always_inline)) {
      if constexpr (!K::DIGITS) return combined<K>(c, r, v);
      return combined<K, K::REST>(c, r, v) * (splat(row_scale[r]) * col_scale[v]);
    };
    auto epilogue = make_epilogue([&](int64_t r) __attribute__((always_inline)) {
      vf s[V];
      DCLR_UNROLL
      for (int v = 0; v < V; ++v) {
        s[v] = similarity(from, r, v);
        if (kept) store(kept + at * kPanel + r * W + v * VL, s[v]);
      }
      to.row(r, s);
    });
    const auto finish = [&]() __attribute__((always_inline)) {
      epilogue.all();
      if (from) to.end(at);
      from = nullptr;
    };
    for (int64_t j = 0; j < nc; j += W) {
      if (left_of_diagonal(j)) continue;
      int32_t* c = sums + (chunks > 1 ? j / W : j / W % 2) * (1 + K::REST) * kBlockWords;
      const char *a1 = a + k * K::STEP, *a2 = a1 + steps * K::STEP;
      const char* b = columns + (j / 16 * steps + k) * K::STEP;
      const auto between = [&]() __attribute__((always_inline)) {
        epilogue.some(per_call);
        ahead.one();
      };
      multiply<K>(t, a1, a2, b, steps * K::STEP, count, k > 0, c, between);
      if constexpr (K::REST) {
        multiply<Rest>(t, a1, a2, b, 0, count, k > 0, c + kBlockWords, between);
      }
      if (!last) continue;
      finish();
      float scales[W];
      if (K::DIGITS) padded(scales, pair.scale2 + j0 + j, nc - j);
      for (int v = 0; K::DIGITS && v < V; ++v) col_scale[v] = load(scales + v * VL);
      const bool marked = row + kPanel > pair.m || j + W > nc ||
                          (first < j0 + j + W && first + kPanel > j0 + j);
      if (!marked && !to.whole_tiles) {
        from = c;
        at = j;
        epilogue.next = 0;
        to.begin(j);
        continue;
      }
      float own[kPanel * W], *tile = kept ? kept + j * kPanel : own;
      for (int64_t r = 0; r < kPanel; ++r) {
        for (int v = 0; v < V; ++v) store(tile + r * W + v * VL, similarity(c, r, v));
      }
      for (int64_t r = 0; r < kPanel; r += MR) {
        mark_left_out(pair, row + r, pair.m - row - r, j0 + j, nc - j, W, tile + r * W);
      }
      take(j, tile);
    }
    finish();
  }
}

}  // namespace directclr::DCLR_ISA
