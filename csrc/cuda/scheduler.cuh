// CUTLASS's static persistent scheduler with the tiles of order.h: block b of C clusters takes the
// clusters b, b + C, b + 2 C ... of the order. CUTLASS's own rounds both sides of the grid up to its
// swizzle and runs the products of what it has added.
//
// All warps of a cluster's blocks ask the same questions in the same order, of numbers alone.
#pragma once

#include "cutlass/gemm/kernel/tile_scheduler.hpp"
#include "order.h"

namespace directclr {

struct InOrder {};  // the scheduler's tag

class TileScheduler : public cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90 {
  using Base = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;

 public:
  using Base::WorkTileInfo;
  struct Arguments : Base::Arguments {
    bool upper = false;
  };
  struct Params : Base::Params {
    TileOrder order;
    int clusters;
  };

  template <class Shape, class Tile, class ClusterShape>
  static Params to_underlying_arguments(Shape shape, Tile tile, ClusterShape cluster,
                                        const cutlass::KernelHardwareInfo& hardware,
                                        const Arguments& arguments, void* = nullptr, uint32_t = 1,
                                        uint32_t = 1) {
    static_assert(cute::size<0>(ClusterShape{}) == kClusterTiles && cute::size(ClusterShape{}) == 2);
    Base::Arguments plain{1, RasterOrderOptions::AlongN};  // grid: (2, clusters at once)
    Params p;
    static_cast<Base::Params&>(p) =
        Base::to_underlying_arguments(shape, tile, cluster, hardware, plain);
    p.order = TileOrder(cute::get<0>(shape), cute::get<1>(shape), cute::size<0>(tile),
                        cute::size<1>(tile), arguments.upper);
    p.clusters = p.order.clusters();
    return p;
  }

  CUTLASS_DEVICE explicit TileScheduler(const Params& p)
      : Base(p), order(p.order), clusters(p.clusters), place(int(blockIdx.y)) {}

  CUTLASS_DEVICE WorkTileInfo get_current_work() {
    if (place >= clusters) return WorkTileInfo::invalid_work_tile();
    const TileOrder::Cluster at = walk.to(order, place);
    return {at.row * kClusterTiles + int(cute::block_id_in_cluster().x), at.column, 0, true};
  }
  template <class ClusterShape>
  CUTLASS_DEVICE WorkTileInfo initial_work_tile_info(ClusterShape) {
    return get_current_work();
  }
  CUTLASS_DEVICE void advance_to_next_work(uint32_t count = 1) {
    place += int(gridDim.y) * int(count);
  }
  CUTLASS_DEVICE bool is_last_tile(const WorkTileInfo&, uint32_t count = 1) const {
    return place + int(gridDim.y) * int(count) >= clusters;
  }
  template <class... Pipeline>
  CUTLASS_DEVICE auto fetch_next_work(const WorkTileInfo&, const Pipeline&...) {
    advance_to_next_work();
    return cute::make_tuple(get_current_work(), true);
  }

 private:
  TileOrder order;
  int clusters, place;
  TileOrder::Walk walk;
};

}  // namespace directclr

template <class Tile, class Cluster, uint32_t kStages>
struct cutlass::gemm::kernel::detail::TileSchedulerSelector<directclr::InOrder, cutlass::arch::Sm90,
                                                            Tile, Cluster, kStages> {
  using Scheduler = directclr::TileScheduler;
};
