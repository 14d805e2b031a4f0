// A panel of queries of one key/value head, and what mask, scores and dropout do to its tile of logits, which lies
// transposed: logits[key][lane]. Lanes are rows r = t * group + g, so the heads of a group share one pass over the
// keys.
#pragma once

#include "tile.h"

namespace attnjax::ATTNJAX_ISA {

constexpr int kKeys = 128;        // of a tile: its weights stay in the first-level cache
constexpr int kHalf = kKeys / 2;  // partial tiles are looked at in halves
static_assert(kHalf % kPackedKeys == 0);
constexpr int kGroup = 2 * kTileRows;  // keys whose products skip the queries that see none of them
constexpr int kMaxDepth = 8;           // of the mask's program

// Memory of a thread, handed out piece by piece.
class Arena {
 public:
  explicit Arena(void* start) : next_(static_cast<char*>(start)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += divide_up(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return piece;
  }

 private:
  char* next_;
};

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

template <class A>
struct Panel {
  static constexpr int L = kLanes<A>;
  int64_t lane = 0, kv = 0, group = 1;  // batch entry, key/value head
  int64_t first = 0;                    // row of the first lane
  int rows = 0, vectors = 0;
  int64_t t_low = 0, t_high = 0;
  int64_t t[L], head[L];
  alignas(64) Integer<A> present[L];
  alignas(64) A scale[L];
  alignas(64) Integer<A> query_values[kMaxComparisons][L];
  alignas(64) uint32_t hash[L];

  void place(const Call& c, int64_t lane_, int64_t kv_, int64_t first_) {
    lane = lane_, kv = kv_, first = first_;
    group = c.heads / c.key_heads;
    rows = static_cast<int>(least(L, c.queries * group - first));
    vectors = static_cast<int>(divide_up(rows, kWidth<A>));
    t_low = first / group, t_high = (first + rows - 1) / group;
    int64_t query = t_low, member = first % group;
    for (int l = 0; l < L; l++) {
      t[l] = query, head[l] = kv * group + member;
      present[l] = l < rows ? -1 : 0;
      if (l + 1 < rows && ++member == group) member = 0, query++;
    }
    by_head(c.scale, scale);
    for (int i = 0; i < c.comparisons; i++) {
      const int32_t* values = reinterpret_cast<const int32_t*>(c.comparison[i].queries.at(lane, 0));
      for (int l = 0; l < L; l++) query_values[i][l] = values[t[l]];
    }
    if (c.dropout > 0) {
      const uint32_t* seeds = reinterpret_cast<const uint32_t*>(c.seeds.at(lane, 0));
      for (int l = 0; l < L; l++) hash[l] = mix(seeds[head[l]] + static_cast<uint32_t>(t[l]) * 0xC2B2AE3Du);
    }
  }

  // Where the rows of an array [lanes, T, N, columns] lie; null for lanes without a row.
  void rows_of(const Array& array, int64_t heads, int64_t columns, char** to) const {
    for (int l = 0; l < L; l++) to[l] = l < rows ? array.at(lane, (t[l] * heads + head[l]) * columns) : nullptr;
  }

  // Numbers [lanes, N] of the accumulation type.
  void by_head(const Pairs& pairs, A* to) const {
    for (int l = 0; l < L; l++) to[l] = *reinterpret_cast<const A*>(pairs.array.at(lane, head[l] * pairs.head));
  }

  // The 64 bits of each row in a block of keys, `column`; null where they are not packed.
  void rows_of(const Packed& packed, const Pairs& pairs, int64_t column, char** to) const {
    int64_t row = -1, block = -1;
    for (int l = 0; l < L; l++) {
      to[l] = nullptr;
      if (l >= rows) continue;
      const int64_t own = t[l] / packed.rows, place = t[l] % packed.rows;
      if (own != row) row = own, block = packed.find(row, column);
      if (block < 0) continue;
      const int64_t bytes = kPackedKeys / 8;
      to[l] = pairs.array.at(lane, head[l] * pairs.head + (block * packed.rows + place) * bytes);
    }
  }

  void rows_of(const Pairs& pairs, int64_t key, char** to) const {
    for (int l = 0; l < L; l++)
      to[l] = l < rows ? pairs.array.at(lane, head[l] * pairs.head + t[l] * pairs.query + key * pairs.key) : nullptr;
  }
};

// Which pairs of a tile are visible.
template <class A>
struct Seen {
  int low = 0, high = 0;          // the keys that some row sees lie in [low, high)
  Integer<A>* visible;            // [key][lane], all bits or none
  int start[kKeys / kGroup + 1];  // of each group of keys, the first vector of rows that sees one of them

  explicit Seen(Arena& arena) : visible(arena.take<Integer<A>>(kKeys * kLanes<A>)) {}
};

// part(low, high, start) for the keys of [low, high), in groups that go with the vectors of rows from `start` on.
template <class A, class Part>
inline void by_group(const Seen<A>& seen, bool masked, int low, int high, const Part& part) {
  if (!masked) {
    part(low, high, 0);
    return;
  }
  while (low < high) {
    int start = seen.start[low / kGroup], end = (low / kGroup + 1) * kGroup;
    while (end < high && seen.start[end / kGroup] == start) end += kGroup;
    end = static_cast<int>(least(end, high));
    part(low, end, start);
    low = end;
  }
}

// Memory for the parts of arrays by query and key that a tile needs.
template <class A>
struct PairsBuffer {
  A* dense[kMaxDense];
  A* bias;
  explicit PairsBuffer(const Call& c, Arena& arena) {
    for (int i = 0; i < c.denses; i++) dense[i] = arena.take<A>(kKeys * kLanes<A>);
    bias = arena.take<A>(kKeys * kLanes<A>);
  }
};

// Bits as 0 and 1, `to[key][lane]`; `key` is a multiple of kPackedKeys.
template <class A>
void fetch_bits(const Packed& packed, const Pairs& pairs, const Panel<A>& panel, int64_t key, int count, A* to) {
  char* rows[kLanes<A>];
  for (int first = 0; first < count; first += kPackedKeys) {
    panel.rows_of(packed, pairs, (key + first) / kPackedKeys, rows);
    const int end = static_cast<int>(least(count, first + kPackedKeys));
    for (int l = 0; l < panel.vectors * kWidth<A>; l++)
      for (int j = first; j < end; j++) {
        const uint8_t byte = rows[l] ? static_cast<uint8_t>(rows[l][(j - first) / 8]) : 0;
        to[j * kLanes<A> + l] = static_cast<A>(byte >> (j % 8) & 1);
      }
  }
}

template <class A>
void fetch_dense(const Call& c, const Panel<A>& panel, int64_t key, int count, PairsBuffer<A>& buffer) {
  int n = 0;
  for (int i = 0; i < c.steps; i++) {
    if (c.mask[i] != MaskStep::dense && c.mask[i] != MaskStep::bits) continue;
    const Pairs& pairs = c.dense[n];
    const Packed& packed = c.packed[n];
    A* to = buffer.dense[n++];
    char* rows[kLanes<A>];
    if (packed.rows) {
      fetch_bits(packed, pairs, panel, key, count, to);
      continue;
    }
    panel.rows_of(pairs, key, rows);
    if (pairs.key) {
      rows_to_lanes<A>(to, rows, Type::u8, count, panel.vectors);
    } else {
      for (int l = 0; l < panel.vectors * kWidth<A>; l++)
        for (int j = 0; j < count; j++) to[j * kLanes<A> + l] = rows[l] && *rows[l] ? A(1) : A(0);
    }
  }
}

template <class A>
inline bool holds_any(Vector<Integer<A>> x) {
  Integer<A> bits = 0;
  for (int l = 0; l < kWidth<A>; l++) bits |= x[l];
  return bits != 0;
}

// Evaluates the mask on the keys [key, key + count) of a partial tile.
template <class A>
void see(const Call& c, const Panel<A>& panel, int64_t key, int count, PairsBuffer<A>& buffer, Seen<A>& seen) {
  using I = Integer<A>;
  using V = Vector<I>;
  constexpr int L = kLanes<A>, W = kWidth<A>;
  fetch_dense(c, panel, key, count, buffer);
  const int32_t* keys[kMaxComparisons];
  for (int i = 0; i < c.comparisons; i++)
    keys[i] = reinterpret_cast<const int32_t*>(c.comparison[i].keys.at(panel.lane, key));
  V group[kTileVectors] = {};
  seen.low = count, seen.high = 0;
  for (int j = 0; j < count; j++) {
    V stack[kMaxDepth][kTileVectors];
    int depth = 0, comparison = 0, dense = 0;
    for (int i = 0; i < c.steps; i++) {
      switch (c.mask[i]) {
        case MaskStep::less_equal:
        case MaskStep::less:
        case MaskStep::equal:
        case MaskStep::greater_equal:
        case MaskStep::greater: {
          V k = splat<I>(keys[comparison][j]);
          for (int v = 0; v < kTileVectors; v++) {
            V q = load(panel.query_values[comparison] + v * W);
            switch (c.mask[i]) {
              case MaskStep::less_equal:
                stack[depth][v] = k <= q;
                break;
              case MaskStep::less:
                stack[depth][v] = k < q;
                break;
              case MaskStep::equal:
                stack[depth][v] = k == q;
                break;
              case MaskStep::greater_equal:
                stack[depth][v] = k >= q;
                break;
              default:
                stack[depth][v] = k > q;
                break;
            }
          }
          depth++, comparison++;
          break;
        }
        case MaskStep::dense:
        case MaskStep::bits:
          for (int v = 0; v < panel.vectors; v++)
            stack[depth][v] = load(buffer.dense[dense] + j * L + v * W) != Vector<A>{};
          for (int v = panel.vectors; v < kTileVectors; v++) stack[depth][v] = V{};
          depth++, dense++;
          break;
        case MaskStep::both:
          depth--;
          for (int v = 0; v < kTileVectors; v++) stack[depth - 1][v] &= stack[depth][v];
          break;
        case MaskStep::either:
          depth--;
          for (int v = 0; v < kTileVectors; v++) stack[depth - 1][v] |= stack[depth][v];
          break;
        case MaskStep::negate:
          for (int v = 0; v < kTileVectors; v++) stack[depth - 1][v] = ~stack[depth - 1][v];
          break;
      }
    }
    V any = {};
    for (int v = 0; v < kTileVectors; v++) {
      V x = stack[0][v] & load(panel.present + v * W);
      store(seen.visible + j * L + v * W, x);
      group[v] |= x;
      any |= x;
    }
    if (holds_any<A>(any)) seen.low = static_cast<int>(least(seen.low, j)), seen.high = j + 1;
    if ((j + 1) % kGroup == 0 || j + 1 == count) {
      int start = 0;
      while (start < panel.vectors && !holds_any<A>(group[start])) start++;
      seen.start[j / kGroup] = start;
      for (int v = 0; v < kTileVectors; v++) group[v] = V{};
    }
  }
}

// The derivatives of a score that has a number for each head: of cap * tanh(logit / cap) by the logit and, where it is
// wanted, by the cap; of factor * logit by the factor.
template <class A>
struct Slopes {
  A *by_logit = nullptr, *by_number = nullptr;
};

// Applies the scores in their order to logits[low..high). Where `slopes` are given, they are filled in.
template <class A>
void modify(const Call& c, const Panel<A>& panel, int64_t key, int low, int high, A* logits, const Slopes<A>* slopes,
            PairsBuffer<A>& buffer) {
  using V = Vector<A>;
  constexpr int L = kLanes<A>, W = kWidth<A>;
  for (int i = 0; i < c.scores; i++) {
    const Score& score = c.score[i];
    if (score.step == ScoreStep::soft_cap) {
      alignas(64) A caps[L];
      panel.by_head(score.pairs, caps);
      for (int v = 0; v < panel.vectors; v++) {
        const V cap = load(caps + v * W), inverse = splat<A>(1) / cap;
        for (int j = low; j < high; j++) {
          const int at = j * L + v * W;
          V part = load(logits + at) * inverse, tanh = hyperbolic_tangent<A>(part);
          store(logits + at, cap * tanh);
          if (!slopes) continue;
          V slope = splat<A>(1) - tanh * tanh;
          store(slopes[i].by_logit + at, slope);
          if (slopes[i].by_number) store(slopes[i].by_number + at, slope == V{} ? tanh : tanh - part * slope);
        }
      }
    } else if (score.step == ScoreStep::scale) {
      alignas(64) A factors[L];
      panel.by_head(score.pairs, factors);
      for (int j = low; j < high; j++)
        for (int v = 0; v < panel.vectors; v++) {
          const int at = j * L + v * W;
          const V logit = load(logits + at);
          if (slopes && slopes[i].by_number) store(slopes[i].by_number + at, logit);
          store(logits + at, logit * load(factors + v * W));
        }
    } else if (score.step == ScoreStep::bias) {
      char* rows[L];
      panel.rows_of(score.pairs, key + low, rows);
      if (score.pairs.key) {
        rows_to_lanes<A>(buffer.bias, rows, score.pairs.array.type, high - low, panel.vectors);
      } else {
        alignas(64) A values[L] = {};
        for (int l = 0; l < panel.rows; l++) load_row(values + l, rows[l], score.pairs.array.type, 1);
        for (int j = 0; j < high - low; j++) std::memcpy(buffer.bias + j * L, values, sizeof(values));
      }
      for (int j = low; j < high; j++)
        for (int v = 0; v < panel.vectors; v++) {
          A* at = logits + j * L + v * W;
          store(at, load(at) + load(buffer.bias + (j - low) * L + v * W));
        }
    } else {
      for (int j = low; j < high; j++) {
        int64_t shift = c.keys - 1 - (key + j);
        A* at = logits + j * L;
        if (panel.group == 1 && panel.rows == L) {
          const A* values = reinterpret_cast<const A*>(
              score.pairs.array.at(panel.lane, panel.head[0] * score.pairs.head + panel.t[0] + shift));
          for (int v = 0; v < kTileVectors; v++) store(at + v * W, load(at + v * W) + load(values + v * W));
        } else {
          for (int l = 0; l < panel.rows; l++)
            at[l] += *reinterpret_cast<const A*>(
                score.pairs.array.at(panel.lane, panel.head[l] * score.pairs.head + panel.t[l] + shift));
        }
      }
    }
  }
}

// Which weights of a key dropout keeps, all bits or none.
template <class A>
inline void kept(const Call& c, const Panel<A>& panel, int64_t key, Integer<A>* keep) {
  const uint32_t column = static_cast<uint32_t>(key) * 0x27D4EB2Fu;
  double limit = c.dropout * 4294967296.0;
  uint64_t rounded = static_cast<uint64_t>(__builtin_nearbyint(limit));
  const uint32_t threshold = rounded > 0xffffffffu ? 0xffffffffu : static_cast<uint32_t>(rounded);
  for (int l = 0; l < kLanes<A>; l++) keep[l] = mix(panel.hash[l] + column) >= threshold ? -1 : 0;
}

// Whether a logit may be -inf although the mask allows the pair.
inline bool may_forbid(const Call& c) {
  for (int i = 0; i < c.scores; i++)
    if (c.score[i].step != ScoreStep::soft_cap) return true;
  return false;
}

// How many steps a product over `size` numbers takes.
template <class A, class E>
inline int64_t depth_of(int64_t size) {
  return std::is_same_v<A, E> ? size : (size + 1) / 2;
}

// As `fetch_keys`, in pairs along the columns: `to[key][depth]`; from bfloat16.
inline void fetch_keys_paired(uint32_t* to, int64_t depth, const Call& c, const Array& array, int64_t lane, int64_t kv,
                              int64_t key, int64_t count, int64_t columns) {
  for (int64_t j = 0; j < count; j++) {
    to[j * depth + depth - 1] = 0;
    std::memcpy(to + j * depth, array.at(lane, ((key + j) * c.key_heads + kv) * columns), columns * 2);
  }
}

// In pairs along the keys: `to[key / 2][columns]`; behind an odd number of keys comes one of zeros.
inline void fetch_keys_in_pairs(uint32_t* to, const Call& c, const Array& array, int64_t lane, int64_t kv, int64_t key,
                                int64_t count, int64_t columns) {
  for (int64_t j = 0; j < count; j += 2) {
    const auto* first = reinterpret_cast<const uint16_t*>(array.at(lane, ((key + j) * c.key_heads + kv) * columns));
    const auto* second = first + c.key_heads * columns;
    uint32_t* row = to + j / 2 * columns;
    if (j + 1 < count)
      for (int64_t d = 0; d < columns; d++) row[d] = first[d] | static_cast<uint32_t>(second[d]) << 16;
    else
      for (int64_t d = 0; d < columns; d++) row[d] = first[d];
  }
}

// Rows of an array [lanes, S, K, columns] for the keys [key, key + count), as `to[key][stride]`.
template <class A>
inline void fetch_keys(A* to, int64_t stride, const Call& c, const Array& array, int64_t lane, int64_t kv, int64_t key,
                       int64_t count, int64_t columns) {
  for (int64_t j = 0; j < count; j++)
    load_row(to + j * stride, array.at(lane, ((key + j) * c.key_heads + kv) * columns), array.type, columns);
}

// Asks for rows of an array [lanes, length, heads, columns] ahead of their use, some lines at a time between other
// work: they lie too far apart for the processor to foresee, and asked for all at once they would wait for each other.
class Ahead {
 public:
  // Rows [first, end) along the length, `count` heads of each from `head` on, in about `parts` parts.
  void aim(const Array& array, int64_t lane, int64_t first, int64_t end, int64_t heads, int64_t head, int64_t count,
           int64_t columns, int64_t parts) {
    const int64_t size = size_of(array.type);
    row_ = array.at(lane, (first * heads + head) * columns);
    stride_ = heads * columns * size, width_ = count * columns * size;
    rows_ = most(0, end - first);
    step_ = divide_up(rows_, most(1, parts));
  }

  void step() {
    for (int64_t end = rows_ - least(step_, rows_); rows_ > end; rows_--, row_ += stride_)
      for (int64_t byte = 0; byte < width_; byte += 64) __builtin_prefetch(row_ + byte, 0, 2);
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0, width_ = 0, rows_ = 0, step_ = 0;
};

// Rows of `columns` numbers to lanes, in pairs where the factors are pairs; `room` is for as many rows of lanes.
template <class A, class E>
inline void factors_to_lanes(E* to, char* const* rows, Type type, int64_t columns, int vectors, A* room) {
  if constexpr (std::is_same_v<A, E>) {
    (void)room;
    rows_to_lanes<A>(to, rows, type, columns, vectors);
  } else {
    rows_to_lanes<A>(room, rows, type, columns, vectors);
    pair_rows(to, room, kLanes<A>, static_cast<int>(columns), vectors);
  }
}

}  // namespace attnjax::ATTNJAX_ISA
