// What is done with tiles in a thread's own memory: packing, matrix products on register tiles, copies between rows in
// memory and lanes of vectors. A "panel" holds rows (queries) side by side in the lanes of kTileVectors vectors.
#pragma once

#include <type_traits>

#include "simd.h"

namespace attnjax::ATTNJAX_ISA {

template <class A>
constexpr int kLanes = kTileVectors * kWidth<A>;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// M x N accumulators: the sum over k of a(m, k) b[k][n]; a(m, k) is a[m * lda + k] or, flipped, a[k * lda + m]. The
// factors are of the accumulators' type A or pairs of bfloat16, uint32_t; then k counts pairs.
template <class A, int M, int N, bool flipped, class E, class Finish>
inline void block(const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth, int m0, int n0,
                  const Finish& finish) {
  Vector<A> sum[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[m][n] = Vector<A>{};
  for (int64_t k = 0; k < depth; k++) {
    Vector<E> x[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) x[n] = load(b + k * ldb + n * kWidth<E>);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      Vector<E> y = splat(flipped ? a[k * lda + m] : a[m * lda + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[m][n] = multiply_add(sum[m][n], y, x[n]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) finish(m0 + m, n0 + n, sum[m][n]);
}

template <class A, int M, bool flipped, class E, class Finish>
inline void rows_of_blocks(const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth, int m, int vectors,
                           const Finish& finish) {
  a += flipped ? m : m * lda;
  int n = 0;
  for (; n + kTileVectors <= vectors; n += kTileVectors)
    block<A, M, kTileVectors, flipped>(a, lda, b + n * kWidth<A>, ldb, depth, m, n, finish);
  if constexpr (kTileVectors == 4) {
    if (vectors - n == 3) block<A, M, 3, flipped>(a, lda, b + n * kWidth<A>, ldb, depth, m, n, finish);
    if (vectors - n == 2) block<A, M, 2, flipped>(a, lda, b + n * kWidth<A>, ldb, depth, m, n, finish);
  }
  if (vectors - n == 1) block<A, M, 1, flipped>(a, lda, b + n * kWidth<A>, ldb, depth, m, n, finish);
}

// The product of `rows` rows and `vectors` columns of vectors. finish(m, n, sum) takes a vector of it; between() is
// called now and then, for what can be done in the shadow of the multiplications.
template <class A, bool flipped, class E, class Finish, class Between>
inline void product(const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth, int rows, int vectors,
                    const Finish& finish, const Between& between) {
  int m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) {
    rows_of_blocks<A, kTileRows, flipped>(a, lda, b, ldb, depth, m, vectors, finish);
    between();
  }
  for (; m + 4 <= rows; m += 4) rows_of_blocks<A, 4, flipped>(a, lda, b, ldb, depth, m, vectors, finish);
  for (; m + 2 <= rows; m += 2) rows_of_blocks<A, 2, flipped>(a, lda, b, ldb, depth, m, vectors, finish);
  if (m < rows) rows_of_blocks<A, 1, flipped>(a, lda, b, ldb, depth, m, vectors, finish);
}

struct Nothing {
  void operator()() const {}
};

// c += a b, rows of `vectors` vectors. The product is summed up before it is added: every addition to a sum that has
// grown large costs accuracy.
template <class A, bool flipped, class E>
inline void add_product(A* c, int64_t ldc, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth, int rows,
                        int vectors) {
  product<A, flipped>(
      a, lda, b, ldb, depth, rows, vectors,
      [&](int m, int n, Vector<A> sum) {
        A* at = c + m * ldc + n * kWidth<A>;
        store(at, load(at) + sum);
      },
      Nothing());
}

// c = a b.
template <class A, bool flipped, class E, class Between = Nothing>
inline void set_product(A* c, int64_t ldc, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth, int rows,
                        int vectors, const Between& between = Between()) {
  product<A, flipped>(
      a, lda, b, ldb, depth, rows, vectors,
      [&](int m, int n, Vector<A> sum) { store(c + m * ldc + n * kWidth<A>, sum); }, between);
}

// c = a b, each column times its factor.
template <class A, bool flipped, class E, class Between = Nothing>
inline void set_scaled_product(A* c, int64_t ldc, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth,
                               int rows, int vectors, const A* factors, const Between& between = Between()) {
  product<A, flipped>(
      a, lda, b, ldb, depth, rows, vectors,
      [&](int m, int n, Vector<A> sum) { store(c + m * ldc + n * kWidth<A>, sum * load(factors + n * kWidth<A>)); },
      between);
}

#if defined(__AVX512BF16__)
// Two rows each to a row of pairs; behind an odd number of rows comes one of zeros.
inline void pair_rows(uint32_t* to, const float* from, int64_t stride, int rows, int vectors) {
  constexpr int W = kWidth<float>;
  for (int i = 0; i < rows; i += 2)
    for (int v = 0; v < vectors; v++) {
      const float* at = from + i * stride + v * W;
      store(to + i / 2 * stride + v * W, pair(load(at), i + 1 < rows ? load(at + stride) : Vector<float>{}));
    }
}
#endif

// Rows in memory, one for each lane, to `to[column][lane]`. Lanes without a row (null) become 0.
template <class A>
inline void rows_to_lanes(A* to, const char* const* rows, Type type, int64_t columns, int vectors) {
  constexpr int W = kWidth<A>;
  constexpr Type own = kOwnType<A>;
  for (int v = 0; v < vectors; v++) {
    for (int64_t c = 0; c < columns; c += W) {
      int count = static_cast<int>(least(W, columns - c));
      Vector<A> r[W];
      for (int i = 0; i < W; i++) {
        const char* row = rows[v * W + i];
        if (row && type == own && count == W) {
          r[i] = load(reinterpret_cast<const A*>(row) + c);
        } else {
          alignas(64) A part[W] = {};
          if (row) load_row(part, row + c * size_of(type), type, count);
          r[i] = load(part);
        }
      }
      transpose<A>(r);
      for (int i = 0; i < count; i++) store(to + (c + i) * kLanes<A> + v * W, r[i]);
    }
  }
}

// The way back: `from[column][lane]` times a factor for each lane, to rows; or added to rows of the type A.
template <class A>
inline void lanes_to_rows(char* const* rows, Type type, const A* from, const A* factor, int64_t columns, int vectors,
                          bool add) {
  constexpr int W = kWidth<A>;
  constexpr Type own = kOwnType<A>;
  for (int v = 0; v < vectors; v++) {
    Vector<A> scale = load(factor + v * W);
    for (int64_t c = 0; c < columns; c += W) {
      int count = static_cast<int>(least(W, columns - c));
      Vector<A> r[W];
      for (int i = 0; i < W; i++) r[i] = i < count ? load(from + (c + i) * kLanes<A> + v * W) * scale : Vector<A>{};
      transpose<A>(r);
      for (int i = 0; i < W; i++) {
        char* row = rows[v * W + i];
        if (!row) continue;
        A* here = reinterpret_cast<A*>(row) + c;
        if (type == own && count == W) {
          store(here, add ? load(here) + r[i] : r[i]);
          continue;
        }
        alignas(64) A part[W];
        store(part, r[i]);
        if (add) {
          for (int j = 0; j < count; j++) here[j] += part[j];
        } else {
          store_row(row + c * size_of(type), part, type, count);
        }
      }
    }
  }
}

}  // namespace attnjax::ATTNJAX_ISA
