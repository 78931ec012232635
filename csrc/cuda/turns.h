// The two warpgroups of a cooperative tile have their epilogues one after the other, so that the
// exponentials of one run under the products of the other: they share the tile's loads, and without an
// order both would be in the same place. It costs the follower one epilogue, in the first tile; from
// then on it is late by that, which the four stages of loads allow.
//
// The leader writes its column sums and arrives (ready), the follower waits for that before its own
// epilogue, adds both groups' and arrives (read). Buffers and barriers alternate between tiles, and the
// leader waits for `read` of the tile before the last, whose buffer it takes.
//
// No deadlock: give every wait the tile and block of columns it is in. A warpgroup waits for a load of
// that block; the load for all warpgroups of the cluster to release an earlier block; the follower of
// tile t for the leader's epilogue of t, which comes after products alone; the leader of t for the
// follower's epilogue of t - 2. So the earliest wait of all is for something that is done or under way,
// and ends. And no barrier is arrived at twice in one phase: `ready` of t + 2 follows `read` of t, which
// follows the wait for `ready` of t; likewise with the names exchanged. tests/test_cuda_host.py walks
// through all orders of these calls beside loads and products.
#pragma once

#include "warp.h"

namespace directclr {

// Barriers has sync(id) and arrive(id), both of the two warpgroups together.
template <class Barriers>
struct Turns {
  static constexpr int kReady = 1, kRead = 3;  // and the next ones

  int tile = 0;

  DIRECTCLR_HD int buffer() const { return tile % 2; }
  DIRECTCLR_HD void begin(bool leads) const {
    if (!leads) {
      Barriers::sync(kReady + buffer());
    } else if (tile > 1) {
      Barriers::sync(kRead + buffer());
    }
  }
  DIRECTCLR_HD void end(bool leads) {
    Barriers::arrive((leads ? kReady : kRead) + buffer());
    ++tile;
  }
};

}  // namespace directclr
