// Register-tiled products: MR rows x v * VL columns of C = A B, A broadcast, B in panels.
//
// B is always packed as [k][v * VL]. A is read where it lies, in one of three ways, none of which
// needs a transpose: the rows of z (for S), and a panel of G (nc / MR panels of [i][MR], see
// weights.h) read along either index. fp32 operands are floats; bf16 operands are pairs of
// neighbouring k in one 32-bit word, so both precisions share every layout with k counted in words.
#pragma once
#include "simd.h"

namespace directclr::DCLR_ISA {

// What a word holds, and so how z is read and G is stored: all else is the same in both precisions.
struct Fp32 {
  static constexpr int PACK = 1;  // values of k per 32-bit word
  static constexpr int KB = MR;   // words of k per step of the micro-kernel's outer loop
  DCLR_INLINE void fma(vf& acc, vf a, vf b) { acc += a * b; }

  // VL words along a row of z, of which `left` floats follow.
  DCLR_INLINE vf load_words(const float* z, int64_t) { return load(z); }

  // VL columns of a word of rows of z, of which `rows` exist.
  DCLR_INLINE vf pair_rows(const float* z, int64_t, int64_t rows) {
    return rows > 0 ? load(z) : vf{};
  }

  // A tile of G, weights(i, v) in MR rows of V vectors, into panels `panel` words apart.
  template <int V, class Weights>
  DCLR_INLINE void store_tile(Weights weights, float* g, float*, int64_t panel) {
    for (int i = 0; i < MR; ++i) {
      DCLR_UNROLL
      for (int v = 0; v < V; ++v) {
        store_runs(g + i * MR + v * VL / MR * panel, panel, weights(i, v));
      }
    }
  }

  // Replaces G_ij after the fact; x is rounded like its neighbours.
  DCLR_INLINE void put(float* g, float*, int64_t panel, int64_t i, int64_t j, float x) {
    g[j / MR * panel + i * MR + j % MR] = x;
  }
};

#if defined(__AVX512BF16__)
constexpr bool kHasBf16 = true;
struct Bf16 {
  static constexpr int PACK = 2;
  static constexpr int KB = MR / 2;
  DCLR_INLINE void fma(vf& acc, vf a, vf b) {
    acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }

  DCLR_INLINE vf load_words(const float* z, int64_t left) {
    // The pitch is a multiple of 16, so the second half of the last 32 may not exist.
    const vf y = left > VL ? load(z + VL) : vf{};
    return (vf)(__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)load(z));
  }

  // 16 floats, round to nearest even, in the low halves of 16 words.
  DCLR_INLINE __m512i low_halves(vf v) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
  }

  DCLR_INLINE vf pair_rows(const float* z, int64_t pitch, int64_t rows) {
    const vf x = rows > 0 ? load(z) : vf{}, y = rows > 1 ? load(z + pitch) : vf{};
    return (vf)_mm512_or_si512(low_halves(x), _mm512_slli_epi32(low_halves(y), 16));
  }

  // g: [j / MR][i][MR / 2], pairs along j; g2: [j / MR][i / 2][MR], pairs along i.
  template <int V, class Weights>
  DCLR_INLINE void store_tile(Weights weights, float* g, float* g2, int64_t panel) {
    for (int i = 0; i < MR; i += 2) {
      DCLR_UNROLL
      for (int v = 0; v < V; ++v) {
        __m512i words[2];
        DCLR_UNROLL
        for (int r = 0; r < 2; ++r) {
          const __m256i x = (__m256i)_mm512_cvtneps_pbh((__m512)weights(i + r, v));
          float* to = g + (i + r) * (MR / 2) + v * 2 * panel;
          _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(x));
          _mm_storeu_si128((__m128i*)(to + panel), _mm256_extracti128_si256(x, 1));
          words[r] = _mm512_cvtepu16_epi32(x);
        }
        store_runs(g2 + i / 2 * MR + v * 2 * panel, panel,
                   (vf)_mm512_or_si512(words[0], _mm512_slli_epi32(words[1], 16)));
      }
    }
  }

  DCLR_INLINE void put(float* g, float* g2, int64_t panel, int64_t i, int64_t j, float x) {
    const __m128i b = (__m128i)_mm_cvtneps_pbh(_mm_set_ss(x));
    const uint16_t h = uint16_t(_mm_extract_epi16(b, 0));
    char* to = reinterpret_cast<char*>(g + j / MR * panel + i * (MR / 2));
    __builtin_memcpy(to + 2 * (j % MR), &h, 2);
    to = reinterpret_cast<char*>(g2 + j / MR * panel + i / 2 * MR + j % MR);
    __builtin_memcpy(to + 2 * (i % 2), &h, 2);
  }
};
#else
constexpr bool kHasBf16 = false;
using Bf16 = Fp32;  // named, never run
#endif

// Rows of words, `ld` apart: A(i, k) = p[i * ld + k].
template <int KB>
struct RowsA {
  static constexpr bool FAR = false;
  const float* p;
  int64_t ld;
  DCLR_INLINE float at(const RowsA& a, int i, int k) { return a.p[i * a.ld + k]; }
  DCLR_INLINE void next(RowsA& a) { a.p += KB; }
};

// Blocks of [i][KB] words, `step` apart: a panel of G along its columns.
template <int KB>
struct BlockA {
  static constexpr bool FAR = true;  // its C is: rows far apart, used once, at the end
  const float* p;
  int64_t step;
  DCLR_INLINE float at(const BlockA& a, int i, int k) { return a.p[i * KB + k]; }
  DCLR_INLINE void next(BlockA& a) { a.p += a.step; }
};

// [k][MR]: a panel of G along its rows.
template <int KB>
struct PanelA {
  static constexpr bool FAR = true;
  const float* p;
  DCLR_INLINE float at(const PanelA& a, int i, int k) { return a.p[k * MR + i]; }
  DCLR_INLINE void next(PanelA& a) { a.p += KB * MR; }
};

// C (MR x v * VL at c, rows ldc apart) = or += A B over `blocks` steps of KB words.
template <class T, int V, class A>
DCLR_INLINE void micro(A a, const float* b, int64_t blocks, float* c, int64_t ldc, bool add) {
  vf acc[MR][V];
  if (A::FAR && add) {
    DCLR_UNROLL
    for (int i = 0; i < MR; ++i) {
      __builtin_prefetch(c + i * ldc, 1);
      if (V * VL > 16) __builtin_prefetch(c + i * ldc + 16, 1);
      if (V * VL > 32) __builtin_prefetch(c + i * ldc + 32, 1);
    }
  }
  DCLR_UNROLL
  for (int i = 0; i < MR; ++i) {
    DCLR_UNROLL
    for (int v = 0; v < V; ++v) acc[i][v] = vf{};
  }
  for (int64_t blk = 0; blk < blocks; ++blk) {
    DCLR_UNROLL
    for (int k = 0; k < T::KB; ++k) {
      vf bv[V];
      DCLR_UNROLL
      for (int v = 0; v < V; ++v) bv[v] = load(b + v * VL);
      b += V * VL;
      DCLR_UNROLL
      for (int i = 0; i < MR; ++i) {
        const vf ai = splat(A::at(a, i, k));
        DCLR_UNROLL
        for (int v = 0; v < V; ++v) T::fma(acc[i][v], ai, bv[v]);
      }
    }
    A::next(a);
  }
  if (add) {
    DCLR_UNROLL
    for (int i = 0; i < MR; ++i) {
      DCLR_UNROLL
      for (int v = 0; v < V; ++v) {
        float* p = c + i * ldc + v * VL;
        store(p, load(p) + acc[i][v]);
      }
    }
  } else {
    DCLR_UNROLL
    for (int i = 0; i < MR; ++i) {
      DCLR_UNROLL
      for (int v = 0; v < V; ++v) store(c + i * ldc + v * VL, acc[i][v]);
    }
  }
}

template <class T, class A>
static __attribute__((noinline)) void micro(int vectors, A a, const float* b, int64_t blocks,
                                            float* c, int64_t ldc, bool add) {
  if (vectors == NV) return micro<T, NV>(a, b, blocks, c, ldc, add);
  if constexpr (NV == 3) {
    if (vectors == 2) return micro<T, 2>(a, b, blocks, c, ldc, add);
  }
  micro<T, 1>(a, b, blocks, c, ldc, add);
}

// C += A B where only `rows` of the tile's rows exist in C.
template <class T, class A>
DCLR_INLINE void micro_rows(int vectors, A a, const float* b, int64_t blocks, float* c, int64_t ldc,
                            int64_t rows) {
  if (rows >= MR) return micro<T>(vectors, a, b, blocks, c, ldc, true);
  float tile[MR * NR];
  const int64_t width = vectors * VL;
  micro<T>(vectors, a, b, blocks, tile, width, false);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) c[i * ldc + j] += tile[i * width + j];
  }
}

}  // namespace directclr::DCLR_ISA
