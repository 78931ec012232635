// Stage `finish`: dx = (dz - z (z . dz)) / |x|, cast and written into the full-width gradient, the
// columns not taken set to zero. The row dots also carry the temperature gradient.
#pragma once
#include "normalize.h"

namespace directclr::DCLR_ISA {

template <class Element, class Convert>
DCLR_INLINE void write_row(const Finish& args, int64_t i, const float* dx, Convert convert) {
  Element* row = static_cast<Element*>(args.grad.data) + i * args.grad.row_stride;
  const int64_t step = args.grad.col_stride;
  if (args.grad.cols) {
    if (args.fill) {
      for (int64_t k = 0; k < args.width; ++k) row[k * step] = 0;
    }
    for (int64_t k = 0; k < args.d; ++k) row[args.grad.cols[k] * step] = convert(dx[k]);
  } else {
    if (step == 1) {
      for (int64_t k = 0; k < args.d; ++k) row[k] = convert(dx[k]);
    } else {
      for (int64_t k = 0; k < args.d; ++k) row[k * step] = convert(dx[k]);
    }
    if (args.fill && step == 1) {
      __builtin_memset(row + args.d, 0, sizeof(Element) * size_t(args.width - args.d));
    } else if (args.fill) {
      for (int64_t k = args.d; k < args.width; ++k) row[k * step] = 0;
    }
  }
}

static void finish(const Finish& args, int64_t begin, int64_t end, double* dots, float* copy) {
  for (int64_t i = begin; i < end; ++i) {
    const float* z = args.z + i * args.pitch;
    const float* dz = args.dz + i * args.pitch;
    const float r = args.rnorm[i];
    const double along = dot(z, dz, args.pitch);
    dots[i] = along;
    if (!args.grad.data) continue;  // only the temperature asks
    const float t = r >= args.rnorm_clamped ? 0.0f : float(along);
    for (int64_t k = 0; k < args.pitch; k += VL) {
      store(copy + k, (load(dz + k) - load(z + k) * t) * r);
    }
    if (args.grad.dtype == kFloat32) {
      write_row<float>(args, i, copy, [](float v) { return v; });
    } else if (args.grad.dtype == kFloat16) {
      write_row<uint16_t>(args, i, copy, [](float v) { return to_fp16(v); });
    } else {
      write_row<uint16_t>(args, i, copy, [](float v) { return to_bf16(v); });
    }
  }
}

}  // namespace directclr::DCLR_ISA
