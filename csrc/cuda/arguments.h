// What a launch is told: plain addresses, sizes and a stream. Nothing here knows torch or CUTLASS.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "tile.h"

namespace directclr {

struct Stream {
  cudaStream_t handle;
  int device, multiprocessors;
};

enum class Operand { kFp16 = 0, kBf16 = 1, kE4m3 = 2 };

// Two matrices of unit rows, (rows, k) and (cols, k), `pitch` elements from row to row.
struct Operands {
  Operand type;
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
  // the rows of tile t; the peaks likewise, without `bounded`.
  float *row_sum, *row_peak, *col_sum, *col_peak;
  // Without `bounded` and where not null: the positives' own logits (rows), in the peaks' unit.
  float* own;
  Exponent exponent;
  int step;
  bool upper, moving, bounded;
};

struct WeightsArguments {
  void* out;
  int64_t pitch;
  WeightFactors factors;
  Exponent exponent;
  int step;
  bool bounded;
};

}  // namespace directclr
