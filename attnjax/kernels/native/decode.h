// The forward for few queries and many keys, where reading keys and values is all the work: a task has some keys of all
// heads of a batch entry, which lie side by side in memory; what tasks found is merged in the order of the keys.
#pragma once

#include "kinds.h"

namespace attnjax::ATTNJAX_ISA {

template <class A>
class Decode {
  static constexpr int L = kLanes<A>, W = kWidth<A>;
  static constexpr int kStep = 64;     // keys of all heads that are looked at together
  static constexpr int kAhead = 8192;  // bytes that are asked for ahead of their use
  static constexpr int64_t kSplit = 512, kTasks = 256;
  static_assert(kStep % W == 0);
  using V = Vector<A>;

 public:
  static constexpr int kMost = 8;  // rows of a key/value head

  static bool takes(const Call& c) {
    return c.queries * (c.heads / c.key_heads) <= least(kMost, W) && c.key_heads <= 256;
  }

  static void run(const Call& c, const Run& run) {
    const int64_t splits = most(1, least(divide_up(kTasks, c.lanes), divide_up(c.keys, kSplit)));
    const int64_t each = divide_up(divide_up(c.keys, splits), kStep) * kStep;
    const int64_t rows = c.queries * c.heads, record = c.value_size + 2;
    A* found = static_cast<A*>(run.reserve(c.lanes * splits * rows * record * static_cast<int64_t>(sizeof(A))));
    const Kinds<A> kinds(c, run);
    for_each(run, c.lanes * splits, [&](int64_t task) {
      int64_t lane = task / splits, first = least(c.keys, task % splits * each);
      Decode(c, kinds, run.scratch(bytes(c)))
          .pass(lane, first, least(c.keys, first + each), found + task * rows * record);
    });
    for_each(run, c.lanes, [&](int64_t lane) { merge(c, lane, splits, found + lane * splits * rows * record); });
    run.release(found);
  }

 private:
  // What the rows of a key/value head have summed so far.
  struct State {
    Panel<A> panel;
    A highest[kMost], total[kMost];
  };

  Decode(const Call& c, const Kinds<A>& kinds, void* memory)
      : c_(c),
        kinds_(kinds),
        rows_(static_cast<int>(c.queries * (c.heads / c.key_heads))),
        wide_h_(divide_up(c.head_size, W) * W),
        wide_v_(divide_up(c.value_size, W) * W),
        arena_(memory),
        states_(arena_.take<State>(c.key_heads)),
        query_(arena_.take<A>(c.key_heads * rows_ * wide_h_)),
        out_(arena_.take<A>(c.key_heads * rows_ * wide_v_)),
        part_(arena_.take<A>(c.key_heads * rows_ * wide_v_)),
        weights_(arena_.take<A>(c.key_heads * rows_ * kStep)),
        sums_(arena_.take<A>(c.key_heads * rows_ * W * W)),
        pairs_(arena_.take<A>(kKeys * L)),
        seen_(arena_),
        buffer_(c, arena_) {}

  static int64_t bytes(const Call& c) {
    const int64_t wide = c.head_size + 2 * c.value_size + 3 * W + kStep + W * W, rows = c.queries * c.heads;
    return (rows * wide + kKeys * L * (3 + c.denses)) * static_cast<int64_t>(sizeof(A)) +
           c.key_heads * static_cast<int64_t>(sizeof(State)) + 8192;
  }

  A* query(int64_t kv, int row) const { return query_ + (kv * rows_ + row) * wide_h_; }
  A* out(int64_t kv, int row) const { return out_ + (kv * rows_ + row) * wide_v_; }
  A* weights(int64_t kv, int row) const { return weights_ + (kv * rows_ + row) * kStep; }

  void pass(int64_t lane, int64_t first, int64_t end, A* found) {
    for (int64_t kv = 0; kv < c_.key_heads; kv++) start(lane, kv);
    for (int64_t key = next(lane, first, end); key < end; key = next(lane, key + kStep, end)) {
      const int keys = static_cast<int>(least(kStep, end - key));
      switch (c_.key.type) {
        case Type::bf16:
          step<Type::bf16>(lane, key, keys);
          break;
        case Type::f16:
          step<Type::f16>(lane, key, keys);
          break;
        default:
          step<kOwnType<A>>(lane, key, keys);
      }
    }
    for (int64_t kv = 0; kv < c_.key_heads; kv++)
      for (int r = 0; r < rows_; r++) {
        const State& state = states_[kv];
        A* to = found + (state.panel.t[r] * c_.heads + state.panel.head[r]) * (c_.value_size + 2);
        to[0] = state.highest[r];
        to[1] = state.total[r];
        std::memcpy(to + 2, out(kv, r), c_.value_size * sizeof(A));
      }
  }

  // The keys, from `key` on, that come next.
  int64_t next(int64_t lane, int64_t key, int64_t end) const {
    return key < end ? kinds_.next_key(lane, 0, 1, key) : key;
  }

  void start(int64_t lane, int64_t kv) {
    State& state = states_[kv];
    state.panel.place(c_, lane, kv, 0);
    char* rows[L];
    state.panel.rows_of(c_.query, c_.heads, c_.head_size, rows);
    for (int r = 0; r < rows_; r++) {
      A* to = query(kv, r);
      std::memset(to, 0, wide_h_ * sizeof(A));
      load_row(to, rows[r], c_.query.type, c_.head_size);
      std::memset(out(kv, r), 0, wide_v_ * sizeof(A));
      state.highest[r] = -static_cast<A>(__builtin_inf());
      state.total[r] = 0;
    }
  }

  template <Type type>
  void step(int64_t lane, int64_t key, int keys) {
    for (int from = 0; from < keys; from += W) logits<type>(lane, key, from, static_cast<int>(least(W, keys - from)));
    for (int64_t kv = 0; kv < c_.key_heads; kv++) soften(kv, key, keys);
    add_values<type>(lane, key, keys);
  }

  // A vector of numbers from memory; zeros behind the `count` that there are.
  template <Type type>
  static V fetch(const char* from, int64_t count) {
    alignas(64) A part[W] = {};
    if (count < W) {
      load_row(part, from, type, count);
      return load(part);
    }
    if constexpr (type == kOwnType<A>) {
      return load(reinterpret_cast<const A*>(from));
    } else if constexpr (sizeof(A) == 4) {
      typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
      Half half;
      std::memcpy(&half, from, sizeof(half));
      auto wide = __builtin_convertvector(half, Vector<uint32_t>);
      if constexpr (type == Type::bf16) return bits<float, uint32_t>(wide << 16);
      auto magnitude = wide & 0x7fff;
      auto usual = (magnitude << 13) + (112u << 23);
      auto tiny = bits<uint32_t, float>(__builtin_convertvector(bits<int32_t, uint32_t>(magnitude), Vector<float>) *
                                        splat(0x1p-24f));
      auto u = magnitude >= 0x7c00 ? usual + (112u << 23) : magnitude < 0x400 ? tiny : usual;
      return bits<float, uint32_t>(u | (wide & 0x8000) << 16);
    }
    return load(part);
  }

  // weights[head][row][from...] = key . query for `count` keys of all heads, in the order in which they lie in memory.
  // Sums across the lanes of a vector become sums of transposed vectors.
  template <Type type>
  void logits(int64_t lane, int64_t key, int from, int count) {
    const int64_t size = size_of(type), width = c_.head_size;
    const char* row = c_.key.at(lane, (key + from) * c_.key_heads * width);
    for (int j = 0; j < count; j++)
      for (int64_t kv = 0; kv < c_.key_heads; kv++, row += width * size) {
        A* sums = sums_ + (kv * rows_ * W + j) * W;
        if (rows_ == 1) {
          dot<type, 1>(row, query(kv, 0), sums);
        } else {
          int r = 0;
          for (; r + 4 <= rows_; r += 4) dot<type, 4>(row, query(kv, r), sums + r * W * W);
          for (; r < rows_; r++) dot<type, 1>(row, query(kv, r), sums + r * W * W);
        }
      }
    for (int64_t i = 0; i < c_.key_heads * rows_; i++) {
      V r[W];
      for (int j = 0; j < W; j++) r[j] = load(sums_ + (i * W + j) * W);
      transpose<A>(r);
      V sum = r[0];
      for (int j = 1; j < W; j++) sum += r[j];
      store(weights_ + i * kStep + from, sum * splat<A>(states_[i / rows_].panel.scale[i % rows_]));
    }
  }

  template <Type type, int rows>
  void dot(const char* key, const A* query, A* sums) const {
    V sum[rows] = {};
    const int64_t size = size_of(type);
    int64_t d = 0;
    for (; d + W <= c_.head_size; d += W) {
      __builtin_prefetch(key + d * size + kAhead, 0, 0);
      V k = fetch<type>(key + d * size, W);
      for (int r = 0; r < rows; r++) sum[r] += k * load(query + r * wide_h_ + d);
    }
    if (d < c_.head_size) {
      V k = fetch<type>(key + d * size, c_.head_size - d);
      for (int r = 0; r < rows; r++) sum[r] += k * load(query + r * wide_h_ + d);
    }
    for (int r = 0; r < rows; r++) store(sums + r * W * W, sum[r]);
  }

  // Logits to weights; what was summed before shrinks.
  void soften(int64_t kv, int64_t key, int keys) {
    State& state = states_[kv];
    const Panel<A>& panel = state.panel;
    const A lowest = -static_cast<A>(__builtin_inf());
    const int kind = kinds_.of(panel, key, key + keys);
    if (!kind) {
      for (int r = 0; r < rows_; r++)
        for (int j = 0; j < kStep; j++) weights(kv, r)[j] = 0;
      return;
    }
    if (kind == 1 || c_.scores) rules(kv, key, keys, kind == 1);
    for (int r = 0; r < rows_; r++) {
      A* logits = weights(kv, r);
      for (int j = keys; j < kStep; j++) logits[j] = lowest;
      V highest = load(logits);
      for (int j = W; j < kStep; j += W) highest = larger<A>(load(logits + j), highest);
      A most_now = state.highest[r];
      for (int l = 0; l < W; l++) most_now = highest[l] > most_now ? highest[l] : most_now;
      const A base = most_now == lowest ? A(0) : most_now;
      const A shrink = static_cast<A>(__builtin_exp(state.highest[r] - base));
      V total = {};
      for (int j = 0; j < kStep; j += W) {
        V x = load(logits + j), weight = x == splat<A>(lowest) ? V{} : exponential(x - splat<A>(base));
        total += weight;
        store(logits + j, weight);
      }
      A sum = 0;
      for (int l = 0; l < W; l++) sum += total[l];
      state.total[r] = state.total[r] * shrink + sum;
      state.highest[r] = most_now;
      A* sums = out(kv, r);
      if (shrink != 1)
        for (int64_t v = 0; v < wide_v_; v += W) store(sums + v, load(sums + v) * splat<A>(shrink));
    }
    if (c_.dropout > 0)
      for (int j = 0; j < keys; j++) {
        alignas(64) Integer<A> keep[L];
        kept(c_, panel, key + j, keep);
        for (int r = 0; r < rows_; r++)
          if (!keep[r]) weights(kv, r)[j] = 0;
      }
  }

  // Scores and mask, which take logits as [key][lane].
  void rules(int64_t kv, int64_t key, int keys, bool masked) {
    const Panel<A>& panel = states_[kv].panel;
    for (int j = 0; j < keys; j++)
      for (int l = 0; l < W; l++) pairs_[j * L + l] = l < rows_ ? weights(kv, l)[j] : A(0);
    if (c_.scores) modify<A>(c_, panel, key, 0, keys, pairs_, nullptr, buffer_);
    if (masked) see(c_, panel, key, keys, buffer_, seen_);
    for (int j = 0; j < keys; j++)
      for (int r = 0; r < rows_; r++) {
        const bool visible = !masked || seen_.visible[j * L + r];
        weights(kv, r)[j] = visible ? pairs_[j * L + r] : -static_cast<A>(__builtin_inf());
      }
  }

  // Adds weight * value for the keys of the step, of all heads, in the order in which they lie in memory; their sum,
  // and not each of them, is added to what was summed before. Keys whose weight is 0 may hold NaN.
  template <Type type>
  void add_values(int64_t lane, int64_t key, int keys) {
    const int64_t size = size_of(type), width = c_.value_size;
    const char* row = c_.value.at(lane, key * c_.key_heads * width);
    const bool careful = c_.steps || c_.kinds.data || may_forbid(c_);
    std::memset(part_, 0, c_.key_heads * rows_ * wide_v_ * sizeof(A));
    for (int j = 0; j < keys; j++)
      for (int64_t kv = 0; kv < c_.key_heads; kv++, row += width * size)
        for (int r = 0; r < rows_; r++) {
          const A weight = weights(kv, r)[j];
          if (careful && weight == 0) continue;
          A* sums = part_ + (kv * rows_ + r) * wide_v_;
          for (int64_t v = 0; v < width; v += W) {
            __builtin_prefetch(row + v * size + kAhead, 0, 0);
            store(sums + v, load(sums + v) + splat(weight) * fetch<type>(row + v * size, width - v));
          }
        }
    for (int64_t i = 0; i < c_.key_heads * rows_ * wide_v_; i += W) store(out_ + i, load(out_ + i) + load(part_ + i));
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
      A total = c.sinks.data
                    ? static_cast<A>(__builtin_exp(*reinterpret_cast<const A*>(c.sinks.at(lane, row % c.heads)) - base))
                    : A(0);
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
  const Kinds<A>& kinds_;
  const int rows_;
  const int64_t wide_h_, wide_v_;
  Arena arena_;
  State* states_;
  A *query_, *out_, *part_, *weights_;
  A* sums_;   // [head][row][key][lane]: products, not summed over the lanes yet
  A* pairs_;  // [key][lane]
  Seen<A> seen_;
  PairsBuffer<A> buffer_;
};

}  // namespace attnjax::ATTNJAX_ISA
