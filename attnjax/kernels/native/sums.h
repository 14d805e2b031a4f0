// Sums of the backward: many numbers in float32 without the growth of rounding errors, arrays that all threads clear,
// and what is subtracted from the cotangents of weights.
#pragma once

#include "nonfinite.h"
#include "panel.h"

namespace attnjax::ATTNJAX_ISA {

// sum += x, and to `rest` what the rounding of that lost.
template <class T>
inline void add_exactly(T& sum, T& rest, T x) {
  const T made = sum + x, share = made - sum;
  rest += (sum - (made - share)) + (x - share);
  sum = made;
}

// Adds `from[column][lane]` to rows of the type A, and what is lost by it to other rows.
template <class A>
inline void add_lanes_exactly(char* const* rows, char* const* rests, const A* from, int64_t columns, int vectors) {
  constexpr int W = kWidth<A>;
  for (int v = 0; v < vectors; v++)
    for (int64_t c = 0; c < columns; c += W) {
      const int count = static_cast<int>(least(W, columns - c));
      Vector<A> r[W];
      for (int i = 0; i < W; i++) r[i] = i < count ? load(from + (c + i) * kLanes<A> + v * W) : Vector<A>{};
      transpose<A>(r);
      for (int i = 0; i < W; i++) {
        if (!rows[v * W + i]) continue;
        A *sums = reinterpret_cast<A*>(rows[v * W + i]) + c, *lost = reinterpret_cast<A*>(rests[v * W + i]) + c;
        alignas(64) A part[W];
        store(part, r[i]);
        for (int j = 0; j < count; j++) add_exactly(sums[j], lost[j], part[j]);
      }
    }
}

template <class Work>
inline void in_pieces(int64_t size, const Run& run, const Work& work) {
  const int64_t pieces = 64, each = divide_up(size, pieces);
  for_each(run, pieces, [&](int64_t i) { work(least(size, i * each), least(size, (i + 1) * each)); });
}

template <class A>
inline void zero(A* sums, int64_t size, const Run& run) {
  in_pieces(size, run, [&](int64_t from, int64_t to) { std::memset(sums + from, 0, (to - from) * sizeof(A)); });
}

// Adds what was lost, which is not a number where the sum is infinite.
template <class A>
inline void add_rests(A* sums, const A* rests, int64_t size, const Run& run) {
  in_pieces(size, run, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) sums[i] = is_finite(rests[i]) ? sums[i] + rests[i] : sums[i];
  });
}

// delta = sum(d_out * out) - d_lse, of the rows of a panel.
template <class A>
inline void subtrahends(const Call& c, const Panel<A>& panel, A* delta) {
  const Type type = c.query.type;
  for (int l = 0; l < panel.rows; l++) {
    const int64_t row = (panel.lane * c.queries + panel.t[l]) * c.heads + panel.head[l];
    const char* out = static_cast<const char*>(c.out) + row * c.value_size * size_of(type);
    const char* d_out = static_cast<const char*>(c.d_out) + row * c.value_size * size_of(type);
    Vector<A> sum = {};
    for (int64_t v = 0; v < c.value_size; v += kWidth<A>)
      sum += fetch<A>(out, type, v, c.value_size) * fetch<A>(d_out, type, v, c.value_size);
    A all = 0;
    for (int i = 0; i < kWidth<A>; i++) all += sum[i];
    delta[row] = all - static_cast<const A*>(c.d_lse)[row];
  }
}

}  // namespace attnjax::ATTNJAX_ISA
