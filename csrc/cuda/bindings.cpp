// The Python module of the Hopper kernels: the structs of arguments.h made from fields by name
// (addresses for pointers) and the stages of stages.h over them; error texts come out as
// RuntimeError. Sizes and addresses are not checked here: the Python side owns the tensors.
#include <pybind11/pybind11.h>

#include <tuple>
#include <utility>

#include "stages.h"

namespace py = pybind11;
using namespace py::literals;

namespace directclr {
namespace {

template <class T>
void set(T*& field, const py::handle& value) {
  field = reinterpret_cast<T*>(value.cast<uintptr_t>());
}
template <class T>
void set(T& field, const py::handle& value) {
  field = value.cast<T>();
}
void set(Operand& field, const py::handle& value) { field = Operand(value.cast<int>()); }

// A struct as a class of the module, made from all of its fields by name.
template <class S, class... M>
void record(py::module_& m, const char* name, std::pair<const char*, M S::*>... fields) {
  py::class_<S>(m, name).def(py::init([=](const py::kwargs& given) {
    const auto value = [&](const char* field) -> py::handle {
      if (PyObject* found = PyDict_GetItemString(given.ptr(), field)) return found;
      throw py::type_error(std::string(name) + ": the field " + field + " is missing");
    };
    S s{};
    (set(s.*fields.second, value(fields.first)), ...);
    if (given.size() == sizeof...(fields)) return s;
    throw py::type_error(std::string(name) + ": expected " + std::to_string(sizeof...(fields)) +
                         " fields, got " + std::to_string(given.size()));
  }));
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

// A stage as a function of its structs, of which the stream is the last.
template <class... A>
auto launching(std::string (*stage)(const A&...)) {
  return [stage](const A&... arguments) {
    launch(std::get<sizeof...(A) - 1>(std::tie(arguments...)), [&] { return stage(arguments...); });
  };
}

}  // namespace
}  // namespace directclr

// A field of the struct that is S where this stands.
#define F(field) std::make_pair(#field, &S::field)

PYBIND11_MODULE(_cuda, m) {
  using namespace directclr;
  m.doc() = "Hopper kernels of directclr_fast; the stages are described in docs/design.md";
  m.attr("tile_width") = kTileWidth;
  m.def("tile_height", &tile_height, "pingpong"_a);
  m.def("combine_blocks", &combine_blocks, "n"_a);
  m.def("built_with", [] { return CUDART_VERSION; });

  {
    using S = Stream;
    record(m, "Stream", F(handle), F(device), F(multiprocessors));
  }
  {
    using S = Input;
    record(m, "Input", F(data), F(dtype), F(rows), F(width), F(row_stride), F(col_stride));
  }
  {
    using S = Layout;
    record(m, "Layout", F(bf16), F(fp8), F(d), F(pitch), F(row), F(fp8_scale));
  }
  {
    using S = NormalizeArguments;
    record(m, "NormalizeArguments", F(r1), F(r2), F(index), F(z1), F(z2), F(rnorm1), F(rnorm2),
           F(positives), F(offset), F(eps), F(both));
    m.def("normalize", launching(&normalize), "layout"_a, "arguments"_a, "stream"_a);
  }
  {
    using S = PositivesArguments;
    record(m, "PositivesArguments", F(z1), F(z2), F(positives), F(n), F(offset));
    m.def("positives", launching(&positives), "layout"_a, "arguments"_a, "stream"_a);
  }
  {
    using S = Operands;
    record(m, "Operands", F(type), F(pingpong), F(a), F(b), F(rows), F(cols), F(k), F(pitch));
  }
  {
    using S = Exponent;
    record(m, "Exponent", F(scale), F(value), F(operands));
  }
  {
    using S = SumsArguments;
    record(m, "SumsArguments", F(row_sum), F(row_peak), F(col_sum), F(col_peak), F(own),
           F(exponent), F(step), F(upper), F(columns), F(bounded));
    m.def("sums", launching(&sums), "operands"_a, "arguments"_a, "stream"_a);
  }
  {
    using S = WeightFactors;
    record(m, "WeightFactors", F(row), F(col), F(row_shift), F(col_shift), F(symmetric));
  }
  {
    using S = WeightsArguments;
    record(m, "WeightsArguments", F(out), F(pitch), F(factors), F(exponent), F(step), F(bounded),
           F(mirror));
    m.def("weights", launching(&weights), "operands"_a, "arguments"_a, "stream"_a);
  }
  {
    using S = FoldArguments;
    record(m, "FoldArguments", F(sums), F(peaks), F(into), F(n), F(lines), F(stride), F(first));
    m.def("fold", launching(&fold), "arguments"_a, "stream"_a);
  }
  {
    using S = CombineArguments;
    record(m, "CombineArguments", F(row_sum), F(row_peak), F(col_sum), F(col_peak), F(rest_row),
           F(rest_col), F(row_lines), F(col_lines), F(positives), F(own), F(scale),
           F(scale_value), F(row_lse), F(col_lse), F(nll_row), F(nll_col), F(loss_by_row), F(loss_by_block), F(m),
           F(n), F(offset), F(symmetric));
    m.def("combine", launching(&combine), "arguments"_a, "stream"_a);
  }
  {
    using S = TotalArguments;
    record(m, "TotalArguments", F(parts), F(loss), F(n), F(factor));
    m.def("total", launching(&total), "arguments"_a, "stream"_a);
  }
  {
    using S = FactorsArguments;
    record(m, "FactorsArguments", F(upstream), F(largest), F(row_lse), F(col_lse), F(nll_row),
           F(nll_col), F(row), F(col), F(row_shift), F(col_shift), F(diagonal), F(m), F(n),
           F(offset), F(store), F(symmetric), F(bounded));
    m.def("factors", launching(&factors), "arguments"_a, "stream"_a);
  }
  {
    using S = FinishSide;
    record(m, "FinishSide", F(z), F(other), F(rnorm), F(acc), F(dr), F(dr_row_stride),
           F(dr_col_stride), F(dots), F(rows), F(to_other), F(to_diagonal));
  }
  {
    using S = FinishArguments;
    record(m, "FinishArguments", F(dtype), F(index), F(diagonal), F(diagonals), F(d), F(width),
           F(largest_rnorm), F(add), F(factor), F(upstream), F(scale), F(scale_value));
    m.def(
        "finish",
        [](const Layout& layout, const FinishSide& first, const FinishSide* second,
           const S& arguments, const Stream& s) {
          launch(s, [&] { return finish(layout, first, second, arguments, s); });
        },
        "layout"_a, "first"_a, "second"_a, "arguments"_a, "stream"_a);
  }
  {
    using S = AddPositivesArguments;
    record(m, "AddPositivesArguments", F(dz), F(other), F(diagonal), F(factor), F(n), F(others),
           F(diagonals), F(to_other), F(to_diagonal));
    m.def("add_positives", launching(&add_positives), "layout"_a, "arguments"_a,
          "stream"_a);
  }
}
