// What a launch is told, as the binding makes it and the kernels read it: plain addresses, sizes and
// a stream. Nothing here knows torch or CUTLASS, and everything else in this folder may include it.
// (m,) is the number of anchors, rows of view 1; (n,) that of candidates, rows of view 2.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace directclr {

struct Stream {
  cudaStream_t handle;
  int device, multiprocessors;
};

enum Dtype { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2 };

// A representation, (rows, width); strides in elements.
struct Input {
  const void* data;
  int dtype;
  int64_t rows, width, row_stride, col_stride;
};

// How unit rows are packed (rows.h): d columns, `pitch` with padding, `row` two-byte elements a row.
struct Layout {
  bool bf16, fp8;
  int d, pitch;
  int64_t row;
  float fp8_scale;
};

// ------------------------------------------------------------------------------- normalize

struct NormalizeArguments {
  Input r1, r2;  // without `both` r1 alone counts
  const int64_t* index;
  void *z1, *z2;
  float *rnorm1, *rnorm2;
  double* positives;
  int64_t offset;
  double eps;
  bool both;
};

struct PositivesArguments {
  const void *z1, *z2;
  double* positives;
  int64_t n, offset;
};

// ------------------------------------------------------------------------------- sums, weights

enum class Operand { kFp16 = 0, kBf16 = 1, kE4m3 = 2, kSplit = 3 };

// Two matrices of unit rows, (rows, k) and (cols, k), `pitch` elements from row to row; `pingpong`
// is the schedule for short rows. kSplit: fp16 rows [hi (k) | lo (k)], of which hi lo' + lo hi' +
// hi hi' is taken.
struct Operands {
  Operand type;
  bool pingpong;
  const void *a, *b;
  int rows, cols, k;
  int64_t pitch;
};

// 1 / temperature: `value`, or read from `scale` on the device; times what undoes the scale of the
// operands (fp8).
struct Exponent {
  const float* scale;
  float value, operands;
};

struct SumsArguments {
  // Line t of row_sum (lines, rows) is of the columns of tile t, line t of col_sum (lines, cols) of
  // the rows of tile t, which `columns` asks for; the peaks likewise, without `bounded`.
  float *row_sum, *row_peak, *col_sum, *col_peak;
  // Without `bounded` or with kSplit, where not null: the positives' own logits (rows), base 2.
  float* own;
  Exponent exponent;
  int step;
  bool upper, columns, bounded;
};

// What a tile of weights is made with; pointers to the launch's first row and column, `col` at an
// address of 8 bytes. The factors are those of docs/design.md section 2 times the power of two that
// the stored weights carry.
struct WeightFactors {
  const float *row, *col;              // w_i exp(-row_i), v_j exp(-col_j); without `bounded` w_i, v_j
  const float *row_shift, *col_shift;  // without `bounded`: row_i, col_j in base 2
  bool symmetric;                      // whether col counts
};

struct WeightsArguments {
  void* out;  // kSplit: rows [hi | lo] of `pitch`, lo times kLoScale
  int64_t pitch;
  WeightFactors factors;
  Exponent exponent;
  int step;
  bool bounded;
  bool mirror;  // P is symmetric: a view's rows with themselves
};

// ------------------------------------------------------------------------------- statistics

// Log-sums of n columns of partials, in `lines` lines `stride` apart: set in `into`, or added.
struct FoldArguments {
  const float *sums, *peaks;
  double* into;
  int64_t n;
  int lines;
  int64_t stride;
  bool first;
};

struct CombineArguments {
  // Partial sums of one launch, or, in rest_*, log-sums.
  const float *row_sum, *row_peak, *col_sum, *col_peak;
  const double *rest_row, *rest_col;
  int row_lines, col_lines;
  const double* positives;  // cosines, or null and
  const float* own;         // their logits, base 2
  const float* scale;       // 1 / temperature on the device, or null and the value
  double scale_value;
  double *row_lse, *col_lse, *nll_row, *nll_col;
  float* loss_by_row;     // (m,), or null and
  double* loss_by_block;  // (combine_blocks(n),)
  int64_t m, n, offset;
  bool symmetric;
};

// The loss: the sum of n parts over `factor`.
struct TotalArguments {
  const double* parts;
  float* loss;
  int64_t n;
  double factor;
};

struct FactorsArguments {
  const float* upstream;  // of reduction "none"; null: weights of 1
  const float* largest;   // what weights are divided by, or null
  const double *row_lse, *col_lse, *nll_row, *nll_col;
  float *row, *col, *row_shift, *col_shift, *diagonal;
  int64_t m, n, offset;
  float store;
  bool symmetric, bounded;
};

// ------------------------------------------------------------------------------- finish

// One view's side.
struct FinishSide {
  const void *z, *other;
  const float *rnorm, *acc;  // acc: (rows, pitch)
  void* dr;                  // null: only the dots
  int64_t dr_row_stride, dr_col_stride;
  float* dots;  // may be null
  int64_t rows;
  int64_t to_other, to_diagonal;  // from a row to the other view's row, to its diagonal's entry
};

struct FinishArguments {
  int dtype;  // of dr
  const int64_t* index;
  const float* diagonal;  // null: acc is the gradient already, and `factor` is all of it
  int64_t diagonals;
  int d, width;
  float largest_rnorm;  // rows from here on were divided by a constant
  bool add;             // to what dr holds
  float factor;
  const float *upstream, *scale;
  float scale_value;
};

// dz_i = factor dz_i + diagonal_{i + to_diagonal} z'_{i + to_other}, where that entry exists.
struct AddPositivesArguments {
  float* dz;
  const void* other;
  const float *diagonal, *factor;
  int64_t n, others, diagonals, to_other, to_diagonal;
};

}  // namespace directclr
