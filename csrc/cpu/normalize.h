// Stage `normalize`: z = x / max(|x|, eps) and the exact positives. Norms and dots accumulate in
// fp64, so rows of 1e19 or of denormals neither overflow nor vanish.
#pragma once
#include "half.h"
#include "pack.h"

namespace directclr::DCLR_ISA {

template <class Convert, class Element>
DCLR_INLINE void gather_row(const Element* p, int64_t d, int64_t stride, const int64_t* cols,
                            float* out, Convert convert) {
  if (cols) {
    for (int64_t k = 0; k < d; ++k) out[k] = convert(p[cols[k] * stride]);
  } else if (stride == 1) {
    for (int64_t k = 0; k < d; ++k) out[k] = convert(p[k]);
  } else {
    for (int64_t k = 0; k < d; ++k) out[k] = convert(p[k * stride]);
  }
}

// Row i of x as d contiguous floats: where it lies if it can be used there, else in `copy`.
DCLR_INLINE const float* read_row(const Strided& x, int64_t i, int64_t d, float* copy) {
  if (x.dtype == kFloat32) {
    const float* p = static_cast<const float*>(x.data) + i * x.row_stride;
    if (!x.cols && x.col_stride == 1) return p;
    gather_row(p, d, x.col_stride, x.cols, copy, [](float v) { return v; });
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + i * x.row_stride;
    if (x.dtype == kFloat16) {
      gather_row(p, d, x.col_stride, x.cols, copy, [](uint16_t v) { return from_fp16(v); });
    } else {
      gather_row(p, d, x.col_stride, x.cols, copy, [](uint16_t v) { return from_bf16(v); });
    }
  }
  return copy;
}

// x . y in fp64, fixed order.
DCLR_INLINE double dot(const float* x, const float* y, int64_t d) {
  vd s[2] = {};
  int64_t k = 0;
  for (; k + VL <= d; k += VL) {
    s[0] += load_double(x + k) * load_double(y + k);
    s[1] += load_double(x + k + VL / 2) * load_double(y + k + VL / 2);
  }
  double r = sum_lanes(s[0] + s[1]);
  for (; k < d; ++k) r += double(x[k]) * double(y[k]);
  return r;
}

static void normalize(const Normalize& args, int64_t begin, int64_t end, float* copy) {
  for (int64_t i = begin; i < end; ++i) {
    const float* x = read_row(args.x, i, args.d, copy);
    const double norm = __builtin_sqrt(dot(x, x, args.d));
    const double r = 1.0 / (norm < args.eps ? args.eps : norm);  // NaN stays NaN
    float* z = args.z + i * args.pitch;
    int64_t k = 0;
    for (; k + VL / 2 <= args.d; k += VL / 2) {
      *reinterpret_cast<hf_mem*>(z + k) = __builtin_convertvector(load_double(x + k) * r, hf);
    }
    for (; k < args.d; ++k) z[k] = float(double(x[k]) * r);
    for (; k < args.pitch; ++k) z[k] = 0.0f;
    args.rnorm[i] = float(r);
  }
}

static void positives(const Positives& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    args.pos[i] = dot(args.z1 + i * args.pitch, args.z2 + (args.row_offset + i) * args.pitch,
                      args.pitch);
  }
}

}  // namespace directclr::DCLR_ISA
