// Which blocks of a mask are empty (0), partial (1) or full (2): from the ends of the numbers that the mask compares,
// by block of keys and panel of queries, or from a map that the caller has. Memory is linear in the lengths, and blocks
// that are far apart are skipped many at a time.
#pragma once

#include "panel.h"

namespace attnjax::ATTNJAX_ISA {

// The least and the greatest of some numbers.
struct Ends {
  int32_t low, high;

  void take(Ends other) {
    low = low < other.low ? low : other.low;
    high = high > other.high ? high : other.high;
  }
};

inline Ends ends_of(const int32_t* numbers, int64_t count) {
  int32_t low = numbers[0], high = numbers[0];
  for (int64_t i = 1; i < count; i++) {
    low = low < numbers[i] ? low : numbers[i];
    high = high > numbers[i] ? high : numbers[i];
  }
  return {low, high};
}

// The kind of a rectangle in which keys and queries have these ends.
inline int compare_ends(MaskStep step, Ends k, Ends q) {
  switch (step) {
    case MaskStep::less_equal:
      return k.high <= q.low ? 2 : k.low > q.high ? 0 : 1;
    case MaskStep::less:
      return k.high < q.low ? 2 : k.low >= q.high ? 0 : 1;
    case MaskStep::equal:
      return k.high < q.low || q.high < k.low ? 0 : k.low == k.high && q.low == q.high ? 2 : 1;
    case MaskStep::greater_equal:
      return k.low >= q.high ? 2 : k.high < q.low ? 0 : 1;
    default:
      return k.low > q.high ? 2 : k.high <= q.low ? 0 : 1;
  }
}

template <class A>
class Kinds {
  static constexpr int L = kLanes<A>;
  static constexpr int kShift = 4;           // 16 runs of one level make one of the next
  static constexpr int kLevels = 16;         // of 64 * 16^15 keys
  static constexpr int64_t kMany = 1 << 16;  // numbers that are worth waking other threads for

  // Runs of blocks, runs of those, and so on up to a single one.
  struct Levels {
    int count = 0;
    int64_t runs[kLevels], first[kLevels], all = 0;

    void plan(int64_t blocks) {
      do {
        runs[count] = blocks, first[count] = all, all += blocks;
        blocks = divide_up(blocks, 1 << kShift);
      } while (runs[count++] > 1);
    }
  };

 public:
  Kinds(const Call& c, const Run& run) : c_(c), run_(run) {
    if (!c.steps || c.kinds.data || !c.keys || !c.queries) return;
    by_key_.plan(divide_up(c.keys, kHalf));
    by_query_.plan(divide_up(c.queries * group(), L));
    int64_t all = 0, numbers = 0;
    for (int i = 0; i < c.comparisons; i++) {
      const int64_t k = copies(c.comparison[i].keys, c.keys), q = copies(c.comparison[i].queries, c.queries);
      all += k * by_key_.all + q * by_query_.all, numbers += k * c.keys + q * c.queries;
    }
    memory_ = run.reserve(all * static_cast<int64_t>(sizeof(Ends)));
    Ends* next = static_cast<Ends*>(memory_);
    for (int i = 0; i < c.comparisons; i++) {
      keys_[i] = next, next += copies(c.comparison[i].keys, c.keys) * by_key_.all;
      queries_[i] = next, next += copies(c.comparison[i].queries, c.queries) * by_query_.all;
    }
    auto measure = [&](int64_t task) {
      task % 2 ? measure_queries(static_cast<int>(task / 2)) : measure_keys(static_cast<int>(task / 2));
    };
    if (numbers < kMany)
      for (int64_t task = 0; task < 2 * c.comparisons; task++) measure(task);
    else
      for_each(run, 2 * c.comparisons, measure);
  }

  ~Kinds() {
    if (memory_) run_.release(memory_);
  }

  Kinds(const Kinds&) = delete;
  Kinds& operator=(const Kinds&) = delete;

  // Of the keys [key, end); `key` is a multiple of kHalf.
  int of(const Panel<A>& panel, int64_t key, int64_t end) const {
    if (c_.kinds.data) return mapped(panel, key, end);
    if (!c_.steps) return 2;
    return evaluate(
        [&](int i) { return keys_between(i, panel.lane, key, end); },
        [&](int i) {
          return queries_[i][at(c_.comparison[i].queries, panel.lane, c_.queries, by_query_) + panel.first / L];
        },
        [&](int i) { return dense_kind(i, panel, key, end); });
  }

  // Whether any block of the keys [key, end) is visited.
  bool visits(const Panel<A>& panel, int64_t key, int64_t end) const {
    for (; key < end; key += kHalf)
      if (of(panel, key, least(end, key + kHalf))) return true;
    return false;
  }

  // The first key from `key` on, a multiple of kHalf, whose block the panels [panel, end) may visit; else all keys.
  int64_t next_key(int64_t lane, int64_t panel, int64_t end, int64_t key) const {
    if (!memory_) return key;
    Ends queries[kMaxComparisons];
    for (int i = 0; i < c_.comparisons; i++) {
      const Ends* own = queries_[i] + at(c_.comparison[i].queries, lane, c_.queries, by_query_);
      queries[i] = own[panel];
      for (int64_t p = panel + 1; p < end; p++) queries[i].take(own[p]);
    }
    const int64_t run = skip(by_key_, key / kHalf, [&](int64_t place) {
      return evaluate([&](int i) { return keys_[i][at(c_.comparison[i].keys, lane, c_.keys, by_key_) + place]; },
                      [&](int i) { return queries[i]; }, [](int) { return 1; });
    });
    return least(c_.keys, run * kHalf);
  }

  // The first panel from `panel` on that may visit the keys [key, end).
  int64_t next_panel(int64_t lane, int64_t panel, int64_t key, int64_t end) const {
    if (!memory_) return panel;
    Ends keys[kMaxComparisons];
    for (int i = 0; i < c_.comparisons; i++) keys[i] = keys_between(i, lane, key, end);
    return skip(by_query_, panel, [&](int64_t place) {
      return evaluate(
          [&](int i) { return keys[i]; },
          [&](int i) { return queries_[i][at(c_.comparison[i].queries, lane, c_.queries, by_query_) + place]; },
          [](int) { return 1; });
    });
  }

 private:
  int64_t group() const { return c_.heads / c_.key_heads; }

  // How many of an array's batch entries are stored.
  int64_t copies(const Array& array, int64_t length) const {
    int64_t last = 0;
    for (int64_t b = 0; b < c_.lanes; b++) last = most(last, array.lanes[b]);
    return last / length + 1;
  }

  static int64_t at(const Array& array, int64_t lane, int64_t length, const Levels& levels) {
    const int64_t start = array.lanes[lane];
    return start ? start / length * levels.all : 0;
  }

  void measure_keys(int i) {
    const Array& array = c_.comparison[i].keys;
    for (int64_t copy = 0; copy < copies(array, c_.keys); copy++) {
      const int32_t* numbers = static_cast<const int32_t*>(array.data) + copy * c_.keys;
      Ends* to = keys_[i] + copy * by_key_.all;
      for (int64_t block = 0; block < by_key_.runs[0]; block++)
        to[block] = ends_of(numbers + block * kHalf, least(kHalf, c_.keys - block * kHalf));
      gather(to, by_key_);
    }
  }

  void measure_queries(int i) {
    const Array& array = c_.comparison[i].queries;
    const int64_t rows = c_.queries * group();
    for (int64_t copy = 0; copy < copies(array, c_.queries); copy++) {
      const int32_t* numbers = static_cast<const int32_t*>(array.data) + copy * c_.queries;
      Ends* to = queries_[i] + copy * by_query_.all;
      for (int64_t panel = 0; panel < by_query_.runs[0]; panel++) {
        const int64_t low = panel * L / group(), high = (least(rows, (panel + 1) * L) - 1) / group();
        to[panel] = ends_of(numbers + low, high - low + 1);
      }
      gather(to, by_query_);
    }
  }

  static void gather(Ends* ends, const Levels& levels) {
    for (int level = 1; level < levels.count; level++)
      for (int64_t run = 0; run < levels.runs[level]; run++) {
        const Ends* below = ends + levels.first[level - 1];
        Ends made = below[run << kShift];
        for (int64_t i = (run << kShift) + 1; i < least(levels.runs[level - 1], (run + 1) << kShift); i++)
          made.take(below[i]);
        ends[levels.first[level] + run] = made;
      }
  }

  // The first run of the lowest level from `run` on whose kind is not 0; `kind` takes a place among all levels.
  template <class Kind>
  static int64_t skip(const Levels& levels, int64_t run, const Kind& kind) {
    while (run < levels.runs[0]) {
      int level = 0;
      while (level + 1 < levels.count && !(run & ((int64_t{1} << kShift * (level + 1)) - 1))) level++;
      while (level >= 0 && kind(levels.first[level] + (run >> kShift * level))) level--;
      if (level < 0) return run;
      run += int64_t{1} << kShift * level;
    }
    return levels.runs[0];
  }

  Ends keys_between(int i, int64_t lane, int64_t key, int64_t end) const {
    const Ends* own = keys_[i] + at(c_.comparison[i].keys, lane, c_.keys, by_key_);
    Ends made = own[key / kHalf];
    for (int64_t block = key / kHalf + 1; block <= (end - 1) / kHalf; block++) made.take(own[block]);
    return made;
  }

  template <class Key, class Query, class Dense>
  int evaluate(const Key& key, const Query& query, const Dense& dense) const {
    int stack[kMaxDepth], depth = 0, comparison = 0, denses = 0;
    for (int i = 0; i < c_.steps; i++) {
      const MaskStep step = c_.mask[i];
      if (step < MaskStep::dense) {
        stack[depth++] = compare_ends(step, key(comparison), query(comparison));
        comparison++;
      } else if (step <= MaskStep::bits) {
        stack[depth++] = dense(denses++);
      } else if (step == MaskStep::negate) {
        stack[depth - 1] = 2 - stack[depth - 1];
      } else {
        const int last = stack[--depth], before = stack[depth - 1];
        stack[depth - 1] = (step == MaskStep::both) == (last < before) ? last : before;
      }
    }
    return stack[0];
  }

  // Looks at all pairs.
  int dense_kind(int number, const Panel<A>& panel, int64_t key, int64_t end) const {
    const Pairs& pairs = c_.dense[number];
    if (c_.packed[number].rows) return packed_kind(c_.packed[number], pairs, panel, key, end);
    bool none = true, all = true;
    const char* last = nullptr;
    const int64_t start = key * pairs.key, count = pairs.key ? end - key : 1;
    for (int l = 0; l < panel.rows && (none || all); l++) {
      const char* row = pairs.array.at(panel.lane, panel.head[l] * pairs.head + panel.t[l] * pairs.query + start);
      if (row == last) continue;
      last = row;
      look(row, count, 1, none, all);
    }
    return none ? 0 : all ? 2 : 1;
  }

  // Partial where a row is not packed: nothing is known of it.
  static int packed_kind(const Packed& packed, const Pairs& pairs, const Panel<A>& panel, int64_t key, int64_t end) {
    bool none = true, all = true;
    char* rows[L];
    for (; key < end; key += kPackedKeys) {
      const int64_t count = least(kPackedKeys, end - key);
      panel.rows_of(packed, pairs, key / kPackedKeys, rows);
      for (int l = 0; l < panel.rows && (none || all); l++) {
        if (!rows[l]) return 1;
        if (l && rows[l] == rows[l - 1]) continue;
        look(rows[l], count / 8, 0xff, none, all), look_at_bits(rows[l] + count / 8, count % 8, none, all);
      }
    }
    return none ? 0 : all ? 2 : 1;
  }

  // Bytes that are 0 where nothing is seen and `full` where all is.
  static void look(const char* bytes, int64_t count, uint64_t full, bool& none, bool& all) {
    const uint64_t every = full * 0x0101010101010101u;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      uint64_t word;
      std::memcpy(&word, bytes + i, 8);
      none &= word == 0, all &= word == every;
    }
    for (; i < count; i++) none &= bytes[i] == 0, all &= static_cast<uint8_t>(bytes[i]) == full;
  }

  static void look_at_bits(const char* byte, int64_t count, bool& none, bool& all) {
    if (!count) return;
    const int every = (1 << count) - 1, found = static_cast<uint8_t>(*byte) & every;
    none &= found == 0, all &= found == every;
  }

  // 0 where no block of the map that the rectangle touches is visited, 2 where all of them are full.
  int mapped(const Panel<A>& panel, int64_t key, int64_t end) const {
    int64_t heads = c_.kinds_by_head ? panel.group : 1, first = c_.kinds_by_head ? panel.kv * panel.group : 0;
    bool none = true, all = true;
    for (int64_t h = first; h < first + heads; h++)
      for (int64_t i = panel.t_low / c_.block_q; i <= panel.t_high / c_.block_q; i++) {
        const char* row = c_.kinds.at(panel.lane, (h * c_.blocks_q + i) * c_.blocks_k);
        for (int64_t j = key / c_.block_k; j <= (end - 1) / c_.block_k; j++) {
          none = none && row[j] == 0;
          all = all && row[j] == 2;
        }
      }
    return none ? 0 : all ? 2 : 1;
  }

  const Call& c_;
  const Run& run_;
  Levels by_key_, by_query_;
  void* memory_ = nullptr;
  Ends *keys_[kMaxComparisons], *queries_[kMaxComparisons];  // [copies][runs of all levels]
};

}  // namespace attnjax::ATTNJAX_ISA
