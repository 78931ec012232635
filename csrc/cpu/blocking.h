// The sizes of the blocked product, in BLIS's words, a row for each body.
//
//   VL        floats per vector
//   MR x NR   register tile, and MR columns of a panel of G: MR * NV accumulators and NV + 1 other
//             vectors must fit the registers, NV = NR / VL
//   MC x NC   block of S, whose packed columns (NC x d) stay in L2 while panels of MR rows pass
//   KC        words of k per pass over a block of S
#pragma once
#include <stdint.h>

namespace directclr::DCLR_ISA {

struct Blocking {
  int vl, mr, nr;
  int64_t mc, nc, kc;
};

//                               VL  MR  NR   MC   NC   KC
#if defined(__AVX512F__)
constexpr Blocking kBlocking = {16, 8, 48, 192, 336, 512};
#elif defined(__AVX2__)
constexpr Blocking kBlocking = {8, 4, 24, 192, 336, 512};
#else
constexpr Blocking kBlocking = {4, 4, 8, 192, 336, 512};
#endif

constexpr int VL = kBlocking.vl, MR = kBlocking.mr, NR = kBlocking.nr, NV = NR / VL;
constexpr int64_t MC = kBlocking.mc, NC = kBlocking.nc, KC = kBlocking.kc;
static_assert(NR % VL == 0, "whole vectors across a register tile");
static_assert(MR == VL || 2 * MR == VL, "a vector spans one or two panels of G");
static_assert(NC % NR == 0 && MC % MR == 0 && NC % MR == 0, "whole tiles per block");

}  // namespace directclr::DCLR_ISA
