// The backward: gradients of query, key, value and of the scores' arrays. A task has some keys of one key/value head
// (or of all heads, where they share the gradient of a bias) and passes over all queries: five products, nothing
// computed twice. Gradients by query are added up in the order of the keys, which tickets enforce, so the sums are the
// same for any number of threads.
#pragma once

#include "kinds.h"
#include "sums.h"

namespace attnjax::ATTNJAX_ISA {

// E is the type of the factors of the products: A, or uint32_t for pairs of bfloat16.
template <class A, class E>
class Backward {
  static constexpr int L = kLanes<A>, W = kWidth<A>;
  static constexpr bool kPaired = !std::is_same_v<A, E>;
  static constexpr int64_t kSpan = 2 * kKeys;  // keys of a task
  static constexpr int kFold = 32;             // panels whose sums by key are added up before they join the others
  static constexpr int kManyAdders = 16;  // to a gradient by query and key: from here on what rounding loses counts
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
    A* rests[kMaxScores];  // what rounding lost of gradients by query and key, where many add to them
  };

 public:
  static void run(const Call& c, const Run& run) {
    const int64_t rows = c.queries * (c.heads / c.key_heads), heads = c.lanes * c.key_heads;
    Shared shared{nullptr, nullptr, nullptr, divide_up(rows, L), divide_up(c.keys, kSpan), {}};
    const Kinds<A> kinds(c, run);
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
        int32_t first = next(kinds, c, panel, 0);
        shared.panels[head * shared.count + p] = {first, first};
        if (first == shared.spans) clear(c, panel);
        subtrahends(c, panel, shared.delta);
      }
    });
    for (int i = 0; i < c.scores; i++) {
      const Score& score = c.score[i];
      if (!score.gradient) continue;
      zero(static_cast<A*>(score.gradient), score.gradient_size, run);
      const bool heads_too = score.adders && !score.gradient_pairs.head;
      if (score.adders * (heads_too ? c.heads / c.key_heads : 1) < kManyAdders) continue;
      shared.rests[i] = static_cast<A*>(run.reserve(score.gradient_size * static_cast<int64_t>(sizeof(A))));
      zero(shared.rests[i], score.gradient_size, run);
    }
    if (shares(c)) {
      for_each(run, shared.spans, [&](int64_t span) {
        for (int64_t head = 0; head < heads; head++) Backward(c, run, kinds, shared).span(head, span);
      });
    } else {
      for_each(run, shared.spans * heads,
               [&](int64_t task) { Backward(c, run, kinds, shared).span(task % heads, task / heads); });
    }
    for (int i = 0; i < c.scores; i++) {
      if (!shared.rests[i]) continue;
      add_rests(static_cast<A*>(c.score[i].gradient), shared.rests[i], c.score[i].gradient_size, run);
      run.release(shared.rests[i]);
    }
    run.release(memory);
  }

 private:
  Backward(const Call& c, const Run& run, const Kinds<A>& kinds, const Shared& shared)
      : Backward(c, run, kinds, shared, run.scratch(bytes(c))) {}

  Backward(const Call& c, const Run& run, const Kinds<A>& kinds, const Shared& shared, void* memory)
      : c_(c),
        run_(run),
        kinds_(kinds),
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
        key_part_(arena_.take<A>(kSpan * wide_h_)),
        value_part_(arena_.take<A>(kSpan * wide_v_)),
        query_(arena_.take<E>(depth_h_ * L)),
        d_query_(arena_.take<A>(c.head_size * L)),
        d_out_(arena_.take<E>(depth_v_ * L)),
        query_rows_(arena_.take<E>(L * wide_h_)),
        d_out_rows_(arena_.take<E>(L * wide_v_)),
        clean_key_(arena_.take<E>(kKeys * c.head_size)),
        clean_rows_(arena_.take<E>(L * most(wide_h_, wide_v_))),
        weights_(arena_.take<A>(kKeys * L)),
        change_(arena_.take<A>(kKeys * L)),
        raw_(c.d_scale ? arena_.take<A>(kKeys * L) : nullptr),
        pairs_(kPaired ? arena_.take<E>(kKeys * L) : nullptr),
        room_(kPaired ? arena_.take<A>(L * most(wide_h_, wide_v_)) : nullptr),
        seen_(arena_),
        buffer_(c, arena_) {
    const int64_t group = c.heads / c.key_heads;
    for (A& one : ones_) one = 1;
    for (int i = 0; i < c.scores; i++) {
      const Score& score = c.score[i];
      if (score.step == ScoreStep::soft_cap) slopes_[i].by_logit = arena_.take<A>(kKeys * L);
      if (score.by_head() && score.gradient) slopes_[i].by_number = arena_.take<A>(kKeys * L);
      if (!score.gradient) continue;
      if (score.step == ScoreStep::by_distance) sums_[i] = arena_.take<A>(group * (c.queries + kSpan));
      if (score.step == ScoreStep::bias && !score.pairs.query && score.pairs.key)
        sums_[i] = arena_.take<A>(2 * group * kSpan);
    }
  }

  static int64_t padded(int64_t size) { return divide_up(size, W) * W; }

  static int64_t bytes(const Call& c) {
    const int64_t h = padded(c.head_size), v = padded(c.value_size), group = c.heads / c.key_heads;
    int64_t tiles = 3 * kSpan * (h + v) + L * (5 * h + 4 * v) + (kKeys + kSpan) * h + kKeys * L * (7 + c.denses);
    int64_t sums = 0;
    for (int i = 0; i < c.scores; i++) sums += c.score[i].by_head() ? 2 * kKeys * L : group * (c.queries + 2 * kSpan);
    return (tiles + sums) * static_cast<int64_t>(sizeof(A)) + 8192;
  }

  // Whether several heads add to the same gradient of a bias by query and key.
  static bool shares(const Call& c) {
    for (int i = 0; i < c.scores; i++)
      if (c.score[i].gradient && c.score[i].adders > 1) return true;
    return false;
  }

  static bool visits(const Kinds<A>& kinds, const Call& c, const Panel<A>& panel, int64_t span) {
    return kinds.visits(panel, span * kSpan, least(c.keys, (span + 1) * kSpan));
  }

  // The first span from `span` on that the panel visits.
  static int32_t next(const Kinds<A>& kinds, const Call& c, const Panel<A>& panel, int64_t span) {
    const int64_t spans = divide_up(c.keys, kSpan), p = panel.first / L;
    for (; span < spans; span++) {
      span = kinds.next_key(panel.lane, p, p + 1, span * kSpan) / kSpan;
      if (span >= spans || visits(kinds, c, panel, span)) break;
    }
    return static_cast<int32_t>(least(span, spans));
  }

  // Gradients of queries that no task visits.
  static void clear(const Call& c, const Panel<A>& panel) {
    for (int l = 0; l < panel.rows; l++) {
      int64_t row = (panel.lane * c.queries + panel.t[l]) * c.heads + panel.head[l];
      if (c.d_query) std::memset(static_cast<A*>(c.d_query) + row * c.head_size, 0, c.head_size * sizeof(A));
    }
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
    keys_ = keys, keys_looked_ = false;
    for (A* sums : {d_key_, key_part_}) std::memset(sums, 0, kSpan * wide_h_ * sizeof(A));
    for (A* sums : {d_value_, value_part_}) std::memset(sums, 0, kSpan * wide_v_ * sizeof(A));
    for (int i = 0; i < c_.scores; i++)
      if (sums_[i] && c_.score[i].step == ScoreStep::bias) std::memset(sums_[i], 0, 2 * group * kSpan * sizeof(A));
    const auto next_panel = [&](int64_t p) { return kinds_.next_panel(lane_, p, start_, start_ + keys); };
    int passed = 0;
    first_query_ = end_query_ = 0;
    for (int64_t p = next_panel(0); p < shared_.count; p = next_panel(p + 1)) {
      panel_.place(c_, lane_, kv_, p * L);
      if (!visits(kinds_, c_, panel_, number)) continue;
      make_room();
      pass(static_cast<int>(keys));
      if (++passed % kFold == 0) fold();
      add_by_query(shared_.panels[head * shared_.count + p], static_cast<int32_t>(number));
    }
    fold();
    if (!scales_differ()) {
      const A scale = *reinterpret_cast<const A*>(c_.scale.array.at(lane_, kv_ * group * c_.scale.head));
      for (int64_t i = 0; i < keys * wide_h_; i++) d_key_[i] *= scale;
    }
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

  // Zeros for the sums by distance that the queries of a panel add to.
  void make_room() {
    if (first_query_ == end_query_) first_query_ = end_query_ = panel_.t_low;
    const int64_t group = panel_.group, length = c_.queries + kSpan, from = end_query_, end = panel_.t_high + 1;
    for (int i = 0; i < c_.scores; i++) {
      if (!sums_[i] || c_.score[i].step != ScoreStep::by_distance) continue;
      const int64_t first = from + (from > first_query_ ? kSpan - 1 : 0);
      for (int64_t g = 0; g < group; g++)
        std::memset(sums_[i] + g * length + first, 0, most(0, end + kSpan - 1 - first) * sizeof(A));
    }
    end_query_ = most(end_query_, end);
  }

  void fold() {
    auto add = [](A* sums, A* part, int64_t count) {
      for (int64_t i = 0; i < count; i += W) store(sums + i, load(sums + i) + load(part + i)), store(part + i, V{});
    };
    add(d_key_, key_part_, keys_ * wide_h_);
    add(d_value_, value_part_, keys_ * wide_v_);
  }

  // Whether the heads of a panel have scales of their own.
  bool scales_differ() const { return c_.scale.head && c_.heads > c_.key_heads; }

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
    rows_looked_ = false;
    std::memset(by_query_, 0, sizeof(by_query_));
    std::memset(d_query_, 0, c_.head_size * L * sizeof(A));
    for (int from = 0; from < keys; from += kKeys) {
      int count = static_cast<int>(least(kKeys, keys - from));
      int kind = kinds_.of(panel_, start_ + from, start_ + from + count);
      if (kind == 2) tile(from, count, false);
      if (kind != 1) continue;
      for (int half = from; half < from + count; half += kHalf) {
        const int part = static_cast<int>(least(kHalf, from + count - half));
        kind = kinds_.of(panel_, start_ + half, start_ + half + part);
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
      set_scaled_product<A, false>(weights_ + first * L + start * W, L, keys + first * depth_h_, depth_h_,
                                   query_ + start * W, L, depth_h_, last - first, vectors - start,
                                   raw_ ? ones_ + start * W : panel_.scale + start * W,
                                   [&] { next_query_.step(), next_d_out_.step(); });
    });
    if (raw_) {
      std::memcpy(raw_ + low * L, weights_ + low * L, (high - low) * L * sizeof(A));
      multiply(weights_, panel_.scale, low, high);
    }
    if (c_.scores) modify<A>(c_, panel_, key, low, high, weights_, slopes_, buffer_);
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
                            L, depth_v_, last - first, vectors - start);
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
    const bool clean = !masked || all_finite_here();
    if (c_.d_value) add_by_key(value_part_, weights_, d_out_rows_, wide_v_, from, low, high, masked, clean);
    for (int i = c_.scores - 1; i >= 0; i--) unmodify(i, key, from, low, high);
    if (raw_) add_by_row(kMaxScores, raw_, low, high);
    if (c_.d_query) add_to_query(from, low, high, clean);
    if (!c_.d_key) return;
    if (scales_differ()) multiply(change_, panel_.scale, low, high);
    add_by_key(key_part_, change_, query_rows_, wide_h_, from, low, high, masked, clean);
  }

  // Whether everything is finite that rows which do not see each other are multiplied with; looked at once.
  bool all_finite_here() {
    const int64_t step = kPaired ? 2 : 1;
    if (!keys_looked_) keys_finite_ = all_finite(key_down_, divide_up(keys_, step) * c_.head_size);
    if (!rows_looked_)
      rows_finite_ = all_finite(query_rows_, L / step * wide_h_) && all_finite(d_out_rows_, L / step * wide_v_);
    keys_looked_ = rows_looked_ = true;
    return keys_finite_ && rows_finite_;
  }

  // Times a number of each row.
  void multiply(A* logits, const A* factors, int low, int high) {
    for (int v = 0; v < panel_.vectors; v++) {
      const V factor = load(factors + v * W);
      for (int j = low; j < high; j++) store(logits + j * L + v * W, load(logits + j * L + v * W) * factor);
    }
  }

  // sums[key] += pairs[key][row] rows[row]
  void add_by_key(A* sums, const A* pairs, const E* rows, int64_t wide, int from, int low, int high, bool masked,
                  bool clean) {
    const E *factors = nullptr, *finite = rows;
    int64_t stride = L;
    if constexpr (kPaired) {
      stride = L / 2;
      for (int i = low * L; i < high * L; i += W) store_halves(pairs_ + i / 2, load(pairs + i));
      factors = pairs_;
    } else {
      factors = pairs;
    }
    if (!clean) {
      copy_finite(clean_rows_, rows, stride * wide);
      finite = clean_rows_;
    }
    by_group(seen_, masked, low, high, [&](int first, int last, int start) {
      const int lanes = start * W, skipped = kPaired ? lanes / 2 : lanes;
      if (lanes < panel_.rows)
        add_product<A, false>(sums + (from + first) * wide, wide, factors + first * stride + skipped, stride,
                              finite + skipped * wide, wide, depth_of<A, E>(panel_.rows - lanes), last - first,
                              static_cast<int>(wide / W));
    });
    if (!clean)
      for_nonfinite(rows, wide, 0, panel_.rows, wide, [&](int l, int64_t d, A x) {
        for (int j = low; j < high; j++)
          if (seen_.visible[j * L + l]) sums[(from + j) * wide + d] += pairs[j * L + l] * x;
      });
  }

  // d_query[column][row] += key[column] change[key][row]
  void add_to_query(int from, int low, int high, bool clean) {
    const int64_t h = c_.head_size;
    const E *keys = key_down_ + from / (kPaired ? 2 : 1) * h, *finite = keys, *change = nullptr;
    if (!clean) {
      copy_finite(clean_key_, keys, divide_up(least(kKeys, keys_ - from), kPaired ? 2 : 1) * h);
      finite = clean_key_;
    }
    int first = low;
    if constexpr (kPaired) {
      // Pairs begin at even keys. The changes of keys that were not looked at are 0.
      if (first % 2) std::memset(change_ + --first * L, 0, L * sizeof(A));
      pair_rows(pairs_, change_ + first * L, L, high - first, panel_.vectors);
      change = pairs_, finite += first / 2 * h;
    } else {
      change = change_ + first * L, finite += first * h;
    }
    add_product<A, true>(d_query_, L, finite, h, change, L, depth_of<A, E>(high - first), static_cast<int>(h),
                         panel_.vectors);
    if (!clean)
      for_nonfinite(keys, h, low, high, h, [&](int j, int64_t d, A x) {
        for (int l = 0; l < panel_.rows; l++)
          if (seen_.visible[j * L + l]) d_query_[d * L + l] += change_[j * L + l] * x;
      });
  }

  // by_query[row] += derivative[key][row] change[key][row], which is 0 where the pair is hidden.
  void add_by_row(int number, const A* derivative, int low, int high) {
    for (int v = 0; v < panel_.vectors; v++) {
      V sum = {};
      for (int j = low; j < high; j++) {
        V x = load(change_ + j * L + v * W);
        sum += derivative ? x == V{} ? x : x * load(derivative + j * L + v * W) : x;
      }
      store(by_query_[number] + v * W, load(by_query_[number] + v * W) + sum);
    }
  }

  // From the change of the logits after a score to that before it, and to the gradient of the score's array.
  void unmodify(int i, int64_t key, int from, int low, int high) {
    const Score& score = c_.score[i];
    const int vectors = panel_.vectors;
    if (score.by_head() && score.gradient) add_by_row(i, slopes_[i].by_number, low, high);
    if (score.step == ScoreStep::scale) {
      alignas(64) A factors[L];
      panel_.by_head(score.pairs, factors);
      multiply(change_, factors, low, high);
      return;
    }
    if (score.step == ScoreStep::soft_cap) {
      for (int j = low; j < high; j++)
        for (int v = 0; v < vectors; v++) {
          A* at = change_ + j * L + v * W;
          V x = load(at);
          store(at, x == V{} ? x : x * load(slopes_[i].by_logit + j * L + v * W));
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
      char *rows[L], *rests[L];
      panel_.rows_of(score.gradient_pairs, key + low, rows);
      if (!shared_.rests[i]) {
        lanes_to_rows<A>(rows, kOwnType<A>, change_ + low * L, ones_, high - low, vectors, true);
        return;
      }
      const auto apart = reinterpret_cast<char*>(shared_.rests[i]) - static_cast<char*>(score.gradient);
      for (int l = 0; l < L; l++) rests[l] = rows[l] ? rows[l] + apart : nullptr;
      add_lanes_exactly<A>(rows, rests, change_ + low * L, high - low, vectors);
    } else if (score.pairs.key) {
      A* rests = sums_[i] + panel_.group * kSpan;
      for (int j = low; j < high; j++) {
        // The rows of a head in turn, then their sum to that of other panels.
        const int64_t group = panel_.group, heads = least(group, panel_.rows);
        for (int64_t first = 0; first < heads; first++) {
          A sum = 0;
          for (int64_t l = first; l < panel_.rows; l += group) sum += change_[j * L + l];
          const int64_t at = (panel_.head[first] - first_head) * kSpan + from + j;
          add_exactly(sums_[i][at], rests[at], sum);
        }
      }
    } else {
      add_by_row(i, nullptr, low, high);
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
        factor[l] = panel_.scale[l];
      }
      lanes_to_rows<A>(rows, kOwnType<A>, d_query_, factor, c_.head_size, panel_.vectors, number != ticket.first);
    }
    for (int i = 0; i <= kMaxScores; i++) {
      void* sums = i == kMaxScores ? c_.d_scale : i < c_.scores && by_row(c_.score[i]) ? c_.score[i].gradient : nullptr;
      if (!sums) continue;
      for (int l = 0; l < panel_.rows; l++)
        static_cast<A*>(sums)[(panel_.lane * c_.heads + panel_.head[l]) * c_.queries + panel_.t[l]] += by_query_[i][l];
    }
    __atomic_store_n(&ticket.turn, next(kinds_, c_, panel_, number + 1), __ATOMIC_RELEASE);
  }

  // Whether a score's gradient is summed by query: of caps and factors, and of biases without an axis of keys.
  static bool by_row(const Score& score) {
    return score.by_head() || (score.step == ScoreStep::bias && !score.pairs.key);
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
          if (first_query_ == end_query_) continue;
          for (int64_t d = most(first_query_, kSpan - keys); d < end_query_ + kSpan - 1; d++)
            to[c_.keys - start_ - kSpan + d] += sums_[i][g * length + d];
        } else {
          A* to = static_cast<A*>(score.gradient) + row * c_.keys + start_;
          const A *sums = sums_[i] + g * kSpan, *rests = sums + c_.heads / c_.key_heads * kSpan;
          for (int64_t j = 0; j < keys; j++) to[j] = is_finite(rests[j]) ? sums[j] + rests[j] : sums[j];
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
  const Kinds<A>& kinds_;
  const Shared& shared_;
  const int64_t wide_h_, wide_v_, depth_h_, depth_v_;
  Arena arena_;
  E *key_, *value_;  // [key][depth]
  E* key_down_;      // [key in steps of the depth][H]
  A *d_key_, *d_value_, *key_part_, *value_part_;
  E* query_;
  A* d_query_;
  E *d_out_, *query_rows_, *d_out_rows_, *clean_key_, *clean_rows_;
  A *weights_, *change_;
  A* raw_;  // products of query and key, where the gradient of the scale is wanted
  Slopes<A> slopes_[kMaxScores];
  E* pairs_;
  A* room_;
  Seen<A> seen_;
  PairsBuffer<A> buffer_;
  A* sums_[kMaxScores] = {};
  Panel<A> panel_;
  int64_t lane_ = 0, kv_ = 0, start_ = 0, keys_ = 0;
  int64_t first_query_ = 0, end_query_ = 0;  // those that added to sums by distance
  bool keys_looked_ = false, keys_finite_ = true, rows_looked_ = false, rows_finite_ = true;
  Ahead next_query_, next_d_out_;
  alignas(64) A share_[L], highest_[L], delta_[L], by_query_[kMaxScores + 1][L];  // the last one: of the scale
  alignas(64) A ones_[L];
};

}  // namespace attnjax::ATTNJAX_ISA
