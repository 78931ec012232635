// Stages `weights` and `products`: for each block of S the weights
//
//     G_ij = wr_i 2^(a' s_ij - rr_i) + wc_j 2^(a' s_ij - rc_j)      (rr, rc whole numbers)
//
// are written to L2 as they come out of the tile, and both products consume them from there:
// dz1 += G z2, dz2 += G' z1. One polynomial serves both terms, at any temperature.
//
// G lies as panels of MR columns, [j / MR][i][MR]. Along i a panel is the broadcast operand of G'
// z1; along j a row tile's MR x MR block is contiguous and is the broadcast operand of G z2. One
// copy serves both, so nothing is transposed. bf16 pairs neighbours along the contraction, which
// differs, and keeps two copies of half the size.
#pragma once
#include "similarity.h"

namespace directclr::DCLR_ISA {

struct ProductsScratch {
  float* columns;   // NC x pitch: z2, packed for S
  float* tiles;     // MC x NC
  float* row_copy;  // MR x pitch
  float* g;         // MC x NC (bf16: two halves)
  float* rows2;     // NC x pitch: z2, packed for G z2
  float* rows1;     // MC x pitch: z1, packed for G' z1
};

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

template <class T>
static void products_of(const Products& args, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                        const ProductsScratch& s) {
  const Pair& pair = args.pair;
  const vf hi = splat(pair.scale_hi), lo = splat(pair.scale_lo);
  const int64_t pitch = pair.pitch, d = pair.d;
  const int64_t ld = round_up((d + T::PACK - 1) / T::PACK, VL);
  const int64_t all_panels = (pair.m + MR - 1) / MR;
  const bool all_kept = pair.keep_panels >= all_panels;
  float* const g2 = s.g + MC * NC / 2;
  const int64_t j_step = even_block(j1 - j0, NC, NR), i_step = even_block(i1 - i0, MC, MR);
  for (int64_t j = j0; j < j1; j += j_step) {
    const int64_t nc = smaller(j_step, j1 - j), jw = round_up(nc, MR);
    if (below_diagonal(pair, i0, j + nc)) continue;
    if (!all_kept) pack_columns<T>(pair.z2 + j * pitch, pitch, nc, ld, s.columns);
    if (args.dz1) pack_rows<T>(pair.z2 + j * pitch, pitch, d, nc, jw / T::PACK, s.rows2);
    float col_weight[NC], col_ref[NC];
    for (int64_t c = 0; c < NC; ++c) {
      col_weight[c] = c < nc ? args.col_weight[j + c] : 0.0f;
      col_ref[c] = c < nc ? args.col_ref[j + c] : 0.0f;
    }
    for (int64_t i = i0; i < i1; i += i_step) {
      const int64_t mc = smaller(i_step, i1 - i), iw = round_up(mc, MR);
      if (below_diagonal(pair, i, j + nc)) continue;
      const int64_t panel = iw * MR / T::PACK;  // words of a panel of G
      float row_weight[MC], row_ref[MC];
      for (int64_t r = 0; r < MC; ++r) {
        row_weight[r] = r < mc ? args.row_weight[i + r] : 0.0f;
        row_ref[r] = r < mc ? args.row_ref[i + r] : 0.0f;
      }
      if (pair.upper && j <= i + mc - 1 + pair.row_offset) {  // tiles below the diagonal stay 0
        __builtin_memset(s.g, 0, sizeof(float) * size_t(MC * NC));
      }

      for_each_tile<T>(
          pair, Block{i, mc, j, nc}, s.columns, s.tiles, s.row_copy, true,
          [&](int64_t ti, int64_t tj, int vectors, const float* tile)
              __attribute__((always_inline)) {
                float* to = s.g + tj / MR * panel + ti * MR / T::PACK;
                float* to2 = g2 + tj / MR * panel + ti * MR / T::PACK;
                const float *rw = row_weight + ti, *rr = row_ref + ti;
                const float *cw = col_weight + tj, *cr = col_ref + tj;
                if (vectors == NV) {
                  weight_tile<T, NV>(tile, hi, lo, rw, rr, cw, cr, to, to2, panel);
                } else if (NV == 3 && vectors == 2) {
                  weight_tile<T, 2>(tile, hi, lo, rw, rr, cw, cr, to, to2, panel);
                } else {
                  weight_tile<T, 1>(tile, hi, lo, rw, rr, cw, cr, to, to2, panel);
                }
              },
          [](int64_t) {});
      if (args.diag) {
        for (int64_t r = 0; r < mc; ++r) {
          const int64_t c = i + r + pair.row_offset - j;
          if (c >= 0 && c < nc) T::put(s.g, g2, panel, r, c, args.diag[i + r]);
        }
      }

      if (args.dz1) {
        for (int64_t c = 0; c < d; c += NR) {
          const int vectors = tile_vectors(d, c);
          for (int64_t r = 0; r < mc; r += MR) {
            const BlockA<T::KB> a{s.g + r * MR / T::PACK, panel};
            micro_rows<T>(vectors, a, s.rows2 + c * (jw / T::PACK), jw / MR,
                          args.dz1 + (i + r) * pitch + c, pitch, mc - r);
          }
        }
      }
      if (args.dz2) {
        pack_rows<T>(pair.z1 + i * pitch, pitch, d, mc, iw / T::PACK, s.rows1);
        for (int64_t c = 0; c < d; c += NR) {
          const int vectors = tile_vectors(d, c);
          for (int64_t r = 0; r < nc; r += MR) {
            const PanelA<T::KB> a{(T::PACK == 1 ? s.g : g2) + r / MR * panel};
            micro_rows<T>(vectors, a, s.rows1 + c * (iw / T::PACK), iw / MR,
                          args.dz2 + (j + r) * pitch + c, pitch, nc - r);
          }
        }
      }
    }
  }
}

}  // namespace directclr::DCLR_ISA
