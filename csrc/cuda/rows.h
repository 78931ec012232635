// The O(N d) stages, one warp a row: what each lane reads, computes and writes (docs/design.md
// sections 2 and 3). Nothing here exchanges values between lanes; rows.cu does, and so do the tests
// that run these functions on a host.
//
// A row of packed unit vectors is [ hi (pitch) | lo (pitch) | e4m3 (pitch bytes, if `fp8`) ]:
// hi = round(kUnit z) is the operand of the tile products, hi + lo the fp32-grade row. pitch is d
// rounded up to 64, with zeros in between. A lane takes eight columns at a time: 16 bytes of hi.
#pragma once

#include <cmath>

#include "arguments.h"
#include "half.h"

namespace directclr {

constexpr int kChunk = 8;

template <class T>
struct alignas(16) Vector16 {
  T v[16 / sizeof(T)];
};

DIRECTCLR_HD float to_float(float x) { return x; }
DIRECTCLR_HD float to_float(__half x) { return __half2float(x); }
DIRECTCLR_HD float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DIRECTCLR_HD void from_float(float x, float* y) { *y = x; }
DIRECTCLR_HD void from_float(float x, __half* y) { *y = __float2half_rn(x); }
DIRECTCLR_HD void from_float(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }

// Eight values from an address that `aligned` says is one of 16 bytes.
template <class T>
DIRECTCLR_HD void read8(const T* p, float (&x)[kChunk]) {
  constexpr int n = 16 / sizeof(T);
  DIRECTCLR_UNROLL
  for (int part = 0; part < kChunk / n; ++part) {
    const Vector16<T> v = *reinterpret_cast<const Vector16<T>*>(p + part * n);
    DIRECTCLR_UNROLL
    for (int k = 0; k < n; ++k) x[part * n + k] = to_float(v.v[k]);
  }
}

template <class T>
DIRECTCLR_HD void write8(T* p, const float (&x)[kChunk]) {
  constexpr int n = 16 / sizeof(T);
  DIRECTCLR_UNROLL
  for (int part = 0; part < kChunk / n; ++part) {
    Vector16<T> v;
    DIRECTCLR_UNROLL
    for (int k = 0; k < n; ++k) from_float(x[part * n + k], &v.v[k]);
    *reinterpret_cast<Vector16<T>*>(p + part * n) = v;
  }
}

// Columns of a representation: the first `d`, or those `index` names. Strides in elements. The host
// must not wait for an index to be checked, so one outside the row's `width` reads NaN.
template <class T>
struct Columns {
  T* data;
  int64_t row_stride, col_stride;
  const int64_t* index;
  int d;
  int64_t width;
  bool aligned;  // rows start at 16-byte addresses and their columns are neighbours

  DIRECTCLR_HD float at(int64_t row, int c) const {
    const int64_t column = index ? index[c] : int64_t(c);
    if (column < 0 || column >= width) return NAN;
    return to_float(data[row * row_stride + column * col_stride]);
  }
  // Columns c .. c + 8, zero from d on.
  DIRECTCLR_HD void load(int64_t row, int c, float (&x)[kChunk]) const {
    if (aligned && c + kChunk <= d) {
      read8(data + row * row_stride + c, x);
      return;
    }
    DIRECTCLR_UNROLL
    for (int k = 0; k < kChunk; ++k) x[k] = c + k < d ? at(row, c + k) : 0.0f;
  }
};

template <class Half>
struct Packed {
  typename Half::Type* data;
  int64_t row_stride;  // in elements of two bytes
  int pitch;
  bool fp8;
  float fp8_scale;

  DIRECTCLR_HD typename Half::Type* row(int64_t i) const { return data + i * row_stride; }

  DIRECTCLR_HD void store(int64_t i, int c, const float (&x)[kChunk]) const {
    float hi[kChunk], lo[kChunk];
    DIRECTCLR_UNROLL
    for (int k = 0; k < kChunk; ++k) {
      hi[k] = Half::widen(Half::round(x[k] * kUnit));
      lo[k] = x[k] * kUnit - hi[k];
    }
    write8(row(i) + c, hi);
    write8(row(i) + pitch + c, lo);
    if (fp8) {
      uint64_t bytes = 0;
      DIRECTCLR_UNROLL
      for (int k = 0; k < kChunk; ++k) bytes |= uint64_t(round_e4m3(x[k] * fp8_scale)) << (8 * k);
      *reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(row(i) + 2 * pitch) + c) = bytes;
    }
  }
  // fp32-grade.
  DIRECTCLR_HD void load(int64_t i, int c, float (&x)[kChunk]) const {
    float lo[kChunk];
    read8(row(i) + c, x);
    read8(row(i) + pitch + c, lo);
    DIRECTCLR_UNROLL
    for (int k = 0; k < kChunk; ++k) x[k] = (x[k] + lo[k]) * (1.0f / kUnit);
  }
};

// --------------------------------------------------------------------------------- normalize

// Sums over a lane's columns of candidate j of view 2 and its anchor i = j - offset of view 1:
// sums = x1 . x1, x2 . x2, x1 . x2, in fp64, so that rows of 1e19 and of 1e-30 are right.
template <class T>
DIRECTCLR_HD void row_sums(const Columns<T>& r1, const Columns<T>& r2, int64_t i, int64_t j,
                           bool has1, bool has2, int lane, double (&sums)[3]) {
  sums[0] = sums[1] = sums[2] = 0.0;
  for (int c = lane * kChunk; c < r1.d; c += kLanes * kChunk) {
    float x1[kChunk] = {}, x2[kChunk] = {};
    if (has1) r1.load(i, c, x1);
    if (has2) r2.load(j, c, x2);
    DIRECTCLR_UNROLL
    for (int k = 0; k < kChunk; ++k) {
      sums[0] += double(x1[k]) * x1[k];
      sums[1] += double(x2[k]) * x2[k];
      sums[2] += double(x1[k]) * x2[k];
    }
  }
}

// 1 / max(|x|, eps); a NaN stays one.
DIRECTCLR_HD double inverse_norm(double square, double eps) {
  const double norm = sqrt(square);
  return 1.0 / (norm < eps ? eps : norm);
}

template <class T, class Half>
DIRECTCLR_HD void write_unit_row(const Columns<T>& r, const Packed<Half>& z, int64_t i,
                                 double inverse, int lane) {
  for (int c = lane * kChunk; c < z.pitch; c += kLanes * kChunk) {
    float x[kChunk] = {};
    if (c < r.d) r.load(i, c, x);
    DIRECTCLR_UNROLL
    for (int k = 0; k < kChunk; ++k) x[k] = c + k < r.d ? float(x[k] * inverse) : 0.0f;
    z.store(i, c, x);
  }
}

// A lane's part of z1_i . z2_j from packed rows.
template <class Half>
DIRECTCLR_HD double cosine_part(const Packed<Half>& z1, const Packed<Half>& z2, int64_t i,
                                int64_t j, int lane) {
  double sum = 0.0;
  for (int c = lane * kChunk; c < z1.pitch; c += kLanes * kChunk) {
    float a[kChunk], b[kChunk];
    z1.load(i, c, a);
    z2.load(j, c, b);
    DIRECTCLR_UNROLL
    for (int k = 0; k < kChunk; ++k) sum += double(a[k]) * b[k];
  }
  return sum;
}

// --------------------------------------------------------------------------------- finish

// A FinishSide, typed: dz_i = factor (acc_i + diagonal z'_p(i)), dx = (dz - z (z . dz)) / |x|.
template <class T, class Half>
struct Side {
  Packed<Half> z, other;
  const float* rnorm;
  const float* acc;
  T* dr;
  int64_t dr_row_stride, dr_col_stride;
  bool dr_aligned;
  float* dots;
  int64_t rows;
  int64_t to_other, to_diagonal;
};

// Unit row and dz of columns c .. c + 8.
template <class T, class Half>
DIRECTCLR_HD void gradient_chunk(const Side<T, Half>& v, int64_t i, float diagonal, int c,
                                 float factor, float (&unit)[kChunk], float (&dz)[kChunk]) {
  v.z.load(i, c, unit);
  read8(v.acc + i * v.z.pitch + c, dz);
  if (diagonal != 0.0f) {
    float other[kChunk];
    v.other.load(i + v.to_other, c, other);
    DIRECTCLR_UNROLL
    for (int k = 0; k < kChunk; ++k) dz[k] += diagonal * other[k];
  }
  DIRECTCLR_UNROLL
  for (int k = 0; k < kChunk; ++k) dz[k] *= factor;
}

template <class T, class Half>
DIRECTCLR_HD float diagonal_of(const Side<T, Half>& v, const FinishArguments& s, int64_t i) {
  const int64_t at = i + v.to_diagonal;
  return s.diagonal && at >= 0 && at < s.diagonals ? s.diagonal[at] : 0.0f;
}

// A lane's part of z_i . dz_i.
template <class T, class Half>
DIRECTCLR_HD float dot_part(const Side<T, Half>& v, int64_t i, float diagonal, float factor,
                            int lane) {
  float dot = 0.0f;
  for (int c = lane * kChunk; c < v.z.pitch; c += kLanes * kChunk) {
    float unit[kChunk], dz[kChunk];
    gradient_chunk(v, i, diagonal, c, factor, unit, dz);
    DIRECTCLR_UNROLL
    for (int k = 0; k < kChunk; ++k) dot += unit[k] * dz[k];
  }
  return dot;
}

// A lane's part of the row of dr, zeros of a slice included.
template <class T, class Half>
DIRECTCLR_HD void write_gradient(const Side<T, Half>& v, const FinishArguments& s, int64_t i,
                                 float diagonal, float factor, float dot, int lane) {
  const float inverse = v.rnorm[i];
  if (inverse >= s.largest_rnorm) dot = 0.0f;
  T* row = v.dr + i * v.dr_row_stride;
  const int end = s.index ? s.d : s.width;
  for (int c = lane * kChunk; c < end; c += kLanes * kChunk) {
    float dx[kChunk] = {};
    if (c < s.d) {
      float unit[kChunk], dz[kChunk];
      gradient_chunk(v, i, diagonal, c, factor, unit, dz);
      DIRECTCLR_UNROLL
      for (int k = 0; k < kChunk; ++k) {
        dx[k] = c + k < s.d ? (dz[k] - unit[k] * dot) * inverse : 0.0f;
      }
    }
    if (v.dr_aligned && !s.index && !s.add && c + kChunk <= end) {
      write8(row + c, dx);
      continue;
    }
    DIRECTCLR_UNROLL
    for (int k = 0; k < kChunk; ++k) {
      if (c + k >= end) continue;
      const int64_t column = s.index ? s.index[c + k] : int64_t(c + k);
      if (column < 0 || column >= s.width) continue;
      T* at = row + column * v.dr_col_stride;
      from_float(s.add ? to_float(*at) + dx[k] : dx[k], at);
    }
  }
}

// Columns c .. of dz_i = factor dz_i + diagonal z'_{i + to_other}, a lane's part.
template <class Half>
DIRECTCLR_HD void add_positive(float* dz, const Packed<Half>& other, int64_t i, int64_t to_other,
                               float diagonal, float factor, int lane) {
  for (int c = lane * kChunk; c < other.pitch; c += kLanes * kChunk) {
    float x[kChunk], z[kChunk] = {};
    read8(dz + i * other.pitch + c, x);
    if (diagonal != 0.0f) other.load(i + to_other, c, z);
    DIRECTCLR_UNROLL
    for (int k = 0; k < kChunk; ++k) x[k] = x[k] * factor + diagonal * z[k];
    write8(dz + i * other.pitch + c, x);
  }
}

}  // namespace directclr
