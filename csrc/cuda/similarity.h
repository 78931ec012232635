// The instantiations of the tile product, one object file each.
#pragma once

#include "stages.h"

namespace directclr {

template <Operand operand, bool pingpong>
std::string sums_as(const Operands&, const SumsArguments&, const Stream&);
template <Operand operand, bool pingpong>
std::string weights_as(const Operands&, const WeightsArguments&, const Stream&);

#define DIRECTCLR_DECLARE(operand, pingpong)                                                       \
  template <>                                                                                      \
  std::string sums_as<operand, pingpong>(const Operands&, const SumsArguments&, const Stream&);    \
  template <>                                                                                      \
  std::string weights_as<operand, pingpong>(const Operands&, const WeightsArguments&,              \
                                            const Stream&);
DIRECTCLR_DECLARE(Operand::kFp16, false)
DIRECTCLR_DECLARE(Operand::kFp16, true)
DIRECTCLR_DECLARE(Operand::kBf16, false)
DIRECTCLR_DECLARE(Operand::kBf16, true)
DIRECTCLR_DECLARE(Operand::kE4m3, false)
DIRECTCLR_DECLARE(Operand::kSplit, false)
#undef DIRECTCLR_DECLARE

}  // namespace directclr
