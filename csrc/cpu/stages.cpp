#include "stages.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "buffer.h"
#include "isa.h"
#include "threads.h"

namespace directclr {
namespace {

constexpr double kLog2e = 1.4426950408889634;
// Below this many multiply-adds per thread (100 us) another thread costs more than it brings; an
// element read or written from memory counts as kElementWork of them.
constexpr double kWorkPerThread = 12e6;
constexpr double kElementWork = 16;

constexpr size_t kHugePage = size_t(2) << 20;

// Only a wish: where it fails, memory is as it was.
void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  (void)madvise(data, bytes, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// Where the bodies pack and keep their tiles: the calling thread's own, kept from call to call, since
// touching 4 MiB of fresh pages costs as much as the whole loss of 500 rows. What is larger than
// kKeptScratch goes back to the system at the end of the call.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    Kept& mine = kept();
    if (mine.size < size_t(bytes)) {
      mine = {};
      const size_t whole = (size_t(bytes) + kHugePage - 1) / kHugePage * kHugePage;
      mine.data.reset(static_cast<char*>(std::aligned_alloc(kHugePage, whole)));
      if (!mine.data) return;
      mine.size = whole;
      advise_huge_pages(mine.data.get(), whole);
    }
    data_ = mine.data.get();
  }
  ~Scratch() {
    if (kept().size > kKeptScratch) kept() = {};
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  char* get() const { return data_; }  // for the whole team

 private:
  static constexpr size_t kKeptScratch = size_t(16) << 20;
  struct Kept {
    std::unique_ptr<char, Free> data;
    size_t size = 0;
  };
  static Kept& kept() {
    static thread_local Kept mine;
    return mine;
  }
  char* data_ = nullptr;
};

// Rows of the anchors whose positives are among the candidates.
struct Rows {
  int64_t begin, end;
};
Rows with_positive(const SimilarityArgs& s) {
  return {std::max<int64_t>(0, -s.row_offset), std::min(s.m, s.n - s.row_offset)};
}

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
  const float high = float(scale);
  return {s.z1, s.z2, s.m, s.n, s.d, pitch(s.d), s.row_offset, s.upper,
          kFp32,  // until Arithmetic has chosen
          high, float(scale - double(high)), nullptr, nullptr, {}, {}, s.ids1, s.ids2, s.scale,
          nullptr, nullptr, static_cast<float*>(s.workspace), 0};
}

bool bounded(const SimilarityArgs& s) {
  return s.scale * kLog2e + std::log2(double(std::max(s.m, s.n))) < 125.0;
}

std::atomic<const char*> last_arithmetic{"none yet"};

// How far off s may be with six products of digits instead of eight: 1e-6 of E at a = 10, what the
// rule for errors forgives whoever computes, and grows with a beyond.
constexpr double kDigitError = 1e-7;

// r of both sides where the largest of a row is 1/2: beyond, rows lie near an axis each. Rounding of
// G where it is large then points along z, and away from the gradient, in fp32 but not in digits.
constexpr double kAxisUnits = 0x1p-15;

// Operands that are rounded: the positives are not.
bool rounded(const Pair& p) { return p.operands == kBf16 || p.operands == kInt8x3; }
bool on_tiles(const Pair& p) { return kernels().tiles && p.operands != kFp32; }

// What rows and columns of S are split at, so that no tile is cut.
int64_t row_unit(const Pair& p) { return on_tiles(p) ? kTileUnit : kernels().mr; }
int64_t column_unit(const Pair& p) { return on_tiles(p) ? kTileUnit : kernels().nr; }

// What the products are made of: on tiles where the body has them, they pay, and digits can hold
// these rows. A function of z, a and what is asked, so that backward does as forward did.
class Arithmetic {
 public:
  // False if memory is short. The pair's scales live as long as this.
  bool choose(const SimilarityArgs& s, int threads, Pair& pair) {
    const Kernels& k = kernels();
    pair.operands = s.operands == kBf16 && k.has_bf16 ? kBf16 : kFp32;
    if (k.tiles && !pair.ids1 && std::min(s.m, s.n) >= k.tiles->least_rows && s.d >= k.tiles->least_columns &&
        s.d <= kMostTileColumns) {
      pair.operands = s.operands == kFp32 ? kInt8x6 : s.operands;
    }
    if (pair.operands > kBf16 && !scale(s, threads, pair)) return false;
    constexpr const char* kNames[] = {"fp32", "bf16", "int8x3", "int8x6", "int8x8"};
    last_arithmetic = kNames[pair.operands];
    const int64_t panel = on_tiles(pair) ? kTileRows : k.mr, panels = (s.m + panel - 1) / panel;
    const auto floats = on_tiles(pair) ? k.tiles->keep_panel_floats : k.keep_panel_floats;
    pair.keep_panels = std::clamp<int64_t>((s.workspace_bytes / 4 - 1) / floats(s.n), 0, panels);
    return true;
  }

 private:
  // Makes the pair one of as many products of digits as it needs, or of fp32 where they will not do.
  bool scale(const SimilarityArgs& s, int threads, Pair& pair) {
    const bool one = s.z1 == s.z2 && s.m == s.n;
    const int64_t rows = one ? s.m : s.m + s.n;
    scales_ = std::make_unique<Buffer<float>>(2 * rows);
    if (!*scales_) return false;
    float *const scale1 = scales_->get(), *const scale2 = one ? scale1 : scale1 + s.m;
    threads = team_size(threads, kElementWork * double(rows) * double(s.d));
    run(threads, [&](int t, Team& team) {
      const auto share = [&](const float* z, int64_t count, float* to) {
        kernels().tiles->scales(z, s.d, pair.pitch, part(count, 16, t, team.size()),
                                part(count, 16, t + 1, team.size()), to, to + rows);
      };
      share(s.z1, s.m, scale1);
      if (!one) share(s.z2, s.n, scale2);
    });
    const double error = std::sqrt(root_mean_square(scale1 + rows, s.m) *
                                   root_mean_square(scale2 + rows, s.n));
    // Errors of few rows may all be above the mean.
    const double above = 1.0 + 16.0 / double(std::min(s.m, s.n));
    if (pair.operands == kInt8x6 &&
        error * above * std::min(s.scale, 10.0) > 10.0 * kDigitError) {
      const double units = root_mean_square(scale1, s.m) * root_mean_square(scale2, s.n);
      pair.operands = units > kAxisUnits ? kFp32 : kInt8x8;
    }
    if (std::isnan(error)) pair.operands = kFp32;
    if (pair.operands == kFp32) return true;
    pair.scale1 = scale1;
    pair.scale2 = scale2;
    return true;
  }

  static double root_mean_square(const float* x, int64_t count) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += double(x[i]) * double(x[i]);
    return std::sqrt(sum / double(count));
  }

  std::unique_ptr<Buffer<float>> scales_;
};

// Whether parts share packed rows: where they are smaller than what one packs at a time, packing would
// grow with their number. It is at most 4.5 MiB a part.
bool shares_rows(const Pair& p, int parts) {
  return on_tiles(p) && parts > 1 && p.m + p.n < 2 * parts * kernels().tiles->packed_rows(p.pitch);
}

// Room for them at `at`, where G asks for z1 and z2 in its form, and for S where `for_s`; bytes.
int64_t place_rows(Pair& pair, bool for_s, bool z1_for_g, bool z2_for_g, char* at) {
  char* next = at;
  const auto view = [&](int64_t rows, bool for_g) {
    const int64_t whole = (rows + kTileUnit - 1) / kTileUnit * kTileUnit;
    const auto take = [&](bool wanted, int64_t row_bytes) {
      char* const here = next;
      next += wanted ? whole * row_bytes : 0;
      return wanted ? here : nullptr;
    };
    const int64_t bytes = kernels().tiles->packed_bytes(pair.pitch);
    char* const s = take(for_s, bytes);
    char* const g = take(for_g, bytes);
    return Packed{s, g, reinterpret_cast<float*>(take(true, 4)), 0, rows};
  };
  pair.packed1 = view(pair.m, z1_for_g);
  pair.packed2 = view(pair.n, z2_for_g);
  return next - at;
}

void pack_rows(const Pair& pair, int t, int team) {
  for (const bool first : {true, false}) {
    const Packed& to = first ? pair.packed1 : pair.packed2;
    kernels().tiles->pack(pair, first, part(to.count, kTileUnit, t, team),
                          part(to.count, kTileUnit, t + 1, team), to);
  }
}

// The last word of the workspace: what the tiles before it were made of. A process may ask for other
// products in between, and then they are made anew.
float* mark_of(const SimilarityArgs& s) {
  return s.workspace_bytes < 4 ? nullptr
                               : static_cast<float*>(s.workspace) + s.workspace_bytes / 4 - 1;
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

void raise_columns(const float* partial, int64_t n, int parts, int t, int team, float* top) {
  const int64_t end = part(n, 16, t + 1, team);
  for (int64_t j = part(n, 16, t, team); j < end; ++j) {
    for (int p = 0; p < parts; ++p) top[j] = std::max(top[j], partial[p * n + j]);
  }
}

int64_t row_scratch_floats(int64_t d) { return pitch(d) + 64; }

// One thread's share of the rows of S. The column sums of part t go to partial[t]: sums, then refs;
// its columns' largest to tops[t].
void sums_part(const Sums& args, Schedule& schedule, double* partial, float* tops, void* scratch) {
  const Kernels& k = kernels();
  const Pair& p = args.pair;
  const int parts = schedule.parts;
  const int64_t unit = row_unit(p);
  const auto bound = [&](int i) {
    return p.upper ? triangle_part(p.m, unit, i, parts) : part(p.m, unit, i, parts);
  };
  for (int t; (t = schedule.take()) < parts;) {
    double* cols = partial + 2 * t * p.n;
    std::fill(cols, cols + 2 * p.n, 0.0);
    float* top = args.row_top ? tops + t * p.n : nullptr;
    if (top) std::fill(top, top + p.n, -HUGE_VALF);
    k.sums(args, bound(t), bound(t + 1), 0, p.n, cols, cols + p.n, top, scratch);
  }
}

// Row and column weights as the kernels take them: w 2^(a' s - ref), the fraction of a log2 in w.
struct Prepared {
  float* weight;
  float* ref;
};

// No weight: a reference that no a s exceeds, since 0 times an overflow would be NaN.
void prepare(const double* weight, const double* lse, double scale, int64_t begin, int64_t end,
             Prepared to) {
  const double above = std::ceil(scale * kLog2e) + 1.0;
  for (int64_t i = begin; i < end; ++i) {
    double w = weight ? weight[i] : 0.0, ref = above;
    if (w != 0.0) {
      const double l = lse[i] * kLog2e;
      ref = std::ceil(l);
      w *= std::exp2(ref - l);  // NaN where l is not finite
    }
    to.weight[i] = float(w);
    to.ref[i] = float(ref);
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
    const int64_t columns = column_unit(p), rows = p.upper ? columns : row_unit(p);
    const int64_t i0 = part(p.m, rows, a, parts), i1 = part(p.m, rows, a + 1, parts);
    const int64_t j0 = part(p.n, columns, b, parts), j1 = part(p.n, columns, b + 1, parts);
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

// The logits of one thread's rows from exact products.
void exact_logits(const SimilarityArgs& s, int t, int parts, double* logits) {
  const Rows rows = with_positive(s);
  const auto bound = [&](int i) {
    return std::clamp(part(s.m, 16, i, parts), rows.begin, std::max(rows.begin, rows.end));
  };
  kernels().positives({s.z1, s.z2, s.d, pitch(s.d), s.row_offset, logits}, bound(t), bound(t + 1));
  for (int64_t i = bound(t); i < bound(t + 1); ++i) logits[i] *= s.scale;
}

// The positives' own term of one thread's rows stays out of the rounded products: two near views
// differ by less than that rounds, and that difference is what a converged gradient points along.
void add_positives(const SimilarityArgs& s, const float* diag, float* dz1, float* dz2, int t,
                   int parts) {
  const int64_t p = pitch(s.d);
  const auto add = [&](float* to, const float* z, float g) {
    for (int64_t k = 0; to && k < s.d; ++k) to[k] += g * z[k];
  };
  const Rows rows = with_positive(s);
  const int64_t end = std::min(part(s.m, 16, t + 1, parts), rows.end);
  for (int64_t i = std::max(part(s.m, 16, t, parts), rows.begin); i < end; ++i) {
    const int64_t j = s.row_offset + i;
    add(dz1 ? dz1 + i * p : nullptr, s.z2 + j * p, diag[i]);
    add(dz2 ? dz2 + j * p : nullptr, s.z1 + i * p, diag[i]);
  }
}

int64_t thread_scratch(int64_t m, int64_t n, int64_t d) {
  const int64_t bytes = kernels().scratch_bytes(m, n, pitch(d)) + 4 * row_scratch_floats(d);
  return (bytes + 4095) / 4096 * 4096;
}

}  // namespace

const char* arithmetic() { return last_arithmetic; }

int64_t workspace_bytes(int64_t m, int64_t n) {
  const Kernels& k = kernels();
  const int64_t fp32 = (m + k.mr - 1) / k.mr * k.keep_panel_floats(n) * 4;
  if (!k.tiles) return fp32 + 4;
  return 4 + std::max(fp32, (m + kTileRows - 1) / kTileRows * k.tiles->keep_panel_floats(n) * 4);
}

int64_t scratch_bytes(int64_t m, int64_t n, int64_t d, int threads) {
  threads = std::abs(threads);
  Pair pair{};
  pair.m = m, pair.n = n, pair.d = d, pair.pitch = pitch(d), pair.operands = kInt8x6;
  const bool shared = shares_rows(pair, part_count(m, threads));
  const int64_t packed = shared ? place_rows(pair, true, true, true, nullptr) : 0;
  const int64_t all = threads * thread_scratch(m, n, d) + packed;
  const int64_t fwd = all + part_count(m, threads) * 20 * n + 16 * (m + n);
  const int64_t bwd = all + 8 * (m + n) + 4 * m + 8 * (m + n);
  return std::max(fwd, bwd);
}

std::string normalize(const Normalize& args, int64_t rows, int threads) {
  threads = team_size(threads, kElementWork * double(rows) * double(args.d));
  Buffer<float> scratch(threads * row_scratch_floats(args.d));
  if (!scratch) return kNoMemory;
  run(threads, [&](int t, Team& team) {
    kernels().normalize(args, part(rows, 16, t, team.size()), part(rows, 16, t + 1, team.size()),
                        scratch.get() + t * row_scratch_floats(args.d));
  });
  return "";
}

std::string sums(const SimilarityArgs& s, Accumulator rows, Accumulator cols, double* logits,
                 const Tops& tops, int threads) {
  threads = team_size(threads, double(s.m) * double(s.n) * double(s.d));
  Sums args{make_pair(s), bounded(s), rows.sum, rows.ref, tops.row};
  Arithmetic arithmetic;
  if (!arithmetic.choose(s, threads, args.pair)) return kNoMemory;
  if (float* const mark = mark_of(s)) *mark = float(args.pair.operands);
  const bool exact = rounded(args.pair) && logits;  // beside rounded products the positives are not
  if (!exact) args.pair.logits = logits;
  args.pair.own = tops.own;
  const int64_t bytes = thread_scratch(s.m, s.n, s.d);
  Schedule schedule(part_count(s.m, threads));
  const bool shared = shares_rows(args.pair, schedule.parts);
  const auto place = [&](char* at) { return place_rows(args.pair, true, false, false, at); };
  Scratch scratch(threads * bytes + (shared ? place(nullptr) : 0));
  Buffer<double> partial(2 * schedule.parts * s.n);
  Buffer<float> tops_of_parts(tops.row ? schedule.parts * s.n : 0);
  if (!scratch || !partial || !tops_of_parts) return kNoMemory;
  if (shared) place(scratch.get() + threads * bytes);
  run(threads, [&](int t, Team& team) {
    if (exact) exact_logits(s, t, team.size(), logits);
    if (shared) {
      pack_rows(args.pair, t, team.size());
      team.barrier();
    }
    sums_part(args, schedule, partial.get(), tops_of_parts.get(), scratch.get() + t * bytes);
    team.barrier();
    if (cols.sum) merge_columns(partial.get(), s.n, schedule.parts, t, team.size(), cols);
    if (tops.col) raise_columns(tops_of_parts.get(), s.n, schedule.parts, t, team.size(), tops.col);
  });
  return "";
}

std::string products(const SimilarityArgs& s, const WeightArgs& w, float* dz1, float* dz2,
                     int threads) {
  threads = team_size(threads, 3.0 * double(s.m) * double(s.n) * double(s.d));
  Buffer<float> prepared(3 * s.m + 2 * s.n);
  if (!prepared) return kNoMemory;
  float* p = prepared.get();
  const Prepared row{p, p + s.m}, col{p + 2 * s.m, p + 2 * s.m + s.n};
  float* diag = w.diagonal ? p + 2 * s.m + 2 * s.n : nullptr;
  Products args{make_pair(s), row.weight, row.ref, col.weight, col.ref, diag, dz1, dz2};
  Arithmetic arithmetic;
  if (!arithmetic.choose(s, threads, args.pair)) return kNoMemory;
  const float* const mark = mark_of(s);
  if (mark && *mark != float(args.pair.operands)) args.pair.keep_panels = 0;
  if (rounded(args.pair)) args.diag = nullptr;
  const int parts_wanted = part_count(std::min(s.m, s.n), threads);
  Schedule schedule(s.upper && parts_wanted > 1 ? (parts_wanted + 1) / 2 * 2 : parts_wanted);
  const int64_t bytes = thread_scratch(s.m, s.n, s.d);
  const bool shared = shares_rows(args.pair, schedule.parts);
  const auto place = [&](char* at) {
    return place_rows(args.pair, args.pair.keep_panels * kTileRows < s.m, dz2, dz1, at);
  };
  Scratch scratch(threads * bytes + (shared ? place(nullptr) : 0));
  if (!scratch) return kNoMemory;
  if (shared) place(scratch.get() + threads * bytes);
  run(threads, [&](int t, Team& team) {
    const int parts = team.size();
    const int64_t i0 = part(s.m, 16, t, parts), i1 = part(s.m, 16, t + 1, parts);
    const int64_t j0 = part(s.n, 16, t, parts), j1 = part(s.n, 16, t + 1, parts);
    prepare(w.row_weight, w.row_lse, s.scale, i0, i1, row);
    prepare(w.col_weight, w.col_lse, s.scale, j0, j1, col);
    for (int64_t i = i0; diag && i < i1; ++i) diag[i] = float(w.diagonal[i]);
    if (shared) pack_rows(args.pair, t, parts);
    team.barrier();
    products_part(args, schedule, scratch.get() + t * bytes);
    if (!rounded(args.pair) || !diag) return;
    team.barrier();
    add_positives(s, diag, dz1, dz2, t, parts);
  });
  return "";
}

std::string finish(const Finish& args, int64_t rows, double* dots, int threads) {
  threads = team_size(threads, kElementWork * double(rows) * double(args.d));
  Buffer<float> scratch(threads * row_scratch_floats(args.d));
  Buffer<double> row_dots(rows);
  if (!scratch || !row_dots) return kNoMemory;
  run(threads, [&](int t, Team& team) {
    kernels().finish(args, part(rows, 16, t, team.size()), part(rows, 16, t + 1, team.size()),
                     row_dots.get(), scratch.get() + t * row_scratch_floats(args.d));
  });
  *dots = std::accumulate(row_dots.get(), row_dots.get() + rows, 0.0);
  return "";
}

}  // namespace directclr
