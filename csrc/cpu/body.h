// One body of the kernels. The including file names it (DCLR_ISA) and is compiled with that
// instruction set's flags; everything lives in the namespace of that name or has internal linkage,
// so that no function compiled here can be taken for another body's or the driver's.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"
//
#include "finish.h"
#include "normalize.h"
#include "products.h"
#include "sums.h"
#if defined(DCLR_TILES)
#include "tile_stages.h"
#endif

namespace directclr::DCLR_ISA {

static int64_t fp32_scratch_bytes(int64_t m, int64_t n, int64_t pitch) {
  return scratch_at(nullptr, m, n, pitch).bytes;
}

static int64_t keep_panel_floats(int64_t n) { return round_up(n, NR) * MR; }

#if defined(DCLR_TILES)
static int64_t scratch_bytes(int64_t m, int64_t n, int64_t pitch) {
  const int64_t fp32 = fp32_scratch_bytes(m, n, pitch);
  const int64_t tiles = tile_scratch(nullptr, m, n, pitch).bytes;
  return tiles > fp32 ? tiles : fp32;
}
static void pack(const Pair& pair, bool first, int64_t begin, int64_t end, const Packed& to) {
  with_kind(pair.operands,
            [&](auto kind) { pack_view<decltype(kind)>(pair, first, begin, end, to); });
}
// By a count of instructions (csrc/README.md) tiles pay from about 40 rows and 8 columns on. The rest
// is a margin for what no count has and nobody measured: configuring the unit in every part, its
// waking up, threads. Emulated they are there to be tested, at all sizes.
constexpr bool kEmulated = __is_same(Tiles, EmulatedTiles);
constexpr TileKernels kTileKernels = {kEmulated ? 1 : 256, kEmulated ? 1 : 96, kept_floats,
                                      digit_scales, packed_rows, packed_bytes, pack, tiles_work,
                                      tile_loop};
constexpr const TileKernels* kTiles = &kTileKernels;
#else
constexpr auto scratch_bytes = fp32_scratch_bytes;
constexpr const TileKernels* kTiles = nullptr;
#endif

template <class T>
static void sums_with(const Sums& args, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                    double* col_sum, double* col_ref, float* col_top, const Scratch& s) {
  const auto run = args.bounded ? (args.row_top ? sums_of<T, true, true> : sums_of<T, true, false>)
                                : (args.row_top ? sums_of<T, false, true> : sums_of<T, false, false>);
  run(args, i0, i1, j0, j1, col_sum, col_ref, col_top, s);
}

static void sums(const Sums& args, int64_t i0, int64_t i1, int64_t j0, int64_t j1, double* col_sum,
                 double* col_ref, float* col_top, void* scratch) {
#if defined(DCLR_TILES)
  const auto on_tiles = [&](auto kind) {
    using K = decltype(kind);
    const auto run = args.bounded ? tile_sums<K, true> : tile_sums<K, false>;
    run(args, i0, i1, j0, j1, col_sum, col_ref, col_top,
        tile_scratch(scratch, args.pair.m, args.pair.n, args.pair.pitch));
  };
  if (with_kind(args.pair.operands, on_tiles)) return;
#endif
  const Scratch s = scratch_at(scratch, args.pair.m, args.pair.n, args.pair.pitch);
  const auto run = kHasBf16 && args.pair.operands == kBf16 ? sums_with<Bf16> : sums_with<Fp32>;
  run(args, i0, i1, j0, j1, col_sum, col_ref, col_top, s);
}

static void products(const Products& args, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                     void* scratch) {
#if defined(DCLR_TILES)
  const auto on_tiles = [&](auto kind) {
    tile_products<decltype(kind)>(
        args, i0, i1, j0, j1,
        tile_scratch(scratch, args.pair.m, args.pair.n, args.pair.pitch));
  };
  if (with_kind(args.pair.operands, on_tiles)) return;
#endif
  const Scratch s = scratch_at(scratch, args.pair.m, args.pair.n, args.pair.pitch);
  const auto run = kHasBf16 && args.pair.operands == kBf16 ? products_of<Bf16> : products_of<Fp32>;
  run(args, i0, i1, j0, j1, s);
}

static void exp2_values(const float* x, float scale_hi, float scale_lo, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += VL) {
    float in[VL] = {}, out[VL];
    for (int64_t l = 0; l < VL && i + l < n; ++l) in[l] = x[i + l];
    const Power e = power(load(in), splat(scale_hi), splat(scale_lo));
    store(out, ldexp(e.p, e.n));
    for (int64_t l = 0; l < VL && i + l < n; ++l) y[i + l] = out[l];
  }
}

// As many independent multiply-adds as hide the latency, on registers only.
static double fma_loop(int64_t iterations) {
  constexpr int CHAINS = MR * NV;
  vf a[CHAINS], b = splat(0.999f), c = splat(0.001f);
  for (int i = 0; i < CHAINS; ++i) a[i] = splat(float(i));
  for (int64_t n = 0; n < iterations; ++n) {
    DCLR_UNROLL
    for (int i = 0; i < CHAINS; ++i) a[i] = a[i] * b + c;
  }
  vf s = vf{};
  for (int i = 0; i < CHAINS; ++i) s += a[i];
  volatile double keep = sum_lanes(s);
  (void)keep;
  return 2.0 * CHAINS * VL * double(iterations);
}

}  // namespace directclr::DCLR_ISA

#define DCLR_JOIN_(a, b) a##b
#define DCLR_JOIN(a, b) DCLR_JOIN_(a, b)
#define DCLR_NAME_(x) #x
#define DCLR_NAME(x) DCLR_NAME_(x)

namespace directclr {
const Kernels DCLR_JOIN(kernels_, DCLR_ISA) = {
    DCLR_NAME(DCLR_ISA),
    DCLR_ISA::MR,
    DCLR_ISA::NR,
    DCLR_ISA::kHasBf16,
    DCLR_ISA::scratch_bytes,
    DCLR_ISA::keep_panel_floats,
    DCLR_ISA::normalize,
    DCLR_ISA::positives,
    DCLR_ISA::sums,
    DCLR_ISA::products,
    DCLR_ISA::finish,
    DCLR_ISA::exp2_values,
    DCLR_ISA::fma_loop,
    DCLR_ISA::kTiles,
};
}  // namespace directclr
