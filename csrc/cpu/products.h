// Stage `products`: dz1 += G z2, dz2 += G' z1. Both take a block of G from L2, where `weights` has
// just written it, so that nothing N x N is stored: the two stages are one walk over the blocks.
#pragma once
#include "weights.h"

namespace directclr::DCLR_ISA {

// dz1 += G z2 for the rows of the block.
template <class T>
DCLR_INLINE void add_G_z2(const Products& args, const Block& b, const Scratch& s) {
  const int64_t pitch = args.pair.pitch, d = args.pair.d;
  const int64_t panel = panel_words<T>(b), inner = round_up(b.nc, MR);
  for (int64_t c = 0; c < d; c += NR) {
    const int vectors = tile_vectors(d, c);
    for (int64_t r = 0; r < b.mc; r += MR) {
      const BlockA<T::KB> a{s.g + r * MR / T::PACK, panel};
      micro_rows<T>(vectors, a, s.rows2 + c * (inner / T::PACK), inner / MR,
                    args.dz1 + (b.i0 + r) * pitch + c, pitch, b.mc - r);
    }
  }
}

// dz2 += G' z1 for the columns of the block.
template <class T>
DCLR_INLINE void add_Gt_z1(const Products& args, const Block& b, const Scratch& s) {
  const int64_t pitch = args.pair.pitch, d = args.pair.d;
  const int64_t panel = panel_words<T>(b), inner = round_up(b.mc, MR);
  pack_rows<T>(args.pair.z1 + b.i0 * pitch, pitch, d, b.mc, inner / T::PACK, s.rows1);
  for (int64_t c = 0; c < d; c += NR) {
    const int vectors = tile_vectors(d, c);
    for (int64_t r = 0; r < b.nc; r += MR) {
      const PanelA<T::KB> a{(T::PACK == 1 ? s.g : s.g2()) + r / MR * panel};
      micro_rows<T>(vectors, a, s.rows1 + c * (inner / T::PACK), inner / MR,
                    args.dz2 + (b.j0 + r) * pitch + c, pitch, b.nc - r);
    }
  }
}

template <class T>
static void products_of(const Products& args, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                        const Scratch& s) {
  const Pair& pair = args.pair;
  const int64_t pitch = pair.pitch, d = pair.d;
  const int64_t ld = round_up((d + T::PACK - 1) / T::PACK, VL);
  const bool all_kept = pair.keep_panels >= (pair.m + MR - 1) / MR;
  const int64_t j_step = even_block(j1 - j0, NC, NR), i_step = even_block(i1 - i0, MC, MR);
  for (int64_t j = j0; j < j1; j += j_step) {
    const int64_t nc = smaller(j_step, j1 - j);
    if (below_diagonal(pair, i0, j + nc)) continue;
    const float* z2 = pair.z2 + j * pitch;
    if (!all_kept) pack_columns<T>(z2, pitch, nc, ld, s.columns);
    if (args.dz1) pack_rows<T>(z2, pitch, d, nc, round_up(nc, MR) / T::PACK, s.rows2);
    for (int64_t i = i0; i < i1; i += i_step) {
      const Block b{i, smaller(i_step, i1 - i), j, nc};
      if (below_diagonal(pair, i, j + nc)) continue;
      weights_of_block<T>(args, b, s);
      if (args.dz1) add_G_z2<T>(args, b, s);
      if (args.dz2) add_Gt_z1<T>(args, b, s);
    }
  }
}

}  // namespace directclr::DCLR_ISA
