// fp16 and bf16 to and from fp32 in plain integer arithmetic, which the compiler vectorises for any
// instruction set; round to nearest even. Internal linkage: each body gets its own copy.
#pragma once
#include <stdint.h>

namespace directclr {
namespace {

inline __attribute__((always_inline)) float float_of_bits(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline __attribute__((always_inline)) uint32_t bits_of_float(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

inline __attribute__((always_inline)) float from_bf16(uint16_t h) {
  return float_of_bits(uint32_t(h) << 16);
}
inline __attribute__((always_inline)) uint16_t to_bf16(float f) {
  const uint32_t u = bits_of_float(f);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return uint16_t((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u | (u >> 16) : rounded);
}

inline __attribute__((always_inline)) float from_fp16(uint16_t h) {
  // Exponent and mantissa in place; the product moves the bias and normalises denormals.
  const uint32_t magnitude = uint32_t(h & 0x7FFFu) << 13;
  const uint32_t value = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7F800000u;  // Inf and NaN
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  return float_of_bits((magnitude >= 0x0F800000u ? special : value) | sign);
}
inline __attribute__((always_inline)) uint16_t to_fp16(float f) {
  const uint32_t u = bits_of_float(f), magnitude = u & 0x7FFFFFFFu;
  const uint32_t sign = (u >> 16) & 0x8000u;
  // Normal results: round the 13 bits that go. Small ones: let an addition round them.
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t small = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t r = magnitude < 0x38800000u ? small : normal;
  r = magnitude >= 0x47800000u ? 0x7C00u : r;  // 65520 and up reach Inf by rounding already
  r = magnitude > 0x7F800000u ? 0x7E00u : r;
  return uint16_t(r | sign);
}

}  // namespace
}  // namespace directclr
