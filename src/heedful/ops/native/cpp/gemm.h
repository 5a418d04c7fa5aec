// Products of small matrices: sums of a panel of MR x NR in registers, the right side packed in panels.
#pragma once
#include "simd.h"

namespace heedful {

// C (R x W vectors) = or += A (R x K) * B (K x .), B in rows of `bs`, A's element (m, k) at a[m * am + k * ak].
template <class T, int R, int W>
__attribute__((noinline)) void micro(long K, const T* a, long am, long ak, const T* b, T* c, long ldc, bool add) {
  constexpr int L = LANES<T>;
  Vec<T> sums[R][W];
#pragma GCC unroll 16
  for (int m = 0; m < R; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < W; ++n) sums[m][n] = Vec<T>{};
  for (long k = 0; k < K; ++k) {
    Vec<T> right[W];
#pragma GCC unroll 2
    for (int n = 0; n < W; ++n) right[n] = load<T>(b + n * L);
#pragma GCC unroll 16
    for (int m = 0; m < R; ++m) {
      T left = a[m * am];
#pragma GCC unroll 2
      for (int n = 0; n < W; ++n) sums[m][n] += left * right[n];
    }
    a += ak;
    b += NR<T>;
  }
#pragma GCC unroll 16
  for (int m = 0; m < R; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < W; ++n) {
      T* to = c + m * ldc + n * L;
      store<T>(to, add ? load<T>(to) + sums[m][n] : sums[m][n]);
    }
}

template <class T, int R>
inline void panel_of(int rows, int width, long K, const T* a, long am, long ak, const T* b, T* c, long ldc, bool add) {
  if (rows == R) {
    if (width > LANES<T>)
      micro<T, R, 2>(K, a, am, ak, b, c, ldc, add);
    else
      micro<T, R, 1>(K, a, am, ak, b, c, ldc, add);
  } else if constexpr (R > 1) {
    panel_of<T, R - 1>(rows, width, K, a, am, ak, b, c, ldc, add);
  }
}

// Up to MR rows by up to NR columns; C needs room for whole vectors.
template <class T>
inline void panel(int rows, int width, long K, const T* a, long am, long ak, const T* b, T* c, long ldc, bool add) {
  panel_of<T, MR>(rows, width, K, a, am, ak, b, c, ldc, add);
}

template <class X> inline X least(X a, X b) { return a < b ? a : b; }
template <class X> inline X most(X a, X b) { return a > b ? a : b; }
template <class T> inline long up(long n) { return (n + LANES<T> - 1) / LANES<T> * LANES<T>; }
template <class T> inline long panels(long n) { return (n + NR<T> - 1) / NR<T>; }

// (rows, cols) -> panels of NR columns: [panel][row][NR], zeros beyond the last column.
template <class T> void pack_columns(const T* x, long stride, long rows, long cols, T* to, T factor = 1) {
  for (long p = 0; p < panels<T>(cols); ++p) {
    long width = least<long>(NR<T>, cols - p * NR<T>);
    T* at = to + p * rows * NR<T>;
    for (long r = 0; r < rows; ++r, at += NR<T>) {
      const T* from = x + r * stride + p * NR<T>;
      if (width == NR<T>) {
        for (int c = 0; c < NR<T>; ++c) at[c] = from[c] * factor;
      } else {
        for (int c = 0; c < NR<T>; ++c) at[c] = c < width ? from[c] * factor : T(0);
      }
    }
  }
}

// (rows, cols) -> panels of NR rows, transposed: [panel][col][NR], zeros beyond the last row.
template <class T> void pack_rows(const T* x, long stride, long rows, long cols, T* to) {
  for (long p = 0; p < panels<T>(rows); ++p) {
    long width = least<long>(NR<T>, rows - p * NR<T>);
    T* at = to + p * cols * NR<T>;
    const T* from = x + p * NR<T> * stride;
    for (long c0 = 0; c0 < cols; c0 += 8) {  // some columns at a time: whole lines of the cache are read
      long c1 = least<long>(c0 + 8, cols);
      for (long r = 0; r < width; ++r)
        for (long c = c0; c < c1; ++c) at[c * NR<T> + r] = from[r * stride + c];
    }
    for (long c = 0; c < cols; ++c)
      for (long r = width; r < NR<T>; ++r) at[c * NR<T> + r] = T(0);
  }
}

}  // namespace heedful
