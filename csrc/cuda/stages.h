// The stages as the binding calls them. Each returns an empty string, or what went wrong; all are
// queued on the stream and wait for nothing.
#pragma once

#include <string>

#include "arguments.h"

namespace directclr {

std::string normalize(const Layout&, const NormalizeArguments&, const Stream&);
std::string positives(const Layout&, const PositivesArguments&, const Stream&);
std::string fold(const FoldArguments&, const Stream&);
int64_t combine_blocks(int64_t n);
std::string combine(const CombineArguments&, const Stream&);
std::string total(const TotalArguments&, const Stream&);
std::string factors(const FactorsArguments&, const Stream&);
// For one view or two, `second` is null or the other one's side.
std::string finish(const Layout&, const FinishSide& first, const FinishSide* second,
                   const FinishArguments&, const Stream&);
std::string add_positives(const Layout&, const AddPositivesArguments&, const Stream&);

// Over tiles of S (similarity.cu).
std::string sums(const Operands&, const SumsArguments&, const Stream&);
std::string weights(const Operands&, const WeightsArguments&, const Stream&);
int tile_height(bool pingpong);
constexpr int kTileWidth = 256;

}  // namespace directclr
