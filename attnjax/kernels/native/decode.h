// The forward for few queries and many keys, where reading keys and values is all the work: a task has some keys of all
// heads of a batch entry, which lie side by side in memory; what tasks found is merged in the order of the keys.
#pragma once

#include "panel.h"

namespace attnjax::ATTNJAX_ISA {

template <class A>
class Decode {
  static constexpr int L = kLanes<A>, W = kWidth<A>;
  static constexpr int kStep = 32;  // keys of all heads that are looked at together
  static constexpr int64_t kSplit = 512, kTasks = 256;
  using V = Vector<A>;

 public:
  static constexpr int kMost = 4;  // rows of a key/value head

  static bool takes(const Call& c) {
    return c.queries * (c.heads / c.key_heads) <= kMost && c.queries > 0 && c.keys > 0 && c.key_heads <= 256;
  }

  static void run(const Call& c, const Run& run) {
    const int64_t splits = most(1, least(divide_up(kTasks, c.lanes), divide_up(c.keys, kSplit)));
    const int64_t each = divide_up(divide_up(c.keys, splits), kKeys) * kKeys;
    const int64_t rows = c.queries * c.heads, record = c.value_size + 2;
    A* found = static_cast<A*>(run.reserve(c.lanes * splits * rows * record * static_cast<int64_t>(sizeof(A))));
    for_each(run, c.lanes * splits, [&](int64_t task) {
      int64_t lane = task / splits, first = task % splits * each;
      Decode(c, run.scratch(bytes(c))).pass(lane, first, least(c.keys, first + each), found + task * rows * record);
    });
    for_each(run, c.lanes, [&](int64_t lane) { merge(c, lane, splits, found + lane * splits * rows * record); });
    run.release(found);
  }

 private:
  struct State {
    Panel<A> panel;
    A* query;  // [row][H], scaled and padded
    A* out;    // [row][V], padded
    alignas(64) A highest[W], total[W];
  };

  Decode(const Call& c, void* memory)
      : c_(c),
        wide_h_(divide_up(c.head_size, W) * W),
        wide_v_(divide_up(c.value_size, W) * W),
        arena_(memory),
        states_(arena_.take<State>(c.key_heads)),
        weights_(arena_.take<A>(kKeys * L)),
        seen_(arena_),
        buffer_(c, arena_) {
    const int64_t rows = c.queries * (c.heads / c.key_heads);
    for (int64_t kv = 0; kv < c.key_heads; kv++) {
      states_[kv].query = arena_.take<A>(rows * wide_h_);
      states_[kv].out = arena_.take<A>(rows * wide_v_);
    }
  }

  static int64_t bytes(const Call& c) {
    int64_t wide = c.head_size + c.value_size + 2 * W + 64, rows = c.queries * c.heads;
    int64_t tiles = kKeys * L * (3 + c.denses) + rows * wide + 32 * c.key_heads;
    return tiles * static_cast<int64_t>(sizeof(A)) + c.key_heads * static_cast<int64_t>(sizeof(State)) + 8192;
  }

  void pass(int64_t lane, int64_t first, int64_t end, A* found) {
    for (int64_t kv = 0; kv < c_.key_heads; kv++) start(states_[kv], lane, kv);
    for (int64_t key = first; key < end; key += kStep)
      for (int64_t kv = 0; kv < c_.key_heads; kv++) {
        if (key + kStep < end) prefetch(lane, kv, key + kStep);
        step(states_[kv], key, static_cast<int>(least(kStep, end - key)));
      }
    for (int64_t kv = 0; kv < c_.key_heads; kv++) {
      State& state = states_[kv];
      for (int l = 0; l < state.panel.rows; l++) {
        A* to = found + (state.panel.t[l] * c_.heads + state.panel.head[l]) * (c_.value_size + 2);
        to[0] = state.highest[l];
        to[1] = state.total[l];
        std::memcpy(to + 2, state.out + l * wide_v_, c_.value_size * sizeof(A));
      }
    }
  }

  // Asks for a share of the keys and values of the next step, in the order in which they lie in memory.
  void prefetch(int64_t lane, int64_t kv, int64_t key) const {
    const int64_t keys = least(kStep, c_.keys - key);
    auto share = [&](const Array& array, int64_t columns) {
      const int64_t size = keys * c_.key_heads * columns * size_of(array.type);
      const char* at = array.at(lane, key * c_.key_heads * columns);
      for (int64_t i = size * kv / c_.key_heads; i < size * (kv + 1) / c_.key_heads; i += 64) __builtin_prefetch(at + i);
    };
    share(c_.key, c_.head_size);
    share(c_.value, c_.value_size);
  }

  void start(State& state, int64_t lane, int64_t kv) {
    state.panel.place(c_, lane, kv, 0);
    char* rows[L];
    state.panel.rows_of(c_.query, c_.heads, c_.head_size, rows);
    for (int l = 0; l < state.panel.rows; l++) {
      A* to = state.query + l * wide_h_;
      std::memset(to, 0, wide_h_ * sizeof(A));
      load_row(to, rows[l], c_.query.type, c_.head_size);
      for (int64_t d = 0; d < c_.head_size; d++) to[d] *= static_cast<A>(c_.scale);
    }
    std::memset(state.out, 0, state.panel.rows * wide_v_ * sizeof(A));
    store(state.highest, splat<A>(-static_cast<A>(__builtin_inf())));
    store(state.total, V{});
  }

  void step(State& state, int64_t key, int keys) {
    const Panel<A>& panel = state.panel;
    int kind = kind_of(c_, panel, key, key + keys), low = 0, high = keys;
    if (!kind) return;
    const bool masked = kind == 1;
    if (masked) {
      see(c_, panel, key, keys, buffer_, seen_);
      low = seen_.low, high = seen_.high;
      if (low >= high) return;
    }
    logits(state, key, low, high);
    if (c_.scores) modify<A>(c_, panel, key, low, high, weights_, nullptr, buffer_);
    const V lowest = splat<A>(-static_cast<A>(__builtin_inf()));
    V before = load(state.highest), highest = before;
    for (int j = low; j < high; j++) {
      V x = load(weights_ + j * L);
      if (masked) x = load(seen_.visible + j * L) ? x : lowest;
      store(weights_ + j * L, x);
      highest = larger<A>(x, highest);
    }
    V base = highest == lowest ? V{} : highest;
    V shrink = exponential(before - base), total = load(state.total) * shrink;
    for (int j = low; j < high; j++) {
      V x = load(weights_ + j * L);
      V weight = x == lowest ? V{} : exponential(x - base);
      total += weight;
      if (c_.dropout > 0) {
        alignas(64) Integer<A> keep[L];
        kept(c_, panel, key + j, keep);
        weight = load(keep) ? weight : V{};
      }
      store(weights_ + j * L, weight);
    }
    store(state.highest, highest);
    store(state.total, total);
    alignas(64) A factor[W];
    store(factor, shrink);
    for (int l = 0; l < panel.rows; l++) sum_values(state, l, factor[l], key, low, high, masked && seen_.gaps);
  }

  // `count` (at most a vector's) numbers from memory, and zeros.
  static V fetch(const char* from, Type type, int64_t count) {
    if (count >= W) {
      if (type == (sizeof(A) == 4 ? Type::f32 : Type::f64)) return load(reinterpret_cast<const A*>(from));
      if constexpr (sizeof(A) == 4) {
        if (type == Type::bf16) {
          typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
          Half half;
          std::memcpy(&half, from, sizeof(half));
          return bits<float, uint32_t>(__builtin_convertvector(half, Vector<uint32_t>) << 16);
        }
      }
    }
    alignas(64) A part[W] = {};
    load_row(part, from, type, least(count, W));
    return load(part);
  }

  // weights[key][row] = key . query: W keys at a time, so that sums across lanes become sums of transposed vectors.
  void logits(State& state, int64_t key, int low, int high) {
    const int64_t size = size_of(c_.key.type), stride = c_.key_heads * c_.head_size * size;
    const char* first = c_.key.at(state.panel.lane, (key * c_.key_heads + state.panel.kv) * c_.head_size);
    for (int j = low; j < high; j += W) {
      const int count = static_cast<int>(least(W, high - j));
      for (int l = 0; l < state.panel.rows; l++) {
        const A* query = state.query + l * wide_h_;
        V sums[W];
        for (int i = 0; i < W; i++) {
          const char* row = first + (j + least(i, count - 1)) * stride;
          V even = {}, odd = {};
          int64_t d = 0;
          for (; d + 2 * W <= c_.head_size; d += 2 * W) {
            even += fetch(row + d * size, c_.key.type, W) * load(query + d);
            odd += fetch(row + (d + W) * size, c_.key.type, W) * load(query + d + W);
          }
          for (; d < c_.head_size; d += W) even += fetch(row + d * size, c_.key.type, c_.head_size - d) * load(query + d);
          sums[i] = even + odd;
        }
        transpose<A>(sums);
        V sum = sums[0];
        for (int i = 1; i < W; i++) sum += sums[i];
        for (int i = 0; i < count; i++) weights_[(j + i) * L + l] = sum[i];
      }
    }
    for (int j = low; j < high; j++)
      for (int l = state.panel.rows; l < W; l++) weights_[j * L + l] = 0;
  }

  void sum_values(State& state, int l, A shrink, int64_t key, int low, int high, bool gaps) {
    constexpr int N = 8;  // vectors of the output at a time
    const int64_t size = size_of(c_.value.type), stride = c_.key_heads * c_.value_size * size;
    const char* first = c_.value.at(state.panel.lane, (key * c_.key_heads + state.panel.kv) * c_.value_size);
    for (int64_t v = 0; v < wide_v_; v += N * W) {
      A* out = state.out + l * wide_v_ + v;
      const int vectors = static_cast<int>(least(N, (wide_v_ - v) / W));
      V sums[N];
      for (int n = 0; n < N; n++) sums[n] = n < vectors ? load(out + n * W) * shrink : V{};
      const bool whole = vectors == N && c_.value_size - v >= N * W;
      for (int j = low; j < high; j++) {
        if (gaps && !seen_.key[j]) continue;
        const V weight = splat(weights_[j * L + l]);
        const char* row = first + j * stride + v * size;
        if (whole) {
          for (int n = 0; n < N; n++) sums[n] += weight * fetch(row + n * W * size, c_.value.type, W);
        } else {
          for (int n = 0; n < vectors; n++)
            sums[n] += weight * fetch(row + n * W * size, c_.value.type, c_.value_size - v - n * W);
        }
      }
      for (int n = 0; n < vectors; n++) store(out + n * W, sums[n]);
    }
  }

  static void merge(const Call& c, int64_t lane, int64_t splits, const A* found) {
    const int64_t rows = c.queries * c.heads, record = c.value_size + 2;
    const A lowest = -static_cast<A>(__builtin_inf());
    for (int64_t row = 0; row < rows; row++) {
      A highest = lowest;
      if (c.sinks.data) highest = *reinterpret_cast<const A*>(c.sinks.at(lane, row % c.heads));
      for (int64_t i = 0; i < splits; i++) {
        A one = found[(i * rows + row) * record];
        highest = one > highest ? one : highest;
      }
      const A base = highest == lowest ? A(0) : highest;
      A total = c.sinks.data ? static_cast<A>(__builtin_exp(*reinterpret_cast<const A*>(c.sinks.at(lane, row % c.heads)) - base)) : A(0);
      const int64_t at = lane * rows + row;
      char* to = static_cast<char*>(c.out) + at * c.value_size * size_of(c.query.type);
      for (int64_t i = 0; i < splits; i++) {
        const A* one = found + (i * rows + row) * record;
        total += one[1] * static_cast<A>(__builtin_exp(one[0] - base));
      }
      const A factor = total == 0 ? A(0) : 1 / (total * static_cast<A>(1 - c.dropout));
      for (int64_t v = 0; v < c.value_size; v += W) {
        const int64_t count = least(W, c.value_size - v);
        alignas(64) A sum[W] = {};
        for (int64_t i = 0; i < splits; i++) {
          const A* one = found + (i * rows + row) * record;
          const A weight = static_cast<A>(__builtin_exp(one[0] - base)) * factor;
          for (int64_t n = 0; n < count; n++) sum[n] += weight * one[2 + v + n];
        }
        store_row(to + v * size_of(c.query.type), sum, c.query.type, count);
      }
      static_cast<A*>(c.highest)[at] = highest;
      static_cast<A*>(c.total)[at] = total;
    }
  }

  const Call& c_;
  const int64_t wide_h_, wide_v_;
  Arena arena_;
  State* states_;
  A* weights_;
  Seen<A> seen_;
  PairsBuffer<A> buffer_;
};

}  // namespace attnjax::ATTNJAX_ISA
