// Which instantiation a launch takes.
#include "similarity.h"

namespace directclr {
namespace {

template <class F>
std::string by_operand(Operand operand, bool pingpong, F f) {
  using O = Operand;
  switch (operand) {
    case O::kFp16: return f(std::integral_constant<O, O::kFp16>{}, pingpong);
    case O::kBf16: return f(std::integral_constant<O, O::kBf16>{}, pingpong);
    case O::kSplit: return f(std::integral_constant<O, O::kSplit>{}, false);
    default: return f(std::integral_constant<O, O::kE4m3>{}, false);
  }
}

std::string named(const char* stage, const Operands& s, const std::string& problem) {
  if (problem.empty()) return {};
  return std::string(stage) + " of " + std::to_string(s.rows) + " x " + std::to_string(s.cols) +
         " rows, " + std::to_string(s.k) + " columns: " + problem;
}

}  // namespace

int tile_height(bool pingpong) { return pingpong ? 64 : 128; }

std::string sums(const Operands& s, const SumsArguments& a, const Stream& stream) {
  return named("sums", s, by_operand(s.type, s.pingpong, [&](auto operand, bool ping) {
                 constexpr Operand kOperand = decltype(operand)::value;
                 if constexpr (kOperand == Operand::kFp16 || kOperand == Operand::kBf16) {
                   if (ping) return sums_as<kOperand, true>(s, a, stream);
                 }
                 return sums_as<kOperand, false>(s, a, stream);
               }));
}

std::string weights(const Operands& s, const WeightsArguments& a, const Stream& stream) {
  return named("weights", s, by_operand(s.type, s.pingpong, [&](auto operand, bool ping) {
                 constexpr Operand kOperand = decltype(operand)::value;
                 if constexpr (kOperand == Operand::kFp16 || kOperand == Operand::kBf16) {
                   if (ping) return weights_as<kOperand, true>(s, a, stream);
                 }
                 return weights_as<kOperand, false>(s, a, stream);
               }));
}

}  // namespace directclr
