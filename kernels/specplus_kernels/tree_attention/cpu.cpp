// tree_attention for vLLM's KV layouts "vec" and "amx". The formula is in __init__.py.
//
// One work item = one request, one KV head, up to MAX_SUBTILES register tiles of ROWS query rows
// (rows x heads of the group). It walks the slots in tiles of 64, so what a row sees of a tile is
// one 64-bit word. Online softmax in base 2 and fp32; a tile's scores and the running output stay
// in the item's scratch. Slots that no row of a register tile sees are never read as values, and a
// value that only some rows see is masked bitwise for the others: garbage cannot leak as 0 * NaN.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../cpu_library/simd.h"

namespace specplus {
namespace {

constexpr int TILE = 64;                    // slots of a key tile: the bits of a word
constexpr int MAX_ROWS = ACCUMULATORS / 2;  // rows of a register tile
constexpr int MAX_SUBTILES = 4;             // register tiles of an item: they share K and V in L2
constexpr int WORDS = 3;                    // ancestor words of a row and one of zeros
constexpr float LOG2E = 1.44269504f;
constexpr double SERIAL_WORK = 1.5e6;  // multiply-adds below which waking threads costs more

enum Error : int64_t { OK = 0, TOO_MANY_ROWS = 1, BLOCK_TABLE = 2 };

struct Params {
  int64_t query, key, value, out, block_table, query_start_loc, context_lens, ancestor_mask;
  int64_t positions, requests, sinks;  // 0: none
  int64_t dtype, num_requests, num_heads, num_kv_heads, head_size, block_size, num_blocks;
  int64_t max_blocks, words, window;  // window 0: none
  int64_t amx;                        // whether the layout is "amx", else it is "vec"
  int64_t query_row, query_head, out_row, out_head, table_row, mask_row, cache_block, cache_head;
  double scale, soft_cap;  // soft_cap 0: none
};

struct Item {
  int64_t request, kv_head, first, count;  // rows [first, first + count) of request x group
};

struct Row {  // one (query row, head) of an item
  int64_t token, head, low;  // low: first context slot that the window leaves
  uint64_t tail[WORDS];      // visible tail slots
  float peak, norm;          // running maximum (base 2) and sum of the softmax
};

template <int ROWS>
constexpr int tile_vectors() {
  return std::min(4, ACCUMULATORS / ROWS);  // at least the two of a load2
}

// K of a (block, head) is [head_size, block_size], V is [block_size, head_size].
template <typename T>
struct Vec {
  using Element = T;
  static constexpr int PAIR = 1;
  int64_t block_size, head_size;

  int64_t slot_of_key(int64_t slot) const { return slot; }
  int64_t slot_of_value(int64_t slot) const { return slot * head_size; }
  int64_t dim_of_value(int64_t dim) const { return dim; }

  template <int NV>
  void keys(const T *k, int64_t d, vfloat (*group)[NV]) const {
    load_group<NV>(k + d * block_size, group[0]);
  }
  template <int NV>
  void values(const T *v, int s, vfloat (*group)[NV]) const {
    load_group<NV>(v + s * head_size, group[0]);
  }
  template <int N>
  static void sort(vfloat *group) {
    sort_group<N, T>(group);
  }
  template <int N>
  static void put(T *to, const vfloat *group) {
    store_group<N>(to, group);
  }
};

// K is [block_size / 16, head_size / 2, 16 slots, 2 dims], V is [head_size / 16, block_size / 2,
// 16 dims, 2 slots], in bf16: a pair is a 32-bit word.
struct Amx {
  using Element = bf16;
  static constexpr int PAIR = 2, SIDE = 16;
  int64_t block_size, head_size;

  int64_t slot_of_key(int64_t slot) const {
    return slot / SIDE * SIDE * head_size + slot % SIDE * PAIR;
  }
  int64_t slot_of_value(int64_t slot) const { return slot * SIDE; }
  int64_t dim_of_value(int64_t dim) const {
    return dim / SIDE * SIDE * block_size + dim % SIDE * PAIR;
  }

  template <int NV>
  void keys(const bf16 *k, int64_t d, vfloat (*group)[NV]) const {
    for (int n = 0; n < NV; ++n)
      split(k + slot_of_key(n * LANES) + d * SIDE, group[0][n], group[1][n]);
  }
  template <int NV>
  void values(const bf16 *v, int s, vfloat (*group)[NV]) const {
    for (int n = 0; n < NV; ++n)
      split(v + dim_of_value(n * LANES) + s * SIDE, group[0][n], group[1][n]);
  }
  static void split(const bf16 *from, vfloat &first, vfloat &second) {
    vuint pairs;
    memcpy(&pairs, from, sizeof pairs);
    first = (vfloat)(pairs << 16);
    second = (vfloat)(pairs & 0xffff0000u);
  }
  template <int N>
  static void sort(vfloat *) {}
  template <int N>
  static void put(bf16 *to, const vfloat *group) {
    for (int n = 0; n < N; ++n) store(to + n * LANES, group[n]);
  }
};

// scores[r][s] = q[r] . k[:, s] for NV vectors of slots; q is [head_size][ROWS].
template <int ROWS, int NV, typename Layout>
void score_keys(const Layout &layout, const float *q, const typename Layout::Element *k,
                float *scores) {
  vfloat acc[ROWS][NV] = {};
  for (int64_t d = 0; d < layout.head_size; d += Layout::PAIR) {
    vfloat keys[Layout::PAIR][NV];
    layout.template keys<NV>(k, d, keys);
#pragma GCC unroll 2
    for (int pair = 0; pair < Layout::PAIR; ++pair, q += ROWS)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) acc[r][n] += q[r] * keys[pair][n];
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    Layout::template sort<NV>(acc[r]);
    store_group<NV>(scores + r * TILE, acc[r]);
  }
}

// out[r] = out[r] * decay[r] + sum_s weights[r][s] * v[s] over the slots of `some`. Outside `all`
// the rows with weight 0 must not touch the value. `out` keeps the layout's group order.
template <int ROWS, int NV, typename Layout>
void add_values(const Layout &layout, const float *weights, const typename Layout::Element *v,
                uint64_t some, uint64_t all, const float *decay, float *out) {
  vfloat acc[ROWS][NV];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n)
      acc[r][n] = load(out + r * layout.head_size + n * LANES) * decay[r];
  while (some) {
    int first = __builtin_ctzll(some) / Layout::PAIR * Layout::PAIR;
    vfloat values[Layout::PAIR][NV];
    layout.template values<NV>(v, first, values);
#pragma GCC unroll 2
    for (int pair = 0; pair < Layout::PAIR; ++pair) {
      int s = first + pair;
      if (all >> s & 1) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n) acc[r][n] += weights[r * TILE + s] * values[pair][n];
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          vint seen = splat(weights[r * TILE + s]) != 0.0f;
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n)
            acc[r][n] += weights[r * TILE + s] * (vfloat)((vint)values[pair][n] & seen);
        }
      }
      some &= ~(1ull << s);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) store(out + r * layout.head_size + n * LANES, acc[r][n]);
}

// Turns a row's scores into weights, updates its peak and norm, returns the decay of its output.
float soften(float *scores, uint64_t visible, float soft_cap, Row &row) {
  const vint lane_bit = [] {
    vint bits;
    for (int i = 0; i < LANES; ++i) bits[i] = 1 << i;
    return bits;
  }();
  vfloat top = splat(-INFINITY);
  for (int at = 0; at < TILE; at += LANES) {
    vfloat x = load(scores + at);
    if (soft_cap != 0) {  // cap * tanh(x / cap), then to base 2
      vfloat power = x * (2.0f * LOG2E / soft_cap);
      power = (power > 100.0f) ? splat(100.0f) : power;
      x = soft_cap * LOG2E * (1.0f - 2.0f / (exp2_vector(power) + 1.0f));
    }
    vint word = vint{} + int32_t(visible >> at & ((1u << LANES) - 1));
    x = ((word & lane_bit) != 0) ? x : splat(-INFINITY);
    top = larger(x, top);
    store(scores + at, x);
  }
  float peak = std::max(row.peak, maximum(top));
  if (peak == -INFINITY) {  // nothing visible yet
    for (int at = 0; at < TILE; at += LANES) store(scores + at, vfloat{});
    return 1.0f;
  }
  vfloat total = {};
  for (int at = 0; at < TILE; at += LANES) {
    vfloat x = load(scores + at);
    vfloat weight = (x == -INFINITY) ? vfloat{} : exp2_vector(x - peak);
    total += weight;
    store(scores + at, weight);
  }
  float decay = row.peak == -INFINITY ? 0.0f : std::exp2(row.peak - peak);
  row.norm = row.norm * decay + sum(total);
  row.peak = peak;
  return decay;
}

template <typename Layout>
class Worker {
  using T = typename Layout::Element;

 public:
  explicit Worker(const Params &params)
      : p(params),
        layout{p.block_size, p.head_size},
        queries(new float[MAX_SUBTILES * MAX_ROWS * p.head_size]),
        output(new float[(MAX_SUBTILES + 1) * MAX_ROWS * p.head_size]) {}

  void run(const Item &item) {
    const int32_t *starts = (const int32_t *)p.query_start_loc;
    first_token = starts[item.request];
    num_rows = starts[item.request + 1] - first_token;
    context = ((const int32_t *)p.context_lens)[item.request];
    table = (const int32_t *)p.block_table + item.request * p.table_row;
    for (int64_t i = 0; i < item.count; ++i) begin_row(item, i);
    std::fill_n(output.get(), (item.count + MAX_ROWS - 1) * p.head_size, 0.0f);
    int64_t low = context;
    for (int64_t i = 0; i < item.count; ++i) low = std::min(low, rows[i].low);
    int64_t end = context + num_rows;
    for (int64_t slot = low / TILE * TILE; slot < end;) slot = walk_tile(item, slot, end);
    for (int64_t i = 0; i < item.count; ++i) end_row(i);
  }

 private:
  const Params &p;
  const Layout layout;
  std::unique_ptr<float[]> queries;  // [subtile][head_size][ROWS], scaled
  std::unique_ptr<float[]> output;   // [row][head_size], not yet divided by the norm
  float scores[MAX_ROWS * TILE];
  Row rows[MAX_SUBTILES * MAX_ROWS];
  int64_t first_token, num_rows, context;
  const int32_t *table;

  static int tile_rows(int64_t left) { return left > 4 ? 8 : left > 2 ? 4 : left; }

  void begin_row(const Item &item, int64_t i) {
    Row &row = rows[i];
    int64_t group = p.num_heads / p.num_kv_heads, index = item.first + i;
    row.token = first_token + index / group;
    row.head = item.kv_head * group + index % group;
    row.low = 0;
    row.peak = p.sinks ? ((const float *)p.sinks)[row.head] * LOG2E : -INFINITY;
    row.norm = p.sinks ? 1.0f : 0.0f;
    see_tail(row);
    int64_t subtile = i / MAX_ROWS, lane = i % MAX_ROWS;
    int width = tile_rows(std::min<int64_t>(MAX_ROWS, item.count - subtile * MAX_ROWS));
    float *to = queries.get() + subtile * MAX_ROWS * p.head_size;
    const T *from = (const T *)p.query + row.token * p.query_row + row.head * p.query_head;
    float scale = float(p.scale) * (p.soft_cap != 0 ? 1.0f : LOG2E);
    for (int64_t d = 0; d < p.head_size; ++d) to[d * width + lane] = to_float(from[d]) * scale;
    if (i == item.count - 1)  // rows that only pad the register tile
      for (int64_t pad = lane + 1; pad < width; ++pad)
        for (int64_t d = 0; d < p.head_size; ++d) to[d * width + pad] = 0.0f;
  }

  void see_tail(Row &row) {
    const int64_t *mask = (const int64_t *)p.ancestor_mask + row.token * p.mask_row;
    for (int w = 0; w < WORDS; ++w) {
      int64_t bits = std::min<int64_t>(64, std::max<int64_t>(0, num_rows - 64 * w));
      uint64_t inside = bits == 64 ? ~0ull : (1ull << bits) - 1;
      row.tail[w] = bits ? uint64_t(mask[w]) & inside : 0;
    }
    if (!p.window) return;
    const int64_t *positions = (const int64_t *)p.positions;
    int64_t oldest = positions[row.token] - p.window;  // the last position out of sight
    row.low = std::min(context, std::max<int64_t>(0, oldest + 1));
    for (int w = 0; w < WORDS; ++w)
      for (uint64_t rest = row.tail[w]; rest; rest &= rest - 1) {
        int bit = __builtin_ctzll(rest);
        if (positions[first_token + 64 * w + bit] <= oldest) row.tail[w] &= ~(1ull << bit);
      }
  }

  // Bits of the slots [slot, slot + 64) that the row sees.
  uint64_t visible(const Row &row, int64_t slot) const {
    uint64_t word = 0;
    if (slot < context) {
      int64_t to = std::min<int64_t>(64, context - slot);
      int64_t from = std::min(to, std::max<int64_t>(0, row.low - slot));
      uint64_t upto = to == 64 ? ~0ull : (1ull << to) - 1;
      word = from == 64 ? 0 : upto & (~0ull << from);
    }
    int64_t bit = slot - context;  // tail slot of bit 0; may be negative
    if (bit <= -64) return word;
    if (bit < 0) return word | row.tail[0] << -bit;
    uint64_t tail = row.tail[bit / 64] >> (bit % 64);
    return bit % 64 ? word | tail | row.tail[bit / 64 + 1] << (64 - bit % 64) : word | tail;
  }

  // One key tile; it ends at 64 slots, the block's end or `end`. Returns the next tile's slot.
  int64_t walk_tile(const Item &item, int64_t slot, int64_t end) {
    int64_t offset = slot % p.block_size;
    int64_t size = std::min({int64_t(TILE), p.block_size - offset, end - slot});
    int64_t at = table[slot / p.block_size] * p.cache_block + item.kv_head * p.cache_head;
    const T *k = (const T *)p.key + at + layout.slot_of_key(offset);
    const T *v = (const T *)p.value + at + layout.slot_of_value(offset);
    for (int64_t i = 0; i < item.count; i += MAX_ROWS) {
      int64_t left = std::min<int64_t>(MAX_ROWS, item.count - i);
      switch (tile_rows(left)) {
        case 8: attend<8>(i, left, k, v, slot, size); break;
        case 4: attend<4>(i, left, k, v, slot, size); break;
        case 2: attend<2>(i, left, k, v, slot, size); break;
        default: attend<1>(i, left, k, v, slot, size);
      }
    }
    return slot + std::min(int64_t(TILE), p.block_size - offset);
  }

  template <int ROWS>
  void attend(int64_t first, int64_t count, const T *k, const T *v, int64_t slot, int64_t size) {
    uint64_t words[ROWS] = {}, some = 0, all = ~0ull;
    uint64_t inside = size == 64 ? ~0ull : (1ull << size) - 1;
    for (int r = 0; r < count; ++r) {
      words[r] = visible(rows[first + r], slot) & inside;
      some |= words[r];
      all &= words[r];
    }
    if (!some) return;
    const float *q = queries.get() + first * p.head_size;
    constexpr int NV = tile_vectors<ROWS>();
    int64_t at = 0;
    for (; at + NV * LANES <= size; at += NV * LANES)
      score_keys<ROWS, NV>(layout, q, k + layout.slot_of_key(at), scores + at);
    for (; at < size; at += LANES)  // whole vectors: a block holds a multiple of 16 slots
      score_keys<ROWS, 1>(layout, q, k + layout.slot_of_key(at), scores + at);
    float decay[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      Row unused = {};
      unused.peak = -INFINITY;
      Row &row = r < count ? rows[first + r] : unused;
      decay[r] = soften(scores + r * TILE, words[r], float(p.soft_cap), row);
    }
    int64_t d = 0;
    for (; d + NV * LANES <= p.head_size; d += NV * LANES)
      mix<ROWS, NV>(first, d, v, some, all, decay);
    for (; d + 2 * LANES <= p.head_size; d += 2 * LANES)
      mix<ROWS, 2>(first, d, v, some, all, decay);
    if (d < p.head_size) mix<ROWS, 1>(first, d, v, some, all, decay);
  }

  template <int ROWS, int NV>
  void mix(int64_t first, int64_t d, const T *v, uint64_t some, uint64_t all, const float *decay) {
    float *out = output.get() + first * p.head_size + d;
    add_values<ROWS, NV>(layout, scores, v + layout.dim_of_value(d), some, all, decay, out);
  }

  void end_row(int64_t i) {
    const Row &row = rows[i];
    T *to = (T *)p.out + row.token * p.out_row + row.head * p.out_head;
    const float *from = output.get() + i * p.head_size;
    float scale = row.norm == 0.0f ? 0.0f : 1.0f / row.norm;
    int64_t d = 0;
    for (; d + 2 * LANES <= p.head_size; d += 2 * LANES) {
      vfloat pair[2] = {load(from + d) * scale, load(from + d + LANES) * scale};
      Layout::template put<2>(to + d, pair);
    }
    if (d < p.head_size) store(to + d, load(from + d) * scale);
  }
};

struct Work {
  std::vector<Item> items;
  double multiply_adds = 0;
};

int64_t check(const Params &p, int64_t request) {
  const int32_t *starts = (const int32_t *)p.query_start_loc;
  int64_t rows = starts[request + 1] - starts[request];
  int64_t slots = ((const int32_t *)p.context_lens)[request] + rows;
  if (rows > 64 * std::min<int64_t>(p.words, WORDS - 1)) return TOO_MANY_ROWS;
  if (slots > p.max_blocks * p.block_size) return BLOCK_TABLE;
  const int32_t *table = (const int32_t *)p.block_table + request * p.table_row;
  for (int64_t slot = 0; slot < slots; slot += p.block_size) {
    int64_t block = table[slot / p.block_size];
    if (block < 0 || block >= p.num_blocks) return BLOCK_TABLE;
  }
  return OK;
}

// Items of `subtiles` register tiles each: many small ones when there are threads to feed.
void list_items(const Params &p, int64_t request, int subtiles, Work &work) {
  const int32_t *starts = (const int32_t *)p.query_start_loc;
  int64_t rows = starts[request + 1] - starts[request];
  int64_t grouped = rows * (p.num_heads / p.num_kv_heads);
  int64_t slots = ((const int32_t *)p.context_lens)[request] + rows;
  if (p.window) slots = std::min(slots, p.window + rows);
  work.multiply_adds += 2.0 * rows * p.num_heads * slots * p.head_size;
  int64_t size = subtiles * MAX_ROWS;
  for (int64_t head = 0; head < p.num_kv_heads; ++head)
    for (int64_t first = 0; first < grouped; first += size)
      work.items.push_back({request, head, first, std::min(size, grouped - first)});
}

template <typename Layout>
int64_t attention(const Params &p) {
  const int32_t *requests = (const int32_t *)p.requests;
  Work work;
  int threads = omp_get_max_threads();
  for (int subtiles = MAX_SUBTILES; subtiles; subtiles /= 2) {
    work = {};
    for (int64_t i = 0; i < p.num_requests; ++i) {
      int64_t request = requests ? requests[i] : i;
      if (int64_t error = check(p, request)) return error * (1ll << 32) + request;
      list_items(p, request, subtiles, work);
    }
    if (work.multiply_adds < SERIAL_WORK) threads = 1;
    if (int64_t(work.items.size()) >= 2 * threads || threads == 1) break;
  }
  threads = std::min<int>(threads, std::max<size_t>(1, work.items.size()));
  if (threads == 1) {
    Worker<Layout> worker(p);
    for (const Item &item : work.items) worker.run(item);
    return OK;
  }
#pragma omp parallel num_threads(threads)
  {
    Worker<Layout> worker(p);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < work.items.size(); ++i) worker.run(work.items[i]);
  }
  return OK;
}

}  // namespace
}  // namespace specplus

extern "C" int64_t specplus_tree_attention(const specplus::Params *params, int64_t size) {
  using namespace specplus;
  if (size != sizeof *params) return STALE;
  switch (params->dtype) {
    case BFLOAT16: return params->amx ? attention<Amx>(*params) : attention<Vec<bf16>>(*params);
    case FLOAT16: return attention<Vec<fp16>>(*params);
    default: return attention<Vec<float>>(*params);
  }
}
