// row_gumbel_argmax: the exact winner without a logarithm per token.
//
// A token beats the score `best` only if -log(u) < exp(x - best), and -log(u) >= 1 - u, so u must
// lie within exp(x - best) of 1. Tokens are taken in groups of GROUP, and a lane of a group is the
// tokens that share a vector lane: one pass over the logits keeps the maximum of every lane, which
// bounds exp(x - best) for its tokens; a second pass only hashes, keeps the largest hash of every
// lane and compares it with the lane's bound. The few lanes that pass are scored in double.
// The first `best` is the score of the largest logit.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../cpu_library/simd.h"

namespace specplus {
namespace {

constexpr int64_t STEPS = 32;             // tokens of a lane
constexpr int64_t GROUP = STEPS * LANES;  // tokens of a group
constexpr int64_t SERIAL_TOKENS = 16384;  // below this one thread is faster than waking more
constexpr uint64_t GAMMA = 0x9e3779b97f4a7c15;
constexpr float LOG2E = 1.44269504f;

typedef uint64_t vlong __attribute__((vector_size(LANES * 4)));
typedef uint32_t vnarrow __attribute__((vector_size(LANES * 2)));
constexpr int HALF = LANES / 2;  // hashes of a vector

struct Params {
  int64_t logits, temperature, seeds, out, num_rows, vocab_size, row_stride, dtype;
};

struct Winner {
  double score;
  int64_t token;
  bool beats(const Winner &other) const {
    return score > other.score || (score == other.score && token < other.token);
  }
};

// SplitMix64's mixing without its last step z ^ (z >> 31), which leaves the top 31 bits alone.
template <typename V>
V mix_most(V z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  return (z ^ (z >> 27)) * 0x94d049bb133111eb;
}
uint64_t finish(uint64_t z) { return z ^ (z >> 31); }

// The largest hash of every lane of a group whose first token's counter is `start` + GAMMA;
// whether any reaches its bound.
bool largest_hashes(uint64_t start, const uint32_t *bound, uint64_t *top) {
  vlong counter[2], largest[2] = {};
  for (int lane = 0; lane < LANES; ++lane)
    counter[lane / HALF][lane % HALF] = start + uint64_t(lane + 1) * GAMMA;
#pragma GCC unroll 4
  for (int64_t step = 0; step < STEPS; ++step)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vlong z = mix_most(counter[half]);
      largest[half] = (z > largest[half]) ? z : largest[half];
      counter[half] += LANES * GAMMA;
    }
  vlong reached = {};
  for (int half = 0; half < 2; ++half) {
    vnarrow least;
    memcpy(&least, bound + half * HALF, sizeof least);
    reached |= (vlong)(largest[half] >> 33 >= __builtin_convertvector(least, vlong));
  }
  memcpy(top, largest, sizeof largest);
  uint64_t any = 0;
  for (int i = 0; i < HALF; ++i) any |= reached[i];
  return any;
}

template <typename T>
struct Row {
  const T *logits;
  int64_t vocab_size;
  float temperature;
  uint64_t key;
  float *maxima;  // [groups][LANES]

  Row(const Params &p, int64_t row, float *all_maxima)
      : logits((const T *)p.logits + row * p.row_stride),
        vocab_size(p.vocab_size),
        temperature(((const float *)p.temperature)[row]),
        key(finish(mix_most(((const uint64_t *)p.seeds)[row]))),
        maxima(all_maxima + row * num_groups(p.vocab_size) * LANES) {}

  static int64_t num_groups(int64_t vocab_size) { return (vocab_size + GROUP - 1) / GROUP; }

  void keep_maxima(int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += GROUP) {
      vfloat top[2] = {splat(-INFINITY), splat(-INFINITY)};
      int64_t last = std::min(at + GROUP, end), i = at;
      for (; i + 2 * LANES <= last; i += 2 * LANES) {
        top[0] = larger(load(logits + i), top[0]);
        top[1] = larger(load(logits + i + LANES), top[1]);
      }
      top[0] = larger(top[1], top[0]);
      for (; i < last; ++i) {
        float x = to_float(logits[i]);
        if (x > top[0][i % LANES]) top[0][i % LANES] = x;
      }
      store(maxima + at / GROUP * LANES, top[0]);
    }
  }

  // The first largest logit, scored; at temperature 0 it has won.
  Winner first_winner() const {
    const float *best = std::max_element(maxima, maxima + num_groups(vocab_size) * LANES);
    if (*best == -INFINITY) return {INFINITY, 0};
    int64_t token = (best - maxima) / LANES * GROUP;
    while (to_float(logits[token]) != *best) ++token;
    if (temperature == 0.0f) return {INFINITY, token};
    return {score(token, hash(token)), token};
  }

  uint64_t hash(int64_t token) const { return mix_most(key + uint64_t(token + 1) * GAMMA); }

  double score(int64_t token, uint64_t z) const {
    double u = (double(finish(z) >> 11) + 0.5) * 0x1p-53;
    return double(to_float(logits[token]) / temperature) - std::log(-std::log(u));
  }

  // Per lane, what the top 31 bits of a hash must reach so that its token may beat `best`: those of
  // 1 - exp(x - best), lowered by more than the rounding of fp32 and of the hash's last step.
  vuint bounds(int64_t group, double best) const {
    float low = std::nextafter(float(best), -INFINITY);
    vfloat gap = load(maxima + group * LANES) / temperature - low;
    vfloat share = exp2_vector(gap * LOG2E) * (1.001f * 0x1p31f);
    vuint bound = 0x7ffffffe - (vuint)__builtin_convertvector(share, vint);
    return (gap > -0.002f) ? vuint{} : bound;
  }

  Winner scan(int64_t begin, int64_t end, Winner winner) const {
    if (winner.score == INFINITY) return winner;
    for (int64_t at = begin; at < end; at += GROUP) {
      uint64_t top[LANES];
      uint32_t bound[LANES];
      vuint bits = bounds(at / GROUP, winner.score);
      memcpy(bound, &bits, sizeof bound);
      if (!largest_hashes(key + uint64_t(at) * GAMMA, bound, top)) continue;
      for (int lane = 0; lane < LANES; ++lane)
        if (top[lane] >> 33 >= bound[lane]) try_lane(at + lane, bound[lane], winner);
    }
    return winner;
  }

  void try_lane(int64_t token, uint32_t bound, Winner &winner) const {
    for (int step = 0; step < STEPS && token < vocab_size; ++step, token += LANES) {
      uint64_t z = hash(token);
      if (z >> 33 < bound) continue;
      Winner other = {score(token, z), token};
      if (other.beats(winner)) winner = other;
    }
  }
};

template <typename T>
void row_gumbel_argmax(const Params &p) {
  bool serial = p.num_rows * p.vocab_size < SERIAL_TOKENS;
  int threads = serial ? 1 : omp_get_max_threads();
  // Few rows are split; a segment does not see how good the winners of the others are.
  int64_t num_groups = Row<T>::num_groups(p.vocab_size);
  int64_t wanted = p.num_rows < 2 * threads && threads > 1 ? 2 * threads : 1;
  int64_t size = (num_groups + wanted - 1) / wanted * GROUP;
  int64_t num_segments = (p.vocab_size + size - 1) / size, items = p.num_rows * num_segments;
  std::vector<float> maxima(p.num_rows * num_groups * LANES);
  std::vector<Winner> first(p.num_rows), winners(items);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; ++i) {
      int64_t begin = i % num_segments * size, end = std::min(p.vocab_size, begin + size);
      Row<T>(p, i / num_segments, maxima.data()).keep_maxima(begin, end);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.num_rows; ++row)
      first[row] = Row<T>(p, row, maxima.data()).first_winner();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; ++i) {
      int64_t begin = i % num_segments * size, end = std::min(p.vocab_size, begin + size);
      Row<T> row(p, i / num_segments, maxima.data());
      winners[i] = row.scan(begin, end, first[i / num_segments]);
    }
  }
  for (int64_t row = 0; row < p.num_rows; ++row) {
    Winner best = winners[row * num_segments];
    for (int64_t s = 1; s < num_segments; ++s)
      if (winners[row * num_segments + s].beats(best)) best = winners[row * num_segments + s];
    ((int64_t *)p.out)[row] = best.token;
  }
}

}  // namespace
}  // namespace specplus

extern "C" int64_t specplus_row_gumbel_argmax(const specplus::Params *params, int64_t size) {
  using namespace specplus;
  if (size != sizeof *params) return STALE;
  switch (params->dtype) {
    case BFLOAT16: row_gumbel_argmax<bf16>(*params); break;
    case FLOAT16: row_gumbel_argmax<fp16>(*params); break;
    default: row_gumbel_argmax<float>(*params);
  }
  return 0;
}
