// Stage `weights`: for each block of S
//
//     G_ij = wr_i 2^(a' s_ij - rr_i) + wc_j 2^(a' s_ij - rc_j)      (rr, rc whole numbers)
//
// written to L2 as it comes out of the tiles, for both products. One polynomial serves both terms,
// at any temperature.
//
// G lies as panels of MR columns, [j / MR][i][MR]. Along i a panel is the broadcast operand of G'
// z1; along j a row tile's MR x MR block is contiguous and is the broadcast operand of G z2. One
// copy serves both, so nothing is transposed. bf16 pairs neighbours along the contraction, which
// differs, and keeps two copies of half the size.
#pragma once
#include "similarity.h"

namespace directclr::DCLR_ISA {

// Words of a panel of G.
template <class T>
DCLR_INLINE int64_t panel_words(const Block& b) {
  return round_up(b.mc, MR) * MR / T::PACK;
}

template <class T, int V>
DCLR_INLINE void weight_tile(const float* tile, vf hi, vf lo, const float* row_weight,
                             const float* row_ref, const float* col_weight, const float* col_ref,
                             float* g, float* g2, int64_t panel) {
  vf cw[V], cr[V];
  DCLR_UNROLL
  for (int v = 0; v < V; ++v) {
    cw[v] = load(col_weight + v * VL);
    cr[v] = load(col_ref + v * VL);
  }
  const auto weights = [&](int i, int v) __attribute__((always_inline)) {
    const Power e = power(load(tile + (i * V + v) * VL), hi, lo);
    return ldexp(e.p, e.n - row_ref[i]) * row_weight[i] + ldexp(e.p, e.n - cr[v]) * cw[v];
  };
  T::template store_tile<V>(weights, g, g2, panel);
}

// `count` values from `first` on, zero up to MOST.
template <int64_t MOST>
DCLR_INLINE void padded(float (&to)[MOST], const float* first, int64_t count) {
  for (int64_t k = 0; k < MOST; ++k) to[k] = k < count ? first[k] : 0.0f;
}

// G of the block, to s.g (and s.g2()); `columns` is its packed z2.
template <class T>
DCLR_INLINE void weights_of_block(const Products& args, const Block& b, const Scratch& s) {
  const Pair& pair = args.pair;
  const vf hi = splat(pair.scale_hi), lo = splat(pair.scale_lo);
  const int64_t panel = panel_words<T>(b);
  float row_weight[MC], row_ref[MC], col_weight[NC], col_ref[NC];
  padded(row_weight, args.row_weight + b.i0, b.mc);
  padded(row_ref, args.row_ref + b.i0, b.mc);
  padded(col_weight, args.col_weight + b.j0, b.nc);
  padded(col_ref, args.col_ref + b.j0, b.nc);
  if (pair.upper && b.j0 <= b.i0 + b.mc - 1 + pair.row_offset) {  // tiles below the diagonal stay 0
    __builtin_memset(s.g, 0, sizeof(float) * size_t(MC * NC));
  }
  for_each_tile<T>(
      pair, b, s.columns, s.tiles, s.row_copy, true,
      [&](int64_t ti, int64_t tj, int vectors, const float* tile) __attribute__((always_inline)) {
        const int64_t at = tj / MR * panel + ti * MR / T::PACK;
        float *g = s.g + at, *g2 = s.g2() + at;
        const float *rw = row_weight + ti, *rr = row_ref + ti;
        const float *cw = col_weight + tj, *cr = col_ref + tj;
        if (vectors == NV) {
          weight_tile<T, NV>(tile, hi, lo, rw, rr, cw, cr, g, g2, panel);
        } else if (NV == 3 && vectors == 2) {
          weight_tile<T, 2>(tile, hi, lo, rw, rr, cw, cr, g, g2, panel);
        } else {
          weight_tile<T, 1>(tile, hi, lo, rw, rr, cw, cr, g, g2, panel);
        }
      },
      [](int64_t) {});
  for (int64_t r = 0; args.diag && r < b.mc; ++r) {
    const int64_t c = b.i0 + r + pair.row_offset - b.j0;
    if (c >= 0 && c < b.nc) T::put(s.g, s.g2(), panel, r, c, args.diag[b.i0 + r]);
  }
}

}  // namespace directclr::DCLR_ISA
