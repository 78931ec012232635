// Packing of z into the micro-kernel's B panels ([k][v * VL], one panel per register tile), and of
// the rows that it broadcasts. Rows of z have a pitch that is a multiple of 16 floats and zeros
// beyond d; rows and columns beyond the matrix become zeros, which add nothing to a product.
#pragma once
#include "gemm.h"

namespace directclr::DCLR_ISA {

DCLR_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
DCLR_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A range in blocks of at most `most`, about equal, multiples of `unit`.
DCLR_INLINE int64_t even_block(int64_t range, int64_t most, int64_t unit) {
  const int64_t blocks = (range + most - 1) / most;
  return blocks <= 1 ? most : round_up((range + blocks - 1) / blocks, unit);
}

// Vectors in the register tile that starts at column j of a block of nc.
DCLR_INLINE int tile_vectors(int64_t nc, int64_t j) {
  return int(smaller(NV, (nc - j + VL - 1) / VL));
}

// `count` (<= VL) rows of words starting at word k, as VL vectors along k.
template <class T>
DCLR_INLINE void load_rows(vf (&r)[VL], const float* z, int64_t pitch, int64_t k, int64_t count) {
  for (int j = 0; j < VL; ++j) {
    r[j] = vf{};
    if (j < count) r[j] = T::load_words(z + j * pitch + k * T::PACK, pitch - k * T::PACK);
  }
}

// The columns of S: rows [0, nc) of z, transposed, tile by tile: out + j * ld, [k][vectors * VL].
// ld is the number of words of a row, rounded up to VL.
template <class T>
static void pack_columns(const float* z, int64_t pitch, int64_t nc, int64_t ld, float* out) {
  for (int64_t j0 = 0; j0 < nc; j0 += NR) {
    const int vectors = tile_vectors(nc, j0);
    float* tile = out + j0 * ld;
    for (int v = 0; v < vectors; ++v) {
      const int64_t j = j0 + v * VL;
      for (int64_t k = 0; k < ld; k += VL) {
        vf r[VL];
        load_rows<T>(r, z + j * pitch, pitch, k, nc - j);
        transpose(r);
        DCLR_UNROLL
        for (int l = 0; l < VL; ++l) store(tile + (k + l) * vectors * VL + v * VL, r[l]);
      }
    }
  }
}

// The right side of G z: rows [0, rows) of z as panels of NR columns, out + c * ld,
// [row][vectors * VL] in words (bf16: pairs of rows); rows up to ld * PACK are zero.
template <class T>
static void pack_rows(const float* z, int64_t pitch, int64_t d, int64_t rows, int64_t ld,
                      float* out) {
  for (int64_t c = 0; c < d; c += NR) {
    const int vectors = tile_vectors(d, c);
    float* panel = out + c * ld;
    for (int64_t w = 0; w < ld; ++w) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t row = w * T::PACK;
        const float* p = z + row * pitch + c + v * VL;
        store(panel + (w * vectors + v) * VL, T::pair_rows(p, pitch, rows - row));
      }
    }
  }
}

// MR rows of z that the micro-kernel broadcasts. Whole fp32 panels are used where they lie; the
// last, ragged one and bf16 ones go through `copy` (MR * pitch floats).
template <class T>
DCLR_INLINE RowsA<T::KB> broadcast_rows(const float* z, int64_t pitch, int64_t count, float* copy) {
  if (T::PACK == 1 && count >= MR) return {z, pitch};
  for (int64_t i = 0; i < MR; ++i) {
    for (int64_t k = 0; k < pitch; k += VL * T::PACK) {
      vf x = vf{};
      if (i < count) x = T::load_words(z + i * pitch + k, pitch - k);
      store(copy + i * pitch + k / T::PACK, x);
    }
  }
  return {copy, pitch};
}

}  // namespace directclr::DCLR_ISA
