// Tile registers: eight matrices of 16 rows x 64 bytes and the instructions of AMX on them, in two
// implementations: the processor's own, and a plain one that any machine runs. All that computes
// with tiles (tile_products.h) is written over `Tiles`, so the second proves it where there is no
// AMX; what remains is the dozen asm statements of the first.
//
// A tile in memory is 1 KiB, row after row. The left operand of a product has 16 rows of C and 64
// bytes of k, the right one 16 words of k (4 bytes each) for 16 columns of C. A word is four bytes,
// whose products are summed exactly, or two bf16, the first in the low half.
#pragma once
#include "simd.h"

namespace directclr::DCLR_ISA {

typedef int32_t vi_mem __attribute__((vector_size(4 * VL), aligned(4), may_alias));

constexpr int64_t kTileBytes = 1024;

template <int T>
struct Tile {};  // the number of a register

// C += A B of bytes, exact in fp32 on the way.
static __attribute__((noinline)) void add_product(int32_t* c, const int8_t* a, const int32_t* b) {
  constexpr int V = 16 / VL, ROWS = VL == 16 ? 8 : 2;
  float wide[64 * 16];  // B as [k][column]
  for (int w = 0; w < 256; w += VL) {
    const vi word = *reinterpret_cast<const vi_mem*>(b + w);
    for (int q = 0; q < 4; ++q) {
      const vi byte = word << (24 - 8 * q) >> 24;
      store(wide + (w / 16 * 4 + q) * 16 + w % 16, __builtin_convertvector(byte, vf));
    }
  }
  for (int i = 0; i < 16; i += ROWS) {
    vf sum[ROWS][V] = {};
    for (int k = 0; k < 64; ++k) {
      DCLR_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const vf x = splat(float(a[(i + r) * 64 + k]));
        DCLR_UNROLL
        for (int v = 0; v < V; ++v) sum[r][v] += x * load(wide + k * 16 + v * VL);
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < V; ++v) {
        vi_mem* to = reinterpret_cast<vi_mem*>(c + (i + r) * 16 + v * VL);
        *to = *to + __builtin_convertvector(sum[r][v], vi);
      }
    }
  }
}

// C += A B of pairs of bf16, as Intel's manual has TDPBF16PS: the products of the low halves in one
// chain of fused additions, those of the high ones in another, from 0; then their sum, then C. A
// product of two bf16 is exact in fp32, so it does not matter whether additions are fused. But
// numbers below 2^-126, which the instruction takes and gives as 0, are whatever this body's are.
static __attribute__((noinline)) void add_bf16_product(float* c, const int32_t* a,
                                                       const int32_t* b) {
  constexpr int V = 16 / VL, ROWS = VL == 16 ? 8 : 2;
  constexpr int32_t HIGH = int32_t(0xFFFF0000);
  const auto number = [](int32_t bits) __attribute__((always_inline)) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return splat(x);
  };
  for (int i = 0; i < 16; i += ROWS) {
    vf low[ROWS][V] = {}, high[ROWS][V] = {};
    for (int k = 0; k < 16; ++k) {
      DCLR_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const int32_t x = a[(i + r) * 16 + k];
        DCLR_UNROLL
        for (int v = 0; v < V; ++v) {
          const vi y = *reinterpret_cast<const vi_mem*>(b + k * 16 + v * VL);
          low[r][v] += number(int32_t(uint32_t(x) << 16)) * (vf)(y << 16);
          high[r][v] += number(x & HIGH) * (vf)(y & HIGH);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < V; ++v) {
        float* to = c + (i + r) * 16 + v * VL;
        store(to, load(to) + (low[r][v] + high[r][v]));
      }
    }
  }
}

struct EmulatedTiles {
  alignas(64) int32_t words[8][256];
  bool configured = false;

  inline __attribute__((always_inline)) void configure() { configured = true; }
  inline __attribute__((always_inline)) void release() { configured = false; }
  template <int T>
  inline __attribute__((always_inline)) int32_t* use() {
    if (!configured) __builtin_trap();  // as the processor would
    return words[T];
  }
  template <int T>
  inline __attribute__((always_inline)) void zero(Tile<T>) {
    __builtin_memset(use<T>(), 0, kTileBytes);
  }
  template <int T>
  inline __attribute__((always_inline)) void load(Tile<T>, const void* p) {
    __builtin_memcpy(use<T>(), p, kTileBytes);
  }
  template <int T>
  inline __attribute__((always_inline)) void load_once(Tile<T>, const void* p) {
    load(Tile<T>{}, p);
  }
  template <int T>
  inline __attribute__((always_inline)) void store(Tile<T>, void* p) {
    __builtin_memcpy(p, use<T>(), kTileBytes);
  }
  template <int C, int A, int B>
  inline __attribute__((always_inline)) void multiply_bytes(Tile<C>, Tile<A>, Tile<B>) {
    add_product(use<C>(), reinterpret_cast<int8_t*>(use<A>()), use<B>());
  }
  template <int C, int A, int B>
  inline __attribute__((always_inline)) void multiply_bf16(Tile<C>, Tile<A>, Tile<B>) {
    add_bf16_product(reinterpret_cast<float*>(use<C>()), use<A>(), use<B>());
  }
};

#if defined(DCLR_AMX)
// As ldtilecfg reads it: every tile is whole.
struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};
static const TileShapes kTileShapes = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
static_assert(sizeof(TileShapes) == 64, "one line");

// Statements of our own: gcc 12's intrinsics tell the compiler too little of the memory that they
// read and are miscompiled at -O3. "memory" also keeps an epilogue between the products.
struct AmxTiles {
  inline __attribute__((always_inline)) void configure() {
    asm volatile("ldtilecfg %0" ::"m"(kTileShapes) : "memory");
  }
  inline __attribute__((always_inline)) void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int T>
  inline __attribute__((always_inline)) void zero(Tile<T>) {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  inline __attribute__((always_inline)) void load(Tile<T>, const void* p) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(int64_t(64)), "i"(T) : "memory");
  }
  template <int T>
  inline __attribute__((always_inline)) void load_once(Tile<T>, const void* p) {  // past L1
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(int64_t(64)), "i"(T) : "memory");
  }
  template <int T>
  inline __attribute__((always_inline)) void store(Tile<T>, void* p) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t(64)), "i"(T) : "memory");
  }
  // C += A B
  template <int C, int A, int B>
  inline __attribute__((always_inline)) void multiply_bytes(Tile<C>, Tile<A>, Tile<B>) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  inline __attribute__((always_inline)) void multiply_bf16(Tile<C>, Tile<A>, Tile<B>) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
using Tiles = AmxTiles;
#else
using Tiles = EmulatedTiles;
#endif

}  // namespace directclr::DCLR_ISA
