// The backward pass: tiles of keys in order, each over the blocks of its queries from the last one back, with a
// running sum of the later gradients of F, which is what a vote's gradient consists of.
#pragma once
#include "plane.h"

namespace heedful {

template <class T> class Backward {
 public:
  explicit Backward(const Job& job) : job(job), plane(job) {}

  void run() {
    if (job.selectors) plane.find_limit();
    find_unit();
    pack();
    zero();
    Progress turn(job.batch * most<long>(1, plane.blocks));
    each(job, job.batch * plane.tiles, [&](long i, int) { differentiate(i % job.batch, i / job.batch, turn); });
    finish();
  }

 private:
  const Job& job;
  Plane<T> plane;
  // Panels: _rows for products over features, _columns for products over tokens.
  Packed<T> k_rows, k_columns, v_rows, q_columns, d_columns, sk_rows, sk_columns, sq_columns;
  Buffer<T> d_out, delta, dq, dsq;
  T unit = 1;  // gradients are worked out at a size of about 1

  long wide() const { return panels<T>(job.size) * NR<T>; }
  long v_wide() const { return panels<T>(job.v_size) * NR<T>; }
  long select_wide() const { return panels<T>(job.select_size) * NR<T>; }
  const T* grad_out(long b, long h, long row) const {
    return (const T*)job.grad_out + b * job.gs[0] + h * job.gs[1] + row * job.gs[2];
  }

  void find_unit() {
    T top = 0;
    bool broken = false;
    auto look = [&](T x) {
      x = std::fabs(x);
      if (!(x < INF<T>)) broken = true;
      top = most(top, x);
    };
    for (long b = 0; b < job.batch; ++b)
      for (long h = 0; h < job.heads; ++h)
        for (long i = 0; i < job.length; ++i) {
          const T* from = grad_out(b, h, i);
          for (long e = 0; e < job.v_size; ++e) look(from[e]);
        }
    if (job.grad_after)
      for (long i = 0; i < job.batch * job.selectors * job.n_keys; ++i) look(((const T*)job.grad_after)[i]);
    if (broken || top == 0) return;
    int power;
    std::frexp(top, &power);
    unit = std::ldexp(T(1), most(-120, least(120, power)));
  }

  void pack() {
    const long planes = job.batch * job.groups, all = job.batch * job.heads;
    k_rows.each = panels<T>(job.n_keys) * NR<T> * job.size;
    v_rows.each = panels<T>(job.n_keys) * NR<T> * job.v_size;
    k_columns.each = wide() * job.n_keys;
    q_columns.each = wide() * job.length;
    d_columns.each = v_wide() * job.length;
    k_rows.data.grow(planes * k_rows.each);
    v_rows.data.grow(planes * v_rows.each);
    k_columns.data.grow(planes * k_columns.each);
    q_columns.data.grow(all * q_columns.each);
    d_columns.data.grow(all * d_columns.each);
    d_out.grow(all * job.length * job.v_size);
    delta.grow(all * job.length);
    each(job, planes, [&](long i, int) {
      long b = i / job.groups, g = i % job.groups;
      pack_rows(plane.k(b, g), job.ks[2], job.n_keys, job.size, k_rows.of(i));
      pack_columns(plane.k(b, g), job.ks[2], job.n_keys, job.size, k_columns.of(i));
      pack_rows(plane.v(b, g), job.vs[2], job.n_keys, job.v_size, v_rows.of(i));
    });
    each(job, all, [&](long i, int) {
      long b = i / job.heads, h = i % job.heads;
      pack_columns(plane.q(b, h), job.qs[2], job.length, job.size, q_columns.of(i));
      T* to = d_out + i * job.length * job.v_size;
      for (long t = 0; t < job.length; ++t, to += job.v_size) {
        const T* from = grad_out(b, h, t);
        const T* out = (const T*)job.out + b * job.os[0] + h * job.os[1] + t * job.os[2];
        bool real = !job.real || job.real[b * job.n_keys + plane.earlier + t];
        T total = 0;
        for (long e = 0; e < job.v_size; ++e) {
          to[e] = real ? from[e] * (1 / unit) : T(0);
          total += to[e] * out[e];
        }
        delta[i * job.length + t] = total;
      }
      pack_columns(d_out + i * job.length * job.v_size, job.v_size, job.length, job.v_size, d_columns.of(i));
    });
    if (!job.select_size) return;
    const long own = job.batch * job.selectors, size = job.select_size;
    sk_rows.each = panels<T>(job.n_keys) * NR<T> * size;
    sk_columns.each = select_wide() * job.n_keys;
    sq_columns.each = select_wide() * job.length;
    sk_rows.data.grow(own * sk_rows.each);
    sk_columns.data.grow(own * sk_columns.each);
    sq_columns.data.grow(own * sq_columns.each);
    each(job, own, [&](long i, int) {
      const T* keys = (const T*)job.select_k + i * job.n_keys * size;
      pack_rows(keys, size, job.n_keys, size, sk_rows.of(i));
      pack_columns(keys, size, job.n_keys, size, sk_columns.of(i));
      pack_columns((const T*)job.select_q + i * job.length * size, size, job.length, size, sq_columns.of(i));
    });
  }

  void zero() {
    dq.grow(job.batch * job.heads * job.length * wide());
    std::memset(dq.get(), 0, job.batch * job.heads * job.length * wide() * sizeof(T));
    if (!job.select_size) return;
    dsq.grow(job.batch * job.selectors * job.length * select_wide());
    std::memset(dsq.get(), 0, job.batch * job.selectors * job.length * select_wide() * sizeof(T));
  }

  static void copy_out(const T* from, long wide, long rows, long size, T factor, T* to) {
    for (long i = 0; i < rows; ++i, from += wide, to += size)
      for (long d = 0; d < size; ++d) to[d] = from[d] * factor;
  }

  void finish() {
    const T factor = T(job.scale) * unit, select = T(job.select_scale) * unit;
    each(job, job.batch * job.heads, [&](long i, int) {
      copy_out(dq + i * job.length * wide(), wide(), job.length, job.size, factor, (T*)job.dq + i * job.length * job.size);
    });
    if (!job.select_size) return;
    for (long i = 0; i < job.batch * job.selectors; ++i)
      copy_out(
          dsq + i * job.length * select_wide(), select_wide(), job.length, job.select_size, select,
          (T*)job.d_select_q + i * job.length * job.select_size);
  }

  struct Scratch {
    Buffer<T> first, weights, slopes, masks, d_masks, votes, carry, later, dk, dv, dsk;
    std::vector<Run> runs;
  };

  void differentiate(long b, long tile, Progress& turn) {
    static thread_local Scratch s;
    const long area = job.block * job.tile, some = most<long>(1, job.selectors), left = tile * job.tile;
    const long width = least(job.tile, job.n_keys - left);
    s.weights.grow(area);
    s.slopes.grow(area);
    s.masks.grow(some * area);
    s.d_masks.grow(some * area);
    s.votes.grow(some * area);
    s.carry.grow(job.tile);
    s.later.grow(some * job.tile);
    s.dk.grow(job.groups * job.tile * wide());
    s.dv.grow(job.groups * job.tile * v_wide());
    std::memset(s.dk.get(), 0, job.groups * job.tile * wide() * sizeof(T));
    std::memset(s.dv.get(), 0, job.groups * job.tile * v_wide() * sizeof(T));
    if (job.select_size) {
      s.dsk.grow(job.selectors * job.tile * select_wide());
      std::memset(s.dsk.get(), 0, job.selectors * job.tile * select_wide() * sizeof(T));
    }
    for (long r = 0; r < job.selectors; ++r)
      for (long j = 0; j < width; ++j) {
        long at = (b * job.selectors + r) * job.n_keys + left + j;
        s.later[r * job.tile + j] = job.grad_after ? ((const T*)job.grad_after)[at] * (1 / unit) : T(0);
      }
    for (long block = plane.blocks; block-- > 0 && tile < plane.tiles_of(block);) step(b, block, tile, turn, s);
    for (long g = 0; g < job.groups; ++g) {
      const long at = (b * job.groups + g) * job.n_keys + left;
      const T factor = T(job.scale) * unit;
      copy_out(s.dk + g * job.tile * wide(), wide(), width, job.size, factor, (T*)job.dk + at * job.size);
      copy_out(s.dv + g * job.tile * v_wide(), v_wide(), width, job.v_size, unit, (T*)job.dv + at * job.v_size);
    }
    for (long r = 0; r < job.selectors; ++r) {
      const long at = (b * job.selectors + r) * job.n_keys + left;
      for (long j = 0; j < width; ++j) ((T*)job.d_start)[at + j] = s.later[r * job.tile + j] * unit;
      if (job.select_size)
        copy_out(
            s.dsk + r * job.tile * select_wide(), select_wide(), width, job.select_size, T(job.select_scale) * unit,
            (T*)job.d_select_k + at * job.select_size);
    }
  }

  // One block of queries by one tile of keys.
  void step(long b, long block, long tile, Progress& turn, Scratch& s) {
    const Cut c = plane.cut(block, tile);
    const long area = job.block * job.tile, own = block * job.batch + b;
    const T* before = (const T*)job.before + (b * job.selectors * plane.blocks + block) * job.n_keys + c.left;
    // the last F has a gradient in votes on keys that nobody needs, too
    if (job.grad_after)
      s.runs.assign(1, {0, c.columns});
    else
      plane.live(b, c, before, plane.blocks * job.n_keys, s.runs);
    if (s.runs.empty()) {
      turn.wait(own, tile);
      turn.set(own, tile + 1);
      return;
    }
    for (long r = 0; r < job.selectors; ++r) {
      const T* packed = job.select_size ? sk_rows.of(b * job.selectors + r) : k_rows.of(b * job.groups);
      T *votes = s.votes + r * area, *d_masks = s.d_masks + r * area;
      plane.select_logits(b, r, c, packed, votes);
      std::memcpy(s.carry.get(), before + r * plane.blocks * job.n_keys, c.w * sizeof(T));
      plane.soft_masks(b, c, votes, T(job.select_size ? job.select_scale : job.scale), s.carry, s.masks + r * area);
      for (long i = 0; i < c.n; ++i) std::memset(d_masks + i * job.tile, 0, c.columns * sizeof(T));
    }
    if (!job.selectors && c.masked) plane.plain_masks(b, c, s.masks);
    bool waited = false;
    for (long h = job.heads; h-- > 0;) {
      const long g = plane.group(h), kv = b * job.groups + g, qh = b * job.heads + h;
      const long r = job.selectors ? plane.selector(h) : 0, rows = qh * job.length + c.row;
      plane.products(plane.q(b, h, c.row), job.qs[2], job.size, c, s.runs, k_rows.of(kv), s.weights);
      plane.products(d_out + rows * job.v_size, job.v_size, job.v_size, c, s.runs, v_rows.of(kv), s.slopes);
      const T *masks = s.masks + r * area, *sums = (const T*)job.log_sum + rows;
      T* d_masks = s.d_masks + r * area;
      if (c.masked)
        slopes<true>(c, s.runs, masks, sums, delta + rows, s.weights, s.slopes, d_masks);
      else
        slopes<false>(c, s.runs, masks, sums, delta + rows, s.weights, s.slopes, d_masks);
      if (h == 0 && job.selectors && !job.select_size)
        vote_gradient<true>(b, c, s.runs, s.votes, s.d_masks, s.later, s.slopes);
      add_transposed(c, s.runs, s.weights, d_columns.of(qh), job.length, job.v_size, s.dv + g * job.tile * v_wide(), v_wide());
      add_transposed(c, s.runs, s.slopes, q_columns.of(qh), job.length, job.size, s.dk + g * job.tile * wide(), wide());
      if (!waited) turn.wait(own, tile), waited = true;
      add_rows(c, s.runs, s.slopes, k_columns.of(kv), job.size, dq + rows * wide(), wide());
    }
    for (long r = 0; r < job.selectors && job.select_size; ++r) {
      const long i = b * job.selectors + r;
      vote_gradient<false>(b, c, s.runs, s.votes + r * area, s.d_masks + r * area, s.later + r * job.tile, s.slopes);
      add_transposed(
          c, s.runs, s.slopes, sq_columns.of(i), job.length, job.select_size, s.dsk + r * job.tile * select_wide(),
          select_wide());
      add_rows(
          c, s.runs, s.slopes, sk_columns.of(i), job.select_size, dsq + (i * job.length + c.row) * select_wide(),
          select_wide());
    }
    turn.set(own, tile + 1);
  }

  // Logits to weights, and the gradient of weights to that of logits, in place; that of F, with the opposite sign,
  // is summed over the heads.
  template <bool MASKED>
  void slopes(
      const Cut& c, const std::vector<Run>& runs, const T* masks, const T* sums, const T* deltas, T* weights, T* slopes,
      T* d_masks) const {
    constexpr int L = LANES<T>;
    const T scale = T(job.scale);
    for (long i = 0; i < c.n; ++i, weights += job.tile, slopes += job.tile, masks += job.tile, d_masks += job.tile) {
      const Vec<T> sum = all<T>(sums[i]), delta = all<T>(deltas[i]);
      for (const Run& run : runs)
        for (long j = run.from; j < run.to; j += L) {
          Vec<T> x = load<T>(weights + j) * scale - sum, d = load<T>(slopes + j) - delta;
          if constexpr (MASKED) {
            Vec<T> f = load<T>(masks + j);
            x = f == INF<T> ? all<T>(-INF<T>) : x - f;
            d = f == INF<T> ? Vec<T>{} : d;
          } else if (job.selectors) {
            x = x - load<T>(masks + j);
          }
          x = exp_of(x);
          d = d * x;
          store<T>(weights + j, x);
          store<T>(slopes + j, d);
          if (job.selectors) store<T>(d_masks + j, load<T>(d_masks + j) + d);
        }
    }
  }

  // The gradient of the selection head's logits through F, added to `slopes` or put there.
  template <bool ADD>
  void vote_gradient(
      long b, const Cut& c, const std::vector<Run>& runs, const T* votes, const T* d_masks, T* later, T* slopes) const {
    const T sign = (job.select_size ? job.select_scale : job.scale) < 0 ? T(-1) : T(1);
    for (long i = c.n; i-- > 0;) {
      const long query = c.at + i;
      const T *vote = votes + i * job.tile, *d = d_masks + i * job.tile;
      T* to = slopes + i * job.tile;
      for (const Run& run : runs) {
        const long end = least(run.to, c.w), others = most<long>(run.from, least<long>(end, query - c.left));
        long j = run.from;
        if (c.left == 0 && j == 0 && others > 0 && !plane.irregular) {  // the first key: no votes on it
          if (!ADD) to[0] = 0;
          later[0] -= d[0];
          j = 1;
        }
        if (plane.irregular) {
          for (; j < others; ++j) {
            const long key = c.left + j;
            const bool voted = vote[j] * sign > 0 && plane.related(b, query, key) && !plane.is_first(b, key);
            to[j] = (ADD ? to[j] : T(0)) + (voted ? later[j] : T(0));
            later[j] -= d[j];
          }
        } else {
          for (; j < others; ++j) {
            T held = later[j];
            to[j] = (ADD ? to[j] : T(0)) + (vote[j] * sign > 0 ? held : T(0));
            later[j] = held - d[j];
          }
        }
        for (; j < run.to; ++j) {
          if (!ADD) to[j] = 0;
          if (j < end) later[j] -= d[j];
        }
      }
    }
  }

  // to (w, size) += X^T times rows of the block, from panels over all queries.
  void add_transposed(
      const Cut& c, const std::vector<Run>& runs, const T* x, const T* packed, long length, long size, T* to,
      long wide) const {
    for (long p = 0; p < panels<T>(size); ++p) {
      const T* from = packed + (p * length + c.row) * NR<T>;
      for (const Run& run : runs)
        for (long j = run.from; j < least(run.to, c.w); j += MR) {
          const int rows = int(least<long>(MR, least(run.to, c.w) - j));
          const long i = most<long>(0, c.left + j - c.at);  // the first query that sees the first of these keys
          if (i < c.n)
            panel<T>(
                rows, int(size - p * NR<T>), c.n - i, x + i * job.tile + j, 1, job.tile, from + i * NR<T>,
                to + j * wide + p * NR<T>, wide, true);
        }
    }
  }

  // to (n, size) += X times the keys of the tile, from panels over all keys.
  void add_rows(const Cut& c, const std::vector<Run>& runs, const T* x, const T* packed, long size, T* to, long wide) const {
    for (long p = 0; p < panels<T>(size); ++p) {
      const T* from = packed + (p * job.n_keys + c.left) * NR<T>;
      for (long i = 0; i < c.n; i += MR) {
        const int rows = int(least<long>(MR, c.n - i));
        const long seen = c.seen(i + rows - 1);
        for (const Run& run : runs) {
          const long end = least(run.to, seen);
          if (end > run.from)
            panel<T>(
                rows, int(size - p * NR<T>), end - run.from, x + i * job.tile + run.from, job.tile, 1,
                from + run.from * NR<T>, to + i * wide + p * NR<T>, wide, true);
        }
      }
    }
  }
};

}  // namespace heedful
