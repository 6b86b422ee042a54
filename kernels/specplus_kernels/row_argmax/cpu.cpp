// row_argmax: one pass takes the maximum of every chunk of columns, then each row scans only its
// first winning chunk for the first element that equals the maximum.

#include <omp.h>

#include <algorithm>
#include <vector>

#include "../cpu_library/simd.h"

namespace specplus {
namespace {

constexpr int64_t CHUNK = 4096;            // columns: the second pass reads one chunk from L1
constexpr int64_t SERIAL_BYTES = 1 << 20;  // below this waking threads gains nothing

struct Params {
  int64_t logits, out, num_rows, vocab_size, row_stride, dtype;
};

template <typename T>
float chunk_maximum(const T *row, int64_t count) {
  constexpr int N = 8;  // independent maxima: enough to hide the latency of a comparison
  vfloat best[N];
  for (int n = 0; n < N; ++n) best[n] = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + N * LANES <= count; i += N * LANES) {
    vfloat group[N];
    load_group<N>(row + i, group);  // the order does not matter
    for (int n = 0; n < N; ++n) best[n] = larger(group[n], best[n]);
  }
  for (int n = 1; n < N; ++n) best[0] = larger(best[n], best[0]);
  float result = maximum(best[0]);
  for (; i < count; ++i) result = to_float(row[i]) > result ? to_float(row[i]) : result;
  return result;
}

template <typename T>
int64_t finish_row(const T *row, const float *maxima, int64_t num_chunks) {
  const float *best = std::max_element(maxima, maxima + num_chunks);  // the first of equals
  if (*best == -__builtin_inff()) return 0;
  int64_t i = (best - maxima) * CHUNK;
  while (to_float(row[i]) != *best) ++i;
  return i;
}

template <typename T>
void row_argmax(const Params &p) {
  const T *logits = (const T *)p.logits;
  int64_t *out = (int64_t *)p.out;
  int64_t num_chunks = (p.vocab_size + CHUNK - 1) / CHUNK;
  std::vector<float> maxima(p.num_rows * num_chunks);
  bool serial = p.num_rows * p.vocab_size * int64_t(sizeof(T)) < SERIAL_BYTES;
#pragma omp parallel for schedule(static) num_threads(serial ? 1 : omp_get_max_threads())
  for (int64_t i = 0; i < p.num_rows * num_chunks; ++i) {
    int64_t row = i / num_chunks, begin = i % num_chunks * CHUNK;
    maxima[i] = chunk_maximum(logits + row * p.row_stride + begin,
                              std::min(CHUNK, p.vocab_size - begin));
  }
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const float *of_row = maxima.data() + row * num_chunks;
    out[row] = finish_row(logits + row * p.row_stride, of_row, num_chunks);
  }
}

}  // namespace
}  // namespace specplus

extern "C" int64_t specplus_row_argmax(const specplus::Params *params, int64_t size) {
  using namespace specplus;
  if (size != sizeof *params) return STALE;
  switch (params->dtype) {
    case BFLOAT16: row_argmax<bf16>(*params); break;
    case FLOAT16: row_argmax<fp16>(*params); break;
    default: row_argmax<float>(*params);
  }
  return 0;
}
