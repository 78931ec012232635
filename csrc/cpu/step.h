// One call a direction: the stages of one column group of one process, and the O(N) terms between
// them. What directclr_fast/driver.py does for every backend and world, for small batches, where
// its operations cost more than the kernels; symbols and reasons are there.
#pragma once
#include <stdint.h>

#include <string>

#include "stages.h"

namespace directclr {

// A view's rows, and where its unit rows (rows, pitch(d)) and reciprocal norms (rows) are.
struct View {
  int64_t rows;
  float* z;
  float* rnorm;
};

struct Step {
  View view1, view2;  // M and N rows; row i of the first belongs to row i of the second
  int64_t d;
  double eps, scale;
  bool both, symmetric;
  Operands operands;  // as SimilarityArgs'
  bool mean, each;  // reduction: "mean", "none"; "sum" is neither
  void* workspace;  // as SimilarityArgs'
  int64_t workspace_bytes;
  double* row_lse;  // (M)
  double* col_lse;  // (N), null for one direction, as nll_col (M)
  double* nll_row;  // (M)
  double* nll_col;
};

// Writes everything that `s` names, and the loss: one, or M of them.
std::string forward(const Step& s, const Strided& x1, const Strided& x2, float* loss, int threads);

// Where a view's gradient goes, as Finish says; data is null where nobody wants it.
struct Gradient {
  Strided to;
  int64_t width;
  bool fill;
};

// `upstream` is one number or M of them, `stride` elements apart. *dtemperature where not null.
std::string backward(const Step& s, const float* upstream, int64_t stride, const Gradient& g1,
                     const Gradient& g2, double* dtemperature, int threads);

}  // namespace directclr
