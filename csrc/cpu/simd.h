// One vector type per instruction set, from the compiler's vector extensions: a * b + c contracts
// to a fused multiply-add where there is one. Included once per body, in that body's own namespace.
#pragma once
#include "blocking.h"

#define DCLR_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define DCLR_UNROLL _Pragma("unroll")
#else
#define DCLR_UNROLL _Pragma("GCC unroll 64")
#endif

namespace directclr::DCLR_ISA {

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float vf_mem __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef float hf __attribute__((vector_size(2 * VL), may_alias));  // half as many floats
typedef float hf_mem __attribute__((vector_size(2 * VL), aligned(4), may_alias));
typedef double vd __attribute__((vector_size(4 * VL)));  // VL / 2 doubles
typedef double vd_mem __attribute__((vector_size(4 * VL), aligned(8), may_alias));

// Lane numbers as a pack, for shuffles with constant indices: Lanes<0, 1, ..., N - 1>.
template <int... L>
struct Lanes {};
template <int N, int... L>
struct FirstLanes : FirstLanes<N - 1, N - 1, L...> {};
template <int... L>
struct FirstLanes<0, L...> {
  using type = Lanes<L...>;
};

DCLR_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
DCLR_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_mem*>(p) = v; }
// Spelled as lanes: `vf{} + x` is an addition (of -0.0), and cost the micro-kernel 5 %.
template <int... L>
DCLR_INLINE vf splat(float x, Lanes<L...>) {
  return vf{((void)L, x)...};
}
DCLR_INLINE vf splat(float x) { return splat(x, typename FirstLanes<VL>::type{}); }

// a * b - c as if a * b were exact, where c is about a * b: contraction alone would not fuse a product
// that is also used elsewhere. Without fused hardware a * b is four exact products of 12-bit halves,
// in an order in which c cancels them without rounding.
#if !defined(__AVX2__)
DCLR_INLINE vf upper_half(vf a) { return (vf)((vi)a & ~0xFFF); }
#endif
DCLR_INLINE vf multiply_subtract(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)c);
#else
  const vf ah = upper_half(a), al = a - ah, bh = upper_half(b), bl = b - bh;
  return (((ah * bh - c) + ah * bl) + al * bh) + al * bl;
#endif
}
DCLR_INLINE vd load_double(const float* p) {
  return __builtin_convertvector(hf(*reinterpret_cast<const hf_mem*>(p)), vd);
}

// Pairwise, in a fixed order.
template <int STEP, int... L>
DCLR_INLINE void add_swapped(vd& v, Lanes<L...>) {
  v += __builtin_shufflevector(v, v, (L ^ STEP)...);
}
DCLR_INLINE double sum_lanes(vd v) {
  using All = typename FirstLanes<VL / 2>::type;
  if constexpr (VL >= 16) add_swapped<4>(v, All{});
  if constexpr (VL >= 8) add_swapped<2>(v, All{});
  add_swapped<1>(v, All{});
  return v[0];
}
DCLR_INLINE vd widen(vf v) {
  const hf* half = reinterpret_cast<const hf*>(&v);
  return __builtin_convertvector(half[0], vd) + __builtin_convertvector(half[1], vd);
}
DCLR_INLINE double sum_lanes(vf v) { return sum_lanes(widen(v)); }

// The stores of a panel of G: one vector is VL / MR runs of MR columns, `stride` floats apart.
DCLR_INLINE void store_runs(float* p, int64_t stride, vf v) {
  if constexpr (MR == VL) {
    store(p, v);
  } else {
    const hf* half = reinterpret_cast<const hf*>(&v);
    *reinterpret_cast<hf_mem*>(p) = half[0];
    *reinterpret_cast<hf_mem*>(p + stride) = half[1];
  }
}

// VL x VL transpose in log2(VL) rounds of two-source permutations.
template <int STEP, int... L>
DCLR_INLINE void swap_blocks(vf& a, vf& b, Lanes<L...>) {
  const vf lo = __builtin_shufflevector(a, b, ((L & STEP) ? VL + L - STEP : L)...);
  b = __builtin_shufflevector(a, b, ((L & STEP) ? VL + L : L + STEP)...);
  a = lo;
}
template <int STEP>
DCLR_INLINE void transpose_round(vf (&r)[VL]) {
  DCLR_UNROLL
  for (int i = 0; i < VL; ++i) {
    if (!(i & STEP)) swap_blocks<STEP>(r[i], r[i + STEP], typename FirstLanes<VL>::type{});
  }
}
DCLR_INLINE void transpose(vf (&r)[VL]) {
  transpose_round<1>(r);
  transpose_round<2>(r);
  if constexpr (VL >= 8) transpose_round<4>(r);
  if constexpr (VL >= 16) transpose_round<8>(r);
}

}  // namespace directclr::DCLR_ISA
