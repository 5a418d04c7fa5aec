// The expansion of SAS, token by token in a core's cache: heads are the channels of two convolutions over the
// features, then a small residual network over the features, then norm and rotation. The backward pass makes the
// intermediate results again.
//
// Between the convolutions a token is (features, heads), heads innermost: the W columns that a tap sees lie side by
// side, so each convolution, its gradients included, is a product of small matrices without a copy of its input.
#pragma once
#include "job.h"

namespace heedful {

// All fields are eight bytes wide; heedful/ops/native/library.py declares the same.
struct Expand {
  int64_t batch, length, heads, sim_heads, size;
  int64_t sim_size;  // 0: the features stay as they are
  int64_t width;     // W, odd
  int64_t threads;
  int64_t norm_first;
  double eps;
  const void* x;  // (B, T, H, D), last stride 1
  int64_t xs[3];
  const void *conv1, *bias1;  // (Ĥ, H, W); a bias may be null
  const void *conv2, *bias2;  // (Ĥ, Ĥ, W)
  const void *lin1, *lin1_bias, *lin2, *lin2_bias;  // (D̂, D), (D̂, D̂)
  const void* norm;           // (D̂), null: none
  const void *cos, *sin;      // (1 or B, T, D̂/2), null: no rotation
  int64_t rotation_stride;    // from one row of the batch to the next
  void* out;                  // (B, Ĥ, T, D̂)
  ParallelFn parallel;
  // backward
  const void* grad;  // (B, Ĥ, T, D̂), last stride 1
  int64_t gs[3];
  void* dx;  // (B, T, H, D), null: not wanted
  void *d_conv1, *d_bias1, *d_conv2, *d_bias2, *d_lin1, *d_lin1_bias, *d_lin2, *d_lin2_bias, *d_norm;  // null likewise
};

// C[m, n] = start[n] + base[m, n] + sum over k1, k2 of A[m, k] B[k, n]; A's element at a[m * am + k1 * a1 + k2 * a2],
// B's row at b + k1 * b1 + k2 * b2, base's where C's is. Columns are read and written in whole grains.
template <class T> struct Product {
  long k1, k2;
  const T* a;
  long am, a1, a2;
  const T* b;
  long b1, b2;
  T* c;
  long cs;
  const T* start = nullptr;
  const T* base = nullptr;  // may be C

  // R rows of W vectors and, with HALF, half a vector more.
  template <int R, int W, int HALF> __attribute__((noinline)) void tile(long m, long n) const {
    constexpr int L = LANES<T>;
    Vec<T> sums[R][W + 1];
    HalfVec<T> ends[R];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const T* from = base + (m + i) * cs + n;
#pragma GCC unroll 3
      for (int j = 0; j < W; ++j) {
        sums[i][j] = start ? load<T>(start + n + j * L) : Vec<T>{};
        if (base) sums[i][j] += load<T>(from + j * L);
      }
      if constexpr (HALF) {
        ends[i] = start ? load_half<T>(start + n + W * L) : HalfVec<T>{};
        if (base) ends[i] += load_half<T>(from + W * L);
      }
    }
    for (long i1 = 0; i1 < k1; ++i1) {
      const T *left = a + m * am + i1 * a1, *right = b + i1 * b1 + n;
      for (long i2 = 0; i2 < k2; ++i2, left += a2, right += b2) {
        Vec<T> row[W + 1];
        HalfVec<T> end;
#pragma GCC unroll 3
        for (int j = 0; j < W; ++j) in_register(row[j] = load<T>(right + j * L));
        if constexpr (HALF) in_register(end = load_half<T>(right + W * L));
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
          const T x = left[i * am];
#pragma GCC unroll 3
          for (int j = 0; j < W; ++j) sums[i][j] += x * row[j];
          if constexpr (HALF) ends[i] += x * end;
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      T* to = c + (m + i) * cs + n;
#pragma GCC unroll 3
      for (int j = 0; j < W; ++j) store<T>(to + j * L, sums[i][j]);
      if constexpr (HALF) store_half<T>(to + W * L, ends[i]);
    }
  }

  template <int R, int W, int HALF> void rest(long m, long rows, long n) const {
    if (rows == R)
      tile<R, W, HALF>(m, n);
    else if constexpr (R > 1)
      rest<R - 1, W, HALF>(m, rows, n);
  }

  template <int R, int W, int HALF> void column(long rows, long n) const {
    long m = 0;
    for (; m + R <= rows; m += R) tile<R, W, HALF>(m, n);
    if (m < rows) rest<R, W, HALF>(m, rows - m, n);
  }

  void run(long rows, long columns) const {
    constexpr int L = LANES<T>;
    const long grains = (columns + GRAIN<T> - 1) / GRAIN<T>;
    long left = grains * GRAIN<T> / L, n = 0;
    if constexpr (GRAIN<T> < L)
      if (grains % 2) {
        const int w = left == 0 ? 0 : left % 2 ? 1 : 2;
        if (w == 2)
          column<2 * MR / 3, 2, 1>(rows, n);
        else if (w == 1)
          column<MR, 1, 1>(rows, n);
        else
          column<MR, 0, 1>(rows, n);
        n += w * L + GRAIN<T>;
        left -= w;
      }
    while (left > 0) {
      const int w = left == 4 ? 2 : left >= 3 && (left % 2 || left % 3 == 0) ? 3 : left >= 2 ? 2 : 1;
      if (w == 3)
        column<2 * MR / 3, 3, 0>(rows, n);
      else if (w == 2)
        column<MR, 2, 0>(rows, n);
      else
        column<MR, 1, 0>(rows, n);
      n += w * L;
      left -= w;
    }
  }
};

// (rows, cols) with strides -> (cols, rows) in rows of `ts`.
template <class T> void transpose(const T* x, long rows, long cols, long stride, T* to, long ts) {
  for (long c0 = 0; c0 < cols; c0 += 8)
    for (long r0 = 0; r0 < rows; r0 += 8)
      if (r0 + 8 <= rows && c0 + 8 <= cols) {
        for (int c = 0; c < 8; ++c)
          for (int r = 0; r < 8; ++r) to[(c0 + c) * ts + r0 + r] = x[(r0 + r) * stride + c0 + c];
      } else {
        for (long c = c0; c < least<long>(c0 + 8, cols); ++c)
          for (long r = r0; r < least<long>(r0 + 8, rows); ++r) to[c * ts + r] = x[r * stride + c];
      }
}

template <class T> void relu(const T* x, T* to, long n) {
  for (long i = 0; i < n; ++i) to[i] = x[i] < 0 ? T(0) : x[i];
}

// Gradients of a relu that gave `active`, and of the way around it: d = (active > 0 ? d : 0) + around.
template <class T> void relu_backward(T* d, const T* active, const T* around, long n) {
  for (long i = 0; i < n; ++i) d[i] = (active[i] <= 0 ? T(0) : d[i]) + around[i];
}

template <class T> void add_rows(const T* x, long rows, long cols, long stride, T* total) {
  for (long r = 0; r < rows; ++r)
    for (long c = 0; c < cols; ++c) total[c] += x[r * stride + c];
}

template <class T> class Expansion {
 public:
  explicit Expansion(const Expand& job)
      : job(job),
        H(job.heads),
        N(job.sim_heads),
        D(job.size),
        E(job.sim_size),
        W(job.width),
        HP(grains(H)),
        NP(grains(N)),
        DP(grains(D)),
        EP(grains(E)),
        rows((D + W - 1)) {
    const T* c1 = static_cast<const T*>(job.conv1);
    const T* c2 = static_cast<const T*>(job.conv2);
    pack(conv1, W * H, NP, [&](long k, long n) { return n < N ? c1[(n * H + k % H) * W + k / H] : T(0); });
    pack(conv2, W * N, NP, [&](long k, long n) { return n < N ? c2[(n * N + k % N) * W + k / N] : T(0); });
    bias(bias1, job.bias1, N, NP);
    bias(bias2, job.bias2, N, NP);
    if (E) {
      const T* l1 = static_cast<const T*>(job.lin1);
      const T* l2 = static_cast<const T*>(job.lin2);
      pack(lin1, D, EP, [&](long k, long n) { return n < E ? l1[n * D + k] : T(0); });
      pack(lin2, E, EP, [&](long k, long n) { return n < E ? l2[n * E + k] : T(0); });
      bias(lin1_bias, job.lin1_bias, E, EP);
      bias(lin2_bias, job.lin2_bias, E, EP);
      bias(gain, job.norm, E, EP);
    }
    block = most<long>(1, 8192 / (N * most(DP, EP)));
  }

  void forward() {
    const long tokens = job.batch * job.length, items = (tokens + block - 1) / block;
    std::vector<Scratch> scratch(threads());
    each(job, items, [&](long item, int thread) {
      Scratch& s = scratch[thread];
      s.grow(*this);
      const long first = item * block, n = least(block, tokens - first);
      widen(s, first, n);
      const long stride = job.length * (E ? E : D);
      T* out = static_cast<T*>(job.out);
      if (!E) {
        for (long i = 0; i < n; ++i) transpose(s.wide + i * D * NP, D, N, NP, out + place(first + i, job.length), stride);
        return;
      }
      for (long i = 0; i < n; ++i) placed(s, first + i, s.refined + i * N * EP);
      // A head at a time: its tokens lie side by side, and heads may lie where they push each other out of the cache.
      for (long h = 0; h < N; ++h)
        for (long i = 0; i < n; ++i)
          copy_line(s.refined + (i * N + h) * EP, out + place(first + i, job.length) + h * stride);
    });
  }

  // Sums run over a fixed number of parts and then over these in order: the same for any number of threads.
  void backward() {
    const T* l1 = static_cast<const T*>(job.lin1);
    const T* l2 = static_cast<const T*>(job.lin2);
    const T* c1 = static_cast<const T*>(job.conv1);
    const T* c2 = static_cast<const T*>(job.conv2);
    pack(conv2_back, W * N, NP, [&](long k, long n) { return n < N ? c2[((k % N) * N + n) * W + W - 1 - k / N] : T(0); });
    if (job.dx)
      pack(conv1_back, W * N, HP, [&](long k, long n) { return n < H ? c1[((k % N) * H + n) * W + W - 1 - k / N] : T(0); });
    if (E) {
      pack(lin1_back, E, DP, [&](long k, long n) { return n < D ? l1[k * D + n] : T(0); });
      pack(lin2_back, E, EP, [&](long k, long n) { return n < E ? l2[k * E + n] : T(0); });
    }
    const long tokens = job.batch * job.length;
    const long part = (most<long>(tokens / PARTS, 64) + block - 1) / block * block;
    const long parts = (tokens + part - 1) / part;
    const bool sums = job.d_conv1 || job.d_bias1 || job.d_conv2 || job.d_bias2 || job.d_lin1 || job.d_lin1_bias ||
                      job.d_lin2 || job.d_lin2_bias || job.d_norm;
    std::vector<Scratch> scratch(threads());
    std::vector<Sums> totals(sums ? most<long>(1, parts) : 0);
    if (sums && !parts) totals[0].grow(*this);
    each(job, parts, [&](long item, int thread) {
      Scratch& s = scratch[thread];
      s.grow(*this);
      s.grow_backward(*this);
      Sums* total = sums ? &totals[item] : nullptr;
      if (total) total->grow(*this);
      const long end = least(tokens, (item + 1) * part);
      for (long first = item * part; first < end; first += block) block_backward(s, total, first, least(block, end - first));
    });
    if (sums) write(totals);
  }

 private:
  static constexpr long PARTS = 32;
  const Expand& job;
  const long H, N, D, E, W;
  const long HP, NP, DP, EP;  // in whole grains
  const long rows;            // of a token with its padding
  long block;                 // tokens that go together
  Buffer<T> conv1, conv2, bias1, bias2, lin1, lin2, lin1_bias, lin2_bias, gain;
  Buffer<T> conv1_back, conv2_back, lin1_back, lin2_back;

  static T* zeros(Buffer<T>& buffer, long n) {
    buffer.grow(n + LANES<T>);
    std::memset(buffer.get(), 0, (n + LANES<T>) * sizeof(T));
    return buffer;
  }

  struct Scratch {
    Buffer<T> x, wide, active, hidden, acted, refined, turned, cos, sin, factors;
    Buffer<T> grad, d_hidden, d_flat, d_wide, d_active, d_x;
    bool ready = false, ready_backward = false;

    void grow(const Expansion& e) {
      if (ready) return;
      ready = true;
      zeros(x, e.block * e.rows * e.HP);
      zeros(wide, e.block * e.D * e.NP);
      zeros(active, e.block * e.rows * e.NP);
      if (!e.E) return;
      zeros(hidden, e.block * e.N * e.EP);
      zeros(acted, e.block * e.N * e.EP);
      zeros(refined, e.block * e.N * e.EP);
      zeros(turned, e.N * e.EP);
      zeros(cos, e.EP);
      zeros(sin, e.EP);
      zeros(factors, e.N);
    }

    void grow_backward(const Expansion& e) {
      if (ready_backward) return;
      ready_backward = true;
      zeros(d_flat, e.block * e.N * e.DP);
      zeros(d_wide, e.block * e.rows * e.NP);
      zeros(d_active, e.block * e.rows * e.NP);
      zeros(d_x, e.D * e.HP);
      if (!e.E) return;
      zeros(grad, e.block * e.N * e.EP);
      zeros(d_hidden, e.block * e.N * e.EP);
    }
  };

  // Gradients of the weights over some tokens, laid out as the products write them.
  struct Sums {
    Buffer<T> conv1, conv2, lin1, lin2;  // (Ĥ, W, H), (Ĥ, W, Ĥ), (D, D̂), (D̂ in, D̂ out)
    Buffer<T> bias1, bias2, lin1_bias, lin2_bias, norm;

    void grow(const Expansion& e) {
      zeros(conv1, e.N * e.W * e.HP);
      zeros(conv2, e.N * e.W * e.NP);
      zeros(bias1, e.NP);
      zeros(bias2, e.NP);
      if (!e.E) return;
      zeros(lin1, e.D * e.EP);
      zeros(lin2, e.E * e.EP);
      zeros(lin1_bias, e.EP);
      zeros(lin2_bias, e.EP);
      zeros(norm, e.EP);
    }
  };

  static long grains(long n) { return (n + GRAIN<T> - 1) / GRAIN<T> * GRAIN<T>; }

  long threads() const { return most<long>(1, job.threads); }

  template <class F> void pack(Buffer<T>& to, long many, long width, F&& value) {
    T* at = zeros(to, many * width);
    for (long k = 0; k < many; ++k)
      for (long n = 0; n < width; ++n) at[k * width + n] = value(k, n);
  }

  void bias(Buffer<T>& to, const void* from, long n, long width) {
    T* at = zeros(to, width);
    if (from) std::memcpy(at, from, n * sizeof(T));
  }

  // Where token `i` of all begins in a (B, Ĥ, T, .) tensor without gaps.
  long place(long i, long length) const {
    const long wide = E ? E : D, b = i / length, t = i % length;
    return (b * N * length + t) * wide;
  }

  // x -> wide, and with features hidden, acted = relu(hidden) and refined, of n tokens from `first` on.
  void widen(Scratch& s, long first, long n) const {
    const long pad = W / 2;
    for (long i = 0; i < n; ++i) {
      const long b = (first + i) / job.length, t = (first + i) % job.length;
      const T* x = static_cast<const T*>(job.x) + b * job.xs[0] + t * job.xs[1];
      T *in = s.x + i * rows * HP, *wide = s.wide + i * D * NP, *active = s.active + i * rows * NP;
      transpose(x, H, D, job.xs[2], in + pad * HP, HP);
      Product<T>{W, H, in, HP, HP, 1, conv1, H * NP, NP, wide, NP, bias1}.run(D, N);
      relu(wide, active + pad * NP, D * NP);
      Product<T>{W, N, active, NP, NP, 1, conv2, N * NP, NP, wide, NP, bias2, wide}.run(D, N);
      if (E) Product<T>{1, D, wide, 1, 0, NP, lin1, 0, EP, s.hidden + i * N * EP, EP, lin1_bias}.run(N, E);
    }
    if (!E) return;
    relu<T>(s.hidden, s.acted, n * N * EP);
    Product<T>{1, E, s.acted, EP, 0, 1, lin2, 0, EP, s.refined, EP, lin2_bias, s.hidden}.run(n * N, E);
  }

  struct Whole {
    static Vec<T> load(const T* p) { return heedful::load<T>(p); }
    static void store(T* p, Vec<T> x) { heedful::store<T>(p, x); }
    static Vec<T> cut(Vec<T> x) { return x; }
  };
  struct Half {
    static HalfVec<T> load(const T* p) { return load_half<T>(p); }
    static void store(T* p, HalfVec<T> x) { store_half<T>(p, x); }
    static HalfVec<T> cut(const Vec<T>& x) { return load_half<T>(reinterpret_cast<const T*>(&x)); }
  };

  // Calls body(width, i) for each vector of a line, and for the half at its end.
  template <class F> void over_line(F&& body) const {
    long i = 0;
    for (; i + LANES<T> <= EP; i += LANES<T>) body(Whole{}, i);
    if (i < EP) body(Half{}, i);
  }

  void copy_line(const T* x, T* to) const {
    if (E == EP)
      over_line([&](auto width, long i) { width.store(to + i, width.load(x + i)); });
    else
      std::memcpy(to, x, E * sizeof(T));
  }

  T dot(const T* x, const T* y) const {
    Vec<T> sums{};
    long i = 0;
    for (; i + LANES<T> <= EP; i += LANES<T>) sums += load<T>(x + i) * load<T>(y + i);
    if (i < EP) return sum_of<T>(sums, load_half<T>(x + i) * load_half<T>(y + i));
    return sum_of<T>(sums);
  }

  // From here to placed_backward: the N lines of a token at a time, EP apart, each with zeros at its end.

  // What the norm multiplies each line by.
  void shrink(const T* x, T* factors) const {
    const T mean = 1 / T(E), eps = T(job.eps);
    for (long h = 0; h < N; ++h) factors[h] = dot(x + h * EP, x + h * EP);
    for (long h = 0; h < N; ++h) factors[h] = 1 / std::sqrt(factors[h] * mean + eps);
  }

  void normed(Scratch& s, T* lines) const {
    shrink(lines, s.factors);
    for (long h = 0; h < N; ++h, lines += EP) {
      const Vec<T> factor = all<T>(s.factors[h]);
      over_line([&](auto width, long i) {
        width.store(lines + i, width.load(lines + i) * width.cut(factor) * width.load(gain + i));
      });
    }
  }

  // Writes less than a vector beyond the last line.
  void rotated(Scratch& s, const T* x, long token, T* to, int direction) const {
    constexpr int L = LANES<T>;
    const long half = E / 2, b = token / job.length, t = token % job.length, from = b * job.rotation_stride + t * half;
    T *cos = s.cos, *sin = s.sin;
    std::memcpy(cos, static_cast<const T*>(job.cos) + from, half * sizeof(T));
    std::memcpy(sin, static_cast<const T*>(job.sin) + from, half * sizeof(T));
    if (direction < 0)
      for (long i = 0; i < half; ++i) sin[i] = -sin[i];
    for (long h = 0; h < N; ++h, x += EP, to += EP) {
      for (long i = 0; i < half; i += L)
        store<T>(to + i, load<T>(x + i) * load<T>(cos + i) - load<T>(x + half + i) * load<T>(sin + i));
      for (long i = 0; i < half; i += L)
        store<T>(to + half + i, load<T>(x + half + i) * load<T>(cos + i) + load<T>(x + i) * load<T>(sin + i));
      for (long i = E; i < EP; ++i) to[i] = 0;
    }
  }

  void turn(Scratch& s, long token, T* lines, int direction) const {
    rotated(s, lines, token, s.turned, direction);
    std::memcpy(lines, s.turned, N * EP * sizeof(T));
  }

  // Norm and rotation of the lines, in place.
  void placed(Scratch& s, long token, T* lines) const {
    if (job.norm && job.norm_first) normed(s, lines);
    if (job.cos) turn(s, token, lines, 1);
    if (job.norm && !job.norm_first) normed(s, lines);
  }

  // grad of the normed lines -> grad of `x`, in place; the gradient of the gains is added.
  void norm_backward(Scratch& s, const T* x, T* grad, T* d_norm) const {
    shrink(x, s.factors);
    for (long h = 0; h < N; ++h, x += EP, grad += EP) {
      const T factor = s.factors[h];
      const Vec<T> by = all<T>(factor);
      if (d_norm)
        over_line([&](auto width, long i) {
          width.store(d_norm + i, width.load(d_norm + i) + width.load(grad + i) * width.load(x + i) * width.cut(by));
        });
      over_line([&](auto width, long i) { width.store(grad + i, width.load(grad + i) * width.load(gain + i)); });
      const Vec<T> mean = all<T>(dot(grad, x) * factor * factor * (1 / T(E)));
      over_line([&](auto width, long i) {
        width.store(grad + i, (width.load(grad + i) - width.load(x + i) * width.cut(mean)) * width.cut(by));
      });
    }
  }

  // `x`: the lines before norm and rotation; their gradient takes the place of the one of `to`.
  void placed_backward(Scratch& s, Sums* total, long token, const T* x, T* to) const {
    T* d_norm = total && job.d_norm ? total->norm.get() : nullptr;
    if (job.norm && !job.norm_first) {
      if (job.cos) rotated(s, x, token, s.turned, 1);
      norm_backward(s, job.cos ? s.turned : x, to, d_norm);
    }
    if (job.cos) turn(s, token, to, -1);
    if (job.norm && job.norm_first) norm_backward(s, x, to, d_norm);
  }

  void block_backward(Scratch& s, Sums* total, long first, long n) const {
    const long pad = W / 2, token = rows * NP;
    widen(s, first, n);
    auto grad = [&](long i) {
      const long b = (first + i) / job.length, t = (first + i) % job.length;
      return static_cast<const T*>(job.grad) + b * job.gs[0] + t * job.gs[2];
    };
    if (!E) {
      for (long i = 0; i < n; ++i) transpose(grad(i), N, D, job.gs[1], s.d_wide + i * token + pad * NP, NP);
    } else {
      for (long h = 0; h < N; ++h)
        for (long i = 0; i < n; ++i) copy_line(grad(i) + h * job.gs[1], s.grad + (i * N + h) * EP);
      for (long i = 0; i < n; ++i)
        placed_backward(s, total, first + i, s.refined + i * N * EP, s.grad + i * N * EP);
      Product<T>{1, E, s.grad, EP, 0, 1, lin2_back, 0, EP, s.d_hidden, EP}.run(n * N, E);
      relu_backward<T>(s.d_hidden, s.acted, s.grad, n * N * EP);
      Product<T>{1, E, s.d_hidden, EP, 0, 1, lin1_back, 0, DP, s.d_flat, DP}.run(n * N, D);
      if (total) {
        Product<T>{1, n * N, s.acted, 1, 0, EP, s.grad, 0, EP, total->lin2, EP, nullptr, total->lin2}.run(E, E);
        Product<T>{n, N, s.wide, NP, D * NP, 1, s.d_hidden, N * EP, EP, total->lin1, EP, nullptr, total->lin1}.run(D, E);
        add_rows<T>(s.grad, n * N, E, EP, total->lin2_bias);
        add_rows<T>(s.d_hidden, n * N, E, EP, total->lin1_bias);
      }
      for (long i = 0; i < n; ++i)
        transpose(s.d_flat + i * N * DP, N, D, DP, s.d_wide + i * token + pad * NP, NP);
    }
    for (long i = 0; i < n; ++i) {
      T *d_active = s.d_active + i * token + pad * NP, *d_wide = s.d_wide + i * token;
      Product<T>{W, N, d_wide, NP, NP, 1, conv2_back, N * NP, NP, d_active, NP}.run(D, N);
      if (total) add_rows<T>(d_wide + pad * NP, D, N, NP, total->bias2);
      relu_backward<T>(d_active, s.active + i * token + pad * NP, d_wide + pad * NP, D * NP);
      if (total) add_rows<T>(d_active, D, N, NP, total->bias1);
      if (!job.dx) continue;
      Product<T>{W, N, s.d_active + i * token, NP, NP, 1, conv1_back, N * HP, HP, s.d_x, HP}.run(D, H);
      transpose<T>(s.d_x, D, H, HP, static_cast<T*>(job.dx) + (first + i) * H * D, D);
    }
    if (!total) return;
    Product<T>{n, D, s.d_wide + pad * NP, 1, token, NP, s.active, token, NP, total->conv2, W * NP, nullptr, total->conv2}.run(
        N, W * NP);
    Product<T>{n, D, s.d_active + pad * NP, 1, token, NP, s.x, rows * HP, HP, total->conv1, W * HP, nullptr, total->conv1}.run(
        N, W * HP);
  }

  template <class F> static void put(void* to, long n, F&& value) {
    if (!to) return;
    for (long i = 0; i < n; ++i) static_cast<T*>(to)[i] = value(i);
  }

  // Adds the parts in order, and hands them over in the layouts of the weights.
  void write(std::vector<Sums>& totals) const {
    Sums& all = totals[0];
    auto add = [&](Buffer<T> Sums::*which, long n) {
      for (size_t i = 1; i < totals.size(); ++i) add_rows<T>(totals[i].*which, 1, n, 0, all.*which);
    };
    add(&Sums::conv1, N * W * HP);
    add(&Sums::conv2, N * W * NP);
    add(&Sums::bias1, N);
    add(&Sums::bias2, N);
    put(job.d_conv1, N * H * W, [&](long i) { return all.conv1[(i / (H * W) * W + i % W) * HP + i / W % H]; });
    put(job.d_conv2, N * N * W, [&](long i) { return all.conv2[(i / (N * W) * W + i % W) * NP + i / W % N]; });
    put(job.d_bias1, N, [&](long i) { return all.bias1[i]; });
    put(job.d_bias2, N, [&](long i) { return all.bias2[i]; });
    if (!E) return;
    add(&Sums::lin1, D * EP);
    add(&Sums::lin2, E * EP);
    add(&Sums::lin1_bias, E);
    add(&Sums::lin2_bias, E);
    add(&Sums::norm, E);
    put(job.d_lin1, E * D, [&](long i) { return all.lin1[i % D * EP + i / D]; });
    put(job.d_lin2, E * E, [&](long i) { return all.lin2[i % E * EP + i / E]; });
    put(job.d_lin1_bias, E, [&](long i) { return all.lin1_bias[i]; });
    put(job.d_lin2_bias, E, [&](long i) { return all.lin2_bias[i]; });
    put(job.d_norm, E, [&](long i) { return all.norm[i]; });
  }
};

}  // namespace heedful
