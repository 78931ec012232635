#include "step.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.h"
#include "threads.h"

namespace directclr {
namespace {

using Doubles = std::vector<double>;

constexpr double kLn2 = 0.69314718055994530942;

// Sums and references of `rows` rows.
Accumulator halves(Doubles& x, int64_t rows) { return {x.data(), x.data() + rows}; }

// log of one row's sum, without its positive.
double rest(const Accumulator& of, int64_t i) { return (std::log2(of.sum[i]) + of.ref[i]) * kLn2; }

double softplus(double x) {
  return x > 0.0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

SimilarityArgs cross(const Step& s) {
  return {s.view1.z, s.view2.z, s.view1.rows, s.view2.rows, s.d, 0, s.scale, false, s.operands,
          s.workspace, s.workspace_bytes};
}

SimilarityArgs own(const Step& s, const View& v) {
  return {v.z, v.z, v.rows, v.rows, s.d, 0, s.scale, true, s.operands, nullptr, 0};
}

// On all threads where it is more than one writes in the time it takes to start them.
void clear(float* x, int64_t count, int threads) {
  const auto part = [&](int t, Team& team) {
    std::fill(x + count * t / team.size(), x + count * (t + 1) / team.size(), 0.0f);
  };
  if (count < (int64_t(1) << 18) || !run_team(std::abs(threads), part)) run_team(1, part);
}

// Calls one stage after the other until one returns an error text.
template <class... Stages>
std::string in_order(const Stages&... stages) {
  std::string error;
  (void)((error = stages(), error.empty()) && ...);
  return error;
}

}  // namespace

std::string forward(const Step& s, const Strided& x1, const Strided& x2, float* loss, int threads) {
  const int64_t m = s.view1.rows, n = s.view2.rows;
  Doubles of_rows(2 * m), of_columns(s.symmetric ? 2 * n : 0), logits(m);
  const Accumulator rows = halves(of_rows, m);
  const Accumulator columns = s.symmetric ? halves(of_columns, n) : Accumulator{};
  const auto unit = [&](const Strided& x, const View& v) {
    return normalize({x, s.d, pitch(s.d), s.eps, v.z, v.rnorm}, v.rows, threads);
  };
  const auto self = [&](const View& v, Accumulator to, bool wanted) -> std::string {
    return wanted ? sums(own(s, v), to, to, nullptr, {}, threads) : "";
  };
  const std::string error = in_order(
      [&] { return unit(x1, s.view1); }, [&] { return unit(x2, s.view2); },
      [&] { return sums(cross(s), rows, columns, logits.data(), {}, threads); },
      [&] { return self(s.view1, rows, s.both); },
      [&] { return self(s.view2, columns, s.both && s.symmetric); });
  if (!error.empty()) return error;
  double total = 0.0;
  for (int64_t i = 0; i < m; ++i) {
    s.nll_row[i] = softplus(rest(rows, i) - logits[i]);
    s.row_lse[i] = logits[i] + s.nll_row[i];
    double of_row = s.nll_row[i];
    if (s.symmetric) {
      s.nll_col[i] = softplus(rest(columns, i) - logits[i]);
      s.col_lse[i] = logits[i] + s.nll_col[i];
      of_row = 0.5 * (of_row + s.nll_col[i]);
    }
    if (s.each) loss[i] = float(of_row);
    total += of_row;
  }
  for (int64_t j = m; s.symmetric && j < n; ++j) s.col_lse[j] = rest(columns, j);
  if (!s.each) *loss = float(s.mean ? total / double(m) : total);
  return "";
}

std::string backward(const Step& s, const float* upstream, int64_t stride, const Gradient& g1,
                     const Gradient& g2, double* dtemperature, int threads) {
  const int64_t m = s.view1.rows, n = s.view2.rows;
  Doubles weight(s.symmetric ? n : m), diagonal(m);
  const double share = s.symmetric ? 0.5 * s.scale : s.scale;
  for (int64_t i = 0; i < m; ++i) {
    const double up = upstream[i * stride];
    weight[i] = (s.mean ? up / double(m) : up) * share;
    diagonal[i] = weight[i] * std::expm1(-s.nll_row[i]);
    if (s.symmetric) diagonal[i] += weight[i] * std::expm1(-s.nll_col[i]);
  }
  // z1 . dz1 is the temperature's gradient for "cross", and so is view 2's; "both" needs either's.
  const bool dots1 = dtemperature && (s.both || !g2.to.data), dots2 = dtemperature && s.both;
  const bool want1 = g1.to.data || dots1, want2 = g2.to.data || dots2;
  Buffer<float> of1(want1 ? m * pitch(s.d) : 0), of2(want2 ? n * pitch(s.d) : 0);
  if (!of1 || !of2) return kNoMemory;
  float* const dz1 = want1 ? of1.get() : nullptr;
  float* const dz2 = want2 ? of2.get() : nullptr;
  clear(dz1, want1 ? m * pitch(s.d) : 0, threads);
  clear(dz2, want2 ? n * pitch(s.d) : 0, threads);
  const double* const w = weight.data();
  const auto self = [&](const View& v, const double* lse, float* dz) -> std::string {
    const bool wanted = s.both && dz && lse;
    return wanted ? products(own(s, v), {w, w, lse, lse, nullptr}, dz, dz, threads) : "";
  };
  double dots[2] = {};
  const auto through = [&](const View& v, const float* dz, const Gradient& g,
                           double* dot) -> std::string {
    if (!dz) return "";
    return finish({v.z, dz, v.rnorm, s.d, pitch(s.d), float(1.0 / s.eps), g.to, g.width, g.fill},
                  v.rows, dot, threads);
  };
  const std::string error = in_order(
      [&] {
        return products(cross(s), {w, s.symmetric ? w : nullptr, s.row_lse, s.col_lse,
                                   diagonal.data()}, dz1, dz2, threads);
      },
      [&] { return self(s.view1, s.row_lse, dz1); }, [&] { return self(s.view2, s.col_lse, dz2); },
      [&] { return through(s.view1, dz1, g1, &dots[0]); },
      [&] { return through(s.view2, dz2, g2, &dots[1]); });
  // A dot is a dloss/da (for "both", the mean of the two is), and da/dtemperature = -a^2.
  if (dtemperature) {
    const double dot = s.both ? 0.5 * (dots[0] + dots[1]) : want1 ? dots[0] : dots[1];
    *dtemperature = -dot * s.scale;
  }
  return error;
}

}  // namespace directclr
