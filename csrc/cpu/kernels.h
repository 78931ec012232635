// The contract between the driver (compiled for the baseline instruction set) and the bodies (one
// translation unit per instruction set, all made from body.h). Plain data only: nothing here may
// have a constructor, a default member initialiser or any other function with vague linkage, since
// the linker could then hand AVX-512 code to a machine without it.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace directclr {

enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// What products of unit rows are made of (tile_products.h has those of digits, and bf16 on tiles).
enum Operands : int { kFp32, kBf16, kInt8x3, kInt8x6, kInt8x8 };

// d columns of a strided matrix: element (i, k) is data[i * row_stride + c(k) * col_stride] with
// c(k) = cols ? cols[k] : k. Strides in elements.
struct Strided {
  void* data;
  int dtype;
  int64_t row_stride;
  int64_t col_stride;
  const int64_t* cols;
};

// z = x / max(|x|, eps): rows of `pitch` floats, zero beyond d.
struct Normalize {
  Strided x;
  int64_t d, pitch;
  double eps;
  float* z;
  float* rnorm;
};

// pos_i = z1_i . z2_{row_offset + i}, exact: for sums of rounded products
struct Positives {
  const float* z1;
  const float* z2;
  int64_t d, pitch, row_offset;
  double* pos;
};

// Rows [begin, begin + count) of a view as the tiles take them (tile_products.h). `for_s` is for S;
// `for_g`, for the products with G, has digits, and `scale` that of each row. Null: not needed.
struct Packed {
  char *for_s, *for_g;
  float* scale;
  int64_t begin, count;
};

// One block of similarities S = z1 z2' and what is left out of it. Entry (i, row_offset + i) is
// always left out, and what has equal ids, where there are any. `upper` (z1 == z2, row_offset == 0)
// also leaves out everything below it, so that a symmetric S is visited once.
struct Pair {
  const float* z1;
  const float* z2;
  int64_t m, n, d, pitch, row_offset;
  bool upper;
  Operands operands;
  // a log2(e) in two floats: exp(a s) = 2^(scale_hi s + scale_lo s).
  float scale_hi, scale_lo;
  // Of the digits of each row (m, n), where the operands are those; else null.
  const float *scale1, *scale2;
  // All rows of both views, where the parts share them; count 0: each packs its own.
  Packed packed1, packed2;
  const int32_t *ids1, *ids2;  // (m), (n), or null
  // a s_i of the entries (i, row_offset + i), as the tile has them, goes here (m) where not null.
  double scale;
  double* logits;
  float* own;  // likewise s_i
  // S tiles kept from forward to backward: `keep_panels` of the row panels, evenly spread.
  float* keep;
  int64_t keep_panels;
};

// Sums of exp(a s) as sum * 2^ref, so that no temperature overflows. `bounded`: a is small enough
// for ref = 0 throughout.
struct Sums {
  Pair pair;
  bool bounded;
  double* row_sum;  // (m), added to by the thread that owns the row
  double* row_ref;
  float* row_top;  // (m), raised to the largest s of the row, or null: nobody asks
};

// G_ij = row_weight_i 2^(a' s_ij - row_ref_i) + col_weight_j 2^(a' s_ij - col_ref_j), refs whole
// numbers; diag_i replaces entry (i, row_offset + i) (null: it stays 0).
struct Products {
  Pair pair;
  const float* row_weight;
  const float* row_ref;
  const float* col_weight;
  const float* col_ref;
  const float* diag;
  float* dz1;  // (m, pitch) += G z2, or null
  float* dz2;  // (n, pitch) += G' z1, or null
};

// dx = (dz - z (z . dz)) rnorm, cast and scattered; rows shorter than eps: dx = dz rnorm.
struct Finish {
  const float* z;
  const float* dz;
  const float* rnorm;
  int64_t d, pitch;
  float rnorm_clamped;  // 1 / eps
  Strided grad;         // data null: only the dots are wanted
  int64_t width;        // columns of the full gradient, zero-filled where `fill` is set
  bool fill;
};

// What a body with tiles has beside its fp32 kernels (tile_products.h).
struct TileKernels {
  int64_t least_rows, least_columns;        // below these the fp32 kernels are as fast
  int64_t (*keep_panel_floats)(int64_t n);  // size of one kept panel of kTileRows rows of S
  // The scale of each row's digits, and what six products leave out of z . z; NaN for a NaN.
  void (*scales)(const float* z, int64_t d, int64_t pitch, int64_t row_begin, int64_t row_end,
                 float* scale, float* left_out);
  int64_t (*packed_rows)(int64_t pitch);   // that a part packs at a time
  int64_t (*packed_bytes)(int64_t pitch);  // of a row for S, and of one for G
  // Rows [begin, end) of one view, multiples of kTileUnit, into `to`.
  void (*pack)(const Pair&, bool first, int64_t begin, int64_t end, const Packed& to);
  bool (*work)();  // whether the tiles compute what their emulation does
  // Products from L1, a load for each or for every two: operations done; the peak in benchmarks.
  double (*loop)(bool bf16, bool few_loads, int64_t iterations);
};
constexpr int64_t kTileRows = 32;      // of a panel
constexpr int64_t kTileUnit = 64;      // rows and columns are split at multiples
constexpr int64_t kMostTileColumns = 32768;  // d: three sums of 2^14 a column in int32

struct Kernels {
  const char* name;
  int64_t mr;  // rows are split between threads at multiples of this
  int64_t nr;  // columns likewise
  bool has_bf16;
  int64_t (*scratch_bytes)(int64_t m, int64_t n, int64_t pitch);
  int64_t (*keep_panel_floats)(int64_t n);  // size of one kept row panel of S
  void (*normalize)(const Normalize&, int64_t row_begin, int64_t row_end, float* row_scratch);
  void (*positives)(const Positives&, int64_t row_begin, int64_t row_end);
  // Rows [i0, i1) x columns [j0, j1); col_sum/col_ref are the calling thread's own (n), col_top too,
  // which counts where row_top does.
  void (*sums)(const Sums&, int64_t i0, int64_t i1, int64_t j0, int64_t j1, double* col_sum,
               double* col_ref, float* col_top, void* scratch);
  void (*products)(const Products&, int64_t i0, int64_t i1, int64_t j0, int64_t j1, void* scratch);
  // Writes z . dz of each row to `dots`.
  void (*finish)(const Finish&, int64_t row_begin, int64_t row_end, double* dots,
                 float* row_scratch);
  void (*exp2)(const float* x, float scale_hi, float scale_lo, float* y, int64_t n);
  double (*fma_loop)(int64_t iterations);  // returns operations done; the peak in benchmarks
  const TileKernels* tiles;                // null: none
};

extern const Kernels kernels_portable;
extern const Kernels kernels_tiles;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_tiles_avx512;
extern const Kernels kernels_amx;
#endif

}  // namespace directclr
