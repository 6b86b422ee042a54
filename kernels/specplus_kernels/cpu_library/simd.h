// Vectors of the CPU kernels: GCC vector types as wide as the target's registers, no intrinsics.
// All functions are static: each kernel file gets its own.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace specplus {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int ACCUMULATORS = 16;  // vectors of a register tile, of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int ACCUMULATORS = 8;  // of 16 registers
#else
constexpr int LANES = 4;
constexpr int ACCUMULATORS = 8;
#endif

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));
typedef uint32_t vuint __attribute__((vector_size(LANES * 4)));
typedef uint16_t vhalf __attribute__((vector_size(LANES * 2)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

constexpr int64_t STALE = -1;  // the caller packed another struct than this library reads

static inline vfloat splat(float x) { return x - vfloat{}; }

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline vfloat load(const float *from) {
  vfloat value;
  memcpy(&value, from, sizeof value);
  return value;
}
static inline vfloat load(const bf16 *from) {
  vhalf bits;
  memcpy(&bits, from, sizeof bits);
  return (vfloat)(__builtin_convertvector(bits, vuint) << 16);
}

static inline vfloat load(const fp16 *from) {
  vhalf half;
  memcpy(&half, from, sizeof half);
  vuint bits = __builtin_convertvector(half, vuint), magnitude = bits & 0x7fff;
  vuint finite = (vuint)((vfloat)(magnitude << 13) * 0x1p112f);
  vuint special = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
  vuint value = (magnitude >= 0x7c00) ? special : finite;
  return (vfloat)(value | (bits & 0x8000) << 16);
}
static inline float to_float(fp16 x) {
  fp16 lanes[LANES] = {x};
  return load(lanes)[0];
}

static inline void store(float *to, vfloat value) { memcpy(to, &value, sizeof value); }
static inline vuint round_bf16(vfloat value) {  // to nearest, ties to even
  vuint bits = (vuint)value;
  vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (value == value) ? rounded : (vuint{} + 0x7fc0);
}
static inline void store(bf16 *to, vfloat value) {
  vhalf half = __builtin_convertvector(round_bf16(value), vhalf);
  memcpy(to, &half, sizeof half);
}

static inline void store(fp16 *to, vfloat value) {  // round to nearest, ties to even
  vuint bits = (vuint)value, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Below 2^-14 a sum with 0.5 rounds at the subnormals' spacing; above, integer rounding does.
  vuint small = (vuint)((vfloat)magnitude + 0.5f) - 0x3f000000u;
  vuint normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  vuint rounded = (magnitude < 0x38800000u) ? small : normal;
  rounded = (magnitude >= 0x477ff000u) ? (vuint{} + 0x7c00) : rounded;
  rounded = (value == value) ? rounded : (vuint{} + 0x7e00);
  vhalf half = __builtin_convertvector(sign | rounded, vhalf);
  memcpy(to, &half, sizeof half);
}

// A group is N neighbouring vectors in the order that is cheapest to load: with bf16 each pair of
// vectors holds the even elements, then the odd ones. `store_group` writes memory's order again.
template <int N, typename T>
static inline void load_group(const T *from, vfloat *group) {
  for (int n = 0; n < N; ++n) group[n] = load(from + n * LANES);
}
template <int N>
static inline void load_group(const bf16 *from, vfloat *group) {
  for (int n = 0; n + 1 < N; n += 2) {
    vuint pairs;
    memcpy(&pairs, from + n * LANES, sizeof pairs);
    group[n] = (vfloat)(pairs << 16);
    group[n + 1] = (vfloat)(pairs & 0xffff0000u);
  }
  if (N % 2) group[N - 1] = load(from + (N - 1) * LANES);
}

// Stores a group of T's order as T.
template <int N, typename T>
static inline void store_group(T *to, const vfloat *group) {
  for (int n = 0; n < N; ++n) store(to + n * LANES, group[n]);
}
template <int N>
static inline void store_group(bf16 *to, const vfloat *group) {
  for (int n = 0; n + 1 < N; n += 2) {
    vuint pairs = round_bf16(group[n]) | round_bf16(group[n + 1]) << 16;
    memcpy(to + n * LANES, &pairs, sizeof pairs);
  }
  if (N % 2) store(to + (N - 1) * LANES, group[N - 1]);
}

// Alternates the elements of two vectors, LANES / 2 of each from FIRST on.
template <int FIRST, size_t... I>
static inline vfloat zip(vfloat even, vfloat odd, std::index_sequence<I...>) {
  return vfloat{(I % 2 ? odd[FIRST + I / 2] : even[FIRST + I / 2])...};
}

// Puts the vectors of a group of T's order into memory's order.
template <int N, typename T>
static inline void sort_group(vfloat *group) {
  if (!std::is_same<T, bf16>::value) return;
  for (int n = 0; n + 1 < N; n += 2) {
    vfloat even = group[n], odd = group[n + 1];
    group[n] = zip<0>(even, odd, std::make_index_sequence<LANES>());
    group[n + 1] = zip<LANES / 2>(even, odd, std::make_index_sequence<LANES>());
  }
}

// `a > b` is false for NaN in `a`, so NaN never replaces a number in `b`.
static inline vfloat larger(vfloat a, vfloat b) { return (a > b) ? a : b; }

template <int STEP, size_t... I>
static inline vfloat swap(vfloat value, std::index_sequence<I...>) {
  return vfloat{value[I ^ STEP]...};
}
template <int STEP = LANES / 2>
static inline float sum(vfloat value) {
  value += swap<STEP>(value, std::make_index_sequence<LANES>());
  if constexpr (STEP > 1) return sum<STEP / 2>(value);
  return value[0];
}
template <int STEP = LANES / 2>
static inline float maximum(vfloat value) {
  value = larger(swap<STEP>(value, std::make_index_sequence<LANES>()), value);
  if constexpr (STEP > 1) return maximum<STEP / 2>(value);
  return value[0];
}

// 2^x within 2 ulp for x <= 127; below -126 it is 2^-126. NaN stays NaN.
static inline vfloat exp2_vector(vfloat x) {
  x = (x < -126.0f) ? splat(-126.0f) : x;
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vfloat shifted = x + magic;
  vint exponent = ((vint)shifted - (vint)magic + 127) << 23;
  vfloat f = x - (shifted - magic);  // in [-0.5, 0.5]
  vfloat p = splat(1.54035304e-4f);  // Taylor: ln(2)^n / n!
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  return p * (vfloat)exponent;
}

}  // namespace specplus
