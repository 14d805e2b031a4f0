// The backward: gradients of query, key, value and of the scores' arrays. A task has some keys of one key/value head
// (or of all heads, where they share the gradient of a bias) and passes over all queries: five products, nothing
// computed twice. Gradients by query are added up in the order of the keys, which tickets enforce, so the sums are the
// same for any number of threads.
#pragma once

#include "panel.h"

namespace attnjax::ATTNJAX_ISA {

// E is the type of the factors of the products: A, or uint32_t for pairs of bfloat16.
template <class A, class E>
class Backward {
  static constexpr int L = kLanes<A>, W = kWidth<A>;
  static constexpr bool kPaired = !std::is_same_v<A, E>;
  static constexpr int64_t kSpan = 2 * kKeys;  // keys of a task
  using V = Vector<A>;

  // Who may add to the rows of a panel: the number of the span whose turn it is; and of the first one.
  struct Ticket {
    int32_t turn, first;
  };

  struct Shared {
    Ticket* panels;     // [lanes][key heads][panels]
    int32_t* distance;  // [lanes][key heads]: spans that have added their sums by distance
    A* delta;           // [lanes, T, N]: what is subtracted from the cotangent of every weight of a row
    int64_t count;      // panels of a key/value head
    int64_t spans;
  };

 public:
  static void run(const Call& c, const Run& run) {
    const int64_t rows = c.queries * (c.heads / c.key_heads), heads = c.lanes * c.key_heads;
    Shared shared{nullptr, nullptr, nullptr, divide_up(rows, L), divide_up(c.keys, kSpan)};
    const int64_t tickets = heads * shared.count * static_cast<int64_t>(sizeof(Ticket));
    const int64_t deltas = heads * rows * static_cast<int64_t>(sizeof(A));
    char* memory = static_cast<char*>(run.reserve(deltas + tickets + heads * 4));
    shared.delta = reinterpret_cast<A*>(memory);
    shared.panels = reinterpret_cast<Ticket*>(memory + deltas);
    shared.distance = reinterpret_cast<int32_t*>(memory + deltas + tickets);
    for_each(run, heads, [&](int64_t head) {
      shared.distance[head] = 0;
      Panel<A> panel;
      for (int64_t p = 0; p < shared.count; p++) {
        panel.place(c, head / c.key_heads, head % c.key_heads, p * L);
        int32_t first = next(c, panel, shared, 0);
        shared.panels[head * shared.count + p] = {first, first};
        if (first == shared.spans) clear(c, panel);
        subtrahends(c, panel, shared.delta);
      }
    });
    for (int i = 0; i < c.scores; i++) clear(c.score[i], run);
    if (shares(c)) {
      for_each(run, shared.spans, [&](int64_t span) {
        for (int64_t head = 0; head < heads; head++) Backward(c, run, shared).span(head, span);
      });
    } else {
      for_each(run, shared.spans * heads,
               [&](int64_t task) { Backward(c, run, shared).span(task % heads, task / heads); });
    }
    run.release(memory);
  }

 private:
  Backward(const Call& c, const Run& run, const Shared& shared) : Backward(c, run, shared, run.scratch(bytes(c))) {}

  Backward(const Call& c, const Run& run, const Shared& shared, void* memory)
      : c_(c),
        run_(run),
        shared_(shared),
        wide_h_(padded(c.head_size)),
        wide_v_(padded(c.value_size)),
        depth_h_(depth_of<A, E>(c.head_size)),
        depth_v_(depth_of<A, E>(c.value_size)),
        arena_(memory),
        key_(arena_.take<E>(kSpan * depth_h_)),
        value_(arena_.take<E>(kSpan * depth_v_)),
        key_down_(kPaired ? arena_.take<E>(kSpan / 2 * c.head_size) : key_),
        d_key_(arena_.take<A>(kSpan * wide_h_)),
        d_value_(arena_.take<A>(kSpan * wide_v_)),
        query_(arena_.take<E>(depth_h_ * L)),
        d_query_(arena_.take<A>(c.head_size * L)),
        d_out_(arena_.take<E>(depth_v_ * L)),
        query_rows_(arena_.take<E>(L * wide_h_)),
        d_out_rows_(arena_.take<E>(L * wide_v_)),
        clean_key_(arena_.take<E>(kKeys * c.head_size)),
        clean_rows_(arena_.take<E>(L * wide_h_)),
        weights_(arena_.take<A>(kKeys * L)),
        change_(arena_.take<A>(kKeys * L)),
        slope_(arena_.take<A>(kKeys * L)),
        pairs_(kPaired ? arena_.take<E>(kKeys * L) : nullptr),
        room_(kPaired ? arena_.take<A>(L * most(wide_h_, wide_v_)) : nullptr),
        seen_(arena_),
        buffer_(c, arena_) {
    const int64_t group = c.heads / c.key_heads;
    for (int i = 0; i < c.scores; i++) {
      const Score& score = c.score[i];
      if (!score.gradient) continue;
      if (score.step == ScoreStep::by_distance) sums_[i] = arena_.take<A>(group * (c.queries + kSpan));
      if (score.step == ScoreStep::bias && !score.pairs.query && score.pairs.key)
        sums_[i] = arena_.take<A>(group * kSpan);
    }
  }

  static int64_t padded(int64_t size) { return divide_up(size, W) * W; }

  static int64_t bytes(const Call& c) {
    const int64_t h = padded(c.head_size), v = padded(c.value_size), group = c.heads / c.key_heads;
    int64_t tiles = 2 * kSpan * (h + v) + L * (5 * h + 3 * v) + (kKeys + kSpan) * h + kKeys * L * (6 + c.denses);
    int64_t sums = c.scores * group * (c.queries + kSpan);
    return (tiles + sums) * static_cast<int64_t>(sizeof(A)) + 8192;
  }

  // Whether several heads add to the same gradient of a bias by query and key.
  static bool shares(const Call& c) {
    for (int i = 0; i < c.scores; i++)
      if (c.score[i].gradient && c.score[i].shared) return true;
    return false;
  }

  static bool visits(const Call& c, const Panel<A>& panel, int64_t span) {
    return kind_of(c, panel, span * kSpan, least(c.keys, (span + 1) * kSpan)) != 0;
  }

  static int32_t next(const Call& c, const Panel<A>& panel, const Shared& shared, int64_t span) {
    while (span < shared.spans && !visits(c, panel, span)) span++;
    return static_cast<int32_t>(span);
  }

  // delta = sum(d_out * out) - d_lse, of the rows of a panel.
  static void subtrahends(const Call& c, const Panel<A>& panel, A* delta) {
    const Type type = c.query.type;
    for (int l = 0; l < panel.rows; l++) {
      const int64_t row = (panel.lane * c.queries + panel.t[l]) * c.heads + panel.head[l];
      const char* out = static_cast<const char*>(c.out) + row * c.value_size * size_of(type);
      const char* d_out = static_cast<const char*>(c.d_out) + row * c.value_size * size_of(type);
      V sum = {};
      for (int64_t v = 0; v < c.value_size; v += W)
        sum += fetch<A>(out, type, v, c.value_size) * fetch<A>(d_out, type, v, c.value_size);
      A all = 0;
      for (int i = 0; i < W; i++) all += sum[i];
      delta[row] = all - static_cast<const A*>(c.d_lse)[row];
    }
  }

  // Gradients of queries that no task visits.
  static void clear(const Call& c, const Panel<A>& panel) {
    for (int l = 0; l < panel.rows; l++) {
      int64_t row = (panel.lane * c.queries + panel.t[l]) * c.heads + panel.head[l];
      if (c.d_query) std::memset(static_cast<A*>(c.d_query) + row * c.head_size, 0, c.head_size * sizeof(A));
    }
  }

  static void clear(const Score& score, const Run& run) {
    if (!score.gradient) return;
    const int64_t pieces = 64, size = score.gradient_size, each = divide_up(size, pieces);
    for_each(run, pieces, [&](int64_t i) {
      int64_t from = least(size, i * each), to = least(size, from + each);
      std::memset(static_cast<A*>(score.gradient) + from, 0, (to - from) * sizeof(A));
    });
  }

  void span(int64_t head, int64_t number) {
    lane_ = head / c_.key_heads, kv_ = head % c_.key_heads;
    start_ = number * kSpan;
    const int64_t keys = least(kSpan, c_.keys - start_), group = c_.heads / c_.key_heads;
    if constexpr (kPaired) {
      fetch_keys_paired(key_, depth_h_, c_, c_.key, lane_, kv_, start_, keys, c_.head_size);
      fetch_keys_paired(value_, depth_v_, c_, c_.value, lane_, kv_, start_, keys, c_.value_size);
      fetch_keys_in_pairs(key_down_, c_, c_.key, lane_, kv_, start_, keys, c_.head_size);
    } else {
      fetch_keys(key_, c_.head_size, c_, c_.key, lane_, kv_, start_, keys, c_.head_size);
      fetch_keys(value_, c_.value_size, c_, c_.value, lane_, kv_, start_, keys, c_.value_size);
    }
    std::memset(d_key_, 0, kSpan * wide_h_ * sizeof(A));
    std::memset(d_value_, 0, kSpan * wide_v_ * sizeof(A));
    for (int i = 0; i < c_.scores; i++) {
      if (!sums_[i]) continue;
      int64_t length = c_.score[i].step == ScoreStep::by_distance ? c_.queries + kSpan : kSpan;
      std::memset(sums_[i], 0, group * length * sizeof(A));
    }
    for (int64_t p = 0; p < shared_.count; p++) {
      panel_.place(c_, lane_, kv_, p * L);
      if (!visits(c_, panel_, number)) continue;
      pass(static_cast<int>(keys));
      add_by_query(shared_.panels[head * shared_.count + p], static_cast<int32_t>(number));
    }
    for (int64_t i = 0; i < keys * wide_h_; i++) d_key_[i] *= static_cast<A>(c_.scale);
    for (int64_t j = 0; j < keys; j++) {
      int64_t row = (lane_ * c_.keys + start_ + j) * c_.key_heads + kv_;
      if (c_.d_key)
        std::memcpy(static_cast<A*>(c_.d_key) + row * c_.head_size, d_key_ + j * wide_h_, c_.head_size * sizeof(A));
      if (c_.d_value)
        std::memcpy(static_cast<A*>(c_.d_value) + row * c_.value_size, d_value_ + j * wide_v_,
                    c_.value_size * sizeof(A));
    }
    add_sums(head, static_cast<int32_t>(number), keys);
  }

  // One panel against the keys of the span.
  void pass(int keys) {
    char* rows[L];
    const int vectors = panel_.vectors;
    panel_.rows_of(c_.query, c_.heads, c_.head_size, rows);
    factors_to_lanes<A>(query_, rows, c_.query.type, c_.head_size, vectors, room_);
    copy_rows(query_rows_, wide_h_, rows, c_.query.type, c_.head_size);
    Array d_out{const_cast<void*>(c_.d_out), c_.query.type, c_.rows};
    panel_.rows_of(d_out, c_.heads, c_.value_size, rows);
    factors_to_lanes<A>(d_out_, rows, c_.query.type, c_.value_size, vectors, room_);
    copy_rows(d_out_rows_, wide_v_, rows, c_.query.type, c_.value_size);
    for (int l = 0; l < L; l++) {
      int64_t row = (panel_.lane * c_.queries + panel_.t[l]) * c_.heads + panel_.head[l];
      A total = static_cast<const A*>(c_.total)[row], highest = static_cast<const A*>(c_.highest)[row];
      bool present = l < panel_.rows;
      share_[l] = present && total != 0 ? 1 / total : A(0);
      highest_[l] = present && highest != -static_cast<A>(__builtin_inf()) ? highest : A(0);
      delta_[l] = present ? shared_.delta[row] : A(0);
    }
    look_ahead(keys);
    std::memset(by_query_, 0, sizeof(by_query_));
    std::memset(d_query_, 0, c_.head_size * L * sizeof(A));
    for (int from = 0; from < keys; from += kKeys) {
      int count = static_cast<int>(least(kKeys, keys - from));
      int kind = kind_of(c_, panel_, start_ + from, start_ + from + count);
      if (kind == 2) tile(from, count, false);
      if (kind != 1) continue;
      for (int half = from; half < from + count; half += kHalf) {
        const int part = static_cast<int>(least(kHalf, from + count - half));
        kind = kind_of(c_, panel_, start_ + half, start_ + half + part);
        if (kind) tile(half, part, kind == 1);
      }
    }
  }

  // To the queries of the next panel, and the cotangents of their outputs.
  void look_ahead(int keys) {
    const int64_t group = panel_.group, first = least(c_.queries, panel_.t_high + 1);
    const int64_t end = least(c_.queries, first + divide_up(L, group)), head = kv_ * group;
    const int64_t parts = keys / kTileRows;
    next_query_.aim(c_.query, lane_, first, end, c_.heads, head, group, c_.head_size, parts);
    next_d_out_.aim({const_cast<void*>(c_.d_out), c_.query.type, c_.rows}, lane_, first, end, c_.heads, head, group,
                    c_.value_size, parts);
  }

  // Rows as they are, or, in pairs, two to a row.
  void copy_rows(E* to, int64_t stride, char* const* rows, Type type, int64_t columns) {
    A* plain = kPaired ? room_ : reinterpret_cast<A*>(to);
    for (int l = 0; l < L; l++) {
      A* row = plain + l * stride;
      if (rows[l])
        load_row(row, rows[l], type, columns);
      else
        std::memset(row, 0, columns * sizeof(A));
      for (int64_t d = columns; d < stride; d++) row[d] = 0;
    }
    if constexpr (kPaired) pair_rows(to, plain, stride, L, static_cast<int>(stride / W));
  }

  void tile(int from, int count, bool masked) {
    const int vectors = panel_.vectors;
    const int64_t key = start_ + from;
    int low = 0, high = count;
    if (masked) {
      see(c_, panel_, key, count, buffer_, seen_);
      low = seen_.low, high = seen_.high;
      if (low >= high) return;
    }
    const E *keys = key_ + from * depth_h_, *values = value_ + from * depth_v_;
    V highest[kTileVectors], share[kTileVectors], delta[kTileVectors];
    for (int v = 0; v < vectors; v++) {
      highest[v] = load(highest_ + v * W);
      share[v] = load(share_ + v * W);
      delta[v] = load(delta_ + v * W);
    }
    by_group(seen_, masked, low, high, [&](int first, int last, int start) {
      set_product<A, false>(weights_ + first * L + start * W, L, keys + first * depth_h_, depth_h_, query_ + start * W,
                            L, depth_h_, last - first, vectors - start, static_cast<A>(c_.scale),
                            [&] { next_query_.step(), next_d_out_.step(); });
    });
    if (c_.scores) modify<A>(c_, panel_, key, low, high, weights_, capped() ? slope_ : nullptr, buffer_);
    const V lowest = splat<A>(-static_cast<A>(__builtin_inf()));
    const bool forbidden = masked || may_forbid(c_);
    for (int j = low; j < high; j++) {
      for (int v = 0; v < vectors; v++) {
        A* at = weights_ + j * L + v * W;
        V x = load(at);
        V weight = exponential(x - highest[v]) * share[v];
        if (forbidden) {
          auto hidden = x == lowest;
          if (masked) hidden |= ~load(seen_.visible + j * L + v * W);
          weight = hidden ? V{} : weight;
        }
        store(at, weight);
      }
    }
    // change = weight * (d_weight - delta)
    const bool dropping = c_.dropout > 0;
    alignas(64) Integer<A> keep[L];
    const V kept_factor = splat<A>(static_cast<A>(1 / (1 - c_.dropout)));
    by_group(seen_, masked, low, high, [&](int first, int last, int start) {
      set_product<A, false>(change_ + first * L + start * W, L, values + first * depth_v_, depth_v_, d_out_ + start * W,
                            L, depth_v_, last - first, vectors - start, A(1));
    });
    for (int j = low; j < high; j++) {
      if (dropping) kept(c_, panel_, key + j, keep);
      for (int v = 0; v < vectors; v++) {
        A *at = weights_ + j * L + v * W, *d_at = change_ + j * L + v * W;
        V weight = load(at), d_weight = load(d_at);
        if (dropping) {
          auto stays = load(keep + v * W);
          d_weight = stays ? d_weight * kept_factor : V{};
          store(at, stays ? weight * kept_factor : V{});
        }
        V change = weight * (d_weight - delta[v]);
        if (forbidden) change = weight == V{} ? V{} : change;
        store(d_at, change);
      }
    }
    if (c_.d_value) add_by_key(d_value_, weights_, d_out_rows_, wide_v_, from, low, high, masked);
    for (int i = c_.scores - 1; i >= 0; i--) unmodify(i, key, from, low, high);
    if (c_.d_key) {
      const E* queries = query_rows_;
      if (masked && rows_hidden()) {
        if constexpr (kPaired)
          copy_kept_pairs(clean_rows_, query_rows_, wide_h_, 0, panel_.rows, seen_.row);
        else
          copy_kept(clean_rows_, query_rows_, wide_h_, 0, panel_.rows, seen_.row);
        queries = clean_rows_;
      }
      add_by_key(d_key_, change_, queries, wide_h_, from, low, high, masked);
    }
    if (c_.d_query) add_to_query(from, low, high, masked);
  }

  // sums[key] += pairs[key][row] rows[row]
  void add_by_key(A* sums, const A* pairs, const E* rows, int64_t wide, int from, int low, int high, bool masked) {
    const E* factors = nullptr;
    int64_t stride = L;
    if constexpr (kPaired) {
      stride = L / 2;
      for (int i = low * L; i < high * L; i += W) store_halves(pairs_ + i / 2, load(pairs + i));
      factors = pairs_;
    } else {
      factors = pairs;
    }
    by_group(seen_, masked, low, high, [&](int first, int last, int start) {
      const int lanes = start * W, skipped = kPaired ? lanes / 2 : lanes;
      if (lanes < panel_.rows)
        add_product<A, false>(sums + (from + first) * wide, wide, factors + first * stride + skipped, stride,
                              rows + skipped * wide, wide, depth_of<A, E>(panel_.rows - lanes), last - first,
                              static_cast<int>(wide / W));
    });
  }

  // d_query[column][row] += key[column] change[key][row]
  void add_to_query(int from, int low, int high, bool masked) {
    const int64_t h = c_.head_size;
    const bool gaps = masked && seen_.gaps;
    const E *keys = nullptr, *change = nullptr;
    if constexpr (kPaired) {
      // Pairs begin at even keys. The changes of keys that were not looked at are 0; what these hold may be NaN.
      const bool half_seen = low % 2 || (masked && high % 2);
      if (low % 2) std::memset(change_ + --low * L, 0, L * sizeof(A));
      pair_rows(pairs_, change_ + low * L, L, high - low, panel_.vectors);
      keys = key_down_ + from / 2 * h, change = pairs_;
      if (gaps || half_seen) {
        copy_kept_pairs(clean_key_, keys, h, low, high, seen_.key);
        keys = clean_key_;
      }
      keys += low / 2 * h;
    } else {
      keys = key_ + from * h, change = change_ + low * L;
      if (gaps) {
        copy_kept(clean_key_, keys, h, low, high, seen_.key);
        keys = clean_key_;
      }
      keys += low * h;
    }
    add_product<A, true>(d_query_, L, keys, h, change, L, depth_of<A, E>(high - low), static_cast<int>(h),
                         panel_.vectors);
  }

  bool rows_hidden() const {
    for (int l = 0; l < panel_.rows; l++)
      if (!seen_.row[l]) return true;
    return false;
  }

  bool capped() const {
    for (int i = 0; i < c_.scores; i++)
      if (c_.score[i].step == ScoreStep::soft_cap) return true;
    return false;
  }

  // From the change of the logits after a score to that before it, and to the gradient of the score's array.
  void unmodify(int i, int64_t key, int from, int low, int high) {
    const Score& score = c_.score[i];
    const int vectors = panel_.vectors;
    if (score.step == ScoreStep::soft_cap) {
      for (int j = low; j < high; j++)
        for (int v = 0; v < vectors; v++) {
          A* at = change_ + j * L + v * W;
          V x = load(at);
          store(at, x == V{} ? x : x * load(slope_ + j * L + v * W));
        }
      return;
    }
    if (!score.gradient) return;
    const int64_t first_head = kv_ * panel_.group;
    if (score.step == ScoreStep::by_distance) {
      const int64_t length = c_.queries + kSpan;
      for (int j = low; j < high; j++) {
        int64_t shift = kSpan - 1 - (from + j);
        for (int l = 0; l < panel_.rows; l++)
          sums_[i][(panel_.head[l] - first_head) * length + panel_.t[l] + shift] += change_[j * L + l];
      }
    } else if (score.pairs.query && score.pairs.key) {
      char* rows[L];
      panel_.rows_of(score.gradient_pairs, key + low, rows);
      alignas(64) A ones[L];
      for (int l = 0; l < L; l++) ones[l] = 1;
      lanes_to_rows<A>(rows, score.gradient_pairs.array.type, change_ + low * L, ones, high - low, vectors, true);
    } else if (score.pairs.key) {
      for (int j = low; j < high; j++)
        for (int l = 0; l < panel_.rows; l++)
          sums_[i][(panel_.head[l] - first_head) * kSpan + from + j] += change_[j * L + l];
    } else {
      alignas(64) A sums[L] = {};
      for (int j = low; j < high; j++)
        for (int v = 0; v < vectors; v++) store(sums + v * W, load(sums + v * W) + load(change_ + j * L + v * W));
      for (int l = 0; l < panel_.rows; l++) by_query_[i][l] += sums[l];
    }
  }

  // Adds this span's part of what is summed by query, when it is its turn.
  void add_by_query(Ticket& ticket, int32_t number) {
    wait(&ticket.turn, number);
    if (c_.d_query) {
      char* rows[L];
      alignas(64) A factor[L];
      for (int l = 0; l < L; l++) {
        int64_t row = (panel_.lane * c_.queries + panel_.t[l]) * c_.heads + panel_.head[l];
        rows[l] = l < panel_.rows ? reinterpret_cast<char*>(static_cast<A*>(c_.d_query) + row * c_.head_size) : nullptr;
        factor[l] = static_cast<A>(c_.scale);
      }
      lanes_to_rows<A>(rows, kOwnType<A>, d_query_, factor, c_.head_size, panel_.vectors, number != ticket.first);
    }
    for (int i = 0; i < c_.scores; i++) {
      const Score& score = c_.score[i];
      if (score.step != ScoreStep::bias || !score.gradient || score.pairs.key) continue;
      for (int l = 0; l < panel_.rows; l++)
        static_cast<A*>(score.gradient)[(panel_.lane * c_.heads + panel_.head[l]) * c_.queries + panel_.t[l]] +=
            by_query_[i][l];
    }
    __atomic_store_n(&ticket.turn, next(c_, panel_, shared_, number + 1), __ATOMIC_RELEASE);
  }

  // Adds what is summed by key (its own rows) and by distance (in turn).
  void add_sums(int64_t head, int32_t number, int64_t keys) {
    bool in_turn = false;
    for (int i = 0; i < c_.scores; i++)
      in_turn = in_turn || (c_.score[i].gradient && c_.score[i].step == ScoreStep::by_distance);
    if (in_turn) wait(&shared_.distance[head], number);
    for (int i = 0; i < c_.scores; i++) {
      if (!sums_[i]) continue;
      const Score& score = c_.score[i];
      for (int64_t g = 0; g < c_.heads / c_.key_heads; g++) {
        const int64_t row = lane_ * c_.heads + kv_ * (c_.heads / c_.key_heads) + g;
        if (score.step == ScoreStep::by_distance) {
          const int64_t length = c_.queries + kSpan, all = c_.queries + c_.keys - 1;
          A* to = static_cast<A*>(score.gradient) + row * all;
          for (int64_t d = kSpan - keys; d < c_.queries + kSpan - 1; d++)
            to[c_.keys - start_ - kSpan + d] += sums_[i][g * length + d];
        } else {
          A* to = static_cast<A*>(score.gradient) + row * c_.keys + start_;
          for (int64_t j = 0; j < keys; j++) to[j] += sums_[i][g * kSpan + j];
        }
      }
    }
    if (in_turn) __atomic_store_n(&shared_.distance[head], number + 1, __ATOMIC_RELEASE);
  }

  void wait(const int32_t* turn, int32_t number) const {
    for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != number; spins++)
      if (spins > 256) run_.yield();
  }

  const Call& c_;
  const Run& run_;
  const Shared& shared_;
  const int64_t wide_h_, wide_v_, depth_h_, depth_v_;
  Arena arena_;
  E *key_, *value_;  // [key][depth]
  E* key_down_;      // [key in steps of the depth][H]
  A *d_key_, *d_value_;
  E* query_;
  A* d_query_;
  E *d_out_, *query_rows_, *d_out_rows_, *clean_key_, *clean_rows_;
  A *weights_, *change_, *slope_;
  E* pairs_;
  A* room_;
  Seen<A> seen_;
  PairsBuffer<A> buffer_;
  A* sums_[kMaxScores] = {};
  Panel<A> panel_;
  int64_t lane_ = 0, kv_ = 0, start_ = 0;
  Ahead next_query_, next_d_out_;
  alignas(64) A share_[L], highest_[L], delta_[L], by_query_[kMaxScores][L];
};

}  // namespace attnjax::ATTNJAX_ISA
