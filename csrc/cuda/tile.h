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

template <class W>
DIRECTCLR_HD typename W::Bool counts(const Place& p, typename W::Int row, typename W::Int col) {
  const typename W::Int beyond = col - row - p.step;
  const typename W::Bool here = p.upper ? beyond > 0 : beyond != 0;
  return here && row < p.rows && col < p.cols;
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
  const typename W::Bool high = (W::lane() & kMask) != 0;
  DIRECTCLR_UNROLL
  for (int k = 0; k < kKept; ++k) {
    if (kBounded) {
      const Float a = acc[k], b = acc[k + kKept];
      acc[k] = W::select(high, b, a) + W::shuffle_xor(W::select(high, a, b), kMask);
    } else {
      // Value v: its peak at 4 (v / 2) + v % 2, its mass two behind.
      const int ka = 4 * (k / 2) + k % 2, kb = 4 * ((k + kKept) / 2) + (k + kKept) % 2;
      const Scaled<W> a{acc[ka], acc[ka + 2]}, b{acc[kb], acc[kb + 2]};
      const Float peak = W::shuffle_xor(W::select(high, a.peak, b.peak), kMask);
      const Float mass = W::shuffle_xor(W::select(high, a.mass, b.mass), kMask);
      const Scaled<W> kept{W::select(high, b.peak, a.peak), W::select(high, b.mass, a.mass)};
      const Scaled<W> sum = add<W>(kept, {peak, mass});
      acc[ka] = sum.peak;
      acc[ka + 2] = sum.mass;
    }
  }
}

// One warp's share of a `sums` tile. acc: 4 kBlocks inner products a lane; overwritten.
// row_sum/row_peak: this tile's line of row partials, indexed by the launch's row. by_warp/peaks:
// kBlocks * 8 floats, this warp's column sums of the tile. a2 = log2(e) / temperature, times the
// operands' scale. Without kBounded every sum carries the maximum it is relative to, and `own_logit`,
// where not null, receives the logits of the positives met, by the launch's row.
template <class W, int kBlocks, bool kBounded, class Acc>
DIRECTCLR_HD void sums_of_warp(Acc& acc, const Place& p, int warp, int height, float a2, bool columns,
                               float* row_sum, float* row_peak, float* own_logit, float* by_warp,
                               float* peaks) {
  using Float = typename W::Float;
  using Int = typename W::Int;
  using Bool = typename W::Bool;
  const Fragment<W> own(p, warp);
  const bool mask = needs_mask(p, height, 8 * kBlocks);
  const float nothing = kBounded ? 0.0f : -INFINITY;
  DIRECTCLR_UNROLL
  for (int j = 0; j < kBlocks; ++j) {
    DIRECTCLR_UNROLL
    for (int k = 0; k < 4; ++k) {
      Float x = acc[4 * j + k] * a2;
      if (kBounded) x = W::exp2(x);
      if (mask) {
        const Int row = own.rows(k / 2), col = own.cols(p, j) + k % 2;
        if (!kBounded && own_logit) {
          W::store(own_logit, row, x, col == row + p.step && row < p.rows && col < p.cols);
        }
        x = W::select(counts<W>(p, row, col), x, Float(nothing));
      }
      acc[4 * j + k] = x;
    }
  }
  const Bool leads = own.quad == 0;
  DIRECTCLR_UNROLL
  for (int h = 0; h < 2; ++h) {
    Scaled<W> row{Float(nothing), Float(0.0f)};
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
    W::store(row_sum, at, row.mass, leads && at < p.rows);
    if (!kBounded) W::store(row_peak, at, row.peak, leads && at < p.rows);
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
  Int first = W::lane() * 0;
  DIRECTCLR_UNROLL
  for (int m = 16, n = kBlocks; m >= 4; m /= 2, n /= 2) {
    first = first + W::select((W::lane() & m) != 0, Int(W::lane() * 0 + n), Int(W::lane() * 0));
  }
  const Bool all = own.quad < 4;
  DIRECTCLR_UNROLL
  for (int k = 0; k < 2 * kBlocks / 8; ++k) {
    // Value `first + k` is block (first + k) / 2, column (first + k) % 2 of the lane's pair.
    const Int at = (first + k) / 2 * 8 + own.quad * 2 + (first + k) % 2;
    if (kBounded) {
      W::store(by_warp, at, Float(acc[k]), all);
    } else {
      W::store(peaks, at, Float(acc[4 * (k / 2) + k % 2]), all);
      W::store(by_warp, at, Float(acc[4 * (k / 2) + 2 + k % 2]), all);
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
    const typename W::Bool odd = (W::lane() & m) != 0;
    DIRECTCLR_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & m) continue;
      const typename W::Word gift = W::select(odd, x[i], x[i | m]);
      const typename W::Word got = W::shuffle_xor(gift, m);
      x[i] = W::select(odd, got, x[i]);
      x[i | m] = W::select(odd, x[i | m], got);
    }
  }
}

// One warp's share of a `weights` tile: P_ij = exp(a s_ij) (row_i + col_j), zero where an entry does
// not count, in half precision to `out` (row-major, `pitch` a multiple of 8, column blocks within the
// pitch are written whole, with zeros). Half::pack(low, high) rounds a pair.
template <class W, class Half, int kBlocks, bool kBounded, class Acc>
DIRECTCLR_HD void weights_of_warp(Acc& acc, const Place& p, int warp, int height, float a2,
                                  const WeightFactors& f, void* out, int64_t pitch) {
  using Float = typename W::Float;
  using Int = typename W::Int;
  using Bool = typename W::Bool;
  const Fragment<W> own(p, warp);
  const bool mask = needs_mask(p, height, 8 * kBlocks);
  Float row[2], row_shift[2];
  DIRECTCLR_UNROLL
  for (int h = 0; h < 2; ++h) {
    const Bool there = own.rows(h) < p.rows;
    row[h] = W::load(f.row, own.rows(h), there, 0.0f);
    if (!kBounded) row_shift[h] = W::load(f.row_shift, own.rows(h), there, INFINITY);
  }
  DIRECTCLR_UNROLL
  for (int four = 0; four < kBlocks; four += 4) {
    typename W::Word words[2][4];
    DIRECTCLR_UNROLL
    for (int b = 0; b < 4; ++b) {
      const int j = four + b;
      Float g[4];
      DIRECTCLR_UNROLL
      for (int c = 0; c < 2; ++c) {
        const Int at = own.cols(p, j) + c;
        const Bool there = at < p.cols;
        Float col(0.0f), col_shift(0.0f);
        if (f.symmetric) {
          col = W::load(f.col, at, there, 0.0f);
          if (!kBounded) col_shift = W::load(f.col_shift, at, there, INFINITY);
        }
        DIRECTCLR_UNROLL
        for (int h = 0; h < 2; ++h) {
          const Float x = acc[4 * j + 2 * h + c] * a2;
          Float y;
          if (kBounded) {
            y = W::exp2(x) * (row[h] + col);
          } else {
            y = W::exp2(x - row_shift[h]) * row[h];
            if (f.symmetric) y = y + W::exp2(x - col_shift) * col;
          }
          if (mask) y = W::select(counts<W>(p, own.rows(h), at), y, Float(0.0f));
          g[2 * h + c] = y;
        }
      }
      DIRECTCLR_UNROLL
      for (int h = 0; h < 2; ++h) words[h][b] = W::template pack<Half>(g[2 * h], g[2 * h + 1]);
    }
    // The lane's block of the four, all eight columns of it.
    const Int col = own.quad * 8 + (p.col + 8 * four);
    DIRECTCLR_UNROLL
    for (int h = 0; h < 2; ++h) {
      transpose_quad<W>(words[h]);
      const Bool there = own.rows(h) < p.rows && W::wide(col) < pitch;
      W::store16(out, (W::wide(own.rows(h)) * pitch + W::wide(col)) / int64_t(8), words[h], there);
    }
  }
}

}  // namespace directclr
