// int8_linear: each weight is read once, for all inputs of a register tile. With few inputs it takes
// as long as reading them. Inputs are rounded to 16 bits, an upper and a lower byte, because CPUs
// with AVX512-VNNI multiply bytes four times as fast as floats. With AMX a panel is a row of tiles:
// sixteen inputs take little longer than one.

#include <cstdint>

#include "../cpu_library/simd.h"

#if defined(__AVX512VNNI__)

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

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
constexpr int SIDE = 16;                   // rows of an AMX tile, each of 64 bytes
constexpr int32_t OFFSET = 128;            // of weights: one factor of a product has no sign

struct Params {
  int64_t x, weight, scales, out, num_rows, num_out, num_in, amx;
};

int64_t depth_of(const Params &p) { return (p.num_in + DEPTH - 1) / DEPTH * DEPTH; }

// x = scale * (256 * upper + lower); scale is NaN where an element of x is not finite.
struct Input {
  int8_t *upper, *lower;
  float scale = 0;
  int32_t upper_sum = 0, lower_sum = 0;

  void round(const float *x, int64_t count) {
    __m512 largest = _mm512_setzero_ps(), nothing = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES) {
      __m512 some = _mm512_maskz_loadu_ps(inside(count - i), x + i);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(some));
      nothing = _mm512_fmadd_ps(some, _mm512_setzero_ps(), nothing);
    }
    scale = _mm512_reduce_max_ps(largest) / 32000 + _mm512_reduce_add_ps(nothing);
    if (!(scale > 0)) return;
    __m512i above = _mm512_setzero_si512(), below = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += LANES) {
      __m512 some = _mm512_maskz_loadu_ps(inside(count - i), x + i);
      __m512i value = _mm512_cvtps_epi32(_mm512_div_ps(some, _mm512_set1_ps(scale)));
      __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
      __m512i low = _mm512_sub_epi32(value, _mm512_slli_epi32(high, 8));
      _mm512_mask_cvtepi32_storeu_epi8(upper + i, inside(count - i), high);
      _mm512_mask_cvtepi32_storeu_epi8(lower + i, inside(count - i), low);
      above = _mm512_add_epi32(above, high);
      below = _mm512_add_epi32(below, low);
    }
    upper_sum = _mm512_reduce_add_epi32(above);
    lower_sum = _mm512_reduce_add_epi32(below);
  }

  static __mmask16 inside(int64_t count) { return count < LANES ? (1u << count) - 1 : 0xffff; }

  // The first `count` outputs of a panel from its sums of products.
  void finish(vint above, vint below, vfloat scales, int64_t count, float *out) const {
    vfloat upper = __builtin_convertvector(above - OFFSET * upper_sum, vfloat);
    vfloat lower = __builtin_convertvector(below - OFFSET * lower_sum, vfloat);
    vfloat total = (upper * 256.0f + lower) * scale * scales;
    memcpy(out, &total, count * sizeof(float));
  }
};

// All inputs; the bytes of each row follow those of the row before.
struct Inputs {
  std::vector<int8_t> bytes;
  std::vector<Input> rows;

  explicit Inputs(const Params &p) : bytes(2 * p.num_rows * depth_of(p)), rows(p.num_rows) {
    int64_t depth = depth_of(p);
    for (int64_t r = 0; r < p.num_rows; ++r) {
      rows[r].upper = bytes.data() + r * depth;
      rows[r].lower = bytes.data() + (p.num_rows + r) * depth;
      rows[r].round((const float *)p.x + r * p.num_in, p.num_in);
    }
  }
};

__m512i four_bytes(const int8_t *from) {
  int32_t bytes;
  memcpy(&bytes, from, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

// The outputs of one panel for R inputs, `count` of them.
template <int R>
void tile(const Params &p, const Input *inputs, int64_t panel, int64_t count, float *out) {
  int64_t depth = depth_of(p);
  const uint8_t *weight = (const uint8_t *)p.weight + panel * depth * OUTPUTS;
  __m512i upper[R], lower[R];
  for (int r = 0; r < R; ++r) upper[r] = lower[r] = _mm512_setzero_si512();
  for (int64_t i = 0; i < depth; i += DEPTH) {
    __m512i w = _mm512_loadu_si512(weight + i * OUTPUTS);
    for (int r = 0; r < R; ++r) {
      upper[r] = _mm512_dpbusd_epi32(upper[r], w, four_bytes(inputs[r].upper + i));
      lower[r] = _mm512_dpbusd_epi32(lower[r], w, four_bytes(inputs[r].lower + i));
    }
  }
  vfloat scales = load((const float *)p.scales + panel * OUTPUTS);
  for (int r = 0; r < R; ++r)
    inputs[r].finish((vint)upper[r], (vint)lower[r], scales, count, out + r * p.num_out);
}

#if defined(__AMX_INT8__)

// Tiles, by number, as GCC takes no names: 0 and 1 the sums of the upper and lower bytes' products,
// 2 and 3 these bytes, 4 weights; 5 to 7 are like 2 to 4, for the bytes that 64 does not divide.
constexpr int64_t WIDTH = 64;  // bytes of a tile's row

struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t num_rows, int64_t num_bytes) {
    rows[tile] = uint8_t(num_rows), row_bytes[tile] = uint16_t(num_bytes);
  }
};

// For `rows` inputs.
void configure_tiles(const Params &p, int64_t rows) {
  TileConfig config;
  int64_t rest = depth_of(p) % WIDTH;
  for (int tile = 0; tile < 4; ++tile) config.set(tile, rows, WIDTH);
  config.set(4, SIDE, WIDTH);
  if (rest) {
    for (int tile : {5, 6}) config.set(tile, rows, rest);
    config.set(7, rest / DEPTH, WIDTH);
  }
  asm volatile("" : : "r"(&config) : "memory");  // GCC 12 takes 8 bytes of it for all that is read
  _tile_loadconfig(&config);
}

void amx_tile(const Params &p, const Input *inputs, int64_t rows, int64_t panel, int64_t count,
              float *out) {
  int64_t depth = depth_of(p), i = 0;
  const uint8_t *weight = (const uint8_t *)p.weight + panel * depth * OUTPUTS;
  const int8_t *upper = inputs->upper, *lower = inputs->lower;
  _tile_zero(0);
  _tile_zero(1);
  for (; i + WIDTH <= depth; i += WIDTH) {
    _tile_loadd(4, weight + i * OUTPUTS, WIDTH);
    _tile_loadd(2, upper + i, depth);
    _tile_loadd(3, lower + i, depth);
    _tile_dpbsud(0, 2, 4);
    _tile_dpbsud(1, 3, 4);
  }
  if (i < depth) {
    _tile_loadd(7, weight + i * OUTPUTS, WIDTH);
    _tile_loadd(5, upper + i, depth);
    _tile_loadd(6, lower + i, depth);
    _tile_dpbsud(0, 5, 7);
    _tile_dpbsud(1, 6, 7);
  }
  vint above[SIDE], below[SIDE];
  _tile_stored(0, above, WIDTH);
  _tile_stored(1, below, WIDTH);
  vfloat scales = load((const float *)p.scales + panel * OUTPUTS);
  for (int64_t r = 0; r < rows; ++r)
    inputs[r].finish(above[r], below[r], scales, count, out + r * p.num_out);
}

#endif

template <int... R>
void int8_linear(const Params &p, std::integer_sequence<int, R...>) {
  constexpr decltype(&tile<1>) tiles[] = {tile<R + 1>...};
  Inputs inputs(p);
  bool serial = p.num_out * p.num_in < SERIAL_BYTES;
  int64_t num_panels = (p.num_out + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel num_threads(serial ? 1 : omp_get_max_threads())
  {
    [[maybe_unused]] int64_t configured = 0;  // rows of this thread's tiles
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      int64_t count = std::min(OUTPUTS, p.num_out - panel * OUTPUTS);
      for (int64_t r = 0, rows; r < p.num_rows; r += rows) {
        rows = std::min<int64_t>(p.num_rows - r, p.amx ? SIDE : INPUTS);
        const Input *from = inputs.rows.data() + r;
        float *to = (float *)p.out + r * p.num_out + panel * OUTPUTS;
#if defined(__AMX_INT8__)
        if (p.amx) {
          if (rows != configured) configure_tiles(p, rows);
          configured = rows;
          amx_tile(p, from, rows, panel, count, to);
          continue;
        }
#endif
        tiles[rows - 1](p, from, panel, count, to);
      }
    }
#if defined(__AMX_INT8__)
    if (configured) _tile_release();
#endif
  }
}

}  // namespace
}  // namespace specplus

// Whether the library has been built for AMX and the system lets this process use it.
extern "C" int64_t specplus_int8_linear_amx() {
#if defined(__AMX_INT8__)
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, ...)
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return 0;
#endif
}

extern "C" int64_t specplus_int8_linear(const specplus::Params *params, int64_t size) {
  using namespace specplus;
  if (size != sizeof *params) return STALE;
  int8_linear(*params, std::make_integer_sequence<int, INPUTS>());
  return 0;
}

#endif
