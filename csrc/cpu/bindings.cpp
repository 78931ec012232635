// The Python module: addresses, sizes and strides in, error texts out as RuntimeError. Nothing is
// checked here; the Python side owns the arrays and checks them.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <numeric>

#include "isa.h"
#include "stages.h"
#include "step.h"
#include "threads.h"

namespace py = pybind11;
using namespace py::literals;

namespace directclr {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

// (data, dtype, row_stride, col_stride, cols)
Strided strided(const py::tuple& t) {
  return {at<void>(t[0].cast<uintptr_t>()), t[1].cast<int>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>(), at<int64_t>(t[4].cast<uintptr_t>())};
}

// (rows, z, rnorm)
View view(const py::tuple& t) {
  return {t[0].cast<int64_t>(), at<float>(t[1].cast<uintptr_t>()),
          at<float>(t[2].cast<uintptr_t>())};
}

// (*strided, width, fill), or None for a gradient that nobody wants
Gradient gradient(const py::object& grad) {
  if (grad.is_none()) return {};
  const py::tuple t = grad;
  return {strided(t), t[5].cast<int64_t>(), t[6].cast<bool>()};
}

// The sum of loop() on so many threads at once.
template <class Loop>
double total(int threads, const Loop& loop) {
  std::vector<double> done(size_t(threads), 0.0);
  py::gil_scoped_release release;
  if (!run_team(threads, [&](int t, Team&) { done[size_t(t)] = loop(); })) return 0.0;
  return std::accumulate(done.begin(), done.end(), 0.0);
}

}  // namespace
}  // namespace directclr

PYBIND11_MODULE(_cpu, m) {
  using namespace directclr;
  using P = uintptr_t;
  using I = int64_t;
  m.doc() = "DirectCLR / InfoNCE on a CPU: stages over addresses (csrc/README.md)";
  m.attr("FLOAT32") = int(kFloat32);
  m.attr("FLOAT16") = int(kFloat16);
  m.attr("BFLOAT16") = int(kBFloat16);

  m.def("isa", [] { return std::string(kernels().name); }, "The body in use.");
  m.def(
      "available_isas",
      [] {
        py::list names;
        for (const Kernels* k : available_kernels()) names.append(k->name);
        return names;
      },
      "Bodies this processor can run, best first.");
  m.def(
      "force_isa",
      [](const std::string& name) {
        const std::string error = force_isa(name);
        if (!error.empty()) throw py::value_error(error);
      },
      "name"_a, "Use this body from now on; an empty name undoes it.");
  m.def("uses_openmp", [] { return openmp_is_usable(); },
        "Whether threads come from the OpenMP pool of the process, not from one call to the next.");
  m.attr("FP32") = int(kFp32);
  m.attr("BF16") = int(kBf16);
  m.attr("INT8X3") = int(kInt8x3);
  m.def("has_tiles", [] { return kernels().tiles != nullptr; },
        "Whether operands=INT8X3 is taken up.");
  m.def("has_bf16", [] { return kernels().has_bf16 || kernels().tiles; }, "operands=BF16 likewise.");
  m.def("matrix_unit", [] { return std::string(matrix_unit()); },
        "Whether this processor's is used, or why not.");
  m.def("arithmetic", [] { return std::string(arithmetic()); },
        "What the last `sums` or `products` of the process multiplied in.");
  m.def("pitch", &pitch, "d"_a, "Floats per row of z and dz.");
  m.def(
      "within",
      [](P cols, I d, I width) {
        const int64_t* c = at<int64_t>(cols);
        return std::all_of(c, c + d, [&](int64_t k) { return 0 <= k && k < width; });
      },
      "cols"_a, "d"_a, "width"_a, "Whether every column lies inside a row of `width`.");
  m.def("workspace_bytes", &workspace_bytes, "m"_a, "n"_a, "Bytes that keep every tile of S.");
  m.def("scratch_bytes", &scratch_bytes, "m"_a, "n"_a, "d"_a, "threads"_a,
        "Memory that a driver takes besides its arguments.");
  m.def(
      "fma_peak",
      [](int threads, I iterations) {
        return total(threads, [&] { return kernels().fma_loop(iterations); });
      },
      "threads"_a, "iterations"_a,
      "Runs independent multiply-adds on every thread and returns the operations done.");
  m.def(
      "tile_peak",
      [](int threads, I iterations, bool bf16, bool few_loads) {
        const TileKernels* const tiles = kernels().tiles;
        return total(threads, [&] { return tiles ? tiles->loop(bf16, few_loads, iterations) : 0.0; });
      },
      "threads"_a, "iterations"_a, "bf16"_a, "few_loads"_a,
      "The same of products of tiles, a load for each or every two; 0 where there are none.");
  m.def(
      "exp2",
      [](P x, float hi, float lo, P y, I n) {
        kernels().exp2(at<float>(x), hi, lo, at<float>(y), n);
      },
      "x"_a, "scale_hi"_a, "scale_lo"_a, "y"_a, "n"_a, "y = 2^((scale_hi + scale_lo) x), fp32.");

  m.def(
      "normalize",
      [](const py::tuple& x, I rows, I d, double eps, P z, P rnorm, int threads) {
        const Normalize args{strided(x), d, pitch(d), eps, at<float>(z), at<float>(rnorm)};
        py::gil_scoped_release release;
        check(normalize(args, rows, threads));
      },
      "x"_a, "rows"_a, "d"_a, "eps"_a, "z"_a, "rnorm"_a, "threads"_a);
  m.def(
      "sums",
      [](P z1, P z2, I rows, I n, I d, I row_offset, double scale, bool upper, int operands,
         P ids1, P ids2, P workspace, I bytes, P row_sum, P row_ref, P col_sum, P col_ref,
         P logits, P row_top, P col_top, P own, int threads) {
        const SimilarityArgs s{at<float>(z1), at<float>(z2), rows, n, d, row_offset, scale, upper,
                               Operands(operands), at<void>(workspace), bytes, at<int32_t>(ids1),
                               at<int32_t>(ids2)};
        py::gil_scoped_release release;
        check(sums(s, {at<double>(row_sum), at<double>(row_ref)},
                   {at<double>(col_sum), at<double>(col_ref)}, at<double>(logits),
                   {at<float>(row_top), at<float>(col_top), at<float>(own)}, threads));
      },
      "z1"_a, "z2"_a, "m"_a, "n"_a, "d"_a, "row_offset"_a, "scale"_a, "upper"_a, "operands"_a,
      "ids1"_a = 0, "ids2"_a = 0, "workspace"_a, "workspace_bytes"_a, "row_sum"_a, "row_ref"_a,
      "col_sum"_a, "col_ref"_a,
      "logits"_a, "row_top"_a = 0, "col_top"_a = 0, "own"_a = 0, "threads"_a);
  m.def(
      "products",
      [](P z1, P z2, I rows, I n, I d, I row_offset, double scale, bool upper, int operands,
         P ids1, P ids2, P workspace, I bytes, P row_weight, P col_weight, P row_lse,
         P col_lse, P diagonal, P dz1, P dz2, int threads) {
        const SimilarityArgs s{at<float>(z1), at<float>(z2), rows, n, d, row_offset, scale, upper,
                               Operands(operands), at<void>(workspace), bytes, at<int32_t>(ids1),
                               at<int32_t>(ids2)};
        const WeightArgs w{at<double>(row_weight), at<double>(col_weight), at<double>(row_lse),
                           at<double>(col_lse), at<double>(diagonal)};
        py::gil_scoped_release release;
        check(products(s, w, at<float>(dz1), at<float>(dz2), threads));
      },
      "z1"_a, "z2"_a, "m"_a, "n"_a, "d"_a, "row_offset"_a, "scale"_a, "upper"_a, "operands"_a,
      "ids1"_a = 0, "ids2"_a = 0, "workspace"_a, "workspace_bytes"_a, "row_weight"_a,
      "col_weight"_a, "row_lse"_a, "col_lse"_a,
      "diagonal"_a, "dz1"_a, "dz2"_a, "threads"_a);
  m.def(
      "finish",
      [](P z, P dz, P rnorm, I rows, I d, double eps, const py::object& grad, int threads) {
        const Gradient g = gradient(grad);
        const Finish args{at<float>(z), at<float>(dz), at<float>(rnorm), d, pitch(d),
                          float(1.0 / eps), g.to, g.width, g.fill};
        double dots = 0.0;
        {
          py::gil_scoped_release release;
          check(finish(args, rows, &dots, threads));
        }
        return dots;
      },
      "z"_a, "dz"_a, "rnorm"_a, "rows"_a, "d"_a, "eps"_a, "grad"_a, "threads"_a);

  const auto step = [](const py::tuple& t) {  // what both directions of a step take
    return Step{view(t[0]), view(t[1]), t[2].cast<I>(), t[3].cast<double>(), t[4].cast<double>(),
                t[5].cast<bool>(), t[6].cast<bool>(), Operands(t[7].cast<int>()), t[8].cast<bool>(),
                t[9].cast<bool>(), at<void>(t[10].cast<P>()), t[11].cast<I>(),
                at<double>(t[12].cast<P>()), at<double>(t[13].cast<P>()),
                at<double>(t[14].cast<P>()), at<double>(t[15].cast<P>())};
  };
  m.def(
      "forward",
      [step](const py::tuple& s, const py::tuple& x1, const py::tuple& x2, P loss, int threads) {
        const Step args = step(s);
        const Strided of1 = strided(x1), of2 = strided(x2);
        py::gil_scoped_release release;
        check(forward(args, of1, of2, at<float>(loss), threads));
      },
      "step"_a, "x1"_a, "x2"_a, "loss"_a, "threads"_a,
      "step: ((rows, z, rnorm), (rows, z, rnorm), d, eps, scale, both, symmetric, operands, mean, "
      "each, workspace, bytes, row_lse, col_lse, nll_row, nll_col), as csrc/cpu/step.h says.");
  m.def(
      "backward",
      [step](const py::tuple& s, P upstream, I stride, const py::object& grad1,
             const py::object& grad2, bool temperature, int threads) {
        const Step args = step(s);
        const Gradient g1 = gradient(grad1), g2 = gradient(grad2);
        double dtemperature = 0.0;
        {
          py::gil_scoped_release release;
          check(backward(args, at<float>(upstream), stride, g1, g2,
                         temperature ? &dtemperature : nullptr, threads));
        }
        return dtemperature;
      },
      "step"_a, "upstream"_a, "stride"_a, "grad1"_a, "grad2"_a, "temperature"_a, "threads"_a,
      "Returns the temperature's gradient, 0 where nobody asks.");
}
