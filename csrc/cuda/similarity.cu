// The tile product of one operand type and schedule, compiled once for each of `instantiations` in
// csrc/build.py: DIRECTCLR_OPERAND (Fp16, Bf16, E4m3, Split) and DIRECTCLR_KIND (Cooperative,
// Pingpong). Both stages: most of the compiler's time goes into reading CUTLASS.
#include "similarity.cuh"

#include "similarity.h"

namespace directclr {
namespace {

struct OfFp16 {
  using Element = cutlass::half_t;
  using Half = Fp16;
};
struct OfBf16 {
  using Element = cutlass::bfloat16_t;
  using Half = Bf16;
};
struct OfE4m3 {
  using Element = cutlass::float_e4m3_t;
  using Half = Fp16;  // of the weights
};
struct OfSplit : OfFp16 {};

#define DIRECTCLR_JOIN_(a, b) a##b
#define DIRECTCLR_JOIN(a, b) DIRECTCLR_JOIN_(a, b)
using Of = DIRECTCLR_JOIN(Of, DIRECTCLR_OPERAND);
using Kind = DIRECTCLR_KIND;
constexpr bool kPingpong = std::is_same_v<Kind, Pingpong>;
constexpr Operand kOperand = Operand::DIRECTCLR_JOIN(k, DIRECTCLR_OPERAND);
constexpr bool kSplit = kOperand == Operand::kSplit;

template <class OurEpilogue>
using Product = Similarity<Of::Element, Kind, OurEpilogue, kSplit>;

}  // namespace

template <>
std::string sums_as<kOperand, kPingpong>(const Operands& s, const SumsArguments& a,
                                             const Stream& stream) {
  return a.bounded ? Product<SumsEpilogue<Kind, true, kSplit>>::run(s, a, stream, a.upper)
                   : Product<SumsEpilogue<Kind, false, true>>::run(s, a, stream, a.upper);
}

template <>
std::string weights_as<kOperand, kPingpong>(const Operands& s, const WeightsArguments& a,
                                                const Stream& stream) {
  using Half = Of::Half;
  return a.bounded
             ? Product<WeightsEpilogue<Kind, Half, true, kSplit>>::run(s, a, stream, a.mirror)
             : Product<WeightsEpilogue<Kind, Half, false, kSplit>>::run(s, a, stream, a.mirror);
}
}  // namespace directclr
