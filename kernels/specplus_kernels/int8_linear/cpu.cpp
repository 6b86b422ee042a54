// int8_linear: each weight is read once, for all inputs of a register tile. With few inputs it takes
// as long as reading them. Inputs are rounded to 16 bits, an upper and a lower byte, because CPUs
// with AVX512-VNNI multiply bytes four times as fast as floats.

#include <cstdint>

#include "../cpu_library/simd.h"

#if defined(__AVX512VNNI__)

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace specplus {
namespace {

constexpr int64_t SERIAL_BYTES = 1 << 18;  // below this waking threads gains nothing
constexpr int64_t OUTPUTS = 16;            // weight rows of a panel, one a lane
constexpr int64_t DEPTH = 4;               // bytes of a lane
constexpr int INPUTS = 8;                  // of a register tile
constexpr int32_t OFFSET = 128;            // of weights: one factor of a product has no sign

struct Params {
  int64_t x, weight, scales, out, num_rows, num_out, num_in;
};

// x = scale * (256 * upper + lower); scale is NaN where an element of x is not finite.
struct Input {
  std::vector<int8_t> upper, lower;
  float scale = 0;
  int32_t upper_sum = 0, lower_sum = 0;

  void round(const float *x, int64_t count) {
    upper.assign((count + DEPTH - 1) / DEPTH * DEPTH, 0);
    lower.assign(upper.size(), 0);
    float largest = 0, nothing = 0;
    for (int64_t i = 0; i < count; ++i) {
      largest = std::max(largest, std::fabs(x[i]));
      nothing += x[i] * 0;
    }
    scale = largest / 32000 + nothing;
    for (int64_t i = 0; i < count && scale > 0; ++i) {
      int32_t value = std::lrintf(x[i] / scale);
      upper[i] = int8_t((value + 128) >> 8);
      lower[i] = int8_t(value - upper[i] * 256);
      upper_sum += upper[i], lower_sum += lower[i];
    }
  }
};

__m512i four_bytes(const std::vector<int8_t> &from, int64_t i) {
  int32_t bytes;
  memcpy(&bytes, from.data() + i, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

// The outputs of one panel for R inputs, `count` of them.
template <int R>
void tile(const Params &p, const Input *inputs, int64_t panel, int64_t count, float *out) {
  int64_t depth = (p.num_in + DEPTH - 1) / DEPTH * DEPTH;
  const uint8_t *weight = (const uint8_t *)p.weight + panel * depth * OUTPUTS;
  __m512i upper[R], lower[R];
  for (int r = 0; r < R; ++r) {
    upper[r] = _mm512_set1_epi32(-OFFSET * inputs[r].upper_sum);
    lower[r] = _mm512_set1_epi32(-OFFSET * inputs[r].lower_sum);
  }
  for (int64_t i = 0; i < depth; i += DEPTH) {
    __m512i w = _mm512_loadu_si512(weight + i * OUTPUTS);
    for (int r = 0; r < R; ++r) {
      upper[r] = _mm512_dpbusd_epi32(upper[r], w, four_bytes(inputs[r].upper, i));
      lower[r] = _mm512_dpbusd_epi32(lower[r], w, four_bytes(inputs[r].lower, i));
    }
  }
  vfloat scales = load((const float *)p.scales + panel * OUTPUTS);
  for (int r = 0; r < R; ++r) {
    vfloat above = __builtin_convertvector((vint)upper[r], vfloat);
    vfloat below = __builtin_convertvector((vint)lower[r], vfloat);
    vfloat total = (above * 256.0f + below) * inputs[r].scale * scales;
    memcpy(out + r * p.num_out + panel * OUTPUTS, &total, count * sizeof(float));
  }
}

template <int... R>
void int8_linear(const Params &p, std::integer_sequence<int, R...>) {
  constexpr decltype(&tile<1>) tiles[] = {tile<R + 1>...};
  std::vector<Input> inputs(p.num_rows);
  for (int64_t r = 0; r < p.num_rows; ++r) {
    inputs[r].round((const float *)p.x + r * p.num_in, p.num_in);
  }
  bool serial = p.num_out * p.num_in < SERIAL_BYTES;
  int64_t num_panels = (p.num_out + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for schedule(static) num_threads(serial ? 1 : omp_get_max_threads())
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    int64_t count = std::min(OUTPUTS, p.num_out - panel * OUTPUTS);
    for (int64_t r = 0; r < p.num_rows; r += INPUTS) {
      int64_t rows = std::min<int64_t>(INPUTS, p.num_rows - r);
      tiles[rows - 1](p, inputs.data() + r, panel, count, (float *)p.out + r * p.num_out);
    }
  }
}

}  // namespace
}  // namespace specplus

extern "C" int64_t specplus_int8_linear(const specplus::Params *params, int64_t size) {
  using namespace specplus;
  if (size != sizeof *params) return STALE;
  int8_linear(*params, std::make_integer_sequence<int, INPUTS>());
  return 0;
}

#endif
