// The stages as the binding calls them. Each returns an empty string, or what went wrong; all are
// queued on the stream and wait for nothing.
#pragma once

#include "arguments.h"

namespace directclr {

enum Dtype { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2 };

// A representation, (rows, width); strides in elements.
struct View {
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

struct CombineArguments {
  // Partial sums of one launch, or, in rest_*, log-sums.
  const float *row_sum, *row_peak, *col_sum, *col_peak;
  const double *rest_row, *rest_col;
  int row_lines, col_lines;
  const double* positives;
  const float* scale;  // 1 / temperature on the device, or null and the value
  double scale_value;
  double *row_lse, *col_lse, *nll_row, *nll_col;
  float* loss_by_row;      // (m,), or null and
  double* loss_by_block;   // (combine_blocks(n),)
  int64_t m, n, offset;
  bool symmetric;
};

struct FactorsArguments {
  const float *upstream, *largest;  // of reduction "none"; largest null: weights of 1
  const double *row_lse, *col_lse, *nll_row, *nll_col;
  float *row, *col, *row_shift, *col_shift, *diagonal;
  int64_t m, n, offset;
  float store;
  bool symmetric, bounded;
};

struct FinishSide {
  const void *z, *other;
  const float *rnorm, *acc;
  void* dr;  // null: only the dots
  int64_t dr_row_stride, dr_col_stride;
  float* dots;  // may be null
  int64_t rows, to_other, to_diagonal;
};

struct FinishCommon {
  const int64_t* index;
  const float* diagonal;  // null: acc is the gradient already, and `factor` is all of it
  int64_t diagonals;
  int width;
  float largest_rnorm;
  bool add;
  float factor;
  const float *upstream, *scale;
  float scale_value;
};

std::string normalize(const Layout&, const View& r1, const View& r2, const int64_t* index, void* z1,
                      void* z2, float* rnorm1, float* rnorm2, double* positives, int64_t offset,
                      double eps, bool both, const Stream&);
std::string positives(const Layout&, const void* z1, const void* z2, double* found, int64_t n,
                      int64_t offset, const Stream&);
std::string fold(const float* sums, const float* peaks, double* into, int64_t n, int lines,
                 int64_t stride, bool first, const Stream&);
int64_t combine_blocks(int64_t n);
std::string combine(const CombineArguments&, const Stream&);
std::string total(const double* parts, float* loss, int64_t n, double factor, const Stream&);
std::string factors(const FactorsArguments&, const Stream&);
std::string finish(const Layout&, int dtype, const FinishSide& first, const FinishSide* second,
                   const FinishCommon&, const Stream&);
std::string add_positives(const Layout&, float* dz, const void* other, const float* diagonal,
                          const float* factor, int64_t n, int64_t others, int64_t diagonals,
                          int64_t to_other, int64_t to_diagonal, const Stream&);

// The tile products (similarity.cu). `pingpong` chooses the schedule for short rows.
std::string sums(const Operands&, const SumsArguments&, bool pingpong, const Stream&);
std::string weights(const Operands&, const WeightsArguments&, bool pingpong, const Stream&);
int tile_height(bool pingpong);
constexpr int kTileWidth = 256;

}  // namespace directclr
