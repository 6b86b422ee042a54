// kv_commit: a strided copy that never looks at what it copies. Innermost loop: the moves, since
// source and destination of a K element mostly share a cache line with those of the next move.

#include <omp.h>

#include <array>
#include <vector>

#include "../cpu_library/simd.h"

namespace specplus {
namespace {

constexpr int64_t SERIAL_ELEMENTS = 200000;  // below this one thread is faster than waking more
constexpr int64_t AHEAD = 16;  // elements of a head: those of a K column lie in as many cache lines
constexpr int64_t BAD_SLOT = 1;

struct Params {
  int64_t caches, num_caches, block_size, num_blocks, src_slots, dst_slots, num_moves;
};

struct Tiles {  // of a cache: [blocks, slot tiles, slots, heads, dim tiles, dims]
  int64_t block, slot_tile, slot, head, dim_tile, dim;
};

struct Cache {
  int64_t data;
  Tiles size, stride;  // strides in elements
  int64_t item_size;

  int64_t at(int64_t block, int64_t slot) const {
    return block * stride.block + slot / size.slot * stride.slot_tile +
           slot % size.slot * stride.slot;
  }
  int64_t num_elements() const { return size.head * size.dim_tile * size.dim; }
};

struct Move {
  int64_t src_block, src_offset, dst_block, dst_offset;
};

// The elements of one dim tile; `at` holds each move's source and destination from its start.
template <typename T>
void move_tile(T *data, int64_t dim, int64_t num_dims, const int64_t (*at)[2], int64_t count) {
  for (int64_t d = 0; d < num_dims; ++d, data += dim) {
    for (int64_t i = 0; i < count; ++i) {
      if (d + AHEAD < num_dims) __builtin_prefetch(data + at[i][0] + AHEAD * dim, 1);
      data[at[i][1]] = data[at[i][0]];
    }
  }
}

template <typename T>
void move_rows(const Cache &cache, const std::vector<Move> &moves) {
  std::vector<std::array<int64_t, 2>> at;
  for (const Move &m : moves)
    at.push_back({cache.at(m.src_block, m.src_offset), cache.at(m.dst_block, m.dst_offset)});
  const Tiles &size = cache.size, &stride = cache.stride;
  for (int64_t head = 0; head < size.head; ++head)
    for (int64_t tile = 0; tile < size.dim_tile; ++tile) {
      T *data = (T *)cache.data + head * stride.head + tile * stride.dim_tile;
      if (stride.dim == 1)
        for (const auto &[src, dst] : at) memmove(data + dst, data + src, size.dim * sizeof(T));
      else
        move_tile(data, stride.dim, size.dim, (const int64_t(*)[2])at.data(), at.size());
    }
}

int64_t read_moves(const Params &p, std::vector<Move> &moves) {
  const int64_t *src = (const int64_t *)p.src_slots, *dst = (const int64_t *)p.dst_slots;
  int64_t size = p.block_size, num_slots = p.num_blocks * size;
  for (int64_t i = 0; i < p.num_moves; ++i) {
    if (src[i] >= num_slots || dst[i] >= num_slots) return BAD_SLOT;
    if (src[i] < 0 || dst[i] < 0 || src[i] == dst[i]) continue;
    moves.push_back({src[i] / size, src[i] % size, dst[i] / size, dst[i] % size});
  }
  return 0;
}

}  // namespace
}  // namespace specplus

extern "C" int64_t specplus_kv_commit(const specplus::Params *params, int64_t size) {
  using namespace specplus;
  if (size != sizeof *params) return STALE;
  const Params &p = *params;
  std::vector<Move> moves;
  moves.reserve(p.num_moves);
  if (int64_t error = read_moves(p, moves)) return error;
  const Cache *caches = (const Cache *)p.caches;
  int64_t elements = 0;
  for (int64_t i = 0; i < p.num_caches; ++i)
    elements += int64_t(moves.size()) * caches[i].num_elements();
  bool serial = elements < SERIAL_ELEMENTS;
#pragma omp parallel for schedule(static) num_threads(serial ? 1 : omp_get_max_threads())
  for (int64_t i = 0; i < p.num_caches; ++i) switch (caches[i].item_size) {
      case 1: move_rows<uint8_t>(caches[i], moves); break;
      case 2: move_rows<uint16_t>(caches[i], moves); break;
      case 4: move_rows<uint32_t>(caches[i], moves); break;
      default: move_rows<uint64_t>(caches[i], moves);
    }
  return 0;
}
