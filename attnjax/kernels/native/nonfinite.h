// Numbers that are not finite, and rows of pairs that do not see each other: 0 * NaN is NaN, so that what a hidden pair
// holds would reach rows that must not see it. Products take 0 for such numbers; those who see them get them
// afterwards.
#pragma once

#include "simd.h"

namespace attnjax::ATTNJAX_ISA {

// Of factors of products: numbers, or pairs of bfloat16.
inline bool is_finite(float x) { return (to_bits(x) & 0x7f800000u) != 0x7f800000u; }

inline bool is_finite(double x) {
  uint64_t u;
  std::memcpy(&u, &x, 8);
  return (u & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}

inline bool all_finite(const float* from, int64_t count) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    const int32_t size = static_cast<int32_t>(to_bits(from[i]) & 0x7fffffffu);
    most = size > most ? size : most;
  }
  return most < 0x7f800000;
}

inline bool all_finite(const double* from, int64_t count) {
  bool finite = true;
  for (int64_t i = 0; i < count; i++) finite &= is_finite(from[i]);
  return finite;
}

inline bool all_finite(const uint32_t* from, int64_t count) {
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < count; i++) {
    const int32_t first = from[i] & 0x7fff, second = from[i] >> 16 & 0x7fff;
    low = first > low ? first : low;
    high = second > high ? second : high;
  }
  return low < 0x7f80 && high < 0x7f80;
}

// A copy with 0 in their place.
template <class A>
inline void copy_finite(A* to, const A* from, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = is_finite(from[i]) ? from[i] : A(0);
}

inline void copy_finite(uint32_t* to, const uint32_t* from, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const uint32_t x = from[i];
    to[i] = x & (((x & 0x7fff) < 0x7f80 ? 0xffffu : 0u) | ((x >> 16 & 0x7fff) < 0x7f80 ? 0xffff0000u : 0u));
  }
}

// part(row, column, number) for those of the rows [low, high); rows of pairs are two to a row.
template <class A, class Part>
inline void for_nonfinite(const A* from, int64_t stride, int low, int high, int64_t columns, const Part& part) {
  for (int row = low; row < high; row++)
    for (int64_t column = 0; column < columns; column++)
      if (!is_finite(from[row * stride + column])) part(row, column, from[row * stride + column]);
}

template <class Part>
inline void for_nonfinite(const uint32_t* from, int64_t stride, int low, int high, int64_t columns, const Part& part) {
  for (int row = low; row < high; row++)
    for (int64_t column = 0; column < columns; column++) {
      const float x = from_bf16(static_cast<uint16_t>(from[row / 2 * stride + column] >> row % 2 * 16));
      if (!is_finite(x)) part(row, column, x);
    }
}

}  // namespace attnjax::ATTNJAX_ISA
