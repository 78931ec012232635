// Every body of the kernels on buffers of exactly the stated sizes: the program that csrc/sanitize.sh
// runs under AddressSanitizer and UndefinedBehaviorSanitizer, or ThreadSanitizer. Similarities are held
// to double loops, a step to what its gradients promise; the tests of accuracy are in
// tests/test_native_kernels.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "isa.h"
#include "stages.h"
#include "step.h"

namespace {

using namespace directclr;
using Floats = std::vector<float>;

int failures = 0;

void expect(bool ok, const char* what, const char* isa, int64_t m, int64_t n, int64_t d) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: %s m=%ld n=%ld d=%ld\n", isa, what, long(m), long(n), long(d));
}

struct Case {
  int64_t m, n, d, offset;
  double temperature;
  int threads;
  double keep;
  Operands operands = kFp32;
};

void run_case(const Case& c) {
  const char* isa = kernels().name;
  const int64_t m = c.m, n = c.n, d = c.d, p = pitch(d), width = d + 3;
  const double a = 1 / c.temperature;
  std::mt19937 random(unsigned(m * 131 + n * 17 + d));
  std::normal_distribution<float> normal;
  Floats x1(m * width), x2(n * width);
  for (float& v : x2) v = normal(random);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = 0; k < width; ++k) {
      x1[i * width + k] = x2[(c.offset + i) * width + k] + normal(random);
    }
  }
  Floats z1(m * p), z2(n * p), rnorm1(m), rnorm2(n), dz1(m * p), dz2(n * p), g1(m * width),
      g2(n * width);
  std::vector<double> logits(m), row_lse(m), col_lse(n), diagonal(m), wr(m), wc(n);
  for (double& v : wr) v = std::fabs(normal(random));
  for (double& v : wc) v = std::fabs(normal(random));
  const int64_t bytes = int64_t(c.keep * double(workspace_bytes(m, n)));
  std::vector<char> workspace(bytes);
  void* kept = bytes ? workspace.data() : nullptr;
  const Strided s1{x1.data(), kFloat32, width, 1, nullptr};
  const Strided s2{x2.data(), kFloat32, width, 1, nullptr};
  const int team = -c.threads;
  normalize({s1, d, p, 1e-12, z1.data(), rnorm1.data()}, m, team);
  normalize({s2, d, p, 1e-12, z2.data(), rnorm2.data()}, n, team);
  const SimilarityArgs pair{z1.data(), z2.data(), m,      n,    d,    c.offset,
                            a,         false,     c.operands, kept, bytes};
  std::vector<double> rows(2 * m), cols(2 * n);
  Floats row_top(m, -3e38f), col_top(n, -3e38f), own(m);
  const std::string error =
      sums(pair, {rows.data(), rows.data() + m}, {cols.data(), cols.data() + n},
           logits.data(), {row_top.data(), col_top.data(), own.data()}, team);
  expect(error.empty(), "sums", isa, m, n, d);
  // Similarities by a plain loop, of which the largest besides the positives are the tops.
  Floats row_most(m, -2.0f), col_most(n, -2.0f);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double s = 0;
      for (int64_t k = 0; k < d; ++k) s += double(z1[i * p + k]) * z2[j * p + k];
      if (j == c.offset + i) {
        expect(std::fabs(s - own[i]) <= (c.operands ? 1e-2 : 1e-6), "own", isa, m, n, d);
        continue;
      }
      row_most[i] = std::max(row_most[i], float(s));
      col_most[j] = std::max(col_most[j], float(s));
    }
  }
  const double near = c.operands ? 1e-2 : 1e-6;
  for (int64_t i = 0; n > 1 && i < m; ++i) {
    expect(std::fabs(row_most[i] - row_top[i]) <= near, "row top", isa, m, n, d);
  }
  for (int64_t j = 0; m > 1 && j < n; ++j) {
    expect(std::fabs(col_most[j] - col_top[j]) <= near, "col top", isa, m, n, d);
  }
  // The positives join the sums of the others, as in directclr_fast/driver.py.
  const auto log_sum = [](const std::vector<double>& x, int64_t i, int64_t count) {
    return (std::log2(x[i]) + x[count + i]) * std::log(2.0);
  };
  for (int64_t j = 0; j < n; ++j) col_lse[j] = log_sum(cols, j, n);
  for (int64_t i = 0; i < m; ++i) {
    const double nll = std::log1p(std::exp(log_sum(rows, i, m) - logits[i]));
    const double nll_col = std::log1p(std::exp(col_lse[c.offset + i] - logits[i]));
    row_lse[i] = logits[i] + nll;
    col_lse[c.offset + i] = logits[i] + nll_col;
    diagonal[i] = a * (wr[i] * std::expm1(-nll) + wc[c.offset + i] * std::expm1(-nll_col));
  }
  std::vector<double> awr(wr), awc(wc);
  for (double& v : awr) v *= a;
  for (double& v : awc) v *= a;
  const WeightArgs weights{awr.data(), awc.data(), row_lse.data(), col_lse.data(),
                           diagonal.data()};
  expect(products(pair, weights, dz1.data(), dz2.data(), team).empty(), "products", isa, m, n, d);
  const Strided o1{g1.data(), kFloat32, width, 1, nullptr};
  const Strided o2{g2.data(), kFloat32, width, 1, nullptr};
  double dots[2];
  finish({z1.data(), dz1.data(), rnorm1.data(), d, p, 1e12f, o1, width, true}, m, &dots[0], team);
  finish({z2.data(), dz2.data(), rnorm2.data(), d, p, 1e12f, o2, width, true}, n, &dots[1], team);
  for (const Floats& g : {g1, g2}) {
    for (float v : g) expect(std::isfinite(v), "gradient", isa, m, n, d);
  }
}

// A whole step on buffers of exactly its sizes: its loss, and by how much a small step against its
// gradients lowers it.
void run_step(int64_t m, int64_t n, int64_t d, bool both, bool symmetric, Operands operands) {
  const int64_t p = pitch(d);
  Floats x1(m * d), x2(n * d), z1(m * p), z2(n * p), rnorm1(m), rnorm2(n), g1(m * d), g2(n * d);
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  for (float& v : x1) v = normal(random);
  for (float& v : x2) v = normal(random);
  std::vector<double> row_lse(m), col_lse(symmetric ? n : 0), nll_row(m), nll_col(symmetric ? m : 0);
  std::vector<float> kept(workspace_bytes(m, n) / 4);
  const Step s{{m, z1.data(), rnorm1.data()}, {n, z2.data(), rnorm2.data()}, d, 1e-12, 10.0, both,
               symmetric, operands, true, false, kept.data(), int64_t(4 * kept.size()), row_lse.data(),
               symmetric ? col_lse.data() : nullptr, nll_row.data(),
               symmetric ? nll_col.data() : nullptr};
  const auto of = [&](Floats& x) { return Strided{x.data(), kFloat32, d, 1, nullptr}; };
  float before = 0.0f, after = 0.0f, upstream = 1.0f;
  double dtemperature = 0.0;
  const char* isa = kernels().name;
  expect(forward(s, of(x1), of(x2), &before, 2).empty(), "forward", isa, m, n, d);
  expect(backward(s, &upstream, 0, {of(g1), d, true}, {of(g2), d, true}, &dtemperature, 2).empty(),
         "backward", isa, m, n, d);
  double squares = 0.0;
  for (float g : g1) squares += double(g) * g;
  for (float g : g2) squares += double(g) * g;
  const float rate = squares > 0.0 ? float(0.02 * before / squares) : 0.0f;
  for (int64_t k = 0; k < m * d; ++k) x1[k] -= rate * g1[k];
  for (int64_t k = 0; k < n * d; ++k) x2[k] -= rate * g2[k];
  forward(s, of(x1), of(x2), &after, 2);
  const double expected = n > 1 && d > 1 ? 0.02 * before : 0.0;
  expect(std::fabs(before - after - expected) <= 0.3 * expected + 1e-6, "step", isa, m, n, d);
}

// One view against itself: twice the strict upper triangle is everything but the diagonal.
void run_self(int64_t m, int64_t d, int threads) {
  const int64_t p = pitch(d);
  Floats z(m * p), dz(m * p);
  std::vector<double> lse(m), w(m, 1.0);
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = 0; k < d; ++k) z[i * p + k] = normal(random) / float(std::sqrt(double(d)));
  }
  std::vector<double> upper(2 * m), whole(2 * m);
  SimilarityArgs s{z.data(), z.data(), m, m, d, 0, 10.0, true, kFp32, nullptr, 0};
  const Accumulator rows{upper.data(), upper.data() + m};
  Floats top(m, -3e38f);
  sums(s, rows, rows, nullptr, {top.data(), top.data(), nullptr}, threads);
  s.upper = false;
  sums(s, {whole.data(), whole.data() + m}, {nullptr, nullptr}, nullptr, {}, threads);
  for (int64_t i = 0; i < m; ++i) {
    const double u = std::ldexp(upper[i], int(upper[m + i]));
    const double v = std::ldexp(whole[i], int(whole[m + i]));
    expect(std::fabs(u - v) <= 1e-5 * v, "self sums", kernels().name, m, m, d);
    lse[i] = v > 0 ? std::log(v) : 0.0;
  }
  s.upper = true;
  products(s, {w.data(), w.data(), lse.data(), lse.data(), nullptr}, dz.data(), dz.data(),
           threads);
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {1, 1, 1, 0, 0.1, 1, 0},        {2, 2, 3, 0, 0.1, 2, 1},
      {7, 7, 16, 0, 0.1, 3, 0},       {63, 63, 17, 0, 0.1, 2, 0.5},
      {65, 129, 33, 64, 0.1, 2, 0},   {129, 129, 127, 0, 0.005, 2, 0},
      {3, 700, 129, 650, 0.5, 2, 0},  {400, 400, 360, 0, 0.1, 2, 0.3},
      {64, 64, 1100, 0, 0.01, 1, 1},  {200, 350, 512, 100, 0.1, 5, 0},
      {65, 65, 17, 0, 0.1, 2, 0.5, kBf16},    {200, 210, 1100, 3, 0.1, 2, 0, kBf16},
      {130, 140, 200, 3, 0.1, 2, 0.5, kInt8x3},
  };
  for (const Kernels* k : available_kernels()) {
    force_isa(k->name);
    for (Case c : cases) {
      if (!c.operands || k->tiles || (c.operands == kBf16 && k->has_bf16)) run_case(c);
    }
    for (int threads : {-1, -2, -3}) {  // exactly so many
      for (int64_t m : {1, 5, 100, 350}) run_self(m, 20, threads);
    }
    for (bool both : {false, true}) {
      for (bool symmetric : {false, true}) {
        run_step(70, 70, 33, both, symmetric, k->has_bf16 || k->tiles ? kBf16 : kFp32);
        run_step(1, 1, 5, both, symmetric, kFp32);
        if (!both) run_step(17, 90, 20, both, symmetric, kFp32);
      }
    }
    std::printf("%s: done\n", k->name);
  }
  if (!failures) std::printf("all passed\n");
  return failures ? 1 : 0;
}
