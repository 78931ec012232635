#include "stages.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../common/threads.h"
#include "isa.h"

namespace directclr {
namespace {

constexpr const char* kNoMemory = "out of memory for the scratch of the loss";
constexpr double kLog2e = 1.4426950408889634;
// Below this many multiply-adds per thread (100 us) another thread costs more than it brings; an
// element read or written from memory counts as kElementWork of them.
constexpr double kWorkPerThread = 12e6;
constexpr double kElementWork = 16;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(
            std::aligned_alloc(64, (size_t(count) * sizeof(T) + 63) / 64 * 64 + 64))) {}
  explicit operator bool() const { return data_ != nullptr; }
  T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T, Free> data_;
};

// Runs on one thread if the others cannot be started.
template <class Body>
void run(int threads, const Body& body) {
  if (!run_team(threads, body)) run_team(1, body);
}

int team_size(int threads, double work) {
  if (threads < 0) return -threads;
  const double most = 1.0 + work / kWorkPerThread;
  return std::max(1, most < double(threads) ? int(most) : threads);
}

// Where part t of `parts` begins, on a multiple of `unit`.
int64_t part(int64_t n, int64_t unit, int t, int parts) {
  const int64_t units = (n + unit - 1) / unit;
  return std::min(n, units * t / parts * unit);
}

// The same where row i costs n - i.
int64_t triangle_part(int64_t n, int64_t unit, int t, int parts) {
  if (t == parts) return n;
  const double row = double(n) * (1.0 - std::sqrt(1.0 - double(t) / parts));
  return std::min(n, int64_t(row / double(unit) + 0.5) * unit);
}

// Work is cut by its size, into more parts than most callers have threads: who is held up does
// less, and the result does not depend on the number of threads while that is not the larger.
int part_count(int64_t rows, int threads) {
  return std::max(threads, int(std::clamp<int64_t>(rows / 1024, 1, 8)));
}

// Hands out the parts of one stage, in order.
struct Schedule {
  explicit Schedule(int count) : parts(count), turns(2 * size_t(count)) {
    for (auto& t : turns) t.store(0, std::memory_order_relaxed);
  }
  int take() { return next.fetch_add(1, std::memory_order_relaxed); }

  const int parts;
  std::atomic<int> next{0};
  std::vector<std::atomic<int>> turns;  // rounds that each part of the rows and columns is through
};

Pair make_pair(const SimilarityArgs& s) {
  const double scale = s.scale * kLog2e;
  Pair p;
  p.z1 = s.z1;
  p.z2 = s.z2;
  p.m = s.m;
  p.n = s.n;
  p.d = s.d;
  p.pitch = pitch(s.d);
  p.row_offset = s.row_offset;
  p.upper = s.upper;
  p.bf16 = s.bf16 && kernels().has_bf16;
  p.scale_hi = float(scale);
  p.scale_lo = float(scale - double(p.scale_hi));
  p.keep = static_cast<float*>(s.workspace);
  p.keep_panels = 0;
  if (s.workspace) {
    const Kernels& k = kernels();
    const int64_t panels = (s.m + k.panel - 1) / k.panel;
    p.keep_panels = std::min(panels, s.workspace_bytes / 4 / k.keep_panel_floats(s.n));
  }
  return p;
}

bool is_bounded(const SimilarityArgs& s) {
  return s.scale * kLog2e + std::log2(double(std::max(s.m, s.n))) < 125.0;
}

void merge(double& sum, double& ref, double s, double r) {
  if (s == 0.0) return;
  if (sum == 0.0) {
    sum = s;
    ref = r;
    return;
  }
  const double top = std::max(ref, r);
  sum = sum * std::exp2(ref - top) + s * std::exp2(r - top);
  ref = top;
}

// One thread's columns of the parts' sums, added up in order.
void merge_columns(const double* partial, int64_t n, int parts, int t, int team, Accumulator to) {
  const int64_t end = part(n, 16, t + 1, team);
  for (int64_t j = part(n, 16, t, team); j < end; ++j) {
    for (int p = 0; p < parts; ++p) {
      const double* sums = partial + 2 * p * n;
      merge(to.sum[j], to.ref[j], sums[j], sums[n + j]);
    }
  }
}

void finalize_range(Accumulator rest, const float* pos, int64_t begin, int64_t end, double scale,
                    float* lse, float* nll) {
  for (int64_t i = begin; i < end; ++i) {
    const double log_rest = (std::log2(rest.sum[i]) + rest.ref[i]) / kLog2e;
    if (!pos) {
      lse[i] = float(log_rest);
      continue;
    }
    const double logit = scale * double(pos[i]);
    const double x = log_rest - logit;
    const double y = x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
    lse[i] = float(logit + y);
    if (nll) nll[i] = float(y);
  }
}

int64_t row_scratch_floats(int64_t d) { return pitch(d) + 64; }

// One thread's part of normalising a view.
void normalize_part(const View& v, int64_t d, double eps, int t, int parts, float* scratch) {
  const Normalize args{v.x, d, pitch(d), eps, v.z, v.rnorm};
  kernels().normalize(args, part(v.rows, 16, t, parts), part(v.rows, 16, t + 1, parts), scratch);
}

// One thread's share of the rows of S. The column sums of part t go to partial[t]: sums, then refs.
void sums_part(const Sums& args, Schedule& schedule, double* partial, void* scratch) {
  const Kernels& k = kernels();
  const Pair& p = args.pair;
  const int parts = schedule.parts;
  const auto bound = [&](int i) {
    return p.upper ? triangle_part(p.m, k.panel, i, parts) : part(p.m, k.panel, i, parts);
  };
  for (int t; (t = schedule.take()) < parts;) {
    double* cols = partial + 2 * t * p.n;
    std::fill(cols, cols + 2 * p.n, 0.0);
    k.sums(args, bound(t), bound(t + 1), 0, p.n, cols, cols + p.n, scratch);
  }
}

// Row and column weights as the kernels take them: w 2^(a' s - ref), the fraction of a log2 in w.
struct Prepared {
  float* weight;
  float* ref;
};

void prepare(const float* weight, const float* lse, double scale, int64_t begin, int64_t end,
             Prepared to) {
  for (int64_t i = begin; i < end; ++i) {
    double w = weight ? scale * double(weight[i]) : 0.0, ref = 0.0;
    if (w != 0.0) {
      const double l = double(lse[i]) * kLog2e;
      ref = std::ceil(l);
      if (std::isfinite(l)) {
        w *= std::exp2(ref - l);
      } else {
        w = std::nan("");
        ref = 0.0;
      }
    }
    to.weight[i] = float(w);
    to.ref[i] = float(ref);
  }
}

void diagonal(const WeightArgs& w, double scale, int64_t offset, int64_t begin, int64_t end,
              float* diag) {
  for (int64_t i = begin; i < end; ++i) {
    double g = 0.0;
    if (w.row_weight) g += double(w.row_weight[i]) * std::expm1(-double(w.nll_row[i]));
    if (w.col_weight) g += double(w.col_weight[offset + i]) * std::expm1(-double(w.nll_col[i]));
    diag[i] = float(scale * g);
  }
}

// One thread's share of both products. Parts of the rows meet parts of the columns in rounds, every
// part once per round; a block waits only for the earlier blocks of its own two parts. So no two
// threads add to the same rows of dz1 or dz2 at once, and each row's additions come in an order
// that the number of parts fixes, whoever does them.
void products_part(const Products& args, Schedule& schedule, void* scratch) {
  const Kernels& k = kernels();
  const Pair& p = args.pair;
  const int parts = schedule.parts;
  const auto block = [&](int a, int b, int round) {
    // Upper: one dz for both sides, one row of turns.
    auto& turn_a = schedule.turns[size_t(a)];
    auto& turn_b = schedule.turns[size_t(p.upper ? b : parts + b)];
    wait_until([&] { return turn_a.load(std::memory_order_acquire) >= round; });
    wait_until([&] { return turn_b.load(std::memory_order_acquire) >= round; });
    const int64_t unit = p.upper ? k.tile : k.panel;
    const int64_t i0 = part(p.m, unit, a, parts), i1 = part(p.m, unit, a + 1, parts);
    const int64_t j0 = part(p.n, k.tile, b, parts), j1 = part(p.n, k.tile, b + 1, parts);
    if (i0 < i1 && j0 < j1) k.products(args, i0, i1, j0, j1, scratch);
    turn_a.store(round + 1, std::memory_order_release);
    turn_b.store(round + 1, std::memory_order_release);
  };
  if (!p.upper) {
    for (int task; (task = schedule.take()) < parts * parts;) {
      const int round = task / parts, a = task % parts;
      block(a, (a + round) % parts, round);
    }
    return;
  }
  // A round-robin tournament of an even number of parts, then each part with itself.
  const int ring = parts - 1, games = parts / 2;
  for (int task; (task = schedule.take()) < ring * games + parts;) {
    if (task >= ring * games) {
      const int a = task - ring * games;
      block(a, a, ring);
    } else {
      const int round = task / games, game = task % games;
      const int a = game ? (round + game) % ring : ring;
      const int b = game ? (round - game + ring) % ring : round;
      block(std::min(a, b), std::max(a, b), round);
    }
  }
}

struct FinishPart {
  const float* z;
  const float* dz;
  const float* rnorm;
  int64_t rows, d;
  double eps;
  Gradient grad;
};

void finish_part(const FinishPart& f, double* dots, int t, int parts, float* scratch) {
  const Finish args{f.z,
                    f.dz,
                    f.rnorm,
                    f.d,
                    pitch(f.d),
                    f.grad.width,
                    float(1.0 / f.eps),
                    f.grad.data,
                    f.grad.dtype,
                    f.grad.row_stride,
                    f.grad.col_stride,
                    f.grad.cols,
                    f.grad.fill};
  kernels().finish(args, part(f.rows, 16, t, parts), part(f.rows, 16, t + 1, parts), dots, scratch);
}

double total(const double* x, int64_t n) {
  double s = 0.0;
  for (int64_t i = 0; i < n; ++i) s += x[i];
  return s;
}

int64_t thread_scratch(int64_t m, int64_t n, int64_t d) {
  const int64_t bytes = kernels().scratch_bytes(m, n, pitch(d)) + 4 * row_scratch_floats(d);
  return (bytes + 4095) / 4096 * 4096;
}

}  // namespace

int64_t workspace_bytes(int64_t m, int64_t n) {
  const Kernels& k = kernels();
  return (m + k.panel - 1) / k.panel * k.keep_panel_floats(n) * 4;
}

int64_t scratch_bytes(int64_t m, int64_t n, int64_t d, int threads) {
  threads = std::abs(threads);
  const int64_t per_thread = thread_scratch(m, n, d);
  const int64_t fwd = threads * per_thread + part_count(m, threads) * 16 * n + 16 * (m + n);
  const int64_t bwd = threads * per_thread + 8 * (m + n) + 4 * m + 8 * (m + n);
  return std::max(fwd, bwd);
}

std::string normalize(const View& view, int64_t d, double eps, int threads) {
  threads = team_size(threads, kElementWork * double(view.rows) * double(d));
  Buffer<float> scratch(threads * row_scratch_floats(d));
  if (!scratch) return kNoMemory;
  run(threads, [&](int t, Team& team) {
    normalize_part(view, d, eps, t, team.size(), scratch.get() + t * row_scratch_floats(d));
  });
  return "";
}

std::string positives(const float* z1, const float* z2, int64_t m, int64_t d, int64_t row_offset,
                      float* pos, int threads) {
  const Positives args{z1, z2, d, pitch(d), row_offset, pos};
  threads = team_size(threads, kElementWork * double(m) * double(d));
  run(threads, [&](int t, Team& team) {
    kernels().positives(args, part(m, 16, t, team.size()), part(m, 16, t + 1, team.size()));
  });
  return "";
}

std::string sums(const SimilarityArgs& s, Accumulator rows, Accumulator cols, int threads) {
  threads = team_size(threads, double(s.m) * double(s.n) * double(s.d));
  const Sums args{make_pair(s), is_bounded(s), rows.sum, rows.ref};
  const int64_t bytes = thread_scratch(s.m, s.n, s.d);
  Schedule schedule(part_count(s.m, threads));
  Buffer<char> scratch(threads * bytes);
  Buffer<double> partial(2 * schedule.parts * s.n);
  if (!scratch || !partial) return kNoMemory;
  run(threads, [&](int t, Team& team) {
    sums_part(args, schedule, partial.get(), scratch.get() + t * bytes);
    team.barrier();
    if (cols.sum) merge_columns(partial.get(), s.n, schedule.parts, t, team.size(), cols);
  });
  return "";
}

std::string finalize(Accumulator rest, const float* pos, int64_t count, double scale, float* lse,
                     float* nll) {
  finalize_range(rest, pos, 0, count, scale, lse, nll);
  return "";
}

std::string products(const SimilarityArgs& s, const WeightArgs& w, float* dz1, float* dz2,
                     int threads) {
  threads = team_size(threads, 3.0 * double(s.m) * double(s.n) * double(s.d));
  const int64_t bytes = thread_scratch(s.m, s.n, s.d);
  Buffer<char> scratch(threads * bytes);
  Buffer<float> prepared(3 * s.m + 2 * s.n);
  if (!scratch || !prepared) return kNoMemory;
  float* p = prepared.get();
  const Prepared row{p, p + s.m}, col{p + 2 * s.m, p + 2 * s.m + s.n};
  float* diag = w.nll_row || w.nll_col ? p + 2 * s.m + 2 * s.n : nullptr;
  const Products args{make_pair(s), row.weight, row.ref, col.weight, col.ref, diag, dz1, dz2};
  const int parts_wanted = part_count(std::min(s.m, s.n), threads);
  Schedule schedule(s.upper && parts_wanted > 1 ? (parts_wanted + 1) / 2 * 2 : parts_wanted);
  run(threads, [&](int t, Team& team) {
    const int parts = team.size();
    const int64_t i0 = part(s.m, 16, t, parts), i1 = part(s.m, 16, t + 1, parts);
    prepare(w.row_weight, w.row_lse, s.scale, i0, i1, row);
    prepare(w.col_weight, w.col_lse, s.scale, part(s.n, 16, t, parts), part(s.n, 16, t + 1, parts),
            col);
    if (diag) diagonal(w, s.scale, s.row_offset, i0, i1, diag);
    team.barrier();
    products_part(args, schedule, scratch.get() + t * bytes);
  });
  return "";
}

std::string finish(const float* z, const float* dz, const float* rnorm, int64_t rows, int64_t d,
                   double eps, const Gradient& grad, double* dots, int threads) {
  threads = team_size(threads, kElementWork * double(rows) * double(d));
  Buffer<float> scratch(threads * row_scratch_floats(d));
  Buffer<double> row_dots(rows);
  if (!scratch || !row_dots) return kNoMemory;
  const FinishPart f{z, dz, rnorm, rows, d, eps, grad};
  run(threads, [&](int t, Team& team) {
    finish_part(f, row_dots.get(), t, team.size(), scratch.get() + t * row_scratch_floats(d));
  });
  *dots = total(row_dots.get(), rows);
  return "";
}

std::string forward(const ForwardArgs& a, int threads) {
  const int64_t m = a.view1.rows, n = a.view2.rows, d = a.d;
  threads = team_size(threads, double(m) * double(n) * double(d));
  const SimilarityArgs s{a.view1.z, a.view2.z, m,     n,      d,           a.row_offset,
                         a.scale,   false,     a.bf16, a.workspace, a.workspace_bytes};
  const int64_t bytes = thread_scratch(m, n, d);
  Buffer<char> scratch(threads * bytes);
  Schedule schedule(part_count(m, threads));
  Buffer<double> partial(2 * (schedule.parts * n + m + n));
  if (!scratch || !partial) return kNoMemory;
  double* row_acc = partial.get() + 2 * schedule.parts * n;
  const Accumulator rows{row_acc, row_acc + m}, cols{row_acc + 2 * m, row_acc + 2 * m + n};
  const Sums args{make_pair(s), is_bounded(s), rows.sum, rows.ref};
  const Positives pos_args{a.view1.z, a.view2.z, d, pitch(d), a.row_offset, a.pos};
  run(threads, [&](int t, Team& team) {
    const int parts = team.size();
    char* mine = scratch.get() + t * bytes;
    normalize_part(a.view1, d, a.eps, t, parts, reinterpret_cast<float*>(mine));
    normalize_part(a.view2, d, a.eps, t, parts, reinterpret_cast<float*>(mine));
    if (t == 0) std::fill(row_acc, row_acc + 2 * (m + n), 0.0);
    team.barrier();
    kernels().positives(pos_args, part(m, 16, t, parts), part(m, 16, t + 1, parts));
    sums_part(args, schedule, partial.get(), mine);
    team.barrier();
    const int64_t i0 = part(m, 16, t, parts), i1 = part(m, 16, t + 1, parts);
    finalize_range(rows, a.pos, i0, i1, a.scale, a.row_lse, a.nll_row);
    if (!a.col_lse) return;
    const int64_t j0 = part(n, 16, t, parts), j1 = part(n, 16, t + 1, parts);
    merge_columns(partial.get(), n, schedule.parts, t, parts, cols);
    // Columns before, with and after the positives.
    const int64_t o = a.row_offset;
    const Accumulator own{cols.sum + o, cols.ref + o};
    finalize_range(cols, nullptr, j0, std::min(j1, o), a.scale, a.col_lse, nullptr);
    finalize_range(own, a.pos, std::max<int64_t>(j0 - o, 0), std::min(j1 - o, m), a.scale,
                   a.col_lse + o, a.nll_col);
    finalize_range(cols, nullptr, std::max(j0, o + m), j1, a.scale, a.col_lse, nullptr);
  });
  return "";
}

std::string backward(const BackwardArgs& a, int threads) {
  const SimilarityArgs& s = a.pair;
  const WeightArgs& w = a.weights;
  const int64_t m = s.m, n = s.n, d = s.d;
  threads = team_size(threads, 3.0 * double(m) * double(n) * double(d));
  const int64_t bytes = thread_scratch(m, n, d);
  Buffer<char> scratch(threads * bytes);
  Buffer<float> prepared(3 * m + 2 * n);
  Buffer<double> row_dots(m + n);
  if (!scratch || !prepared || !row_dots) return kNoMemory;
  float* p = prepared.get();
  const Prepared row{p, p + m}, col{p + 2 * m, p + 2 * m + n};
  float* diag = p + 2 * m + 2 * n;
  const Products args{make_pair(s), row.weight, row.ref, col.weight, col.ref, diag, a.dz1, a.dz2};
  Schedule schedule(part_count(std::min(m, n), threads));
  run(threads, [&](int t, Team& team) {
    const int parts = team.size();
    char* mine = scratch.get() + t * bytes;
    const int64_t i0 = part(m, 16, t, parts), i1 = part(m, 16, t + 1, parts);
    const int64_t j0 = part(n, 16, t, parts), j1 = part(n, 16, t + 1, parts);
    const size_t row_bytes = sizeof(float) * size_t(pitch(d));
    prepare(w.row_weight, w.row_lse, s.scale, i0, i1, row);
    prepare(w.col_weight, w.col_lse, s.scale, j0, j1, col);
    diagonal(w, s.scale, s.row_offset, i0, i1, diag);
    if (a.dz1) std::memset(a.dz1 + i0 * pitch(d), 0, row_bytes * size_t(i1 - i0));
    if (a.dz2) std::memset(a.dz2 + j0 * pitch(d), 0, row_bytes * size_t(j1 - j0));
    team.barrier();
    products_part(args, schedule, mine);
    team.barrier();
    float* row_copy = reinterpret_cast<float*>(mine);
    if (a.dz1) {
      const FinishPart f{s.z1, a.dz1, a.rnorm1, m, d, a.eps, a.grad1};
      finish_part(f, row_dots.get(), t, parts, row_copy);
    }
    if (a.dz2) {
      const FinishPart f{s.z2, a.dz2, a.rnorm2, n, d, a.eps, a.grad2};
      finish_part(f, row_dots.get() + m, t, parts, row_copy);
    }
  });
  a.dots[0] = a.dz1 ? total(row_dots.get(), m) : 0.0;
  a.dots[1] = a.dz2 ? total(row_dots.get() + m, n) : 0.0;
  return "";
}

}  // namespace directclr
