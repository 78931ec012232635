// One warp in lock-step, twice: on the device a register per thread, on a host all 32 of them.
//
// The epilogues (tile.h) are written against a class W with Float, Int, Bool and Word of a lane and
// the exchanges between lanes. `DeviceWarp` is what ships; `HostWarp` runs the same source on a CPU,
// shuffles included, which is how tests check it where there is no GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DIRECTCLR_HD __host__ __device__ __forceinline__
#define DIRECTCLR_UNROLL _Pragma("unroll")
#else
#define DIRECTCLR_HD inline
#define DIRECTCLR_UNROLL
#endif

namespace directclr {

constexpr int kLanes = 32;

#ifdef __CUDACC__
struct DeviceWarp {
  using Float = float;
  using Int = int;
  using Bool = bool;
  using Word = uint32_t;  // two half-precision values
  using Long = int64_t;

  static __device__ __forceinline__ Long wide(Int x) { return x; }
  static __device__ __forceinline__ Int lane() {
    int id;
    asm("mov.u32 %0, %%laneid;" : "=r"(id));
    return id & (kLanes - 1);
  }
  template <class T>
  static __device__ __forceinline__ T select(bool c, T a, T b) {
    return c ? a : b;
  }
  // A condition that picks one of two values by their bits. Given a plain select under a shuffle the
  // compiler branches, and shuffles in both arms, each with a part of the warp.
  using Mask = uint32_t;
  static __device__ __forceinline__ Mask mask(Bool c) {
    uint32_t bits = c ? ~0u : 0u;
    asm("" : "+r"(bits));  // no longer known to be one of two
    return bits;
  }
  static __device__ __forceinline__ Word pick(Mask c, Word a, Word b) { return (a & c) | (b & ~c); }
  static __device__ __forceinline__ Float pick(Mask c, Float a, Float b) {
    return __uint_as_float(pick(c, __float_as_uint(a), __float_as_uint(b)));
  }
  template <class T>
  static __device__ __forceinline__ T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
  }
  static __device__ __forceinline__ Float exp2(Float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  // max that keeps a NaN.
  static __device__ __forceinline__ Float max(Float a, Float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
  }
  // What a lane reads and writes, where `c` holds.
  static __device__ __forceinline__ Float load(const float* p, Int at, Bool c, float other) {
    return c ? __ldg(p + at) : other;
  }
  // Two neighbours, the first at an address of 8 bytes.
  static __device__ __forceinline__ void load2(const float* p, Int at, Float (&x)[2]) {
    const float2 both = __ldg(reinterpret_cast<const float2*>(p + at));
    x[0] = both.x, x[1] = both.y;
  }
  // To global memory; one instruction under a predicate, never a branch.
  static __device__ __forceinline__ void store(float* p, Int at, Float x, Bool c) {
    asm volatile(
        "{\n  .reg .pred there;\n  setp.ne.s32 there, %2, 0;\n"
        "  @there st.global.f32 [%0], %1;\n}"
        :
        : "l"(p + at), "f"(x), "r"(int(c))
        : "memory");
  }
  static __device__ __forceinline__ void put(float* p, Int at, Float x) { p[at] = x; }
  // A block of 8 x 8 halves, row lane / 4, columns 2 (lane % 4) and the next, becomes its transpose.
  static __device__ __forceinline__ Word transpose8(Word x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
  }
  template <class Half>
  static __device__ __forceinline__ Word pack(Float low, Float high) {
    return Half::pack(low, high);
  }
  template <class Half>
  static __device__ __forceinline__ Word pack_rest(Word packed, Float low, Float high) {
    return Half::pack_rest(packed, low, high);
  }
  // 16 bytes to global memory at p + at (in units of 16 bytes).
  static __device__ __forceinline__ void store16(void* p, Long at, const Word (&x)[4], Bool c) {
    asm volatile(
        "{\n  .reg .pred there;\n  setp.ne.s32 there, %1, 0;\n"
        "  @there st.global.v4.b32 [%0], {%2, %3, %4, %5};\n}"
        :
        : "l"(static_cast<uint4*>(p) + at), "r"(int(c)), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
        : "memory");
  }
};
#endif

// A value of each of the 32 lanes.
template <class T>
struct Lanes {
  T v[kLanes];
  Lanes() = default;
  Lanes(T x) {
    for (T& y : v) y = x;
  }
  T& operator[](int i) { return v[i]; }
  T operator[](int i) const { return v[i]; }
  Lanes& operator+=(const Lanes& b) {
    for (int i = 0; i < kLanes; ++i) v[i] = v[i] + b.v[i];
    return *this;
  }
};

// `op` of two values of each lane, or of each lane's and one for all.
#define DIRECTCLR_LANE_OPERATOR(Result, op)                            \
  template <class T>                                                   \
  Lanes<Result> operator op(const Lanes<T>& a, const Lanes<T>& b) {    \
    Lanes<Result> y;                                                   \
    for (int i = 0; i < kLanes; ++i) y.v[i] = a.v[i] op b.v[i];        \
    return y;                                                          \
  }                                                                    \
  template <class T, class S>                                          \
  Lanes<Result> operator op(const Lanes<T>& a, S b) {                  \
    return a op Lanes<T>(T(b));                                        \
  }
DIRECTCLR_LANE_OPERATOR(T, +)
DIRECTCLR_LANE_OPERATOR(T, -)
DIRECTCLR_LANE_OPERATOR(T, *)
DIRECTCLR_LANE_OPERATOR(T, /)
DIRECTCLR_LANE_OPERATOR(T, &)
DIRECTCLR_LANE_OPERATOR(T, |)
DIRECTCLR_LANE_OPERATOR(T, ^)
DIRECTCLR_LANE_OPERATOR(T, %)
DIRECTCLR_LANE_OPERATOR(bool, <)
DIRECTCLR_LANE_OPERATOR(bool, >)
DIRECTCLR_LANE_OPERATOR(bool, ==)
DIRECTCLR_LANE_OPERATOR(bool, !=)
#undef DIRECTCLR_LANE_OPERATOR

struct HostWarp {
  using Float = Lanes<float>;
  using Int = Lanes<int>;
  using Bool = Lanes<bool>;
  using Word = Lanes<uint32_t>;
  using Long = Lanes<int64_t>;

  static Long wide(const Int& x) {
    Long y;
    for (int i = 0; i < kLanes; ++i) y[i] = x[i];
    return y;
  }
  static Int lane() {
    Int y;
    for (int i = 0; i < kLanes; ++i) y[i] = i;
    return y;
  }
  template <class T>
  static Lanes<T> select(const Bool& c, const Lanes<T>& a, const Lanes<T>& b) {
    Lanes<T> y;
    for (int i = 0; i < kLanes; ++i) y[i] = c[i] ? a[i] : b[i];
    return y;
  }
  using Mask = Bool;
  static Mask mask(const Bool& c) { return c; }
  template <class T>
  static Lanes<T> pick(const Mask& c, const Lanes<T>& a, const Lanes<T>& b) {
    return select(c, a, b);
  }
  template <class T>
  static Lanes<T> shuffle_xor(const Lanes<T>& x, int mask) {
    Lanes<T> y;
    for (int i = 0; i < kLanes; ++i) y[i] = x[i ^ mask];
    return y;
  }
  static Float exp2(const Float& x) {
    Float y;
    for (int i = 0; i < kLanes; ++i) y[i] = std::exp2(x[i]);
    return y;
  }
  static Float max(const Float& a, const Float& b) {
    Float y;
    for (int i = 0; i < kLanes; ++i) y[i] = std::isnan(a[i]) || a[i] > b[i] ? a[i] : b[i];
    return y;
  }
  static Float load(const float* p, const Int& at, const Bool& c, float other) {
    Float y;
    for (int i = 0; i < kLanes; ++i) y[i] = c[i] ? p[at[i]] : other;
    return y;
  }
  static void load2(const float* p, const Int& at, Float (&x)[2]) {
    for (int i = 0; i < kLanes; ++i) x[0][i] = p[at[i]], x[1][i] = p[at[i] + 1];
  }
  static void store(float* p, const Int& at, const Float& x, const Bool& c) {
    for (int i = 0; i < kLanes; ++i) {
      if (c[i]) p[at[i]] = x[i];
    }
  }
  static void put(float* p, const Int& at, const Float& x) { store(p, at, x, true); }
  static Word transpose8(const Word& x) {
    Word y;
    for (int i = 0; i < kLanes; ++i) {
      const int from = 8 * (i % 4) + i / 8, half = i / 4 % 2 * 16;  // row 2 (i % 4), column i / 4
      y[i] = (x[from] >> half & 0xffffu) | (x[from + 4] >> half & 0xffffu) << 16;
    }
    return y;
  }
  template <class Half>
  static Word pack(const Float& low, const Float& high) {
    Word y;
    for (int i = 0; i < kLanes; ++i) y[i] = Half::pack(low[i], high[i]);
    return y;
  }
  template <class Half>
  static Word pack_rest(const Word& packed, const Float& low, const Float& high) {
    Word y;
    for (int i = 0; i < kLanes; ++i) y[i] = Half::pack_rest(packed[i], low[i], high[i]);
    return y;
  }
  static void store16(void* p, const Long& at, const Word (&x)[4], const Bool& c) {
    for (int i = 0; i < kLanes; ++i) {
      if (!c[i]) continue;
      const uint32_t words[4] = {x[0][i], x[1][i], x[2][i], x[3][i]};
      std::memcpy(static_cast<char*>(p) + 16 * at[i], words, 16);
    }
  }
};

}  // namespace directclr
