// What is done with a tile of S while it is in registers: the epilogues of `sums` and `weights`
// (docs/design.md sections 2 and 3), written once for the device and for a host (warp.h).
//
// A warp holds 16 rows and 8 * kBlocks columns of the tile as wgmma leaves them: value
// 4 j + 2 h + c of a lane is row lane / 4 + 8 h, column 8 j + 2 (lane % 4) + c.
#pragma once

#include "arguments.h"
#include "warp.h"

namespace directclr {

constexpr int kWarpRows = 16;

// Where the tile lies in its launch and which of its entries count.
struct Place {
  int row, col;    // its first row and column
  int rows, cols;  // of the whole launch
  int step;        // the positive of row i is column i + step
  bool upper;      // only columns beyond that one count (a view with itself)
};

// Whether some entry of a tile of `height` x `width` does not count.
DIRECTCLR_HD bool needs_mask(const Place& p, int height, int width) {
  const bool ragged = p.row + height > p.rows || p.col + width > p.cols;
  const bool reaches = p.col < p.row + p.step + height;
  if (p.upper) return ragged || reaches;
  return ragged || (reaches && p.col + width > p.row + p.step);
}

// The rows and columns of a lane.
template <class W>
struct Fragment {
  typename W::Int row, quad;
  DIRECTCLR_HD Fragment(const Place& p, int warp)
      : row(W::lane() / 4 + (p.row + kWarpRows * warp)), quad(W::lane() % 4) {}
  DIRECTCLR_HD typename W::Int rows(int h) const { return row + 8 * h; }
  DIRECTCLR_HD typename W::Int cols(const Place& p, int j) const {
    return quad * 2 + (p.col + 8 * j);
  }
};

// Which of a lane's values count. A question is three compares with constants, nothing is kept for
// later: a tile's accumulators leave few registers.
template <class W>
struct Counting {
  using Bool = typename W::Bool;
  typename W::Int ahead;    // from the lane's first column to its first row's positive
  typename W::Int left[2];  // columns from the first one on, none where there is no row
  Bool both;                // whether columns before the positive count

  DIRECTCLR_HD Counting(const Place& p, const Fragment<W>& own)
      : ahead(own.row + p.step - own.cols(p, 0)), both(!p.upper) {
    const typename W::Int none = own.quad * 0, columns = none + p.cols - own.cols(p, 0);
    DIRECTCLR_UNROLL
    for (int h = 0; h < 2; ++h) left[h] = W::select(own.rows(h) < p.rows, columns, none);
  }
  DIRECTCLR_HD Bool there(int i) const { return left[i / 2 % 2] > column(i); }
  DIRECTCLR_HD Bool positive(int i) const { return (ahead == beyond(i)) & there(i); }
  DIRECTCLR_HD Bool operator()(int i) const {
    return ((ahead < beyond(i)) | ((ahead > beyond(i)) & both)) & there(i);
  }

 private:
  static constexpr DIRECTCLR_HD int column(int i) { return i / 4 * 8 + i % 2; }
  static constexpr DIRECTCLR_HD int beyond(int i) { return column(i) - i / 2 % 2 * 8; }
};

// acc: 4 kBlocks inner products a lane, times a2 = log2(e) / temperature times the operands' scale;
// -inf where an entry does not count. `own_logit`, where not null, receives those of the positives
// met, by the launch's row.
template <class W, int kBlocks, class Acc>
DIRECTCLR_HD void scale_and_mask(Acc& acc, const Place& p, const Fragment<W>& own, int height,
                                 float a2, float* own_logit) {
  using Float = typename W::Float;
  DIRECTCLR_UNROLL
  for (int i = 0; i < 4 * kBlocks; ++i) acc[i] = acc[i] * a2;
  if (!needs_mask(p, height, 8 * kBlocks)) return;
  // All values in one place that other tiles jump over: a question at each value's use is a branch
  // a value.
  const Counting<W> counts(p, own);
  DIRECTCLR_UNROLL
  for (int i = 0; i < 4 * kBlocks; ++i) {
    if (own_logit) W::store(own_logit, own.rows(i / 2 % 2), Float(acc[i]), counts.positive(i));
    acc[i] = W::select(counts(i), Float(acc[i]), Float(-INFINITY));
  }
}

// --------------------------------------------------------------------------------- sums

// Sum of exp2 in relation to a maximum: mass * exp2(peak). Empty: peak -inf, mass 0.
template <class W>
struct Scaled {
  typename W::Float peak, mass;
};

template <class W>
DIRECTCLR_HD typename W::Float finite_or_zero(typename W::Float x) {
  return W::select(x == -INFINITY, typename W::Float(0.0f), x);
}

template <class W>
DIRECTCLR_HD Scaled<W> add(const Scaled<W>& a, const Scaled<W>& b) {
  const typename W::Float peak = W::max(a.peak, b.peak), base = finite_or_zero<W>(peak);
  return {peak, a.mass * W::exp2(a.peak - base) + b.mass * W::exp2(b.peak - base)};
}

// Of 2 kKept values a lane keeps kKept and adds to them its partner's, which keeps the others.
template <class W, bool kBounded, int kKept, int kMask, class Acc>
DIRECTCLR_HD void halve(Acc& acc) {
  using Float = typename W::Float;
  const typename W::Mask high = W::mask((W::lane() & kMask) != 0);
  DIRECTCLR_UNROLL
  for (int k = 0; k < kKept; ++k) {
    if (kBounded) {
      const Float a = acc[k], b = acc[k + kKept];
      acc[k] = W::pick(high, b, a) + W::shuffle_xor(W::pick(high, a, b), kMask);
    } else {
      // Value v: its peak at 4 (v / 2) + v % 2, its mass two behind.
      const int ka = 4 * (k / 2) + k % 2, kb = 4 * ((k + kKept) / 2) + (k + kKept) % 2;
      const Scaled<W> a{acc[ka], acc[ka + 2]}, b{acc[kb], acc[kb + 2]};
      const Float peak = W::shuffle_xor(W::pick(high, a.peak, b.peak), kMask);
      const Float mass = W::shuffle_xor(W::pick(high, a.mass, b.mass), kMask);
      const Scaled<W> kept{W::pick(high, b.peak, a.peak), W::pick(high, b.mass, a.mass)};
      const Scaled<W> sum = add<W>(kept, {peak, mass});
      acc[ka] = sum.peak;
      acc[ka + 2] = sum.mass;
    }
  }
}

// Where a warp's sum of column `c` of the tile lies: 32 lanes that write, eight columns each 32
// apart, and 32 that read neighbours find as many banks.
template <class Int>
DIRECTCLR_HD Int place_of_column(const Int& c) {
  const Int group = c / 32;
  return c ^ (group % 2 + group / 2 * 8);
}

// One warp's share of a `sums` tile. acc: 4 kBlocks inner products a lane; overwritten.
// row_sum/row_peak: this tile's line of row partials, indexed by the launch's row. by_warp/peaks:
// kBlocks * 8 floats, this warp's column sums of the tile by place_of_column. Without kBounded every
// sum carries the maximum it is relative to. With kOwn `own_logit` may be asked for.
template <class W, int kBlocks, bool kBounded, bool kOwn, class Acc>
DIRECTCLR_HD void sums_of_warp(Acc& acc, const Place& p, int warp, int height, float a2, bool columns,
                               float* row_sum, float* row_peak, float* own_logit, float* by_warp,
                               float* peaks) {
  using Float = typename W::Float;
  using Int = typename W::Int;
  using Bool = typename W::Bool;
  const Fragment<W> own(p, warp);
  scale_and_mask<W, kBlocks>(acc, p, own, height, a2, kOwn ? own_logit : nullptr);
  if (kBounded) {
    DIRECTCLR_UNROLL
    for (int i = 0; i < 4 * kBlocks; ++i) acc[i] = W::exp2(acc[i]);
  }
  const Bool leads = own.quad == 0;
  DIRECTCLR_UNROLL
  for (int h = 0; h < 2; ++h) {
    Scaled<W> row{Float(-INFINITY), Float(0.0f)};
    if (!kBounded) {
      DIRECTCLR_UNROLL
      for (int j = 0; j < kBlocks; ++j) {
        row.peak = W::max(row.peak, W::max(acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]));
      }
    }
    const Float base = finite_or_zero<W>(row.peak);
    DIRECTCLR_UNROLL
    for (int j = 0; j < kBlocks; ++j) {
      DIRECTCLR_UNROLL
      for (int c = 0; c < 2; ++c) {
        const Float x = acc[4 * j + 2 * h + c];
        row.mass += kBounded ? x : W::exp2(x - base);
      }
    }
    DIRECTCLR_UNROLL
    for (int m = 1; m <= 2; m *= 2) {
      const Float mass = W::shuffle_xor(row.mass, m);
      if (kBounded) {
        row.mass += mass;
      } else {
        row = add<W>(row, {W::shuffle_xor(row.peak, m), mass});
      }
    }
    const Int at = own.rows(h);
    W::store(row_sum, at, row.mass, leads & (at < p.rows));
    if (!kBounded) W::store(row_peak, at, row.peak, leads & (at < p.rows));
  }
  if (!columns) return;
  // In place: the two rows of a lane first, then the eight lanes of a column, which exchange halves
  // in three rounds: 7/4 kBlocks shuffles in place of 6 kBlocks.
  if (kBounded) {
    DIRECTCLR_UNROLL
    for (int v = 0; v < 2 * kBlocks; ++v) {
      acc[v] = acc[4 * (v / 2) + v % 2] + acc[4 * (v / 2) + 2 + v % 2];
    }
  } else {
    // Peaks where the upper row's values were, masses where the lower row's were.
    DIRECTCLR_UNROLL
    for (int j = 0; j < kBlocks; ++j) {
      DIRECTCLR_UNROLL
      for (int c = 0; c < 2; ++c) {
        const Float a = acc[4 * j + c], b = acc[4 * j + 2 + c];
        const Float peak = W::max(a, b), base = finite_or_zero<W>(peak);
        acc[4 * j + c] = peak;
        acc[4 * j + 2 + c] = W::exp2(a - base) + W::exp2(b - base);
      }
    }
  }
  halve<W, kBounded, kBlocks, 16>(acc);
  halve<W, kBounded, kBlocks / 2, 8>(acc);
  halve<W, kBounded, kBlocks / 4, 4>(acc);
  constexpr int kLeft = 2 * kBlocks / 8;
  const Int first = W::lane() / 4 * kLeft;
  DIRECTCLR_UNROLL
  for (int k = 0; k < kLeft; ++k) {
    // Value `first + k` is block (first + k) / 2, column (first + k) % 2 of the lane's pair.
    const Int at = place_of_column<Int>((first + k) / 2 * 8 + own.quad * 2 + (first + k) % 2);
    if (kBounded) {
      W::put(by_warp, at, Float(acc[k]));
    } else {
      W::put(peaks, at, Float(acc[4 * (k / 2) + k % 2]));
      W::put(by_warp, at, Float(acc[4 * (k / 2) + 2 + k % 2]));
    }
  }
}

// The tile's sum of one column, from those of its warps in their order.
template <bool kBounded>
DIRECTCLR_HD void sum_of_column(const float* by_warp, const float* peaks, int warps, int stride,
                                float* sum, float* peak) {
  float mass = 0.0f, top = -INFINITY;
  if (!kBounded) {
    for (int w = 0; w < warps; ++w) {
      const float x = peaks[w * stride];
      top = x > top || x != x ? x : top;
    }
  }
  const float base = top == -INFINITY ? 0.0f : top;
  for (int w = 0; w < warps; ++w) {
    const float x = by_warp[w * stride];
    mass += kBounded ? x : x * exp2f(peaks[w * stride] - base);
  }
  *sum = mass;
  if (!kBounded) *peak = top;
}

// --------------------------------------------------------------------------------- weights

// Lane q of each quad gives word b of block q to lane b: x[b] of lane q becomes x[q] of lane b.
template <class W>
DIRECTCLR_HD void transpose_quad(typename W::Word (&x)[4]) {
  DIRECTCLR_UNROLL
  for (int m = 1; m <= 2; m *= 2) {
    const typename W::Mask odd = W::mask((W::lane() & m) != 0);
    DIRECTCLR_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & m) continue;
      const typename W::Word gift = W::pick(odd, x[i], x[i | m]);
      const typename W::Word got = W::shuffle_xor(gift, m);
      x[i] = W::pick(odd, got, x[i]);
      x[i | m] = W::pick(odd, x[i | m], got);
    }
  }
}

// One warp's share of a `weights` tile: P_ij = exp(a s_ij) (row_i + col_j), zero where an entry does
// not count, in half precision to `out` (row-major, `pitch` a multiple of 8, column blocks within the
// pitch are written whole, with zeros). Half::pack(low, high) rounds a pair. `mirror`: P is square and
// symmetric, and what lies below the diagonal's squares of 8 kBlocks is stored by the tiles above.
// kSplit: a row is the rounded weights and then, times kLoScale, what they lack.
template <class W, class Half, int kBlocks, bool kBounded, bool kSplit, class Acc>
DIRECTCLR_HD void weights_of_warp(Acc& acc, const Place& p, int warp, int height, float a2,
                                  const WeightFactors& f, void* out, int64_t pitch, bool mirror) {
  using Float = typename W::Float;
  using Int = typename W::Int;
  using Bool = typename W::Bool;
  const Fragment<W> own(p, warp);
  // Of the lane's columns two a block: all under way before the first is used, in pairs but at the
  // edge. Without kBounded there are too few registers, and they are read where they are used.
  const int columns = f.symmetric ? p.cols : 0;
  Float col[kBlocks][2];
  const auto load_at_edge = [&](const float* from, int j, float other, Float(&x)[2]) {
    DIRECTCLR_UNROLL
    for (int c = 0; c < 2; ++c) {
      const Int at = own.cols(p, j) + c;
      x[c] = W::load(from, at, at < columns, other);
    }
  };
  if (kBounded && !f.symmetric) {
    DIRECTCLR_UNROLL
    for (int j = 0; j < kBlocks; ++j) col[j][0] = col[j][1] = Float(0.0f);
  } else if (kBounded && p.col + 8 * kBlocks <= columns) {
    DIRECTCLR_UNROLL
    for (int j = 0; j < kBlocks; ++j) W::load2(f.col, own.cols(p, j), col[j]);
  } else if (kBounded) {
    DIRECTCLR_UNROLL
    for (int j = 0; j < kBlocks; ++j) load_at_edge(f.col, j, 0.0f, col[j]);
  }
  Float row[2], row_shift[2];
  DIRECTCLR_UNROLL
  for (int h = 0; h < 2; ++h) {
    const Bool there = own.rows(h) < p.rows;
    row[h] = W::load(f.row, own.rows(h), there, 0.0f);
    if (!kBounded) row_shift[h] = W::load(f.row_shift, own.rows(h), there, INFINITY);
  }
  constexpr int kParts = kSplit ? 2 : 1;
  const int64_t width = pitch / kParts;
  // Where the lane's first eight columns go, in units of eight, and how many may be written there.
  typename W::Long line[2];
  Int left[2];
  const Int begin = own.quad * 8 + p.col;
  DIRECTCLR_UNROLL
  for (int h = 0; h < 2; ++h) {
    line[h] = (W::wide(own.rows(h)) * pitch + W::wide(begin)) / int64_t(8);
    left[h] = W::select(own.rows(h) < p.rows, begin * -1 + int(width), begin * 0);
  }
  scale_and_mask<W, kBlocks>(acc, p, own, height, a2, nullptr);
  // Four blocks turned: eight rows of the tile as neighbours, in a row of `out` for each column.
  constexpr int kSquare = 8 * kBlocks;
  const bool twice = mirror && p.col / kSquare > p.row / kSquare;
  const auto store_turned = [&](int four, const typename W::Word(&of)[2][4], int part) {
    const Int row = W::lane() / 4 + own.quad * 8 + (p.col + 32 * four);
    DIRECTCLR_UNROLL
    for (int h = 0; h < 2; ++h) {
      typename W::Word x[4];
      DIRECTCLR_UNROLL
      for (int b = 0; b < 4; ++b) x[b] = W::transpose8(of[h][b]);
      transpose_quad<W>(x);
      const int64_t column = part * width + p.row + kWarpRows * warp + 8 * h;
      W::store16(out, (W::wide(row) * pitch + column) / int64_t(8), x, row < p.cols);
    }
  };
  // With kBounded alone mirror images come at the end, so that other tiles' way has one branch; the
  // other forms have no registers to keep the words till then.
  constexpr bool kLater = kBounded && !kSplit;
  typename W::Word words[kBlocks / 4][2][4];
  DIRECTCLR_UNROLL
  for (int four = 0; four < kBlocks / 4; ++four) {
    typename W::Word rest[2][4];
    DIRECTCLR_UNROLL
    for (int b = 0; b < 4; ++b) {
      const int j = 4 * four + b;
      Float col_shift[2], y[4];
      if (!kBounded) {
        load_at_edge(f.col, j, 0.0f, col[j]);
        load_at_edge(f.col_shift, j, INFINITY, col_shift);
      }
      DIRECTCLR_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int h = i / 2, c = i % 2;
        const Float x = acc[4 * j + i];
        if (kBounded) {
          y[i] = W::exp2(x) * (row[h] + col[j][c]);
        } else {
          y[i] = W::exp2(x - row_shift[h]) * row[h] + W::exp2(x - col_shift[c]) * col[j][c];
        }
      }
      DIRECTCLR_UNROLL
      for (int h = 0; h < 2; ++h) {
        words[four][h][b] = W::template pack<Half>(y[2 * h], y[2 * h + 1]);
        if constexpr (kSplit) {
          rest[h][b] = W::template pack_rest<Half>(words[four][h][b], y[2 * h], y[2 * h + 1]);
        }
      }
    }
    // The lane's block of the four, all eight columns of it.
    DIRECTCLR_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const auto& of = part ? rest : words[four];
      DIRECTCLR_UNROLL
      for (int h = 0; h < 2; ++h) {
        typename W::Word x[4] = {of[h][0], of[h][1], of[h][2], of[h][3]};
        transpose_quad<W>(x);
        const int64_t at = part * width / 8 + 4 * four;
        W::store16(out, line[h] + at, x, left[h] > 32 * four);
      }
      if (!kLater && twice) store_turned(four, of, part);
    }
  }
  if (kLater && twice) {
    DIRECTCLR_UNROLL
    for (int four = 0; four < kBlocks / 4; ++four) store_turned(four, words[four], 0);
  }
}

}  // namespace directclr
