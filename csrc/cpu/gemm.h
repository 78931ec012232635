// Register-tiled products: MR rows x v * VL columns of C = A B, A broadcast, B in panels.
//
// B is always packed as [k][v * VL]. A is read where it lies, in one of three ways, none of which
// needs a transpose: the rows of z (for S), and a panel of G (nc / MR panels of [i][MR], see
// products.h) read along either index. fp32 operands are floats; bf16 operands are pairs of
// neighbouring k in one 32-bit word, so both precisions share every layout with k counted in words.
#pragma once
#include "simd.h"

namespace directclr::DCLR_ISA {

struct Fp32 {
  static constexpr int PACK = 1;  // values of k per 32-bit word
  static constexpr int KB = MR;   // words of k per step of the micro-kernel's outer loop
  DCLR_INLINE void fma(vf& acc, vf a, vf b) { acc += a * b; }
};

#if defined(__AVX512BF16__)
struct Bf16 {
  static constexpr int PACK = 2;
  static constexpr int KB = MR / 2;
  DCLR_INLINE void fma(vf& acc, vf a, vf b) {
    acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }
};
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
