// Rounding to the operand types, on the device and on a host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstring>

#include "warp.h"

namespace directclr {

// Of packed rows, and of the remainders of stored weights (kernels/layout.py).
constexpr float kUnit = 32768.0f, kLoScale = 2048.0f;

struct Fp16 {
  using Type = __half;
  static DIRECTCLR_HD Type round(float x) { return __float2half_rn(x); }
  static DIRECTCLR_HD float widen(Type x) { return __half2float(x); }
  static DIRECTCLR_HD uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
  }
  // What `word` = pack(low, high) lacks of them, times kLoScale.
  static DIRECTCLR_HD uint32_t pack_rest(uint32_t word, float low, float high) {
    __half2 pair;
    memcpy(&pair, &word, 4);
    const float2 there = __half22float2(pair);
    return pack((low - there.x) * kLoScale, (high - there.y) * kLoScale);
  }
};

struct Bf16 {
  using Type = __nv_bfloat16;
  static DIRECTCLR_HD Type round(float x) { return __float2bfloat16_rn(x); }
  static DIRECTCLR_HD float widen(Type x) { return __bfloat162float(x); }
  static DIRECTCLR_HD uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
  }
};

// e4m3, saturating.
DIRECTCLR_HD uint8_t round_e4m3(float x) {
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

}  // namespace directclr
