// The stages `sums` and `products` on tiles: the same walk, left-out entries and exponential as in
// sums.h and products.h, over packed operands.
#pragma once
#include "tile_products.h"
#include "products.h"
#include "sums.h"

namespace directclr::DCLR_ISA {

struct TileScratch {
  Packed view1, view2;       // unless the parts share them
  int32_t* sums;
  float *g, *dz2;            // kGBlock x kGBlock; d x kGBlock: dz2 of a block, transposed
  char *g_rows, *g_columns;  // G, as the left side of G z2 and the right one of z1' G
  int64_t bytes;
};

static TileScratch tile_scratch(void* at, int64_t m, int64_t n, int64_t pitch) {
  const int64_t steps = steps_of(pitch), wide = packed_bytes(pitch);
  const int64_t rows = smaller(packed_rows(pitch), round_up(m, 64));
  const int64_t columns = smaller(kSumsBlock, round_up(n, 64)), g = kGBlock * kGBlock;
  char* next = static_cast<char*>(at);
  const auto take = [&](int64_t bytes) {
    char* r = next;
    next += bytes;
    return r;
  };
  TileScratch s{};
  s.sums = reinterpret_cast<int32_t*>(take((steps > kSteps ? columns / 16 : 2) * kBlockWords * 8));
  s.view1.for_s = take(rows * wide), s.view1.for_g = take(rows * wide);
  s.view2.for_s = take(columns * wide), s.view2.for_g = take(smaller(kGBlock, columns) * wide);
  s.g = reinterpret_cast<float*>(take(4 * g)), s.g_rows = take(3 * g), s.g_columns = take(3 * g);
  s.dz2 = reinterpret_cast<float*>(take(4 * steps * 64 * kGBlock));
  s.view1.scale = reinterpret_cast<float*>(take(4 * rows));
  s.view2.scale = reinterpret_cast<float*>(take(4 * kGBlock));
  s.bytes = next - static_cast<char*>(at);
  return s;
}

// Rows [begin, end) of a view: those of all parts, or packed here into `own`. A null form stays so.
template <class K>
DCLR_INLINE Packed rows_of_view(const Pair& pair, bool first, int64_t begin, int64_t end,
                                const Packed& own) {
  const Packed& shared = first ? pair.packed1 : pair.packed2;
  if (shared.count) return shared;
  const Packed here{own.for_s, own.for_g, own.scale, begin, end - begin};
  pack_view<K>(pair, first, begin, end, here);
  return here;
}

// ---------------------------------------------------------------------------- sums

template <bool BOUNDED, int V>
struct SumsOf {
  vf hi, lo;
  vf *row_sum, *row_ref, *row_top;      // of the panel
  float *col_sum, *col_ref, *col_top;  // of the block
  bool tops, whole_tiles;
  vf sum[V];

  inline __attribute__((always_inline)) void begin(int64_t j) {
    for (int v = 0; v < V; ++v) sum[v] = load(col_sum + j + v * VL);
  }
  inline __attribute__((always_inline)) void row(int64_t r, const vf (&s)[V]) {
    if constexpr (BOUNDED) {
      vf total = row_sum[r];
      DCLR_UNROLL
      for (int v = 0; v < V; ++v) {
        const Power e = power(s[v], hi, lo);
        const vf x = ldexp(e.p, e.n);
        total += x;
        sum[v] += x;
      }
      row_sum[r] = total;
    }
  }
  inline __attribute__((always_inline)) void end(int64_t j) {
    for (int v = 0; BOUNDED && v < V; ++v) store(col_sum + j + v * VL, sum[v]);
  }
  inline __attribute__((always_inline)) void whole(int64_t j, const float* tile) {
    for (int64_t r = 0; r < kPanel; r += MR) {
      const float* rows = tile + r * V * VL;
      if constexpr (!BOUNDED) {
        sum_tile<false, V>(rows, hi, lo, row_sum + r, row_ref + r, col_sum + j, col_ref + j);
      }
      if (tops) top_tile(V, rows, row_top + r, col_top + j);
    }
  }
};

template <class K, bool BOUNDED>
static void tile_sums(const Sums& args, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                       double* col_sum, double* col_ref, float* col_top, TileScratch s) {
  const Pair& pair = args.pair;
  s.view1.for_g = s.view2.for_g = nullptr;
  const bool tops = args.row_top;
  vf row_sum[kPanel], row_ref[kPanel], row_top[kPanel];
  float block_sum[kSumsBlock], block_ref[kSumsBlock], block_top[kSumsBlock];
  SumsOf<BOUNDED, K::WIDTH / VL> to{
      splat(pair.scale_hi), splat(pair.scale_lo), row_sum, row_ref, row_top,
      block_sum, block_ref, block_top, tops, tops || !BOUNDED, {}};
  const int64_t group = packed_rows(pair.pitch), panel_bytes = 2 * steps_of(pair.d) * K::STEP;
  Tiles t;
  t.configure();
  for (int64_t g = i0; g < i1; g += group) {
    const int64_t g_end = smaller(g + group, i1);
    const Packed rows = rows_of_view<K>(pair, true, g, g_end, s.view1);
    for (int64_t j = j0; j < j1; j += kSumsBlock) {
      const int64_t nc = smaller(kSumsBlock, j1 - j);
      if (below_diagonal(pair, g, j + nc)) continue;
      const Packed of_block = rows_of_view<K>(pair, false, j, j + nc, s.view2);
      const char* const columns = row_for_s<K>(of_block, pair.d, j);
      for (int64_t i = g; i < g_end; i += kGBlock) {
        if (below_diagonal(pair, i, j + nc)) continue;
        for (int64_t c = 0; c < kSumsBlock; ++c) {
          block_sum[c] = 0;
          block_ref[c] = kNoReference;
          block_top[c] = kNoTop;
        }
        for (int64_t row = i; row < smaller(i + kGBlock, g_end); row += kPanel) {
          for (int r = 0; r < kPanel; ++r) {
            row_sum[r] = vf{};
            row_ref[r] = splat(kNoReference);
            row_top[r] = splat(kNoTop);
          }
          const char* a = row_for_s<K>(rows, pair.d, row);
          const Prefetch next{a + panel_bytes, row + kPanel < g_end ? a + 2 * panel_bytes : a};
          similarity_panel<K>(t, pair, row, j, nc, a, columns, s.sums, false, next, to);
          for (int r = 0; r < smaller(kPanel, pair.m - row); ++r) {
            fold_row<BOUNDED>(row_sum[r], row_ref[r], args.row_sum[row + r], args.row_ref[row + r]);
            for (int l = 0; tops && l < VL; ++l) raise_to(args.row_top[row + r], row_top[r][l]);
          }
        }
        for (int64_t c = 0; c < nc; ++c) {
          if (BOUNDED || met(block_ref[c], block_sum[c])) {
            merge(col_sum[j + c], col_ref[j + c], double(block_sum[c]),
                  BOUNDED ? 0.0 : double(block_ref[c]));
          }
          if (tops) raise_to(col_top[j + c], block_top[c]);
        }
      }
    }
  }
  t.release();
}

// ---------------------------------------------------------------------------- weights

// G of a block, and of digits the sums of its magnitudes.
template <class K>
struct WeightsOf {
  static constexpr int V = K::WIDTH / VL;
  vf hi, lo;
  const float *row_weight, *row_ref;  // of the panel
  const float *col_weight, *col_ref;  // of the block
  float *g, *col_sum;
  vf* row_sum;
  int64_t at;
  vf weight[V], ref[V], sum[V];
  static constexpr bool whole_tiles = false;

  inline __attribute__((always_inline)) void begin(int64_t j) {
    at = j;
    for (int v = 0; v < V; ++v) {
      weight[v] = load(col_weight + j + v * VL);
      ref[v] = load(col_ref + j + v * VL);
      sum[v] = load(col_sum + j + v * VL);
    }
  }
  inline __attribute__((always_inline)) void row(int64_t r, const vf (&s)[V]) {
    vf of_row = row_sum[r];
    DCLR_UNROLL
    for (int v = 0; v < V; ++v) {
      const Power e = power(s[v], hi, lo);
      const vf by_row = ldexp(e.p, e.n - row_ref[r]) * row_weight[r];
      vf x = by_row + ldexp(e.p, e.n - ref[v]) * weight[v];
      if constexpr (!K::DIGITS) x = nearest_bf16(x);
      store(g + r * kGBlock + at + v * VL, x);
      if constexpr (!K::DIGITS) continue;
      of_row += magnitude(x);
      sum[v] += magnitude(x);
    }
    row_sum[r] = of_row;
  }
  inline __attribute__((always_inline)) void end(int64_t j) {
    for (int v = 0; v < V; ++v) store(col_sum + j + v * VL, sum[v]);
  }
  inline __attribute__((always_inline)) void whole(int64_t, const float*) {}
};

// Entries of G that are more than 1 / kOutlier of their row's or column's sum: positives, hard
// negatives, candidates equal to the positive. Their products are made in fp32, since the digits of
// all others would go short beside them, and what is left where such terms cancel is small.
constexpr float kOutlier = 16.0f;
struct Outliers {
  struct Entry {
    int64_t i, j;
    float g;
  } entries[2 * kGBlock];
  int64_t count, others;  // of them no positives, which have half of the room
};

// Moves the outliers of row r, column j from the block of G to the list.
DCLR_INLINE void take_outliers(const Block& b, int64_t positive, int64_t r, float row_limit,
                               const float* col_limit, float* g, Outliers& out) {
  for (int64_t j = 0; j < b.nc; ++j) {
    const float size = __builtin_fabsf(g[j]);
    if (!(size > row_limit || size > col_limit[j])) continue;
    if (j != positive && out.others++ >= kGBlock) continue;
    out.entries[out.count++] = {b.i0 + r, b.j0 + j, g[j]};
    g[j] = 0;
  }
}

// Puts the positives into G of a block and takes the outliers out; the units of the digits of rows
// and columns of what is left. `row_sum` and `col_sum` are of magnitudes without the positives.
static void units_of_G(const Products& args, const Block& b, float* block, const vf* row_sum,
                       const float* col_sum, const float* row_scale, const float* col_scale,
                       float* unit_row, float* unit_col, Outliers& out) {
  const int64_t first = b.i0 + args.pair.row_offset - b.j0;  // the positive of row 0
  float row_limit[kGBlock], col_limit[kGBlock];
  for (int64_t j = 0; j < kGBlock; ++j) col_limit[j] = col_sum[j] / kOutlier;
  for (int64_t r = 0; r < b.mc; ++r) {
    const int64_t p = first + r;
    row_limit[r] = float(sum_lanes(row_sum[r])) / kOutlier;
    if (!args.diag || p < 0 || p >= b.nc) continue;
    const float x = args.diag[b.i0 + r], share = __builtin_fabsf(x) / kOutlier;
    block[r * kGBlock + p] = x;
    row_limit[r] += share;
    col_limit[p] += share;
  }
  vi col_most[kGBlock / VL] = {};
  for (int64_t r = 0; r < round_up(b.mc, kPanel); ++r) {
    float* g = block + r * kGBlock;
    vi beyond = {};
    for (int64_t j = 0; j < b.nc; j += VL) {
      const vf x = magnitude(load(g + j));
      beyond |= (x > splat(row_limit[r])) | (x > load(col_limit + j));
    }
    if (r < b.mc && any_lane(beyond)) {
      take_outliers(b, first + r, r, row_limit[r], col_limit, g, out);
    }
    vi most = {};
    for (int64_t j = 0; j < b.nc; j += VL) {
      const vf x = magnitude(load(g + j));
      most = larger((vi)(x * load(col_scale + j)), most);
      col_most[j / VL] = larger((vi)(x * row_scale[r]), col_most[j / VL]);
    }
    unit_row[r] = unit_of(largest_lane(most));
  }
  for (int64_t j = 0; j < kGBlock; ++j) unit_col[j] = unit_of(col_most[j / VL][j % VL]);
}

// G of a block, and as an operand in both forms. unit_row and unit_col are its digits'.
template <class K>
DCLR_INLINE void operands_of_G(Tiles& t, const Products& args, const Block& b,
                               const TileScratch& s, const Packed& rows, const Packed& columns,
                               float* unit_row, float* unit_col, Outliers& out) {
  const Pair& pair = args.pair;
  float row_weight[kGBlock], row_ref[kGBlock], row_scale[kGBlock];
  float col_weight[kGBlock], col_ref[kGBlock], col_scale[kGBlock], col_sum[kGBlock] = {};
  padded(row_weight, args.row_weight + b.i0, b.mc);
  padded(row_ref, args.row_ref + b.i0, b.mc);
  padded(col_weight, args.col_weight + b.j0, b.nc);
  padded(col_ref, args.col_ref + b.j0, b.nc);
  vf row_sum[kGBlock] = {};
  WeightsOf<K> to{splat(pair.scale_hi), splat(pair.scale_lo), row_weight, row_ref, col_weight,
                  col_ref, s.g, col_sum, row_sum, 0, {}, {}, {}};
  if (b.mc % 64 || b.nc % 64 || below_diagonal(pair, b.i0 + b.mc - 1, b.j0 + 1)) {
    __builtin_memset(s.g, 0, sizeof(float) * size_t(kGBlock * kGBlock));
  }
  for (int64_t r = 0; r < b.mc; r += kPanel) {
    if (below_diagonal(pair, b.i0 + r, b.j0 + b.nc)) continue;
    to.row_weight = row_weight + r, to.row_ref = row_ref + r;
    to.row_sum = row_sum + r, to.g = s.g + r * kGBlock;
    similarity_panel<K>(t, pair, b.i0 + r, b.j0, b.nc, row_for_s<K>(rows, pair.d, b.i0 + r),
                        row_for_s<K>(columns, pair.d, b.j0), s.sums, true, {}, to);
  }
  out.count = out.others = 0;
  if constexpr (K::DIGITS > 0) {
    padded(row_scale, rows.scale + b.i0 - rows.begin, b.mc);
    padded(col_scale, columns.scale + b.j0 - columns.begin, b.nc);
    units_of_G(args, b, s.g, row_sum, col_sum, row_scale, col_scale, unit_row, unit_col, out);
  }
  float per_unit[16];
  for (int64_t r = 0; args.dz1 && r < round_up(b.mc, kPanel); r += 16) {
    for (int l = 0; K::DIGITS && l < 16; ++l) per_unit[l] = K::UNITS / unit_row[r + l];
    for (int64_t j = 0; j < b.nc; j += 64) {
      pack_step<K>(
          [&](int l, int q, int v) __attribute__((always_inline)) {
            const int64_t c = j + q * 16 + v * VL;
            const vf x = load(s.g + (r + l) * kGBlock + c);
            if constexpr (!K::DIGITS) return x;
            return x * load(col_scale + c) * per_unit[l];
          },
          false, s.g_rows + (r / 16 * steps_of(b.nc) + j / 64) * K::STEP);
    }
  }
  for (int64_t j = 0; args.dz2 && j < round_up(b.nc, K::WIDTH); j += 16) {
    for (int l = 0; K::DIGITS && l < 16; ++l) per_unit[l] = K::UNITS / unit_col[j + l];
    for (int64_t i = 0; i < b.mc; i += 64) {
      pack_step<K>(
          [&](int l, int q, int v) __attribute__((always_inline)) {
            const int64_t r = i + q * 16 + l;
            const vf x = load(s.g + r * kGBlock + j + v * VL);
            if constexpr (!K::DIGITS) return x;
            return x * (row_scale[r] * load(per_unit + v * VL));
          },
          false, s.g_columns + (j / 16 * steps_of(b.mc) + i / 64) * K::STEP);
    }
  }
}

// ---------------------------------------------------------------------------- products

// dz1 += G z2 for the rows of the block.
template <class K>
DCLR_INLINE void add_tiles_G_z2(Tiles& t, const Products& args, const Block& b,
                                const TileScratch& s, const Packed& columns, const float* unit) {
  const int64_t pitch = args.pair.pitch, steps = steps_of(b.nc), side = steps * K::STEP;
  const int64_t side2 = side_for_g<K>(columns);
  const int64_t per_call = rows_per_call<K>(steps);
  const int32_t* from = s.sums;
  int64_t at = 0, column = 0, turn = 0;
  auto epilogue = make_epilogue([&](int64_t r) __attribute__((always_inline)) {
    float* to = args.dz1 + (b.i0 + at + r) * pitch + column;
    DCLR_UNROLL
    for (int v = 0; v < K::WIDTH / VL; ++v) {
      if (v >= TV && column + v * VL >= pitch) break;
      vf x = combined<K>(from, r, v);
      if constexpr (K::DIGITS > 0) x *= unit[at + r];
      store(to + v * VL, load(to + v * VL) + x);
    }
  });
  epilogue.rows = 0;
  for (int64_t i = 0; i < b.mc; i += kPanel) {
    for (int64_t c = 0; c < args.pair.d; c += K::WIDTH) {
      int32_t* sums = s.sums + (turn ^= 1) * kBlockWords;
      const char* a = s.g_rows + i / 16 * side;
      const char* z2 = row_for_g<K>(columns, b.j0) + c / 16 * side2;
      multiply<K>(t, a, a + side, z2, side2, steps, false, sums,
                  [&]() __attribute__((always_inline)) { epilogue.some(per_call); });
      epilogue.all();
      from = sums, at = i, column = c;
      epilogue.next = 0, epilogue.rows = smaller(kPanel, b.mc - i);
    }
  }
  epilogue.all();
}

// The transposed dz2 += z1' G for the columns of the block.
template <class K>
DCLR_INLINE void add_tiles_z1_G(Tiles& t, const Products& args, const Block& b,
                                const TileScratch& s, const Packed& rows, const float* unit) {
  const int64_t steps = steps_of(b.mc), side = steps * K::STEP, side1 = side_for_g<K>(rows);
  const int64_t per_call = rows_per_call<K>(steps);
  const int32_t* from = s.sums;
  int64_t at = 0, column = 0, turn = 0;
  auto epilogue = make_epilogue([&](int64_t r) __attribute__((always_inline)) {
    float* to = s.dz2 + (column + r) * kGBlock + at;
    DCLR_UNROLL
    for (int v = 0; v < K::WIDTH / VL; ++v) {
      vf x = combined<K>(from, r, v);
      if constexpr (K::DIGITS > 0) x *= load(unit + at + v * VL);
      store(to + v * VL, load(to + v * VL) + x);
    }
  });
  epilogue.rows = 0;
  for (int64_t c = 0; c < args.pair.d; c += kPanel) {
    for (int64_t j = 0; j < b.nc; j += K::WIDTH) {
      int32_t* sums = s.sums + (turn ^= 1) * kBlockWords;
      const char* a = row_for_g<K>(rows, b.i0) + c / 16 * side1;
      multiply<K>(t, a, a + side1, s.g_columns + j / 16 * side, side, steps, false, sums,
                  [&]() __attribute__((always_inline)) { epilogue.some(per_call); });
      epilogue.all();
      from = sums, at = j, column = c;
      epilogue.next = 0, epilogue.rows = kPanel;
    }
  }
  epilogue.all();
}

// dz2 of nc columns, back to rows.
DCLR_INLINE void add_turned(const Products& args, int64_t j0, int64_t nc, const float* turned) {
  const int64_t pitch = args.pair.pitch;
  for (int64_t c = 0; c < args.pair.d; c += VL) {
    for (int64_t j = 0; j < nc; j += VL) {
      vf r[VL];
      for (int l = 0; l < VL; ++l) r[l] = load(turned + (c + l) * kGBlock + j);
      transpose(r);
      for (int l = 0; l < smaller(VL, nc - j); ++l) {
        float* to = args.dz2 + (j0 + j + l) * pitch + c;
        store(to, load(to) + r[l]);
      }
    }
  }
}

DCLR_INLINE void add_outliers(const Products& args, const Outliers& out) {
  const int64_t pitch = args.pair.pitch;
  for (int64_t e = 0; e < out.count; ++e) {
    const int64_t i = out.entries[e].i * pitch, j = out.entries[e].j * pitch;
    const vf g = splat(out.entries[e].g);
    for (int64_t k = 0; k < pitch; k += VL) {
      float *dz1 = args.dz1 + i + k, *dz2 = args.dz2 + j + k;
      if (args.dz1) store(dz1, load(dz1) + g * load(args.pair.z2 + j + k));
      if (args.dz2) store(dz2, load(dz2) + g * load(args.pair.z1 + i + k));
    }
  }
}

template <class K>
static void tile_products(const Products& args, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                           TileScratch s) {
  const Pair& pair = args.pair;
  const int64_t steps = steps_of(pair.d), group = packed_rows(pair.pitch);
  if (pair.keep_panels * kPanel >= pair.m) s.view1.for_s = s.view2.for_s = nullptr;
  if (!args.dz1) s.view2.for_g = nullptr;
  if (!args.dz2) s.view1.for_g = nullptr;
  const int64_t j_step = even_block(j1 - j0, kGBlock, 64);
  const int64_t i_step = even_block(i1 - i0, kGBlock, 64);
  float unit_row[kGBlock], unit_col[kGBlock];
  Outliers out;
  Tiles t;
  t.configure();
  for (int64_t g = i0; g < i1; g += group / i_step * i_step) {
    const int64_t g_end = smaller(g + group / i_step * i_step, i1);
    const Packed rows = rows_of_view<K>(pair, true, g, g_end, s.view1);
    for (int64_t j = j0; j < j1; j += j_step) {
      const int64_t nc = smaller(j_step, j1 - j);
      if (below_diagonal(pair, g, j + nc)) continue;
      const Packed columns = rows_of_view<K>(pair, false, j, j + nc, s.view2);
      for (int64_t c = 0; args.dz2 && c < steps * 64; ++c) {
        __builtin_memset(s.dz2 + c * kGBlock, 0, sizeof(float) * size_t(round_up(nc, 64)));
      }
      for (int64_t i = g; i < g_end; i += i_step) {
        const Block b{i, smaller(i_step, g_end - i), j, nc};
        if (below_diagonal(pair, i, j + nc)) continue;
        operands_of_G<K>(t, args, b, s, rows, columns, unit_row, unit_col, out);
        if (args.dz1) add_tiles_G_z2<K>(t, args, b, s, columns, unit_row);
        if (args.dz2) add_tiles_z1_G<K>(t, args, b, s, rows, unit_col);
        add_outliers(args, out);
      }
      if (args.dz2) add_turned(args, j, nc, s.dz2);
    }
  }
  t.release();
}

}  // namespace directclr::DCLR_ISA
