// The stages of stages.h on a CPU, for tests: the functions of the kernels, lane by lane, warp by
// warp (shuffles in lock-step) and tile by tile, behind the same binding. Tile products are plain
// loops over the same half-precision operands. Needs nvcc and no GPU.
#include <type_traits>
#include <vector>

#include "order.h"
#include "rows.h"
#include "stages.h"
#include "statistics.h"
#include "tile.h"
#include "turns.h"
#include "typed.h"

#ifdef DIRECTCLR_CHECK_FRAGMENT
#include "similarity.cuh"
#endif

namespace directclr {
namespace {

constexpr int kBlocksOfTile = kTileWidth / 8;
using Values = Lanes<float>[4 * kBlocksOfTile];

float value_of(Operand type, const void* data, int64_t at) {
  switch (type) {
    case Operand::kFp16:
    case Operand::kSplit: return __half2float(static_cast<const __half*>(data)[at]);
    case Operand::kBf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
    default: {
      const auto byte = static_cast<const __nv_fp8_storage_t*>(data)[at];
      return __half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)));
    }
  }
}

int columns_of(const Operands& s) { return s.type == Operand::kSplit ? 2 * s.k : s.k; }

std::vector<float> widened(const Operands& s, const void* data, int rows) {
  const int64_t columns = columns_of(s);
  std::vector<float> x(size_t(rows * columns));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < columns; ++k) {
      x[size_t(i * columns + k)] = value_of(s.type, data, i * s.pitch + k);
    }
  }
  return x;
}

// sum + a . b as a tensor core is said to add: 16 exact products at once, what does not fit behind
// the sum cut off (Fasi, Higham, Mikaitis, Pranesh, PeerJ Computer Science 7, 2021).
float add_products(float sum, const float* a, const float* b, int count) {
  for (int k = 0; k < count; k += 16) {
    double exact = sum;
    for (int i = k; i < k + 16; ++i) exact += double(a[i]) * b[i];
    sum = float(exact);
    if (std::fabs(sum) > std::fabs(exact)) sum = std::nextafter(sum, 0.0f);
  }
  return sum;
}

// Calls f(place, warp, values) for every warp of every tile, values as wgmma leaves them; beyond
// the edge they are what TMA's zeros give. `after(place, m, n)` follows the warps of a tile.
template <class F, class After>
void by_tiles(const Operands& s, int height, int step, bool upper, bool mirror, F f, After after) {
  const std::vector<float> a = widened(s, s.a, s.rows), b = widened(s, s.b, s.cols);
  const int columns = columns_of(s), lo = columns - s.k;
  const TileOrder order(s.rows, s.cols, height, kTileWidth, upper || mirror);
  TileOrder::Walk walk;
  for (int place = 0, clusters = order.clusters(); place < clusters; ++place) {
    const TileOrder::Cluster at = walk.to(order, place);
    for (int block = 0; block < kClusterTiles; ++block) {
      const int m = at.row * kClusterTiles + block, n = at.column;
      if (m * height >= s.rows) continue;
      const Place p{m * height, n * kTileWidth, s.rows, s.cols, step, upper};
      for (int w = 0; w < height / kWarpRows; ++w) {
        Values acc;
        for (int lane = 0; lane < kLanes; ++lane) {
          for (int i = 0; i < 4 * kBlocksOfTile; ++i) {
            const int row = p.row + kWarpRows * w + lane / 4 + 8 * (i / 2 % 2);
            const int col = p.col + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
            acc[i][lane] = 0.0f;
            if (row >= s.rows || col >= s.cols) continue;
            const float *x = &a[size_t(row) * columns], *y = &b[size_t(col) * columns];
            float dot = 0.0f;
            if (lo) dot = add_products(add_products(dot, x + lo, y, s.k), x, y + lo, s.k);
            acc[i][lane] = add_products(dot, x, y, s.k);
          }
        }
        f(p, m, n, w, acc);
      }
      after(p, m, n);
    }
  }
}

float exponent_scale_of(const Exponent& e) {
  return (e.scale ? *e.scale : e.value) * 1.4426950408889634f * e.operands;
}

template <bool kBounded>
void sums_as(const Operands& s, const SumsArguments& a, int height) {
  const int warps = height / kWarpRows;
  std::vector<float> sums(size_t(warps * kTileWidth), NAN), peaks(sums);
  const float a2 = exponent_scale_of(a.exponent);
  by_tiles(
      s, height, a.step, a.upper, false,
      [&](const Place& p, int, int n, int w, Values& acc) {
        sums_of_warp<HostWarp, kBlocksOfTile, kBounded, true>(
            acc, p, w, height, a2, a.columns, a.row_sum + int64_t(n) * s.rows,
            a.row_peak + int64_t(n) * s.rows, a.own, &sums[size_t(w * kTileWidth)],
            &peaks[size_t(w * kTileWidth)]);
      },
      [&](const Place& p, int m, int) {
        for (int c = 0; a.columns && c < kTileWidth && p.col + c < p.cols; ++c) {
          const int64_t at = int64_t(m) * s.cols + p.col + c;
          const size_t from = size_t(place_of_column(c));
          sum_of_column<kBounded>(&sums[from], &peaks[from], warps, kTileWidth,
                                  a.col_sum + at, a.col_peak + at);
        }
      });
}

double by_lanes(double (&lanes)[kLanes]) {  // the order of sum_over_warp
  for (int m = 16; m >= 1; m /= 2) {
    double next[kLanes];
    for (int l = 0; l < kLanes; ++l) next[l] = lanes[l] + lanes[l ^ m];
    for (int l = 0; l < kLanes; ++l) lanes[l] = next[l];
  }
  return lanes[0];
}

template <class T, class Half>
void finish_rows(const Side<T, Half>& v, const FinishArguments& s, float factor) {
  for (int64_t i = 0; i < v.rows; ++i) {
    const float diagonal = diagonal_of(v, s, i);
    double lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = dot_part(v, i, diagonal, factor, l);
    const float dot = float(by_lanes(lanes));
    if (v.dots) v.dots[i] = dot;
    for (int l = 0; v.dr && l < kLanes; ++l) write_gradient(v, s, i, diagonal, factor, dot, l);
  }
}

}  // namespace

std::string normalize(const Layout& layout, const NormalizeArguments& a, const Stream&) {
  return by_types(a.r1.dtype, layout, [&](auto t, auto half) {
    using T = decltype(t);
    using Half = decltype(half);
    const auto x1 = columns<T>(a.r1, a.index, layout.d), x2 = columns<T>(a.r2, a.index, layout.d);
    const auto p1 = packed<Half>(layout, a.z1), p2 = packed<Half>(layout, a.z2);
    for (int64_t j = 0; j < (a.both ? a.r2.rows : a.r1.rows); ++j) {
      const int64_t i = a.both ? j - a.offset : j;
      const bool has1 = i >= 0 && i < a.r1.rows;
      double lanes[3][kLanes], sums[3];
      for (int l = 0; l < kLanes; ++l) {
        double part[3];
        row_sums(x1, x2, i, j, has1, a.both, l, part);
        for (int k = 0; k < 3; ++k) lanes[k][l] = part[k];
      }
      for (int k = 0; k < 3; ++k) sums[k] = by_lanes(lanes[k]);
      const double inverse1 = inverse_norm(sums[0], a.eps), inverse2 = inverse_norm(sums[1], a.eps);
      for (int l = 0; l < kLanes; ++l) {
        if (has1) write_unit_row(x1, p1, i, inverse1, l);
        if (a.both) write_unit_row(x2, p2, j, inverse2, l);
      }
      if (has1) a.rnorm1[i] = float(inverse1);
      if (a.both) a.rnorm2[j] = float(inverse2);
      if (has1 && a.both) a.positives[i] = sums[2] * inverse1 * inverse2;
    }
    return std::string();
  });
}

std::string positives(const Layout& layout, const PositivesArguments& a, const Stream&) {
  return by_half(layout, [&](auto half) {
    using Half = decltype(half);
    const auto p1 = packed<Half>(layout, a.z1), p2 = packed<Half>(layout, a.z2);
    for (int64_t i = 0; i < a.n; ++i) {
      double lanes[kLanes];
      for (int l = 0; l < kLanes; ++l) lanes[l] = cosine_part(p1, p2, i, i + a.offset, l);
      a.positives[i] = by_lanes(lanes);
    }
    return std::string();
  });
}

std::string sums(const Operands& s, const SumsArguments& a, const Stream&) {
  const int height = tile_height(s.pingpong);
  a.bounded ? sums_as<true>(s, a, height) : sums_as<false>(s, a, height);
  return {};
}

std::string weights(const Operands& s, const WeightsArguments& a, const Stream&) {
  const int height = tile_height(s.pingpong);
  const float a2 = exponent_scale_of(a.exponent);
  const auto run = [&](auto half, auto bounded, auto split) {
    by_tiles(
        s, height, a.step, false, a.mirror,
        [&](const Place& p, int, int, int w, Values& acc) {
          weights_of_warp<HostWarp, decltype(half), kBlocksOfTile, decltype(bounded)::value,
                          decltype(split)::value>(acc, p, w, height, a2, a.factors, a.out, a.pitch,
                                                  a.mirror);
        },
        [](const Place&, int, int) {});
  };
  const auto with = [&](auto half, auto split) {
    a.bounded ? run(half, std::true_type{}, split) : run(half, std::false_type{}, split);
  };
  if (s.type == Operand::kSplit) {
    with(Fp16{}, std::true_type{});
  } else {
    s.type == Operand::kBf16 ? with(Bf16{}, std::false_type{}) : with(Fp16{}, std::false_type{});
  }
  return {};
}

int tile_height(bool pingpong) { return pingpong ? 64 : 128; }

static double log_of_parts(const Parts& p, int64_t at, int shares) {  // the order of rows.cu
  float high = -INFINITY;
  for (int s = 0; p.peaks && s < shares; ++s) high = fmaxf(high, peak_of_share(p, at, s, shares));
  const double top = p.peaks ? top_of(high) : 0.0;
  double sum = 0.0;
  for (int s = 0; s < shares; ++s) sum += sum_of_share(p, at, s, shares, top);
  return log_of_sum(sum, top);
}

std::string fold(const FoldArguments& a, const Stream&) {
  for (int64_t at = 0; at < a.n; ++at) {
    fold_one(a, at, log_of_parts(parts_of(a), at, shares_of(a.lines)));
  }
  return {};
}

int64_t combine_blocks(int64_t n) { return n; }

std::string combine(const CombineArguments& a, const Stream&) {
  const int shares = shares_of(a);
  for (int64_t j = 0; j < a.n; ++j) {
    const int64_t i = j - a.offset;
    double rest_row = 0.0, rest_col = 0.0;
    if (i >= 0 && i < a.m) {
      rest_row = a.rest_row ? a.rest_row[i] : log_of_parts(row_parts(a), i, shares);
    }
    if (a.symmetric) rest_col = a.rest_col ? a.rest_col[j] : log_of_parts(col_parts(a), j, shares);
    const double per_row = combine_one(a, j, rest_row, rest_col);
    if (!a.loss_by_row) a.loss_by_block[j] = per_row;
  }
  return {};
}

std::string total(const TotalArguments& a, const Stream&) {
  double sum = 0.0;
  for (int64_t at = 0; at < a.n; ++at) sum += a.parts[at];
  *a.loss = float(sum / a.factor);
  return {};
}

std::string factors(const FactorsArguments& a, const Stream&) {
  for (int64_t j = 0; j < a.n; ++j) factors_one(a, j);
  return {};
}

std::string finish(const Layout& layout, const FinishSide& first, const FinishSide* second,
                   const FinishArguments& a, const Stream&) {
  return by_types(a.dtype, layout, [&](auto t, auto half) {
    using T = decltype(t);
    using Half = decltype(half);
    float factor = a.factor;
    if (a.diagonal) factor *= *a.upstream * (a.scale ? *a.scale : a.scale_value);
    finish_rows(side<T, Half>(layout, first), a, factor);
    if (second) finish_rows(side<T, Half>(layout, *second), a, factor);
    return std::string();
  });
}

std::string add_positives(const Layout& layout, const AddPositivesArguments& a, const Stream&) {
  return by_half(layout, [&](auto half) {
    using Half = decltype(half);
    const auto z = packed<Half>(layout, a.other);
    for (int64_t i = 0; i < a.n; ++i) {
      const int64_t at = i + a.to_diagonal, from = i + a.to_other;
      const bool there = at >= 0 && at < a.diagonals && from >= 0 && from < a.others;
      for (int l = 0; l < kLanes; ++l) {
        add_positive(a.dz, z, i, a.to_other, there ? a.diagonal[at] : 0.0f, *a.factor, l);
      }
    }
    return std::string();
  });
}

}  // namespace directclr

using namespace directclr;

// The tiles of a launch in their order: how many, of which the first `room` as (row, column) go to
// `tiles`. With an odd number of tile rows the last ones' clusters have a tile beyond the end.
extern "C" int64_t host_tiles(int m, int n, int height, bool upper, int32_t* tiles, int64_t room) {
  const TileOrder order(m, n, height, kTileWidth, upper);
  const int clusters = order.clusters();
  TileOrder::Walk walk;
  for (int place = 0; place < clusters && place < room / kClusterTiles; ++place) {
    const TileOrder::Cluster at = walk.to(order, place);
    for (int block = 0; block < kClusterTiles; ++block) {
      *tiles++ = at.row * kClusterTiles + block;
      *tiles++ = at.column;
    }
  }
  return int64_t(clusters) * kClusterTiles;
}

// What a warpgroup does at the barriers of `tiles` tiles: begin and end of each, as the barrier's id,
// negative where it arrives only, 0 where nothing is done.
extern "C" void host_turns(bool leads, int tiles, int* barriers) {
  static thread_local int last;
  struct Noting {
    static void sync(int id) { last = id; }
    static void arrive(int id) { last = -id; }
  };
  Turns<Noting> turns;
  for (int tile = 0; tile < tiles; ++tile) {
    last = 0, turns.begin(leads), *barriers++ = last;
    last = 0, turns.end(leads), *barriers++ = last;
  }
}

// Where a packed row and a stored weight lie, in elements, far beyond 2^31 of them.
extern "C" int64_t host_row_offset(int64_t row, int64_t stride) {
  const Packed<Fp16> z{nullptr, stride, 64, false, 1.0f};
  return int64_t(reinterpret_cast<uintptr_t>(z.row(row)) / 2);
}

#ifdef DIRECTCLR_CHECK_FRAGMENT
// How many values of all threads' accumulators are not where tile.h takes them to be, by CuTe's
// own description of the main loop.
extern "C" int host_fragment_mismatches() {
  int wrong = 0;
  const auto count = [&](auto mma, auto kind) {
    using Kind = decltype(kind);
    const auto coordinates = cute::make_identity_tensor(
        cute::make_shape(cute::Int<Kind::kHeight>{}, cute::Int<kWidth>{}));
    for (int thread = 0; thread < int(cute::size(mma)); ++thread) {
      const auto mine = mma.get_thread_slice(thread).partition_C(coordinates);
      if (int(cute::size(mine)) != 4 * kBlocks) ++wrong;
      for (int i = 0; i < 4 * kBlocks; ++i) {
        const int lane = thread % kLanes;
        const int row = kWarpRows * (thread / kLanes) + lane / 4 + 8 * (i / 2 % 2);
        const int col = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        wrong += cute::get<0>(mine(i)) != row || cute::get<1>(mine(i)) != col;
      }
    }
  };
  using H = cutlass::half_t;
  using E = cutlass::float_e4m3_t;
  using Shared = SumsEpilogue<Cooperative, true, false>;
  using Each = SumsEpilogue<Pingpong, true, false>;
  count(typename Similarity<H, Cooperative, Shared, false>::Mainloop::TiledMma{}, Cooperative{});
  count(typename Similarity<H, Cooperative, Shared, true>::Mainloop::TiledMma{}, Cooperative{});
  count(typename Similarity<H, Pingpong, Each, false>::Mainloop::TiledMma{}, Pingpong{});
  count(typename Similarity<E, Cooperative, Shared, false>::Mainloop::TiledMma{}, Cooperative{});
  return wrong;
}
#endif
