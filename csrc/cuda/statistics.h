// What is done with the per-row statistics, O(N) in fp64, one candidate at a time.
#pragma once

#include <cmath>

#include "arguments.h"
#include "warp.h"

namespace directclr {

// log of the sum of a column of partials, each relative to its peak where there are peaks (base 2).
DIRECTCLR_HD double log_of_parts(const float* sums, const float* peaks, int64_t at, int lines,
                                 int64_t stride) {
  double top = 0.0, total = 0.0;
  if (peaks) {
    float high = -INFINITY;
    for (int l = 0; l < lines; ++l) high = fmaxf(high, peaks[l * stride + at]);
    top = high == -INFINITY ? 0.0 : high;
  }
  for (int l = 0; l < lines; ++l) {
    const double part = sums[l * stride + at];
    total += peaks ? part * exp2(peaks[l * stride + at] - top) : part;
  }
  return log(total) + top * 0.6931471805599453;
}

DIRECTCLR_HD double add_logs(double a, double b) {
  const double high = fmax(a, b), base = high == -INFINITY ? 0.0 : high;
  return log(exp(a - base) + exp(b - base)) + base;
}

DIRECTCLR_HD void fold_one(const FoldArguments& a, int64_t at) {
  const double log_sum = log_of_parts(a.sums, a.peaks, at, a.lines, a.stride);
  a.into[at] = a.first ? log_sum : add_logs(log_sum, a.into[at]);
}

// log(1 + exp(x)); a NaN stays one.
DIRECTCLR_HD double softplus(double x) { return (x < 0.0 ? 0.0 : x) + log1p(exp(-fabs(x))); }

// Candidate j and its anchor i = j - offset: log-sums, -log p by row and by column. Returns the
// anchor's loss, 0 where there is none.
DIRECTCLR_HD double combine_one(const CombineArguments& a, int64_t j) {
  const int64_t i = j - a.offset;
  const bool has_row = i >= 0 && i < a.m, has_col = j < a.n;
  double per_row = 0.0, logit = 0.0;
  if (has_row) {
    logit = a.positives[i] * (a.scale ? double(*a.scale) : a.scale_value);
    const double rest = a.rest_row ? a.rest_row[i]
                                   : log_of_parts(a.row_sum, a.row_peak, i, a.row_lines, a.m);
    const double nll = softplus(rest - logit);
    a.nll_row[i] = nll;
    a.row_lse[i] = logit + nll;
    per_row = nll;
  }
  if (a.symmetric && has_col) {
    const double rest = a.rest_col ? a.rest_col[j]
                                   : log_of_parts(a.col_sum, a.col_peak, j, a.col_lines, a.n);
    const double nll = softplus(rest - logit);
    a.col_lse[j] = has_row ? logit + nll : rest;
    if (has_row) {
      a.nll_col[i] = nll;
      per_row = 0.5 * (per_row + nll);
    }
  }
  if (a.loss_by_row && has_row) a.loss_by_row[i] = float(per_row);
  return per_row;
}

// The factors of row i = j - offset and of column j, and the positive's term (kernels/weights.py).
DIRECTCLR_HD void factors_one(const FactorsArguments& a, int64_t j) {
  const int64_t i = j - a.offset;
  const bool has_row = i >= 0 && i < a.m, has_col = j < a.n;
  double weight = has_row ? double(a.store) : 0.0;
  if (a.largest && has_row) {
    const double top = *a.largest;
    weight *= top == 0.0 ? 0.0 : a.upstream[i] / top;
  }
  double diagonal = 0.0;
  if (has_row) {
    diagonal = weight * expm1(-a.nll_row[i]);
    a.row[i] = float(a.bounded ? weight * exp(-a.row_lse[i]) : weight);
    if (!a.bounded) a.row_shift[i] = float(a.row_lse[i] * 1.4426950408889634);
  }
  if (a.symmetric) {
    if (has_row) diagonal += weight * expm1(-a.nll_col[i]);
    if (has_col) {
      const double lse = a.col_lse[j];
      // Candidates nobody is the positive of have no weight, whatever their log-sum.
      a.col[j] = float(a.bounded ? (has_row ? weight * exp(-lse) : 0.0) : weight);
      if (!a.bounded) a.col_shift[j] = float(lse * 1.4426950408889634);
    }
  }
  if (has_row) a.diagonal[i] = float(diagonal);
}

}  // namespace directclr
