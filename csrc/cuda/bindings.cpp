// The Python module of the Hopper kernels: addresses, sizes and a stream in, error texts out as
// RuntimeError. Nothing is checked here; the Python side owns the tensors and checks them.
#include <pybind11/pybind11.h>

#include "stages.h"

namespace py = pybind11;
using namespace py::literals;

namespace directclr {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The caller has made the stream's device current, in its own copy of the CUDA runtime; ours is told
// too, and nothing changes for the driver.
template <class F>
void launch(const Stream& stream, F f) {
  std::string error;
  {
    py::gil_scoped_release release;
    cudaSetDevice(stream.device);
    cudaGetLastError();  // of somebody else, or no device at all: the launch says so
    error = f();
  }
  if (!error.empty()) {
    throw std::runtime_error("cuda backend: " + error + " (device " +
                             std::to_string(stream.device) + ")");
  }
}

// (handle, device, multiprocessors)
Stream stream_of(const py::tuple& t) {
  return {at<CUstream_st>(t[0].cast<uintptr_t>()), t[1].cast<int>(), t[2].cast<int>()};
}

// (data, dtype, rows, width, row_stride, col_stride)
Input input_of(const py::tuple& t) {
  return {at<void>(t[0].cast<uintptr_t>()), t[1].cast<int>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>(), t[4].cast<int64_t>(), t[5].cast<int64_t>()};
}

// (bf16, fp8, d, pitch, row, fp8_scale)
Layout layout_of(const py::tuple& t) {
  return {t[0].cast<bool>(), t[1].cast<bool>(),    t[2].cast<int>(),
          t[3].cast<int>(),  t[4].cast<int64_t>(), t[5].cast<float>()};
}

// (operand, a, b, rows, cols, k, pitch)
Operands operands_of(const py::tuple& t, bool pingpong) {
  return {Operand(t[0].cast<int>()), pingpong, at<void>(t[1].cast<uintptr_t>()),
          at<void>(t[2].cast<uintptr_t>()), t[3].cast<int>(), t[4].cast<int>(), t[5].cast<int>(),
          t[6].cast<int64_t>()};
}

// (scale address or 0, value, operands)
Exponent exponent_of(const py::tuple& t) {
  return {at<float>(t[0].cast<uintptr_t>()), t[1].cast<float>(), t[2].cast<float>()};
}

// (z, other, rnorm, acc, dr, dr_row_stride, dr_col_stride, dots, rows, to_other, to_diagonal)
FinishSide side_of(const py::tuple& t) {
  return {at<void>(t[0].cast<uintptr_t>()), at<void>(t[1].cast<uintptr_t>()),
          at<float>(t[2].cast<uintptr_t>()), at<float>(t[3].cast<uintptr_t>()),
          at<void>(t[4].cast<uintptr_t>()), t[5].cast<int64_t>(), t[6].cast<int64_t>(),
          at<float>(t[7].cast<uintptr_t>()), t[8].cast<int64_t>(), t[9].cast<int64_t>(),
          t[10].cast<int64_t>()};
}

}  // namespace
}  // namespace directclr

PYBIND11_MODULE(_cuda, m) {
  using namespace directclr;
  using P = uintptr_t;
  using I = int64_t;
  m.doc() = "Hopper kernels of directclr_fast; the stages are described in docs/design.md";
  m.attr("tile_width") = kTileWidth;
  m.def("tile_height", &tile_height, "pingpong"_a);
  m.def("combine_blocks", &combine_blocks, "n"_a);
  m.def("built_with", [] { return CUDART_VERSION; });

  m.def("normalize", [](const py::tuple& layout, const py::tuple& r1, const py::tuple& r2, P index,
                        P z1, P z2, P rnorm1, P rnorm2, P positives_at, I offset, double eps,
                        bool both, const py::tuple& stream) {
    const Stream s = stream_of(stream);
    const Layout l = layout_of(layout);
    const NormalizeArguments a{input_of(r1),       input_of(r2),      at<int64_t>(index),
                               at<void>(z1),       at<void>(z2),      at<float>(rnorm1),
                               at<float>(rnorm2),  at<double>(positives_at), offset, eps, both};
    launch(s, [&] { return normalize(l, a, s); });
  });
  m.def("positives", [](const py::tuple& layout, P z1, P z2, P found, I n, I offset,
                        const py::tuple& stream) {
    const Stream s = stream_of(stream);
    const Layout l = layout_of(layout);
    const PositivesArguments a{at<void>(z1), at<void>(z2), at<double>(found), n, offset};
    launch(s, [&] { return positives(l, a, s); });
  });
  m.def("sums", [](const py::tuple& operands, P row_sum, P row_peak, P col_sum, P col_peak,
                   P own, const py::tuple& exponent, int step, bool upper, bool moving, bool bounded,
                   bool pingpong, const py::tuple& stream) {
    const Stream s = stream_of(stream);
    const Operands o = operands_of(operands, pingpong);
    const SumsArguments a{at<float>(row_sum),  at<float>(row_peak), at<float>(col_sum),
                          at<float>(col_peak), at<float>(own),      exponent_of(exponent),
                          step,                upper,               moving,
                          bounded};
    launch(s, [&] { return sums(o, a, s); });
  });
  m.def("weights", [](const py::tuple& operands, P out, I pitch, P row, P col, P row_shift,
                      P col_shift, bool symmetric, const py::tuple& exponent, int step,
                      bool bounded, bool pingpong, const py::tuple& stream) {
    const Stream s = stream_of(stream);
    const Operands o = operands_of(operands, pingpong);
    const WeightsArguments a{at<void>(out),
                             pitch,
                             {at<float>(row), at<float>(col), at<float>(row_shift),
                              at<float>(col_shift), symmetric},
                             exponent_of(exponent),
                             step,
                             bounded};
    launch(s, [&] { return weights(o, a, s); });
  });
  m.def("fold", [](P sums_at, P peaks, P into, I n, int lines, I stride, bool first,
                   const py::tuple& stream) {
    const Stream s = stream_of(stream);
    const FoldArguments a{at<float>(sums_at), at<float>(peaks), at<double>(into), n, lines, stride,
                          first};
    launch(s, [&] { return fold(a, s); });
  });
  m.def("combine", [](const py::tuple& parts, P rest_row, P rest_col, P positives_at, P scale,
                      double scale_value, P row_lse, P col_lse, P nll_row, P nll_col,
                      P loss_by_row, P loss_by_block, I rows, I n, I offset, bool symmetric,
                      const py::tuple& stream) {
    const Stream s = stream_of(stream);
    const CombineArguments a{at<float>(parts[0].cast<P>()),
                             at<float>(parts[1].cast<P>()),
                             at<float>(parts[2].cast<P>()),
                             at<float>(parts[3].cast<P>()),
                             at<double>(rest_row),
                             at<double>(rest_col),
                             parts[4].cast<int>(),
                             parts[5].cast<int>(),
                             at<double>(positives_at),
                             at<float>(scale),
                             scale_value,
                             at<double>(row_lse),
                             at<double>(col_lse),
                             at<double>(nll_row),
                             at<double>(nll_col),
                             at<float>(loss_by_row),
                             at<double>(loss_by_block),
                             rows,
                             n,
                             offset,
                             symmetric};
    launch(s, [&] { return combine(a, s); });
  });
  m.def("total", [](P parts, P loss, I n, double factor, const py::tuple& stream) {
    const Stream s = stream_of(stream);
    launch(s, [&] { return total({at<double>(parts), at<float>(loss), n, factor}, s); });
  });
  m.def("factors", [](P upstream, P largest, P row_lse, P col_lse, P nll_row, P nll_col, P row,
                      P col, P row_shift, P col_shift, P diagonal, I rows, I n, I offset,
                      float store, bool symmetric, bool bounded, const py::tuple& stream) {
    const Stream s = stream_of(stream);
    const FactorsArguments a{at<float>(upstream), at<float>(largest),   at<double>(row_lse),
                             at<double>(col_lse), at<double>(nll_row),  at<double>(nll_col),
                             at<float>(row),      at<float>(col),       at<float>(row_shift),
                             at<float>(col_shift), at<float>(diagonal), rows,
                             n,                   offset,               store,
                             symmetric,           bounded};
    launch(s, [&] { return factors(a, s); });
  });
  m.def("finish", [](const py::tuple& layout, int dtype, const py::tuple& first,
                     const py::object& second, P index, P diagonal, I diagonals, int width,
                     float largest_rnorm, bool add, float factor, P upstream, P scale,
                     float scale_value, const py::tuple& stream) {
    const Stream s = stream_of(stream);
    const Layout l = layout_of(layout);
    const FinishSide one = side_of(first);
    const bool both = !second.is_none();
    const FinishSide two = both ? side_of(second.cast<py::tuple>()) : FinishSide{};
    const FinishArguments c{dtype, at<int64_t>(index), at<float>(diagonal), diagonals, l.d, width,
                            largest_rnorm, add, factor, at<float>(upstream), at<float>(scale),
                            scale_value};
    launch(s, [&] { return finish(l, one, both ? &two : nullptr, c, s); });
  });
  m.def("add_positives", [](const py::tuple& layout, P dz, P other, P diagonal, P factor, I n,
                            I others, I diagonals, I to_other, I to_diagonal,
                            const py::tuple& stream) {
    const Stream s = stream_of(stream);
    const Layout l = layout_of(layout);
    const AddPositivesArguments a{at<float>(dz), at<void>(other), at<float>(diagonal),
                                  at<float>(factor), n, others, diagonals, to_other, to_diagonal};
    launch(s, [&] { return add_positives(l, a, s); });
  });
}
