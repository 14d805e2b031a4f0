// The forward: softmax(logits) values, a task for some panels of one key/value head, passing over its keys once.
#pragma once

#include "kinds.h"
#include "nonfinite.h"

namespace attnjax::ATTNJAX_ISA {

// E is the type of the factors of the products: A, or uint32_t for pairs of bfloat16.
template <class A, class E>
class Forward {
  static constexpr int L = kLanes<A>, W = kWidth<A>;
  static constexpr bool kPaired = !std::is_same_v<A, E>;
  using V = Vector<A>;

  // What a panel has summed so far.
  struct State {
    Panel<A> panel;
    E* query;  // [H][lane]
    A* out;    // [V][lane]
    bool started;
    alignas(64) A highest[L], total[L];
  };

 public:
  static void run(const Call& c, const Run& run) {
    const int64_t rows = c.queries * (c.heads / c.key_heads), heads = c.lanes * c.key_heads;
    const int64_t each = (c.head_size + c.value_size) * L * static_cast<int64_t>(sizeof(A));
    // The more panels share the keys that were fetched the better, while they fit into the second-level cache and there
    // is enough for every thread to do. How panels are shared out changes no result.
    const int64_t fair = rows * heads / (4 * run.threads * L);
    const int64_t panels = least(divide_up(rows, L), most(1, least(least(512 / L, (1 << 18) / each), fair)));
    const int64_t blocks = divide_up(rows, panels * L);
    const Kinds<A> kinds(c, run);
    for_each(run, heads * blocks, [&](int64_t task) {
      int64_t head = task % heads, block = blocks - 1 - task / heads;  // under a causal mask the last ones see the most
      int64_t first = block * panels * L;
      Forward(c, run, kinds, panels)
          .block(head / c.key_heads, head % c.key_heads, first, least(rows, first + panels * L));
    });
  }

 private:
  Forward(const Call& c, const Run& run, const Kinds<A>& kinds, int64_t panels)
      : Forward(c, kinds, run.scratch(bytes(c, panels)), panels) {}

  Forward(const Call& c, const Kinds<A>& kinds, void* memory, int64_t panels)
      : c_(c),
        kinds_(kinds),
        arena_(memory),
        states_(arena_.take<State>(panels)),
        depth_(depth_of<A, E>(c.head_size)),
        key_(arena_.take<E>(kKeys * depth_)),
        value_(arena_.take<E>(kKeys * c.value_size)),
        clean_(arena_.take<E>(kKeys * c.value_size)),
        weights_(arena_.take<A>(kKeys * L)),
        pairs_(kPaired ? arena_.take<E>(most(kKeys, 2 * c.head_size) / 2 * L) : nullptr),
        seen_(arena_),
        buffer_(c, arena_) {
    for (int64_t p = 0; p < panels; p++) {
      states_[p].query = arena_.take<E>(depth_ * L);
      states_[p].out = arena_.take<A>(c.value_size * L);
    }
  }

  static int64_t bytes(const Call& c, int64_t panels) {
    int64_t tiles = kKeys * (c.head_size + 2 * c.value_size) + kKeys * L * (4 + c.denses) + c.head_size * L;
    int64_t each = (c.head_size + c.value_size) * L;
    return (tiles + panels * each) * static_cast<int64_t>(sizeof(A)) + panels * static_cast<int64_t>(sizeof(State)) +
           8192;
  }

  void block(int64_t lane, int64_t kv, int64_t first, int64_t end) {
    int count = 0;
    for (int64_t row = first; row < end; row += L) start(states_[count++], lane, kv, row);
    const int64_t panel = first / L;
    for (int64_t key = next(lane, panel, count, 0); key < c_.keys; key = next(lane, panel, count, key + kKeys)) {
      const int64_t keys = least(kKeys, c_.keys - key);
      bool fetched = false;
      for (int p = 0; p < count; p++) {
        State& state = states_[p];
        int kind = kinds_.of(state.panel, key, key + keys);
        if (!kind) continue;
        if (!fetched) {
          fetch(lane, kv, key, keys);
          fetched = true;
          look_ahead(lane, kv, key + kKeys, count);
        }
        if (kind == 2) {
          tile(state, key, 0, static_cast<int>(keys), false);
          continue;
        }
        for (int64_t from = 0; from < keys; from += kHalf) {
          const int64_t end = least(keys, from + kHalf);
          int half = kinds_.of(state.panel, key + from, key + end);
          if (half) tile(state, key, static_cast<int>(from), static_cast<int>(end), half == 1);
        }
      }
    }
    for (int p = 0; p < count; p++) finish(states_[p]);
  }

  // The tile of keys, from `key` on, that comes next.
  int64_t next(int64_t lane, int64_t panel, int count, int64_t key) const {
    return key < c_.keys ? kinds_.next_key(lane, panel, panel + count, key) / kKeys * kKeys : key;
  }

  void fetch(int64_t lane, int64_t kv, int64_t key, int64_t keys) {
    fetched_ = keys, looked_ = false;
    if constexpr (kPaired) {
      fetch_keys_paired(key_, depth_, c_, c_.key, lane, kv, key, keys, c_.head_size);
      fetch_keys_in_pairs(value_, c_, c_.value, lane, kv, key, keys, c_.value_size);
    } else {
      fetch_keys(key_, c_.head_size, c_, c_.key, lane, kv, key, keys, c_.head_size);
      fetch_keys(value_, c_.value_size, c_, c_.value, lane, kv, key, keys, c_.value_size);
    }
  }

  // To the next tile of keys and values, while `count` panels take in this one.
  void look_ahead(int64_t lane, int64_t kv, int64_t key, int count) {
    const int64_t first = least(c_.keys, key), end = least(c_.keys, key + kKeys);
    const int64_t parts = count * (kKeys / kTileRows);
    next_key_.aim(c_.key, lane, first, end, c_.key_heads, kv, 1, c_.head_size, parts);
    next_value_.aim(c_.value, lane, first, end, c_.key_heads, kv, 1, c_.value_size, parts);
  }

  void start(State& state, int64_t lane, int64_t kv, int64_t row) {
    state.panel.place(c_, lane, kv, row);
    state.started = false;
    char* rows[L];
    state.panel.rows_of(c_.query, c_.heads, c_.head_size, rows);
    factors_to_lanes<A>(state.query, rows, c_.query.type, c_.head_size, state.panel.vectors,
                        reinterpret_cast<A*>(pairs_));
    for (int v = 0; v < kTileVectors; v++) {
      store(state.highest + v * W, splat<A>(-static_cast<A>(__builtin_inf())));
      store(state.total + v * W, V{});
    }
  }

  // Takes in the keys [from, end) of the tile that starts at `key`.
  void tile(State& state, int64_t key, int from, int end, bool masked) {
    const Panel<A>& panel = state.panel;
    const int vectors = panel.vectors;
    int low = 0, high = end - from;
    if (masked) {
      see(c_, panel, key + from, high, buffer_, seen_);
      low = seen_.low, high = seen_.high;
      if (low >= high) return;
    }
    V highest[kTileVectors], before[kTileVectors];
    for (int v = 0; v < vectors; v++) before[v] = highest[v] = load(state.highest + v * W);
    const E *keys = key_ + from * depth_, *values = value_ + (kPaired ? from / 2 : from) * c_.value_size;
    if (!masked && !c_.scores) {
      product<A, false>(
          keys, depth_, state.query, L, depth_, high, vectors,
          [&](int m, int n, V sum) {
            sum = sum * load(panel.scale + n * W);
            store(weights_ + m * L + n * W, sum);
            highest[n] = larger<A>(sum, highest[n]);
          },
          [&] { next_key_.step(), next_value_.step(); });
    } else {
      by_group(seen_, masked, low, high, [&](int first, int last, int start) {
        set_scaled_product<A, false>(weights_ + first * L + start * W, L, keys + first * depth_, depth_,
                                     state.query + start * W, L, depth_, last - first, vectors - start,
                                     panel.scale + start * W);
      });
      if (c_.scores) modify<A>(c_, panel, key + from, low, high, weights_, nullptr, buffer_);
      const V hidden = splat<A>(-static_cast<A>(__builtin_inf()));
      for (int j = low; j < high; j++)
        for (int v = 0; v < vectors; v++) {
          V x = load(weights_ + j * L + v * W);
          if (masked) {
            x = load(seen_.visible + j * L + v * W) ? x : hidden;
            store(weights_ + j * L + v * W, x);
          }
          highest[v] = larger<A>(x, highest[v]);
        }
    }
    V shrink[kTileVectors];
    exponentiate(state, low, high, masked || may_forbid(c_), highest, shrink);
    if (c_.dropout > 0) drop(panel, key + from, low, high);
    const bool clean = !masked || values_finite();
    if (!clean) {
      const int64_t count = divide_up(fetched_ - from, kPaired ? 2 : 1) * c_.value_size;
      copy_finite(clean_, values, count);
    }
    const E *factors = nullptr, *summed = clean ? values : clean_;
    int first = low;
    if constexpr (kPaired) {
      // Pairs begin at even keys. The weights of keys that were not looked at are 0.
      if (first % 2) std::memset(weights_ + --first * L, 0, L * sizeof(A));
      pair_rows(pairs_, weights_ + first * L, L, high - first, vectors);
      factors = pairs_;
      summed += first / 2 * c_.value_size;
    } else {
      factors = weights_ + first * L;
      summed += first * c_.value_size;
    }
    bool moved = false;
    for (int v = 0; v < vectors; v++) {
      auto differs = highest[v] != before[v];
      Integer<A> any = 0;
      for (int l = 0; l < W; l++) any |= differs[l];
      moved = moved || any;
    }
    A* out = state.out;
    auto sum_values = [&](const auto& finish) {
      product<A, true>(summed, c_.value_size, factors, L, depth_of<A, E>(high - first), static_cast<int>(c_.value_size),
                       vectors, finish, Nothing());
    };
    if (!state.started)
      sum_values([&](int m, int n, V sum) { store(out + m * L + n * W, sum); });
    else if (moved)
      sum_values([&](int m, int n, V sum) { store(out + m * L + n * W, load(out + m * L + n * W) * shrink[n] + sum); });
    else
      sum_values([&](int m, int n, V sum) { store(out + m * L + n * W, load(out + m * L + n * W) + sum); });
    state.started = true;
    if (!clean)
      for_nonfinite(values, c_.value_size, low, high, c_.value_size, [&](int j, int64_t d, A x) {
        for (int l = 0; l < panel.rows; l++)
          if (seen_.visible[j * L + l]) out[d * L + l] += weights_[j * L + l] * x;
      });
  }

  bool values_finite() {
    if (!looked_) finite_ = all_finite(value_, divide_up(fetched_, kPaired ? 2 : 1) * c_.value_size);
    looked_ = true;
    return finite_;
  }

  // Logits to weights exp(logit - highest); the running maximum and total.
  void exponentiate(State& state, int low, int high, bool forbidden, const V* highest, V* shrink) {
    const V lowest = splat<A>(-static_cast<A>(__builtin_inf()));
    for (int v = 0; v < state.panel.vectors; v++) {
      V base = highest[v] == lowest ? V{} : highest[v];
      shrink[v] = exponential(load(state.highest + v * W) - base);
      V total = load(state.total + v * W) * shrink[v];
      A* at = weights_ + low * L + v * W;
      if (forbidden) {
        for (int j = low; j < high; j++, at += L) {
          V x = load(at);
          V weight = x == lowest ? V{} : exponential(x - base);
          total += weight;
          store(at, weight);
        }
      } else {
        V second = {};
        int j = low;
        for (; j + 2 <= high; j += 2, at += 2 * L) {
          V a = exponential(load(at) - base), b = exponential(load(at + L) - base);
          total += a;
          second += b;
          store(at, a);
          store(at + L, b);
        }
        if (j < high) {
          V a = exponential(load(at) - base);
          total += a;
          store(at, a);
        }
        total += second;
      }
      store(state.highest + v * W, highest[v]);
      store(state.total + v * W, total);
    }
  }

  void drop(const Panel<A>& panel, int64_t key, int low, int high) {
    for (int j = low; j < high; j++) {
      alignas(64) Integer<A> keep[L];
      kept(c_, panel, key + j, keep);
      for (int v = 0; v < panel.vectors; v++) {
        A* at = weights_ + j * L + v * W;
        store(at, load(keep + v * W) ? load(at) : V{});
      }
    }
  }

  void finish(State& state) {
    const Panel<A>& panel = state.panel;
    alignas(64) A factor[L] = {};
    for (int l = 0; l < panel.rows; l++) {
      A highest = state.highest[l], total = state.total[l], before = 1;
      const A sink = c_.sinks.data ? *reinterpret_cast<const A*>(c_.sinks.at(panel.lane, panel.head[l]))
                                   : -static_cast<A>(__builtin_inf());
      if (sink != -static_cast<A>(__builtin_inf())) {  // which adds nothing, also where no key was seen
        A with = sink > highest ? sink : highest;
        before = __builtin_exp(highest - with);
        total = total * before + static_cast<A>(__builtin_exp(sink - with));
        highest = with;
      }
      A kept = static_cast<A>(1 - c_.dropout);
      factor[l] = total == 0 ? A(0) : before / (total * kept);
      int64_t row = (panel.lane * c_.queries + panel.t[l]) * c_.heads + panel.head[l];
      static_cast<A*>(c_.highest)[row] = highest;
      static_cast<A*>(c_.total)[row] = total;
    }
    if (!state.started) std::memset(state.out, 0, c_.value_size * L * sizeof(A));
    char* rows[L];
    const int64_t size = size_of(c_.query.type);
    for (int l = 0; l < L; l++) {
      int64_t row = (panel.lane * c_.queries + panel.t[l]) * c_.heads + panel.head[l];
      rows[l] = l < panel.rows ? static_cast<char*>(c_.out) + row * c_.value_size * size : nullptr;
    }
    lanes_to_rows<A>(rows, c_.query.type, state.out, factor, c_.value_size, panel.vectors, false);
  }

  const Call& c_;
  const Kinds<A>& kinds_;
  Arena arena_;
  State* states_;
  const int64_t depth_;
  E *key_, *value_, *clean_;
  A* weights_;
  E* pairs_;
  Seen<A> seen_;
  PairsBuffer<A> buffer_;
  Ahead next_key_, next_value_;
  int64_t fetched_ = 0;                  // keys of the tile
  bool looked_ = false, finite_ = true;  // whether its values are finite, once they were looked at
};

}  // namespace attnjax::ATTNJAX_ISA
