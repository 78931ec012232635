// What is done with the per-row statistics, O(N) in fp64, one candidate at a time.
#pragma once

#include <cmath>

#include "arguments.h"
#include "half.h"

namespace directclr {

// Partial sums in lines, `stride` apart, and, where there are, the peaks they are relative to (base 2).
// A column's lines are added by shares: share s of S adds lines s, s + S, s + 2 S ... in their order,
// then the shares are added in theirs, whoever runs them.
struct Parts {
  const float *sums, *peaks;
  int lines;
  int64_t stride;
};

constexpr int kMostShares = 32;
constexpr double kLn2 = 0.6931471805599453, kLog2e = 1.4426950408889634;

DIRECTCLR_HD int shares_of(int lines) { return lines < 512 ? 8 : kMostShares; }

DIRECTCLR_HD float peak_of_share(const Parts& p, int64_t at, int share, int shares) {
  float high = -INFINITY;
  for (int l = share; l < p.lines; l += shares) high = fmaxf(high, p.peaks[l * p.stride + at]);
  return high;
}

DIRECTCLR_HD double sum_of_share(const Parts& p, int64_t at, int share, int shares, double top) {
  double sum = 0.0;
  for (int l = share; l < p.lines; l += shares) {
    const double part = p.sums[l * p.stride + at];
    sum += p.peaks ? part * exp2(p.peaks[l * p.stride + at] - top) : part;
  }
  return sum;
}

DIRECTCLR_HD double top_of(float high) { return high == -INFINITY ? 0.0 : high; }

DIRECTCLR_HD double log_of_sum(double sum, double top) {
  return log(sum) + top * kLn2;
}

DIRECTCLR_HD double add_logs(double a, double b) {
  const double high = fmax(a, b), base = high == -INFINITY ? 0.0 : high;
  return log(exp(a - base) + exp(b - base)) + base;
}

DIRECTCLR_HD Parts parts_of(const FoldArguments& a) { return {a.sums, a.peaks, a.lines, a.stride}; }

DIRECTCLR_HD void fold_one(const FoldArguments& a, int64_t at, double log_sum) {
  a.into[at] = a.first ? log_sum : add_logs(log_sum, a.into[at]);
}

// log(1 + exp(x)); a NaN stays one.
DIRECTCLR_HD double softplus(double x) { return (x < 0.0 ? 0.0 : x) + log1p(exp(-fabs(x))); }

DIRECTCLR_HD Parts row_parts(const CombineArguments& a) {
  return {a.row_sum, a.row_peak, a.row_lines, a.m};
}
DIRECTCLR_HD Parts col_parts(const CombineArguments& a) {
  return {a.col_sum, a.col_peak, a.col_lines, a.n};
}
DIRECTCLR_HD int shares_of(const CombineArguments& a) {
  return shares_of(a.row_lines > a.col_lines ? a.row_lines : a.col_lines);
}

// Candidate j and its anchor i = j - offset: log-sums, -log p by row and by column, from the log-sums
// of their negatives where they exist. Returns the anchor's loss, 0 where there is none.
DIRECTCLR_HD double combine_one(const CombineArguments& a, int64_t j, double rest_row,
                                double rest_col) {
  const int64_t i = j - a.offset;
  const bool has_row = i >= 0 && i < a.m, has_col = j < a.n;
  double per_row = 0.0, logit = 0.0;
  if (has_row) {
    logit = a.own ? a.own[i] * kLn2 : a.positives[i] * (a.scale ? double(*a.scale) : a.scale_value);
    const double nll = softplus(rest_row - logit);
    a.nll_row[i] = nll;
    a.row_lse[i] = logit + nll;
    per_row = nll;
  }
  if (a.symmetric && has_col) {
    const double nll = softplus(rest_col - logit);
    a.col_lse[j] = has_row ? logit + nll : rest_col;
    if (has_row) {
      a.nll_col[i] = nll;
      per_row = 0.5 * (per_row + nll);
    }
  }
  if (a.loss_by_row && has_row) a.loss_by_row[i] = float(per_row);
  return per_row;
}

// weight exp(-log_sum) where there is a bound, otherwise weight and shift for exp2(x - shift), with the
// shift's rounding in the weight.
DIRECTCLR_HD void factor_one(bool bounded, double weight, double log_sum, float* factor, float* shift) {
  const double exact = log_sum * kLog2e;
  const float rounded = float(exact);
  if (!bounded) *shift = rounded;
  // Candidates nobody is the positive of have no weight, whatever their log-sum.
  *factor = weight == 0.0 ? 0.0f : float(weight * (bounded ? exp(-log_sum) : exp2(rounded - exact)));
}

// The factors of row i = j - offset and of column j, and the positive's term (kernels/weights.py).
DIRECTCLR_HD void factors_one(const FactorsArguments& a, int64_t j) {
  const int64_t i = j - a.offset;
  const bool has_row = i >= 0 && i < a.m, has_col = j < a.n;
  double weight = has_row ? double(a.store) : 0.0;
  if (a.upstream && has_row) weight *= a.upstream[i];
  if (a.largest) weight *= *a.largest == 0.0f ? 0.0 : 1.0 / *a.largest;
  double diagonal = 0.0;
  if (has_row) {
    diagonal = weight * expm1(-a.nll_row[i]);
    factor_one(a.bounded, weight, a.row_lse[i], a.row + i, a.row_shift + i);
  }
  if (a.symmetric) {
    if (has_row) diagonal += weight * expm1(-a.nll_col[i]);
    if (has_col) factor_one(a.bounded, weight, a.col_lse[j], a.col + j, a.col_shift + j);
  }
  if (has_row) a.diagonal[i] = float(diagonal * kUnit);
}

}  // namespace directclr
