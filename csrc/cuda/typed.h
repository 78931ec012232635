// From the binding's addresses and dtype codes to the typed rows of rows.h.
#pragma once

#include <string>

#include "arguments.h"
#include "rows.h"

namespace directclr {

template <class T>
inline bool divides(const void* data, int64_t row_stride, int64_t col_stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * int64_t(sizeof(T)) % 16 == 0 &&
         col_stride == 1;
}

template <class T>
Columns<const T> columns(const Input& r, const int64_t* index, int d) {
  const bool aligned = !index && divides<T>(r.data, r.row_stride, r.col_stride);
  return {static_cast<const T*>(r.data), r.row_stride, r.col_stride, index, d, r.width,
          aligned};
}

template <class Half>
Packed<Half> packed(const Layout& l, const void* z) {
  auto* data = static_cast<typename Half::Type*>(const_cast<void*>(z));
  return {data, l.row, l.pitch, l.fp8, l.fp8_scale};
}

// Calls f with values of the representation's and of the operands' type.
template <class F>
std::string by_types(int dtype, const Layout& layout, F f) {
  const auto with = [&](auto half) -> std::string {
    switch (dtype) {
      case kFloat16: return f(__half{}, half);
      case kBfloat16: return f(__nv_bfloat16{}, half);
      case kFloat32: return f(float{}, half);
      default: return "dtype: expected fp16, bf16 or fp32";
    }
  };
  return layout.bf16 ? with(Bf16{}) : with(Fp16{});
}

template <class F>
std::string by_half(const Layout& layout, F f) {
  return layout.bf16 ? f(Bf16{}) : f(Fp16{});
}

template <class T, class Half>
Side<T, Half> side(const Layout& l, const FinishSide& s) {
  return {packed<Half>(l, s.z),
          packed<Half>(l, s.other),
          s.rnorm,
          s.acc,
          static_cast<T*>(s.dr),
          s.dr_row_stride,
          s.dr_col_stride,
          divides<T>(s.dr, s.dr_row_stride, s.dr_col_stride),
          s.dots,
          s.rows,
          s.to_other,
          s.to_diagonal};
}

}  // namespace directclr
