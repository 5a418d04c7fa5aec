// Vectors of the machine's width, by GCC's vector extension: no intrinsics, any processor.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#define HEEDFUL_VECTOR_BYTES 64
#define HEEDFUL_PANEL_ROWS 12  // 24 of 32 registers hold sums
#elif defined(__AVX__)
#define HEEDFUL_VECTOR_BYTES 32
#define HEEDFUL_PANEL_ROWS 6  // 12 of 16
#elif defined(__aarch64__)
#define HEEDFUL_VECTOR_BYTES 16
#define HEEDFUL_PANEL_ROWS 12  // 24 of 32
#else
#define HEEDFUL_VECTOR_BYTES 16
#define HEEDFUL_PANEL_ROWS 6
#endif

namespace heedful {

template <class T> struct Lanes;
template <> struct Lanes<float> {
  typedef float V __attribute__((vector_size(HEEDFUL_VECTOR_BYTES)));
  typedef float H __attribute__((vector_size(HEEDFUL_VECTOR_BYTES / 2)));
  typedef float U __attribute__((vector_size(HEEDFUL_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(HEEDFUL_VECTOR_BYTES)));
};
template <> struct Lanes<double> {
  typedef double V __attribute__((vector_size(HEEDFUL_VECTOR_BYTES)));
  typedef double H __attribute__((vector_size(HEEDFUL_VECTOR_BYTES / 2)));
  typedef double U __attribute__((vector_size(HEEDFUL_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(HEEDFUL_VECTOR_BYTES)));
};
template <class T> using Vec = typename Lanes<T>::V;
template <class T> using HalfVec = typename Lanes<T>::H;

template <class T> constexpr int LANES = HEEDFUL_VECTOR_BYTES / int(sizeof(T));
template <class T> constexpr int NR = 2 * LANES<T>;  // columns of a panel
constexpr int MR = HEEDFUL_PANEL_ROWS;               // rows of a panel
// What widths of small matrices are padded to: half a vector where a whole one is long.
template <class T> constexpr int GRAIN = HEEDFUL_VECTOR_BYTES == 64 ? LANES<T> / 2 : LANES<T>;

template <class T> constexpr T INF = std::numeric_limits<T>::infinity();

template <class T> inline Vec<T> load(const T* p) { return *reinterpret_cast<const typename Lanes<T>::U*>(p); }
template <class T> inline void store(T* p, Vec<T> x) { *reinterpret_cast<typename Lanes<T>::U*>(p) = x; }
template <class T> inline HalfVec<T> load_half(const T* p) {
  HalfVec<T> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T> inline void store_half(T* p, HalfVec<T> x) { std::memcpy(p, &x, sizeof x); }
template <class T> inline Vec<T> all(T x) { return x - Vec<T>{}; }

// Keeps a vector in its register. GCC would rather load it again with every product that uses it, and loads are scarcer.
template <class V> inline void in_register(V& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// Half onto half until one is left.
template <class T, int N> inline T sum_of_lanes(const T* x) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    typedef T Part __attribute__((vector_size(N / 2 * sizeof(T))));
    Part low, high;
    std::memcpy(&low, x, sizeof low);
    std::memcpy(&high, x + N / 2, sizeof high);
    low += high;
    T rest[N / 2];
    std::memcpy(rest, &low, sizeof low);
    return sum_of_lanes<T, N / 2>(rest);
  }
}
template <class T> inline T sum_of(Vec<T> x) {
  T lanes[LANES<T>];
  in_register(x);  // or the sum would live in memory
  std::memcpy(lanes, &x, sizeof x);
  return sum_of_lanes<T, LANES<T>>(lanes);
}
template <class T> inline T sum_of(Vec<T> x, HalfVec<T> more) {
  T lanes[LANES<T>];
  in_register(x);
  std::memcpy(lanes, &x, sizeof x);
  more += load_half<T>(lanes) + load_half<T>(lanes + LANES<T> / 2);
  store_half<T>(lanes, more);
  return sum_of_lanes<T, LANES<T> / 2>(lanes);
}
template <class T> inline T max_of(Vec<T> x) {
  T top = x[0];
  for (int i = 1; i < LANES<T>; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// exp(x) for x <= 88, to 2 units in the last place; exactly 0 from -87 down, where the result leaves the normal numbers.
inline Vec<float> exp_of(Vec<float> x) {
  typedef Lanes<float>::I I;
  const Vec<float> low = all(-87.0f), high = all(88.0f), magic = all(12582912.0f);
  I lost = x < low;
  x = x > high ? high : x;
  Vec<float> n = (x * 1.44269504088896341f + magic) - magic;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  I bits = (__builtin_convertvector(n, I) + 127) << 23;
  Vec<float> power;
  std::memcpy(&power, &bits, sizeof power);
  return lost ? Vec<float>{} : p * power;
}

// In double precision speed matters less than the last digit.
inline Vec<double> exp_of(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < LANES<double>; ++i) y[i] = x[i] < -708.0 ? 0.0 : std::exp(x[i]);
  return y;
}

// Denormal numbers are 0 while one of these lives: products with them run a hundred times slower.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() {
    before_ = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before_ | 0x8040);
  }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | (1ull << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

}  // namespace heedful
