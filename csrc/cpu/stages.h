// The stages of the loss on a CPU, and the two drivers that run all of them for one pair of views.
// Every function returns an error text, empty if all is well. Sizes and pointers are the caller's
// to check. All z and dz have rows of pitch(d) floats. `threads` is a limit, small work takes
// fewer; -t means exactly t, for tests.
#pragma once
#include <stdint.h>

#include <string>

#include "kernels.h"

namespace directclr {

// Floats per row of z and dz: a multiple of 16, not of 512 (rows would share cache sets).
inline int64_t pitch(int64_t d) {
  const int64_t p = (d + 15) / 16 * 16;
  return p % 512 == 0 ? p + 16 : p;
}

struct View {
  Strided x;
  int64_t rows;
  float* z;
  float* rnorm;
};

// What the sums of one row of similarities come to: sum * 2^ref of exp(a s), positives left out.
struct Accumulator {
  double* sum;
  double* ref;
};

struct SimilarityArgs {
  const float* z1;
  const float* z2;
  int64_t m, n, d, row_offset;
  double scale;  // a = 1 / temperature
  bool upper, bf16;
  void* workspace;  // tiles of S kept for the backward pass, or null
  int64_t workspace_bytes;
};

struct Gradient {
  void* data;
  int dtype;
  int64_t row_stride, col_stride, width;
  const int64_t* cols;
  bool fill;
};

std::string normalize(const View& view, int64_t d, double eps, int threads);
std::string positives(const float* z1, const float* z2, int64_t m, int64_t d, int64_t row_offset,
                      float* pos, int threads);
// Adds to the accumulators. For `upper` rows and cols may be the same arrays.
std::string sums(const SimilarityArgs& s, Accumulator rows, Accumulator cols, int threads);
// lse = log(rest + exp(a pos)), nll = lse - a pos = softplus(log rest - a pos), both without
// cancellation; pos null: lse = log rest.
std::string finalize(Accumulator rest, const float* pos, int64_t count, double scale, float* lse,
                     float* nll);

struct WeightArgs {
  const float* row_weight;  // (m), or null for none
  const float* col_weight;  // (n), or null for none
  const float* row_lse;     // (m)
  const float* col_lse;     // (n), may be null without col_weight
  const float* nll_row;     // (m), null: positives carry no gradient
  const float* nll_col;     // (m)
};

// dz1 += a G z2, dz2 += a G' z1; for `upper` both name the one dz of the one view.
std::string products(const SimilarityArgs& s, const WeightArgs& w, float* dz1, float* dz2,
                     int threads);
// The gradient of the rows; *dots = sum of z . dz.
std::string finish(const float* z, const float* dz, const float* rnorm, int64_t rows, int64_t d,
                   double eps, const Gradient& grad, double* dots, int threads);

struct ForwardArgs {
  View view1, view2;
  int64_t d, row_offset;
  double eps, scale;
  bool bf16;
  float* pos;
  float* row_lse;
  float* col_lse;
  float* nll_row;
  float* nll_col;
  void* workspace;
  int64_t workspace_bytes;
};
std::string forward(const ForwardArgs& args, int threads);

struct BackwardArgs {
  SimilarityArgs pair;
  WeightArgs weights;
  float* dz1;  // (m, pitch) and (n, pitch): overwritten; null: this side needs no gradient
  float* dz2;
  const float* rnorm1;
  const float* rnorm2;
  double eps;
  Gradient grad1, grad2;
  double* dots;  // [2]: sums of z . dz of each view
};
std::string backward(const BackwardArgs& args, int threads);

// Bytes of `workspace` that keep every tile of S.
int64_t workspace_bytes(int64_t m, int64_t n);
// Memory that a call of `threads` threads takes besides its arguments.
int64_t scratch_bytes(int64_t m, int64_t n, int64_t d, int threads);

}  // namespace directclr
