// Vectors and the functions of them that attention needs, written once with the compiler's vector extensions. Their
// width is that of the instruction set this file is compiled for; everything lives in a namespace of its name, so that
// the linker never mixes code of one with another. Knows nothing of attention.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "call.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#ifndef ATTNJAX_ISA
#error "compile with -DATTNJAX_ISA=<name of the instruction set>"
#endif

namespace attnjax::ATTNJAX_ISA {

// A product keeps kTileRows x kTileVectors accumulators in registers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileVectors = 4;
#else
constexpr int kVectorBytes = 16, kTileVectors = 2;
#endif
constexpr int kTileRows = 6;

template <class A>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <class A>
using Integer = typename IntegerOf<A>::type;

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  typedef A loose __attribute__((vector_size(kVectorBytes), aligned(alignof(A)), may_alias));
};
template <class A>
using Vector = typename VectorOf<A>::type;

template <class A>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
inline Vector<A> load(const A* from) {
  return *reinterpret_cast<const typename VectorOf<A>::loose*>(from);
}

template <class A>
inline void store(A* to, Vector<A> x) {
  *reinterpret_cast<typename VectorOf<A>::loose*>(to) = x;
}

template <class A, int... i>
inline Vector<A> splat_(A x, std::integer_sequence<int, i...>) {
  return Vector<A>{(static_cast<void>(i), x)...};
}

template <class A>
inline Vector<A> splat(A x) {
  return splat_(x, std::make_integer_sequence<int, kWidth<A>>());
}

// The bits of one vector as another type of the same element size.
template <class To, class From>
inline Vector<To> bits(Vector<From> x) {
  return reinterpret_cast<Vector<To>>(x);
}

// The larger; y where either is NaN.
template <class A>
inline Vector<A> larger(Vector<A> x, Vector<A> y) {
  return x > y ? x : y;
}

inline Vector<float> multiply_add(Vector<float> sum, Vector<float> x, Vector<float> y) { return sum + x * y; }
inline Vector<double> multiply_add(Vector<double> sum, Vector<double> x, Vector<double> y) { return sum + x * y; }

// Pairs of bfloat16 in 32-bit words, the first in the lower half, where the processor multiplies them: two products a
// lane, summed in float32.
#if defined(__AVX512BF16__)
constexpr bool kMultipliesPairs = true;

inline Vector<float> multiply_add(Vector<float> sum, Vector<uint32_t> x, Vector<uint32_t> y) {
  return reinterpret_cast<Vector<float>>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y)));
}

inline Vector<uint32_t> low_halves(Vector<float> x) {
  return reinterpret_cast<Vector<uint32_t>>(
      _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)))));
}

inline Vector<uint32_t> pair(Vector<float> first, Vector<float> second) {
  return low_halves(first) | low_halves(second) << 16;
}

inline void store_halves(uint32_t* to, Vector<float> x) {
  auto halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
  std::memcpy(to, &halves, sizeof(halves));
}
#else
constexpr bool kMultipliesPairs = false;
#endif

// exp(x) for x <= 0; not below exp(-87) (float32) or exp(-708) (float64), also for -inf. Relative error about one unit
// in the last place: x = n ln 2 + f, |f| <= ln(2) / 2, and a polynomial in f. Float32 has the minimax polynomial of
// degree 6; float64 Taylor's of degree 13.
inline Vector<float> exponential(Vector<float> x) {
  using V = Vector<float>;
  const V magic = splat(0x1.8p23f);
  x = larger<float>(splat(-87.0f), x);
  V t = x * splat(1.44269504f) + magic;
  V n = t - magic;
  V f = x - n * splat(0.693147181f);
  V p = splat(0x1.6b6e1ap-10f);
  p = p * f + splat(0x1.122fc2p-7f);
  p = p * f + splat(0x1.555688p-5f);
  p = p * f + splat(0x1.5554a4p-3f);
  p = p * f + splat(0.5f);
  p = p * f + splat(1.0f);
  p = p * f + splat(1.0f);
  return bits<float, uint32_t>(bits<uint32_t, float>(p) + (bits<uint32_t, float>(t) << 23));
}

constexpr double inverse_factorial(int n) {
  double product = 1;
  for (int i = 2; i <= n; i++) product *= i;
  return 1 / product;
}

inline Vector<double> exponential(Vector<double> x) {
  using V = Vector<double>;
  const V magic = splat(0x1.8p52);
  x = larger<double>(splat(-708.0), x);
  V t = x * splat(0x1.71547652b82fep0) + magic;
  V n = t - magic;
  V f = x - n * splat(0x1.62e42fefa3800p-1);
  f = f - n * splat(0x1.ef35793c76730p-45);
  V p = splat(inverse_factorial(13));
#pragma GCC unroll 16
  for (int i = 12; i >= 0; i--) p = p * f + splat(inverse_factorial(i));
  return bits<double, uint64_t>(bits<uint64_t, double>(p) + (bits<uint64_t, double>(t) << 52));
}

// tanh(x). Where |x| is small by Taylor's polynomial of exp(y) - 1 with y = 2x, where 1 - 2 / (exp(y) + 1) would
// cancel.
template <class A>
inline Vector<A> hyperbolic_tangent(Vector<A> x) {
  using V = Vector<A>;
  constexpr int degree = sizeof(A) == 4 ? 11 : 19;
  const V one = splat(A(1)), zero = splat(A(0));
  V size = x < zero ? -x : x;
  V y = splat(A(2)) * size;
  V minus_one = splat(A(inverse_factorial(degree)));
#pragma GCC unroll 20
  for (int i = degree - 1; i >= 1; i--) minus_one = minus_one * y + splat(A(inverse_factorial(i)));
  minus_one = minus_one * y;
  V small = minus_one / (minus_one + splat(A(2)));
  V decay = exponential(-y);
  V large = (one - decay) / (one + decay);
  V r = size < splat(A(0.55)) ? small : large;
  return x < zero ? -r : r;
}

constexpr int low_lane(int lane, int step, int width) { return (lane & step) ? width + lane - step : lane; }
constexpr int high_lane(int lane, int step, int width) { return (lane & step) ? width + lane : lane + step; }

template <class A, int step, int... i>
inline void exchange(Vector<A>& a, Vector<A>& b, std::integer_sequence<int, i...>) {
  constexpr int width = sizeof...(i);
#if defined(__clang__)
  Vector<A> low = __builtin_shufflevector(a, b, low_lane(i, step, width)...);
  Vector<A> high = __builtin_shufflevector(a, b, high_lane(i, step, width)...);
#else  // GCC has the other one since version 12 only
  Vector<A> low = __builtin_shuffle(a, b, Vector<Integer<A>>{low_lane(i, step, width)...});
  Vector<A> high = __builtin_shuffle(a, b, Vector<Integer<A>>{high_lane(i, step, width)...});
#endif
  a = low;
  b = high;
}

template <class A, int step = 1>
inline void transpose(Vector<A> (&r)[kWidth<A>]) {
  if constexpr (step < kWidth<A>) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth<A>; i++) {
      if (!(i & step)) exchange<A, step>(r[i], r[i + step], std::make_integer_sequence<int, kWidth<A>>());
    }
    transpose<A, 2 * step>(r);
  }
}

// Conversions of the storage types. bfloat16 is the upper half of a float32; float16 has another exponent.
inline float from_bits(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

inline uint32_t to_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}

inline float from_bf16(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }

inline uint16_t to_bf16(float x) {
  uint32_t u = to_bits(x);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? (u >> 16) | 0x40 : rounded);
}

// No arithmetic on subnormal float32 numbers, which XLA's threads take for 0.
inline float from_f16(uint16_t x) {
  uint32_t magnitude = x & 0x7fff;
  uint32_t usual = (magnitude << 13) + (112u << 23);
  uint32_t tiny = to_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  uint32_t u = magnitude >= 0x7c00 ? usual + (112u << 23) : magnitude < 0x400 ? tiny : usual;
  return from_bits(u | static_cast<uint32_t>(x & 0x8000) << 16);
}

inline uint16_t to_f16(float x) {
  uint32_t u = to_bits(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t tiny = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;  // below 2^-14: rounded by the addition
  uint32_t usual = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  uint32_t r = magnitude < 0x38800000u ? tiny : usual;
  r = magnitude >= 0x477ff000u ? 0x7c00u : r;
  r = magnitude > 0x7f800000u ? 0x7e00u : r;
  return static_cast<uint16_t>(r | sign);
}

template <class A>
constexpr Type kOwnType = sizeof(A) == 4 ? Type::f32 : Type::f64;

template <class A>
inline void load_row(A* to, const void* from, Type type, int64_t n) {
  switch (type) {
    case Type::f32:
      for (int64_t i = 0; i < n; i++) to[i] = static_cast<A>(static_cast<const float*>(from)[i]);
      break;
    case Type::f64:
      for (int64_t i = 0; i < n; i++) to[i] = static_cast<A>(static_cast<const double*>(from)[i]);
      break;
    case Type::bf16:
      for (int64_t i = 0; i < n; i++) to[i] = static_cast<A>(from_bf16(static_cast<const uint16_t*>(from)[i]));
      break;
    case Type::f16:
      for (int64_t i = 0; i < n; i++) to[i] = static_cast<A>(from_f16(static_cast<const uint16_t*>(from)[i]));
      break;
    case Type::u8:
      for (int64_t i = 0; i < n; i++) to[i] = static_cast<A>(static_cast<const uint8_t*>(from)[i]);
      break;
  }
}

// The vector of a row's numbers from `at` on; zeros behind the row's end.
template <class A>
inline Vector<A> fetch(const char* row, Type type, int64_t at, int64_t columns) {
  if (type == kOwnType<A> && at + kWidth<A> <= columns) return load(reinterpret_cast<const A*>(row) + at);
  alignas(64) A part[kWidth<A>] = {};
  load_row(part, row + at * size_of(type), type, columns - at < kWidth<A> ? columns - at : kWidth<A>);
  return load(part);
}

template <class A>
inline void store_row(void* to, const A* from, Type type, int64_t n) {
  switch (type) {
    case Type::f32:
      for (int64_t i = 0; i < n; i++) static_cast<float*>(to)[i] = static_cast<float>(from[i]);
      break;
    case Type::f64:
      for (int64_t i = 0; i < n; i++) static_cast<double*>(to)[i] = static_cast<double>(from[i]);
      break;
    case Type::bf16:
      for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(to)[i] = to_bf16(static_cast<float>(from[i]));
      break;
    case Type::f16:
      for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(to)[i] = to_f16(static_cast<float>(from[i]));
      break;
    case Type::u8:
      break;
  }
}

}  // namespace attnjax::ATTNJAX_ISA
