// The tile product S = A B^T of unit rows on Hopper: CUTLASS's persistent warp-specialised main
// loop (TMA loads, wgmma, B multicast in clusters of two) under the epilogues of tile.h.
//
// A, B: (rows, k) and (cols, k), k contiguous, fp16 (one part or two), bf16 or e4m3, fp32 accumulators. Rows beyond
// the end read as zero, by TMA, and are masked in the epilogue. An epilogue's results go to fixed
// places, so the order in which tiles are taken does not matter and repeat runs give the same bits.
#pragma once

#include <string>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/detail.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "arguments.h"
#include "half.h"
#include "scheduler.cuh"
#include "tile.h"
#include "turns.h"

namespace directclr {

// `Cooperative`: two warpgroups share a tile of 128 x 256 (turns.h). `Pingpong`: each has a tile of 64 x
// 256, which pays where k is short.
struct Cooperative {
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using ScheduleFp8 = cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum;
  static constexpr int kHeight = 128, kGroups = 1;
};
struct Pingpong {
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using ScheduleFp8 = cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum;
  static constexpr int kHeight = 64, kGroups = 2;
};
constexpr int kWidth = 256;
constexpr int kBlocks = kWidth / 8;

// The part of CUTLASS's epilogue interface that its adapter for these kernels wants and that is
// the same for both of ours.
template <class Params_>
struct EpilogueBase {
  using EpilogueSchedule = cutlass::epilogue::PtrArrayNoSmemWarpSpecialized;
  using DispatchPolicy = EpilogueSchedule;
  using ElementC = float;
  using ElementD = float;
  using ElementOutput = float;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  using GmemTiledCopyC = void;
  using GmemTiledCopyD = void;
  static constexpr int kOutputAlignment = 1;
  struct ThreadEpilogueOp {
    static constexpr int kCount = 1;
  };
  using Arguments = Params_;
  using Params = Params_;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
};

__device__ __forceinline__ float exponent_scale(const Exponent& e) {
  return (e.scale ? *e.scale : e.value) * 1.4426950408889634f * e.operands;
}

constexpr int kGroupThreads = 128;

struct OfBothGroups {
  static CUTLASS_DEVICE void sync(int id) {
    cutlass::arch::NamedBarrier::sync(2 * kGroupThreads, uint32_t(id));
  }
  static CUTLASS_DEVICE void arrive(int id) {
    cutlass::arch::NamedBarrier::arrive(2 * kGroupThreads, uint32_t(id));
  }
};

// Bounded and unbounded are kernels of their own: in one, the registers of both together spill.
template <class Kind, bool kBounded, bool kOwn>
struct SumsEpilogue : EpilogueBase<SumsArguments> {
  static constexpr int kWarps = Kind::kHeight / kWarpRows;
  static constexpr bool kShared = Kind::kGroups == 1;  // a tile is both warpgroups'
  // By group, by turn: this tile's column sums of each warp are read while the next one's may be
  // written already, never the one after, which a barrier lies before.
  struct SharedStorage {
    float sums[Kind::kGroups][2][kWarps][kWidth];
    float peaks[Kind::kGroups][2][kBounded ? 1 : kWarps][kWidth];
  };
  using TensorStorage = SharedStorage;

  CUTLASS_DEVICE explicit SumsEpilogue(const Params& p) : params(p) {}

  template <class Shape, class Block, class Coord, class Acc, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(Shape shape, Block, Coord coord, Acc& acc, Mma, Residue,
                                 int thread, char* shared) {
    static_assert(cute::size(Acc{}) == 4 * kBlocks, "a warp holds 16 rows of the tile");
    const auto [m, n, k, l] = coord;
    const Place place{int(m) * Kind::kHeight, int(n) * kWidth,  cute::get<0>(shape),
                      cute::get<1>(shape),    params.step,      params.upper};
    if (place.row >= place.rows) return;  // the second tile row of a cluster that has one
    auto& storage = *reinterpret_cast<SharedStorage*>(shared);
    const int group = cutlass::canonical_warp_group_idx() - 1;
    auto& sums = storage.sums[kShared ? 0 : group][turns.buffer()];
    auto& peaks = storage.peaks[kShared ? 0 : group][turns.buffer()];
    if (kShared) turns.begin(group == 0);
    const int warp = thread / kLanes;
    const float a2 = exponent_scale(params.exponent);
    float* row_sum = params.row_sum + int64_t(n) * place.rows;
    float* row_peak = params.row_peak + int64_t(n) * place.rows;
    sums_of_warp<DeviceWarp, kBlocks, kBounded, kOwn>(
        acc, place, warp, Kind::kHeight, a2, params.columns, row_sum, row_peak, params.own,
        sums[warp], peaks[kBounded ? 0 : warp]);
    if (params.columns && (!kShared || group == 1)) {
      cutlass::arch::NamedBarrier::sync(kGroupThreads, uint32_t(kShared ? 0 : group));
      CUTLASS_PRAGMA_UNROLL
      for (int c = thread % kGroupThreads; c < kWidth; c += kGroupThreads) {
        if (place.col + c >= place.cols) continue;
        const int64_t at = int64_t(m) * place.cols + place.col + c;
        const int from = place_of_column(c);
        sum_of_column<kBounded>(&sums[0][from], &peaks[0][from], kWarps, kWidth,
                                params.col_sum + at, params.col_peak + at);
      }
    }
    kShared ? turns.end(group == 0) : void(++turns.tile);
  }

  Params params;
  Turns<OfBothGroups> turns;
};

template <class Kind, class Half, bool kBounded, bool kSplit>
struct WeightsEpilogue : EpilogueBase<WeightsArguments> {
  struct SharedStorage {};
  using TensorStorage = SharedStorage;

  CUTLASS_DEVICE explicit WeightsEpilogue(const Params& p) : params(p) {}

  template <class Shape, class Block, class Coord, class Acc, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(Shape shape, Block, Coord coord, Acc& acc, Mma, Residue,
                                 int thread, char*) {
    const auto [m, n, k, l] = coord;
    const Place place{int(m) * Kind::kHeight, int(n) * kWidth,  cute::get<0>(shape),
                      cute::get<1>(shape),    params.step,      false};
    if (place.row >= place.rows) return;
    const int warp = thread / kLanes;
    const float a2 = exponent_scale(params.exponent);
    const bool leads = cutlass::canonical_warp_group_idx() == 1;
    if (Kind::kGroups == 1) turns.begin(leads);
    weights_of_warp<DeviceWarp, Half, kBlocks, kBounded, kSplit>(
        acc, place, warp, Kind::kHeight, a2, params.factors, params.out, params.pitch,
        params.mirror);
    if (Kind::kGroups == 1) turns.end(leads);
  }

  Params params;
  Turns<OfBothGroups> turns;
};

template <class Element>
constexpr bool kIsFp8 = std::is_same_v<Element, cutlass::float_e4m3_t>;

// Of rows [hi | lo] the products lo hi', hi lo' and hi hi', as one that is three times as deep. What a
// tensor core adds to a sum is cut off behind it, so the small ones come first.
template <class Base>
struct InParts : Base {
  template <class Shape>
  static CUTLASS_HOST_DEVICE auto of_memory(const Shape& shape) {
    const auto [m, n, k, l] = shape;
    return cute::make_shape(m, n, k / 3 * 2, l);
  }
  template <class Shape>
  static typename Base::Params to_underlying_arguments(const Shape& shape,
                                                       const typename Base::Arguments& arguments,
                                                       void* workspace) {
    return Base::to_underlying_arguments(of_memory(shape), arguments, workspace);
  }
  template <class Shape>
  CUTLASS_DEVICE auto load_init(const Shape& shape, const typename Base::Params& params) const {
    return Base::load_init(of_memory(shape), params);
  }
  template <class Tensors, class Block, class Iterator>
  CUTLASS_DEVICE void load(const typename Base::Params& params, typename Base::MainloopPipeline pipeline,
                           typename Base::PipelineState state, const Tensors& tensors,
                           const Block& block, Iterator from, int tiles, int thread, uint32_t rank,
                           typename Base::TensorStorage& shared) {
    const int depth = tiles / 3;
    const auto moved = [](const auto& tensor, int by) {
      using cute::_0;
      return cute::domain_offset(cute::make_coord(_0{}, _0{}, _0{}, by, _0{}), tensor);
    };
    CUTLASS_PRAGMA_NO_UNROLL
    for (int part = 0; part < 3; ++part) {
      const auto both = cute::make_tuple(moved(cute::get<0>(tensors), part == 0 ? depth : 0),
                                         moved(cute::get<1>(tensors), part == 1 ? depth : 0));
      Base::load(params, pipeline, state, both, block, from, depth, thread, rank, shared);
      state.advance(depth);
    }
  }
};

template <class Element, class Kind, class OurEpilogue, bool kSplit>
struct Similarity {
  static constexpr int kAlignment = 16 / sizeof(Element);
  static constexpr int kDepth = 128 / sizeof(Element);  // one row of the swizzled tile
  using Tile = cute::Shape<cute::Int<Kind::kHeight>, cute::Int<kWidth>, cute::Int<kDepth>>;
  using Cluster = cute::Shape<cute::Int<kClusterTiles>, cute::_1, cute::_1>;
  using Schedule =
      std::conditional_t<kIsFp8<Element>, typename Kind::ScheduleFp8, typename Kind::Schedule>;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<OurEpilogue>;
  using OnePart = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor,
      kAlignment, Element, cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(
          sizeof(typename OurEpilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Mainloop = std::conditional_t<kSplit, InParts<OnePart>, OnePart>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, InOrder>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(Kernel::SharedStorageSize <= 227 * 1024, "what a block of sm_90 may use");

  // Empty, or what went wrong. `upper`: only tiles beyond the diagonal.
  static std::string run(const Operands& s, const typename OurEpilogue::Params& epilogue,
                         const Stream& stream, bool upper) {
    const auto* a = static_cast<const Element*>(s.a);
    const auto* b = static_cast<const Element*>(s.b);
    typename Gemm::Arguments args{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {s.rows, s.cols, kSplit ? 3 * s.k : s.k, 1},
        {a, {s.pitch, cute::_1{}, int64_t(0)}, b, {s.pitch, cute::_1{}, int64_t(0)}},
        epilogue,
        {stream.device, stream.multiprocessors}};
    args.scheduler.upper = upper;
    Gemm gemm;
    cutlass::Status status = Gemm::can_implement(args);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(args, nullptr, stream.handle);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream.handle);
    if (status == cutlass::Status::kSuccess) return {};
    const cudaError_t error = cudaGetLastError();
    return std::string(cutlass::cutlassGetStatusString(status)) +
           (error == cudaSuccess ? "" : std::string(", ") + cudaGetErrorString(error));
  }
};

}  // namespace directclr
