// What a kernel is asked to do: sizes, pointers and the small programs of mask and scores, checked and in plain types.
// `module.cc` fills it in from XLA's call frame; `attention.cc` reads it. No code of any instruction set.
#pragma once

#include <cstdint>

namespace attnjax {

enum class Type : int { f32, f64, bf16, f16, u8 };

// Inlined always: what the linker finds twice it keeps once, perhaps compiled for another instruction set.
#define ATTNJAX_INLINE inline __attribute__((always_inline))

ATTNJAX_INLINE int64_t size_of(Type type) {
  return type == Type::f64 ? 8 : type == Type::f32 ? 4 : type == Type::u8 ? 1 : 2;
}

// An array with batch axes of which some may have size 1. `lanes[b]` is where batch entry b starts, in elements.
struct Array {
  void* data = nullptr;
  Type type = Type::f32;
  const int64_t* lanes = nullptr;

  ATTNJAX_INLINE char* at(int64_t lane, int64_t element) const {
    return static_cast<char*>(data) + (lanes[lane] + element) * size_of(type);
  }
};

// Steps of the mask's program, in postfix order. A comparison reads the next two arrays, int32 by key and by query;
// `dense` the next one, bytes by query and key, with an axis of heads; `bits` the next three, see `Packed`.
enum class MaskStep : int64_t { less_equal, less, equal, greater_equal, greater, dense, bits, both, either, negate };

// How one score changes a logit.
enum class ScoreStep : int64_t { soft_cap, bias, by_distance, scale };

struct Comparison {
  MaskStep step;
  Array keys, queries;  // int32 [lanes or 1, S] and [lanes or 1, T]
};

// An array [lanes, N or 1, T or 1, S or 1]; by distance t - s + S - 1, [lanes, N or 1, T + S - 1]; or [lanes, N or 1].
struct Pairs {
  Array array;
  int64_t head = 0, query = 0, key = 0;  // strides in elements, 0 for an axis of size 1
};

constexpr int64_t kPackedKeys = 64;

// The blocks of a mask, `rows` queries by kPackedKeys keys, whose pairs were looked at: their bits, the first key
// lowest, are [lanes or 1, N or 1, block, rows, kPackedKeys / 8]. What the others hold does not matter to the mask's
// program.
struct Packed {
  int64_t rows = 0;                  // 0 where an array is no such
  const int32_t* starts = nullptr;   // of each row of blocks, the number of its first; and how many there are
  const int32_t* columns = nullptr;  // of each block, the number of its keys' block; they rise within a row

  // The number of a block, or -1.
  ATTNJAX_INLINE int64_t find(int64_t row, int64_t column) const {
    int64_t low = starts[row], high = starts[row + 1];
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (columns[middle] < column)
        low = middle + 1;
      else
        high = middle;
    }
    return low < starts[row + 1] && columns[low] == column ? low : -1;
  }
};

struct Score {
  ScoreStep step;
  Pairs pairs;  // what is added; or caps and factors, by lane and head, in the accumulation type
  // In the accumulation type, null where not wanted: by query and key where the score has both, at `gradient_pairs`;
  // else of every lane and head, [lanes, N, S], [lanes, N, T + S - 1] or, of caps and factors as well, [lanes, N, T].
  void* gradient = nullptr;
  Pairs gradient_pairs;
  int64_t gradient_size = 0;
  int64_t adders = 0;  // how many lanes and heads add to the same gradient by query and key

  // Whether its array has one number for each lane and head.
  ATTNJAX_INLINE bool by_head() const { return step == ScoreStep::soft_cap || step == ScoreStep::scale; }
};

constexpr int kMaxSteps = 64, kMaxComparisons = 24, kMaxDense = 4, kMaxScores = 6;

struct Call {
  int64_t lanes, queries, keys, heads, key_heads, head_size, value_size;
  bool wide;  // accumulate in float64
  double dropout;
  Array query, key, value;
  Pairs scale;  // by lane and head, in the accumulation type
  Array sinks;  // [lanes, N], in the accumulation type; no data where there are none
  Array seeds;  // of dropout, by lane and query head

  int steps = 0, comparisons = 0, denses = 0, scores = 0;
  MaskStep mask[kMaxSteps];
  Comparison comparison[kMaxComparisons];
  Pairs dense[kMaxDense];
  Packed packed[kMaxDense];  // what is known of the same arrays, where they are bits
  Score score[kMaxScores];

  // The block map, where the caller knows one: 0 empty, 1 partial, 2 full. Else the mask's arrays tell.
  Array kinds;
  int64_t block_q = 1, block_k = 1, blocks_q = 0, blocks_k = 0;
  bool kinds_by_head = false;

  // Results and, for the backward, what the forward gave. [lanes, T, N(, V)], contiguous.
  void* out = nullptr;  // in the query's type
  void* highest = nullptr;
  void* total = nullptr;
  const int64_t* rows = nullptr;  // where batch entry b of the output starts, in elements
  const void* d_out = nullptr;    // in the query's type
  const void* d_lse = nullptr;
  void* d_query = nullptr;  // accumulation type; null where not wanted
  void* d_key = nullptr;
  void* d_value = nullptr;
  void* d_scale = nullptr;  // by query: [lanes, N, T]
};

// Threads and memory, from `module.cc`. Plain pointers, because templates of the standard library would be compiled
// once per instruction set and merged by the linker.
struct Run {
  void* state;
  int64_t threads;
  // work(data, task) for every task below `count`, started in increasing order, on the threads there are.
  void (*start)(void* state, int64_t count, void (*work)(void* data, int64_t task), void* data);
  // Memory of this thread, aligned to 64 bytes, kept until its next request. Not zeroed.
  void* (*scratch)(int64_t bytes);
  // Memory for all threads, not zeroed.
  void* (*reserve)(int64_t bytes);
  void (*release)(void* memory);
  // Lets another thread go on while this one waits.
  void (*yield)();
};

template <class F>
void for_each(const Run& run, int64_t count, const F& work) {
  run.start(
      run.state, count, [](void* data, int64_t task) { (*static_cast<const F*>(data))(task); }, const_cast<F*>(&work));
}

struct Kernels {
  const char* name;
  void (*forward)(const Call&, const Run&);
  void (*backward)(const Call&, const Run&);
};

}  // namespace attnjax
