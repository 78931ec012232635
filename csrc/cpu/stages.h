// The stages of the loss on a CPU.
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

// What the sums of one row of similarities come to: sum * 2^ref of exp(a s), positives left out.
struct Accumulator {
  double* sum;
  double* ref;
};

// Largest similarities met, to be raised, and the positives' own; all null where nobody asks.
struct Tops {
  float* row;  // (m)
  float* col;  // (n), may be null, and row's for `upper`
  float* own;  // (m), may be null
};

struct SimilarityArgs {
  const float* z1;
  const float* z2;
  int64_t m, n, d, row_offset;
  double scale;  // a = 1 / temperature
  bool upper;
  Operands operands;  // kFp32, fp32-grade, or what may be rounded to where that is faster
  void* workspace;    // tiles of S kept for the backward pass, or null
  int64_t workspace_bytes;
  // (m), (n): entries of equal ids are left out; null for none
  const int32_t *ids1 = nullptr, *ids2 = nullptr;
};

std::string normalize(const Normalize& args, int64_t rows, int threads);
// Adds to the accumulators, and writes the positives' a s_i to `logits` (m) where that is not null
// and they are among the candidates: in the rounding of the tiles, so that a candidate equal to the
// positive has its bits, or exact where the operands are rounded. For `upper` rows and cols may be
// the same arrays.
std::string sums(const SimilarityArgs& s, Accumulator rows, Accumulator cols, double* logits,
                 const Tops& tops, int threads);
// G_ij = row_weight_i exp(a s_ij - row_lse_i) + col_weight_j exp(a s_ij - col_lse_j), and
// diagonal_i at the positives. In fp64: a log-sum of 17 in fp32 would shift a row by 1e-6.
struct WeightArgs {
  const double* row_weight;  // (m), or null for none
  const double* col_weight;  // (n), or null for none
  const double* row_lse;     // (m)
  const double* col_lse;     // (n), may be null without col_weight
  const double* diagonal;    // (m), or null: 0
};

// dz1 += G z2, dz2 += G' z1; for `upper` both name the one dz of the one view.
std::string products(const SimilarityArgs& s, const WeightArgs& w, float* dz1, float* dz2,
                     int threads);
// *dots = sum of z . dz.
std::string finish(const Finish& args, int64_t rows, double* dots, int threads);

// What the last `sums` or `products` of the process multiplied in: "fp32", "bf16", "int8x3",
// "int8x6" or "int8x8".
const char* arithmetic();
// Bytes of `workspace` that keep every tile of S.
int64_t workspace_bytes(int64_t m, int64_t n);
// Memory that a call of `threads` threads takes besides its arguments.
int64_t scratch_bytes(int64_t m, int64_t n, int64_t d, int threads);

}  // namespace directclr
