// Stage `sums`: sums of E_ij = exp(a s_ij) over the rows and the columns of S, without the
// positives.
//
// `bounded` (a log2(e) + log2 N < 125, temperature above about 1/77): E itself stays in fp32's
// range. Otherwise every lane of every running sum carries its own whole-number reference, the
// largest exponent it has met; moving a sum to another reference multiplies by a power of two and
// is exact, so the true maximum costs a few instructions and no second pass.
//
// Rows: MR vectors, folded into fp64 after each panel of a block. Columns: fp32 over the MC rows of
// a block, then fp64 in the calling thread's own array.
//
// TOP, for statistics: the largest s of each row and column, in a pass of its own over the tile.
#pragma once
#include "similarity.h"

namespace directclr::DCLR_ISA {

constexpr float kNoReference = kLeftOut;

// Whether a lane met anything besides left-out entries (a NaN leaves no reference).
DCLR_INLINE bool met(float ref, float sum) { return ref > kNoReference / 2 || sum != sum; }

template <bool BOUNDED, int V>
DCLR_INLINE void sum_tile(const float* tile, vf hi, vf lo, vf* row_sum, vf* row_ref, float* col_sum,
                          float* col_ref) {
  vf csum[V], cref[V];
  DCLR_UNROLL
  for (int v = 0; v < V; ++v) {
    csum[v] = load(col_sum + v * VL);
    if (!BOUNDED) cref[v] = load(col_ref + v * VL);
  }
  for (int i = 0; i < MR; ++i) {
    vf rsum = row_sum[i], rref = row_ref[i];
    DCLR_UNROLL
    for (int v = 0; v < V; ++v) {
      const Power e = power(load(tile + (i * V + v) * VL), hi, lo);
      if constexpr (BOUNDED) {
        const vf x = ldexp(e.p, e.n);
        rsum += x;
        csum[v] += x;
      } else {
        const vf r = e.n > rref ? e.n : rref;
        const vf c = e.n > cref[v] ? e.n : cref[v];
        rsum = ldexp(rsum, rref - r) + ldexp(e.p, e.n - r);
        csum[v] = ldexp(csum[v], cref[v] - c) + ldexp(e.p, e.n - c);
        rref = r;
        cref[v] = c;
      }
    }
    row_sum[i] = rsum;
    row_ref[i] = rref;
  }
  DCLR_UNROLL
  for (int v = 0; v < V; ++v) {
    store(col_sum + v * VL, csum[v]);
    if (!BOUNDED) store(col_ref + v * VL, cref[v]);
  }
}

template <bool BOUNDED>
DCLR_INLINE void sum_tile(int vectors, const float* tile, vf hi, vf lo, vf* row_sum, vf* row_ref,
                          float* col_sum, float* col_ref) {
  if (vectors == NV) {
    sum_tile<BOUNDED, NV>(tile, hi, lo, row_sum, row_ref, col_sum, col_ref);
  } else if (NV == 3 && vectors == 2) {
    sum_tile<BOUNDED, 2>(tile, hi, lo, row_sum, row_ref, col_sum, col_ref);
  } else {
    sum_tile<BOUNDED, 1>(tile, hi, lo, row_sum, row_ref, col_sum, col_ref);
  }
}

constexpr float kNoTop = -3e38f;

DCLR_INLINE void top_tile(int vectors, const float* tile, vf* row_top, float* col_top) {
  for (int v = 0; v < vectors; ++v) {
    vf top = load(col_top + v * VL);
    DCLR_UNROLL
    for (int i = 0; i < MR; ++i) {
      const vf s = load(tile + (i * vectors + v) * VL);
      row_top[i] = s > row_top[i] ? s : row_top[i];
      top = s > top ? s : top;
    }
    store(col_top + v * VL, top);
  }
}

DCLR_INLINE void raise_to(float& top, float s) { top = s > top ? s : top; }

template <bool BOUNDED>
DCLR_INLINE void fold_row(vf sum, vf ref, double& to_sum, double& to_ref) {
  if constexpr (BOUNDED) {
    merge(to_sum, to_ref, sum_lanes(sum), 0.0);
  } else {
    for (int l = 0; l < VL; ++l) {
      if (met(ref[l], sum[l])) merge(to_sum, to_ref, double(sum[l]), double(ref[l]));
    }
  }
}

template <class T, bool BOUNDED, bool TOP>
static void sums_of(const Sums& args, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                    double* col_sum, double* col_ref, float* col_top, const Scratch& s) {
  const Pair& pair = args.pair;
  const vf hi = splat(pair.scale_hi), lo = splat(pair.scale_lo);
  const int64_t ld = round_up((pair.d + T::PACK - 1) / T::PACK, VL);
  const int64_t j_step = even_block(j1 - j0, NC, NR), i_step = even_block(i1 - i0, MC, MR);
  for (int64_t j = j0; j < j1; j += j_step) {
    const int64_t nc = smaller(j_step, j1 - j);
    if (below_diagonal(pair, i0, j + nc)) continue;
    pack_columns<T>(pair.z2 + j * pair.pitch, pair.pitch, nc, ld, s.columns);
    for (int64_t i = i0; i < i1; i += i_step) {
      const int64_t mc = smaller(i_step, i1 - i);
      if (below_diagonal(pair, i, j + nc)) continue;
      for (int64_t c = 0; c < NC; ++c) {
        s.col_sum[c] = 0;
        s.col_ref[c] = kNoReference;
        if (TOP) s.col_top[c] = kNoTop;
      }
      vf row_sum[MR], row_ref[MR], row_top[MR];
      for (int r = 0; r < MR; ++r) {
        row_sum[r] = vf{};
        row_ref[r] = splat(kNoReference);
        if (TOP) row_top[r] = splat(kNoTop);
      }
      for_each_tile<T>(
          pair, Block{i, mc, j, nc}, s.columns, s.tiles, s.row_copy, false,
          [&](int64_t, int64_t tj, int vectors, const float* tile)
              __attribute__((always_inline)) {
                sum_tile<BOUNDED>(vectors, tile, hi, lo, row_sum, row_ref, s.col_sum + tj,
                                  s.col_ref + tj);
                if (TOP) top_tile(vectors, tile, row_top, s.col_top + tj);
              },
          [&](int64_t ti) __attribute__((always_inline)) {
            for (int r = 0; r < MR; ++r) {
              if (i + ti + r < pair.m) {
                fold_row<BOUNDED>(row_sum[r], row_ref[r], args.row_sum[i + ti + r],
                                  args.row_ref[i + ti + r]);
                for (int l = 0; TOP && l < VL; ++l) raise_to(args.row_top[i + ti + r], row_top[r][l]);
              }
              row_sum[r] = vf{};
              row_ref[r] = splat(kNoReference);
              if (TOP) row_top[r] = splat(kNoTop);
            }
          });
      for (int64_t c = 0; c < nc; ++c) {
        if (BOUNDED || met(s.col_ref[c], s.col_sum[c])) {
          merge(col_sum[j + c], col_ref[j + c], double(s.col_sum[c]),
                BOUNDED ? 0.0 : double(s.col_ref[c]));
        }
        if (TOP) raise_to(col_top[j + c], s.col_top[c]);
      }
    }
  }
}

}  // namespace directclr::DCLR_ISA
