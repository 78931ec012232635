// exp(a s) = 2^(n + f) = p * 2^n, n whole, f in [-1/2, 1/2], p = 2^f by a polynomial of degree 6
// with p(0) = 1 (fitted minimax in relative error: 2e-9 exact, 1.6e-8 with fp32 coefficients; about
// 1e-7 after rounding).
//
// The scale a log2(e) comes as two floats and the reduction subtracts n before it rounds, so the
// argument carries no error that grows with a: what a shift of -a costs elsewhere (half an ulp of
// a s, 5e-7 at temperature 0.1) is not paid. n stays a float of whole value: sums and weights move
// it by whole references, which is exact.
#pragma once
#include "simd.h"

namespace directclr::DCLR_ISA {

struct Power {
  vf p, n;
};

// Similarities that are left out get the value for which a' s = -2^24, beyond every reference: those
// of the rest stay within 2^22, since the callers see to it that a is at most 2^21.
constexpr float kLeftOut = -16777216.0f;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds |x| < 2^22 to a whole number

DCLR_INLINE Power power(vf s, vf scale_hi, vf scale_lo) {
#if defined(__AVX512F__)
  const vf n = (vf)_mm512_roundscale_ps((__m512)(s * scale_hi), 0);
#else
  const vf n = (s * scale_hi + kMagic) - kMagic;
#endif
  vf f = multiply_subtract(s, scale_hi, n);
  f = s * scale_lo + f;
  vf p = splat(0.00015353362f) * f + 0.0013398874f;
  p = p * f + 0.009618437f;
  p = p * f + 0.055503324f;
  p = p * f + 0.24022648f;
  p = p * f + 0.6931472f;
  p = p * f + 1.0f;
  return {p, n};
}

// p * 2^n. Results below 2^-126 may become 0.
DCLR_INLINE vf ldexp(vf p, vf n) {
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  n = n < -127.0f ? splat(-127.0f) : n;
  n = n > 127.0f ? splat(127.0f) : n;
  const vi bits = (vi)(n + kMagic) - 0x4B400000;  // n as an integer; kMagic's bits
  return p * (vf)((bits + 127) << 23);
#endif
}

// 2^n as a double, n a whole number.
DCLR_INLINE double power_of_two(double n) {
  if (!(n > -1022.0)) return n != n ? n : 0.0;
  const int64_t bits = (int64_t(n > 1023.0 ? 1023.0 : n) + 1023) << 52;
  double r;
  __builtin_memcpy(&r, &bits, 8);
  return r;
}

// (sum, ref) += (s, r), both standing for sum * 2^ref.
DCLR_INLINE void merge(double& sum, double& ref, double s, double r) {
  if (s == 0.0) return;
  if (sum == 0.0) {
    sum = s;
    ref = r;
  } else if (r == ref) {
    sum += s;
  } else if (r > ref) {
    sum = sum * power_of_two(ref - r) + s;
    ref = r;
  } else {
    sum += s * power_of_two(r - ref);
  }
}

}  // namespace directclr::DCLR_ISA
