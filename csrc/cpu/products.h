// Stages `weights` and `products`: for each block of S the weights
//
//     G_ij = wr_i 2^(a' s_ij - rr_i) + wc_j 2^(a' s_ij - rc_j)      (rr, rc whole numbers)
//
// are written to L2 as they come out of the tile, and both products consume them from there:
// dz1 += G z2, dz2 += G' z1. One polynomial serves both terms, at any temperature.
//
// G lies as panels of PW columns, [j / PW][i][PW]. Along i a panel is the broadcast operand of G'
// z1; along j a row tile's PW x PW block is contiguous and is the broadcast operand of G z2. One
// copy serves both, so nothing is transposed. bf16 pairs neighbours along the contraction, which
// differs, and keeps two copies of half the size.
#pragma once
#include "similarity.h"

namespace directclr::DCLR_ISA {

struct ProductsScratch {
  float* columns;   // NB x pitch: z2, packed for S
  float* tiles;     // MB x NB
  float* row_copy;  // PW x pitch
  float* g;         // MB x NB (bf16: two halves)
  float* rows2;     // NB x pitch: z2, packed for G z2
  float* rows1;     // MB x pitch: z1, packed for G' z1
};

template <class T, int V>
DCLR_INLINE void weight_tile(const float* tile, vf hi, vf lo, const float* row_weight,
                             const float* row_ref, const float* col_weight, const float* col_ref,
                             float* g, [[maybe_unused]] float* g2, int64_t panel) {
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
  if constexpr (T::PACK == 1) {
    for (int i = 0; i < PW; ++i) {
      DCLR_UNROLL
      for (int v = 0; v < V; ++v) {
        store_runs(g + i * PW + v * VL / PW * panel, panel, weights(i, v));
      }
    }
  } else {
#if defined(__AVX512BF16__)
    // g: [j / PW][i][PW / 2], pairs along j; g2: [j / PW][i / 2][PW], pairs along i.
    for (int i = 0; i < PW; i += 2) {
      DCLR_UNROLL
      for (int v = 0; v < V; ++v) {
        __m512i words[2];
        DCLR_UNROLL
        for (int r = 0; r < 2; ++r) {
          const __m256i x = (__m256i)_mm512_cvtneps_pbh((__m512)weights(i + r, v));
          float* to = g + (i + r) * (PW / 2) + v * 2 * panel;
          _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(x));
          _mm_storeu_si128((__m128i*)(to + panel), _mm256_extracti128_si256(x, 1));
          words[r] = _mm512_cvtepu16_epi32(x);
        }
        store_runs(g2 + i / 2 * PW + v * 2 * panel, panel,
                   (vf)_mm512_or_si512(words[0], _mm512_slli_epi32(words[1], 16)));
      }
    }
#endif
  }
}

// Replaces G_ij after the fact; x is rounded like its neighbours.
template <class T>
DCLR_INLINE void put(float* g, [[maybe_unused]] float* g2, int64_t panel, int64_t i, int64_t j,
                     float x) {
  if constexpr (T::PACK == 1) {
    g[j / PW * panel + i * PW + j % PW] = x;
  } else {
#if defined(__AVX512BF16__)
    const __m128i b = (__m128i)_mm_cvtneps_pbh(_mm_set_ss(x));
    const uint16_t h = uint16_t(_mm_extract_epi16(b, 0));
    char* to = reinterpret_cast<char*>(g + j / PW * panel + i * (PW / 2));
    __builtin_memcpy(to + 2 * (j % PW), &h, 2);
    to = reinterpret_cast<char*>(g2 + j / PW * panel + i / 2 * PW + j % PW);
    __builtin_memcpy(to + 2 * (i % 2), &h, 2);
#endif
  }
}

template <class T>
static void products_of(const Products& args, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                        const ProductsScratch& s) {
  const Pair& pair = args.pair;
  const vf hi = splat(pair.scale_hi), lo = splat(pair.scale_lo);
  const int64_t pitch = pair.pitch, d = pair.d;
  const int64_t ld = round_up((d + T::PACK - 1) / T::PACK, VL);
  const int64_t all_panels = (pair.m + PW - 1) / PW;
  const bool all_kept = pair.keep_panels >= all_panels;
  float* const g2 = s.g + MB * NB / 2;
  const int64_t j_step = even_block(j1 - j0, NB, NR), i_step = even_block(i1 - i0, MB, PW);
  for (int64_t j = j0; j < j1; j += j_step) {
    const int64_t nb = smaller(j_step, j1 - j), jw = round_up(nb, PW);
    if (below_diagonal(pair, i0, j + nb)) continue;
    if (!all_kept) pack_columns<T>(pair.z2 + j * pitch, pitch, nb, ld, s.columns);
    if (args.dz1) pack_rows<T>(pair.z2 + j * pitch, pitch, d, nb, jw / T::PACK, s.rows2);
    float col_weight[NB], col_ref[NB];
    for (int64_t c = 0; c < NB; ++c) {
      col_weight[c] = c < nb ? args.col_weight[j + c] : 0.0f;
      col_ref[c] = c < nb ? args.col_ref[j + c] : 0.0f;
    }
    for (int64_t i = i0; i < i1; i += i_step) {
      const int64_t mb = smaller(i_step, i1 - i), iw = round_up(mb, PW);
      if (below_diagonal(pair, i, j + nb)) continue;
      const int64_t panel = iw * PW / T::PACK;  // words of a panel of G
      float row_weight[MB], row_ref[MB];
      for (int64_t r = 0; r < MB; ++r) {
        row_weight[r] = r < mb ? args.row_weight[i + r] : 0.0f;
        row_ref[r] = r < mb ? args.row_ref[i + r] : 0.0f;
      }
      if (pair.upper && j <= i + mb - 1 + pair.row_offset) {  // tiles below the diagonal stay 0
        __builtin_memset(s.g, 0, sizeof(float) * size_t(MB * NB));
      }

      for_each_tile<T>(
          pair, Block{i, mb, j, nb}, s.columns, s.tiles, s.row_copy, true,
          [&](int64_t ti, int64_t tj, int vectors, const float* tile)
              __attribute__((always_inline)) {
                float* to = s.g + tj / PW * panel + ti * PW / T::PACK;
                float* to2 = g2 + tj / PW * panel + ti * PW / T::PACK;
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
        for (int64_t r = 0; r < mb; ++r) {
          const int64_t c = i + r + pair.row_offset - j;
          if (c >= 0 && c < nb) put<T>(s.g, g2, panel, r, c, args.diag[i + r]);
        }
      }

      if (args.dz1) {
        for (int64_t c = 0; c < d; c += NR) {
          const int vectors = tile_vectors(d, c);
          for (int64_t r = 0; r < mb; r += PW) {
            const BlockA<T::KB> a{s.g + r * PW / T::PACK, panel};
            micro_rows<T>(vectors, a, s.rows2 + c * (jw / T::PACK), jw / PW,
                          args.dz1 + (i + r) * pitch + c, pitch, mb - r);
          }
        }
      }
      if (args.dz2) {
        pack_rows<T>(pair.z1 + i * pitch, pitch, d, mb, iw / T::PACK, s.rows1);
        for (int64_t c = 0; c < d; c += NR) {
          const int vectors = tile_vectors(d, c);
          for (int64_t r = 0; r < nb; r += PW) {
            const PanelA<T::KB> a{(T::PACK == 1 ? s.g : g2) + r / PW * panel};
            micro_rows<T>(vectors, a, s.rows1 + c * (iw / T::PACK), iw / PW,
                          args.dz2 + (j + r) * pitch + c, pitch, nb - r);
          }
        }
      }
    }
  }
}

}  // namespace directclr::DCLR_ISA
