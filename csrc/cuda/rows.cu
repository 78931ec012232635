// The O(N d) and O(N) stages as kernels: one warp a row where there are columns, one lane a candidate
// where there are only statistics, and a share of the partial sums a warp. Every sum has a fixed
// order.
#include "rows.h"
#include "stages.h"
#include "statistics.h"
#include "typed.h"

namespace directclr {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsOfBlock = kThreads / kLanes;
constexpr int kLine = kLanes;  // of `fold` and `combine`: a warp's columns, one share of lines a warp

template <class T>
__device__ T sum_over_warp(T x) {
  DIRECTCLR_UNROLL
  for (int m = 16; m >= 1; m /= 2) x += __shfl_xor_sync(0xffffffffu, x, m);
  return x;
}

__device__ int64_t row_of_warp() {
  return int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / kLanes;
}

unsigned blocks(int64_t n, int step) { return unsigned((n + step - 1) / step); }

std::string launched(const char* name, int64_t rows) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return std::string(name) + " of " + std::to_string(rows) + " rows: " + cudaGetErrorString(error);
}

// ------------------------------------------------------------------------------- normalize

template <class T, class Half>
__global__ void __launch_bounds__(kThreads)
    normalize_kernel(Columns<const T> r1, Columns<const T> r2, Packed<Half> z1, Packed<Half> z2,
                     float* rnorm1, float* rnorm2, double* positives, int64_t n1, int64_t n2,
                     int64_t offset, double eps, bool both) {
  const int64_t j = row_of_warp(), i = both ? j - offset : j;
  const int lane = threadIdx.x % kLanes;
  const bool has1 = i >= 0 && i < n1, has2 = both && j < n2;
  if (!has1 && !has2) return;
  double sums[3];
  row_sums(r1, r2, i, j, has1, has2, lane, sums);
  DIRECTCLR_UNROLL
  for (double& s : sums) s = sum_over_warp(s);
  const double inverse1 = inverse_norm(sums[0], eps), inverse2 = inverse_norm(sums[1], eps);
  if (has1) {
    write_unit_row(r1, z1, i, inverse1, lane);
    if (lane == 0) rnorm1[i] = float(inverse1);
  }
  if (has2) {
    write_unit_row(r2, z2, j, inverse2, lane);
    if (lane == 0) rnorm2[j] = float(inverse2);
  }
  if (has1 && has2 && lane == 0) positives[i] = sums[2] * inverse1 * inverse2;
}

template <class Half>
__global__ void __launch_bounds__(kThreads)
    positives_kernel(Packed<Half> z1, Packed<Half> z2, double* positives, int64_t n,
                     int64_t offset) {
  const int64_t i = row_of_warp();
  const int lane = threadIdx.x % kLanes;
  if (i >= n) return;
  const double sum = sum_over_warp(cosine_part(z1, z2, i, i + offset, lane));
  if (lane == 0) positives[i] = sum;
}

// ------------------------------------------------------------------------------- statistics

// Of the block's kLine columns, one a lane, the log-sums of their lines, of which every warp adds a
// share; to be used by the first warp. `there`: whether the lane's column exists.
__device__ double log_of_parts(const Parts& p, int64_t at, bool there) {
  __shared__ float highs[kMostShares][kLine];
  __shared__ double sums[kMostShares][kLine];
  const int lane = threadIdx.x, share = threadIdx.y, shares = blockDim.y;
  double top = 0.0;
  if (p.peaks) {
    highs[share][lane] = there ? peak_of_share(p, at, share, shares) : -INFINITY;
    __syncthreads();
    float high = -INFINITY;
    for (int s = 0; s < shares; ++s) high = fmaxf(high, highs[s][lane]);
    top = top_of(high);
  }
  sums[share][lane] = there ? sum_of_share(p, at, share, shares, top) : 0.0;
  __syncthreads();
  double sum = 0.0;
  for (int s = 0; share == 0 && s < shares; ++s) sum += sums[s][lane];
  __syncthreads();  // the next call writes there
  return log_of_sum(sum, top);
}

__global__ void __launch_bounds__(kLine* kMostShares, 1) fold_kernel(FoldArguments a) {
  const int64_t at = int64_t(blockIdx.x) * kLine + threadIdx.x;
  const double log_sum = log_of_parts(parts_of(a), at, at < a.n);
  if (threadIdx.y == 0 && at < a.n) fold_one(a, at, log_sum);
}

__global__ void __launch_bounds__(kLine* kMostShares, 1) combine_kernel(CombineArguments a) {
  const int64_t j = int64_t(blockIdx.x) * kLine + threadIdx.x, i = j - a.offset;
  const bool has_row = i >= 0 && i < a.m, has_col = a.symmetric && j < a.n;
  double rest_row = 0.0, rest_col = 0.0;
  if (!a.rest_row) rest_row = log_of_parts(row_parts(a), i, has_row);
  if (a.symmetric && !a.rest_col) rest_col = log_of_parts(col_parts(a), j, has_col);
  if (threadIdx.y != 0) return;
  if (a.rest_row && has_row) rest_row = a.rest_row[i];
  if (a.rest_col && has_col) rest_col = a.rest_col[j];
  const double per_row = combine_one(a, j, rest_row, rest_col);
  if (a.loss_by_row) return;
  const double sum = sum_over_warp(per_row);
  if (threadIdx.x == 0) a.loss_by_block[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) total_kernel(TotalArguments a) {
  double sum = 0.0;
  for (int64_t at = threadIdx.x; at < a.n; at += kThreads) sum += a.parts[at];
  __shared__ double of_warps[kThreads / kLanes];
  sum = sum_over_warp(sum);
  if (threadIdx.x % kLanes == 0) of_warps[threadIdx.x / kLanes] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0.0;
  for (double w : of_warps) total += w;
  *a.loss = float(total / a.factor);
}

__global__ void __launch_bounds__(kThreads) factors_kernel(FactorsArguments a) {
  factors_one(a, int64_t(blockIdx.x) * kThreads + threadIdx.x);
}

// ------------------------------------------------------------------------------- finish

template <class T, class Half>
__device__ void finish_row(const Side<T, Half>& v, const FinishArguments& a, float factor) {
  const int64_t i = row_of_warp();
  const int lane = threadIdx.x % kLanes;
  if (i >= v.rows) return;
  const float diagonal = diagonal_of(v, a, i);
  const float dot = sum_over_warp(dot_part(v, i, diagonal, factor, lane));
  if (v.dots && lane == 0) v.dots[i] = dot;
  if (v.dr) write_gradient(v, a, i, diagonal, factor, dot, lane);
}

template <class T, class Half>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Side<T, Half> first, Side<T, Half> second, FinishArguments a) {
  float factor = a.factor;
  if (a.diagonal) factor *= *a.upstream * (a.scale ? *a.scale : a.scale_value);
  finish_row(blockIdx.y == 0 ? first : second, a, factor);
}

template <class Half>
__global__ void __launch_bounds__(kThreads)
    add_positives_kernel(Packed<Half> other, AddPositivesArguments a) {
  const int64_t i = row_of_warp();
  if (i >= a.n) return;
  const int64_t at = i + a.to_diagonal, from = i + a.to_other;
  const bool there = at >= 0 && at < a.diagonals && from >= 0 && from < a.others;
  add_positive(a.dz, other, i, a.to_other, there ? a.diagonal[at] : 0.0f, *a.factor,
               int(threadIdx.x % kLanes));
}

}  // namespace

std::string normalize(const Layout& layout, const NormalizeArguments& a, const Stream& stream) {
  return by_types(a.r1.dtype, layout, [&](auto t, auto half) {
    using T = decltype(t);
    using Half = decltype(half);
    // Anchors are rows of view 2 as well, moved by `offset`.
    const int64_t rows = a.both ? a.r2.rows : a.r1.rows;
    normalize_kernel<T, Half><<<blocks(rows, kRowsOfBlock), kThreads, 0, stream.handle>>>(
        columns<T>(a.r1, a.index, layout.d), columns<T>(a.r2, a.index, layout.d),
        packed<Half>(layout, a.z1), packed<Half>(layout, a.z2), a.rnorm1, a.rnorm2, a.positives,
        a.r1.rows, a.r2.rows, a.offset, a.eps, a.both);
    return launched("normalize", rows);
  });
}

std::string positives(const Layout& layout, const PositivesArguments& a, const Stream& stream) {
  return by_half(layout, [&](auto half) {
    using Half = decltype(half);
    positives_kernel<Half><<<blocks(a.n, kRowsOfBlock), kThreads, 0, stream.handle>>>(
        packed<Half>(layout, a.z1), packed<Half>(layout, a.z2), a.positives, a.n, a.offset);
    return launched("positives", a.n);
  });
}

std::string fold(const FoldArguments& a, const Stream& stream) {
  fold_kernel<<<blocks(a.n, kLine), dim3(kLine, shares_of(a.lines)), 0, stream.handle>>>(a);
  return launched("fold", a.n);
}

int64_t combine_blocks(int64_t n) { return blocks(n, kLine); }

std::string combine(const CombineArguments& a, const Stream& stream) {
  combine_kernel<<<blocks(a.n, kLine), dim3(kLine, shares_of(a)), 0, stream.handle>>>(a);
  return launched("combine", a.n);
}

std::string total(const TotalArguments& a, const Stream& stream) {
  total_kernel<<<1, kThreads, 0, stream.handle>>>(a);
  return launched("total", a.n);
}

std::string factors(const FactorsArguments& a, const Stream& stream) {
  factors_kernel<<<blocks(a.n, kThreads), kThreads, 0, stream.handle>>>(a);
  return launched("factors", a.n);
}

std::string finish(const Layout& layout, const FinishSide& first, const FinishSide* second,
                   const FinishArguments& a, const Stream& stream) {
  return by_types(a.dtype, layout, [&](auto t, auto half) {
    using T = decltype(t);
    using Half = decltype(half);
    const FinishSide& other = second ? *second : first;
    const int64_t rows = first.rows > other.rows ? first.rows : other.rows;
    const dim3 grid(blocks(rows, kRowsOfBlock), second ? 2 : 1);
    finish_kernel<T, Half><<<grid, kThreads, 0, stream.handle>>>(
        side<T, Half>(layout, first), side<T, Half>(layout, other), a);
    return launched("finish", rows);
  });
}

std::string add_positives(const Layout& layout, const AddPositivesArguments& a,
                          const Stream& stream) {
  return by_half(layout, [&](auto half) {
    using Half = decltype(half);
    add_positives_kernel<Half><<<blocks(a.n, kRowsOfBlock), kThreads, 0, stream.handle>>>(
        packed<Half>(layout, a.other), a);
    return launched("add_positives", a.n);
  });
}

}  // namespace directclr
