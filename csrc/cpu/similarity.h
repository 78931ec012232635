// Blocks of S = z1 z2', tile by tile: the walk that `sums` and `products` share.
//
// For a block of MC rows and NC columns whose packed columns lie in L2, each panel of MR rows stays
// in L1 while the columns stream past it. Long rows (more than KC words) are taken in several
// passes over the block, which keeps the packed columns of one pass in L2; the partial tiles then
// wait in `block`. When a tile is complete its left-out entries are marked and the epilogue runs on
// it, still in L1.
#pragma once
#include "exp2.h"
#include "pack.h"

namespace directclr::DCLR_ISA {

constexpr int64_t kTile = MR * NR;

// A thread's, in whole cache lines; sizes follow the problem where it is smaller than a block.
struct Scratch {
  float *tiles, *g;                    // MC x NC: partial tiles; G (bf16: two halves)
  float *columns, *rows2, *rows1;      // x pitch: NC of z2 for S and for G z2, MC of z1 for G' z1
  float* row_copy;                     // MR x pitch
  float *col_sum, *col_ref, *col_top;  // NC
  int64_t bytes;

  // Of bf16, the copy of G with pairs along i.
  inline __attribute__((always_inline)) float* g2() const { return g + MC * NC / 2; }
};

static Scratch scratch_at(void* at, int64_t m, int64_t n, int64_t pitch) {
  const int64_t nc = smaller(NC, round_up(n, NR)), mc = smaller(MC, round_up(m, MR));
  const int64_t wide = round_up(pitch, NR) + VL;
  char* next = static_cast<char*>(at);
  const auto floats = [&](int64_t count) {
    float* r = reinterpret_cast<float*>(next);
    next += round_up(4 * count, 64);
    return r;
  };
  Scratch s{};
  s.tiles = floats(MC * NC), s.g = floats(MC * NC);
  s.columns = floats(nc * wide), s.rows2 = floats(nc * wide), s.rows1 = floats(mc * wide);
  s.row_copy = floats(MR * wide);
  s.col_sum = floats(NC), s.col_ref = floats(NC), s.col_top = floats(NC);
  s.bytes = next - static_cast<char*>(at);
  return s;
}

// Words of k that are added up one after another before they join the tile. The error of a sum is
// made where it is large, so c chains err about 1 / c as much as one. Where they are cut depends on d
// alone: equal rows have equal products, wherever they stand.
template <class T>
constexpr int64_t kChain = T::PACK == 1 ? 192 : KC;

// Which kept panel holds rows [i, i + rows), or -1: `keep_panels` of all, evenly spread.
DCLR_INLINE int64_t kept_slot(const Pair& pair, int64_t i, int64_t rows = MR) {
  const int64_t panels = (pair.m + rows - 1) / rows, ip = i / rows;
  const int64_t slot = ip * pair.keep_panels / panels;
  return (ip + 1) * pair.keep_panels / panels > slot ? slot : -1;
}

// Nothing of rows >= i, columns < j_end is wanted.
DCLR_INLINE bool below_diagonal(const Pair& pair, int64_t i, int64_t j_end) {
  return pair.upper && j_end - 1 <= i + pair.row_offset;
}

DCLR_INLINE void mark_left_out(const Pair& pair, int64_t i0, int64_t rows, int64_t j0, int64_t cols,
                               int width, float* tile) {
  const int64_t first = i0 + pair.row_offset - j0;  // column of the tile that row 0 leaves out
  const bool diagonal = first < width && first + MR > 0;
  const bool below = pair.upper && first + MR > 1;
  if (!diagonal && !below && rows >= MR && cols >= width) return;
  for (int64_t i = 0; (pair.logits || pair.own) && i < smaller(MR, rows); ++i) {
    const int64_t positive = first + i;
    if (positive >= 0 && positive < smaller(width, cols)) {
      const float s = tile[i * width + positive];
      if (pair.logits) pair.logits[i0 + i] = pair.scale * double(s);
      if (pair.own) pair.own[i0 + i] = s;
    }
  }
  const float left_out = kLeftOut / pair.scale_hi;
  for (int64_t i = 0; i < MR; ++i) {
    const int64_t positive = first + i;
    for (int64_t j = 0; j < width; ++j) {
      if (i >= rows || j >= cols || j == positive || (pair.upper && j < positive)) {
        tile[i * width + j] = left_out;
      }
    }
  }
}

// The entries of a tile whose ids are equal.
DCLR_INLINE void mark_equal(const Pair& pair, int64_t i0, int64_t rows, int64_t j0, int64_t cols,
                            int width, float* tile) {
  const float left_out = kLeftOut / pair.scale_hi;
  for (int64_t i = 0; i < smaller(MR, rows); ++i) {
    const int32_t id = pair.ids1[i0 + i];
    for (int64_t j = 0; j < smaller(width, cols); ++j) {
      float& s = tile[i * width + j];
      s = pair.ids2[j0 + j] == id ? left_out : s;
    }
  }
}

// Brings in part `t` of `parts` of the next panel's rows while this one computes: a panel comes
// from beyond L2 once per block of columns.
DCLR_INLINE void prefetch_panel(const Pair& pair, int64_t row, int64_t k0, int64_t k1, int64_t t,
                                int64_t parts) {
  if (row + MR > pair.m) return;
  const int64_t lines = (k1 - k0 + 15) / 16;
  const float* p = pair.z1 + row * pair.pitch + k0;
  for (int64_t line = lines * t / parts; line < lines * (t + 1) / parts; ++line) {
    for (int i = 0; i < MR; ++i) __builtin_prefetch(p + i * pair.pitch + line * 16, 0, 2);
  }
}

struct Block {
  int64_t i0, mc, j0, nc;
};

// Calls tile_done(i, j, vectors, tile) for every tile of the block (i, j relative to it; tile:
// MR x vectors * VL) and row_done(i) after the last tile of a panel. `columns` is the block's
// packed z2, `tiles` room for MC x NC floats, `row_copy` for MR * pitch.
template <class T, class TileDone, class RowDone>
DCLR_INLINE void for_each_tile(const Pair& pair, const Block& b, const float* columns, float* tiles,
                               float* row_copy, bool reuse_kept, TileDone tile_done,
                               RowDone row_done) {
  const int64_t ld = round_up((pair.d + T::PACK - 1) / T::PACK, VL);
  const int64_t words = round_up((pair.d + T::PACK - 1) / T::PACK, T::KB);
  const int64_t passes = (words + KC - 1) / KC;
  const int64_t kc = round_up((words + passes - 1) / passes, VL);
  const int64_t row_tiles = (pair.n + NR - 1) / NR;
  for (int64_t k0 = 0; k0 < words; k0 += kc) {
    const bool last = k0 + kc >= words;
    const int64_t k_end = smaller(k0 + kc, words), chains = (k_end - k0 + kChain<T> - 1) / kChain<T>;
    const int64_t chain = round_up((k_end - k0 + chains - 1) / chains, T::KB);
    for (int64_t i = 0; i < b.mc; i += MR) {
      const int64_t row = b.i0 + i, rows = pair.m - row;
      const int64_t slot = pair.keep_panels ? kept_slot(pair, row) : -1;
      float* kept = slot < 0 ? nullptr : pair.keep + (slot * row_tiles + b.j0 / NR) * kTile;
      const bool reuse = kept && reuse_kept;
      if (reuse && !last) continue;
      RowsA<T::KB> a{};
      if (!reuse) a = broadcast_rows<T>(pair.z1 + row * pair.pitch, pair.pitch, rows, row_copy);
      for (int64_t j = 0; j < b.nc; j += NR) {
        const int vectors = tile_vectors(b.nc, j), width = vectors * VL;
        if (below_diagonal(pair, row, b.j0 + smaller(j + NR, b.nc))) continue;
        float* tile = passes > 1 ? tiles + i * NC + j * MR : tiles;
        if (kept) tile = kept + j * MR;
        if (!reuse) {
          prefetch_panel(pair, row + MR, k0 * T::PACK, k_end * T::PACK, j / NR,
                         (b.nc + NR - 1) / NR);
          for (int64_t k = k0; k < k_end; k += chain) {
            const RowsA<T::KB> from{a.p + k, a.ld};
            const int64_t steps = (smaller(chain, k_end - k) + T::KB - 1) / T::KB;
            micro<T>(vectors, from, columns + j * ld + k * width, steps, tile, width, k > 0);
          }
          if (last) mark_left_out(pair, row, rows, b.j0 + j, b.nc - j, width, tile);
          if (last && pair.ids1) mark_equal(pair, row, rows, b.j0 + j, b.nc - j, width, tile);
        }
        if (last) tile_done(i, j, vectors, tile);
      }
      if (last) row_done(i);
    }
  }
}

}  // namespace directclr::DCLR_ISA
