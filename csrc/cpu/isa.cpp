#include "isa.h"

#include <atomic>
#include <cstdlib>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace directclr {
namespace {

std::atomic<const Kernels*> forced{nullptr};

constexpr char kUsable[] = "AMX, in use";

// AMX: in the processor, its registers saved by the system, the process permitted to have them, and
// right in a first product. So no instruction here can be illegal, and a fault of ours or of a
// virtual machine costs speed only.
const char* try_matrix_unit() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d, low, high;
  constexpr unsigned kXsave = 1u << 27, kTileState = 3u << 17;
  constexpr unsigned kAmx = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmx) != kAmx) {
    return "the processor has no AMX";
  }
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kXsave) == 0) return "the system has no XSAVE";
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileState) != kTileState) return "the system does not save AMX's registers";
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    return "the system does not permit AMX";
  }
  return kernels_amx.tiles->work() ? kUsable : "AMX failed its check";
#else
  return "AMX is used on Linux, x86-64";
#endif
}

// The best there is, or the one DIRECTCLR_FAST_ISA names: so every test runs on every body.
const Kernels* chosen() {
  const std::vector<const Kernels*> all = available_kernels();
  const char* const name = std::getenv("DIRECTCLR_FAST_ISA");
  for (const Kernels* k : all) {
    if (name != nullptr && std::string(name) == k->name) return k;
  }
  return all.front();
}

}  // namespace

const char* matrix_unit() {
  static const char* const state = try_matrix_unit();  // once for each process
  return state;
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> bodies;
#if defined(__x86_64__)
  // These tests include whether the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // AMD's bf16 dot product does twice the work of an fp32 FMA in its time. On Intel's processors it
  // runs at half that rate, since their tiles are for it: there the body is taken by name only.
  const bool bf16_is_faster = __builtin_cpu_is("amd");
  if (avx512 && matrix_unit() == kUsable) bodies.push_back(&kernels_amx);
  if (bf16 && bf16_is_faster) bodies.push_back(&kernels_avx512_bf16);
  if (avx512) bodies.push_back(&kernels_avx512);
  if (bf16 && !bf16_is_faster) bodies.push_back(&kernels_avx512_bf16);
  if (avx2) bodies.push_back(&kernels_avx2);
#endif
  bodies.push_back(&kernels_portable);
  // By name only: the tiles of the matrix unit emulated, so that all but its instructions is tested
  // on any machine.
#if defined(__x86_64__)
  if (avx512) bodies.push_back(&kernels_tiles_avx512);
#endif
  bodies.push_back(&kernels_tiles);
  return bodies;
}

const Kernels& kernels() {
  static const Kernels* const best = chosen();
  const Kernels* f = forced.load(std::memory_order_acquire);
  return f ? *f : *best;
}

std::string force_isa(const std::string& name) {
  if (name.empty()) {
    forced.store(nullptr, std::memory_order_release);
    return "";
  }
  std::string names;
  for (const Kernels* k : available_kernels()) {
    if (name == k->name) {
      forced.store(k, std::memory_order_release);
      return "";
    }
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  return "isa: expected one of " + names + ", got " + name;
}

}  // namespace directclr
