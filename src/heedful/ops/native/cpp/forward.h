// The forward pass: blocks of queries in order, each over the tiles of its keys, all heads in turn.
#pragma once
#include "plane.h"

namespace heedful {

template <class T> class Forward {
 public:
  explicit Forward(const Job& job) : job(job), plane(job) {}

  void run() {
    if (job.selectors) plane.find_limit();
    pack();
    start();
    if (!job.length) return;
    Progress done(job.batch * plane.blocks);
    each(job, job.batch * plane.blocks, [&](long i, int) {
      long n = i / job.batch;  // without votes nothing waits: the longest first
      attend(i % job.batch, job.selectors ? n : plane.blocks - 1 - n, done);
    });
  }

 private:
  const Job& job;
  Plane<T> plane;
  Packed<T> keys, values, select_keys;

  void pack() {
    const long planes = job.batch * job.groups;
    keys.each = panels<T>(job.n_keys) * NR<T> * job.size;
    values.each = panels<T>(job.v_size) * NR<T> * job.n_keys;
    keys.data.grow(planes * keys.each);
    values.data.grow(planes * values.each);
    each(job, 2 * planes, [&](long i, int) {
      long b = i / 2 / job.groups, g = i / 2 % job.groups;
      if (i % 2)
        pack_columns(plane.v(b, g), job.vs[2], job.n_keys, job.v_size, values.of(i / 2));
      else
        pack_rows(plane.k(b, g), job.ks[2], job.n_keys, job.size, keys.of(i / 2));
    });
    if (!job.select_size) return;
    select_keys.each = panels<T>(job.n_keys) * NR<T> * job.select_size;
    select_keys.data.grow(job.batch * job.selectors * select_keys.each);
    each(job, job.batch * job.selectors, [&](long i, int) {
      const T* from = (const T*)job.select_k + i * job.n_keys * job.select_size;
      pack_rows(from, job.select_size, job.n_keys, job.select_size, select_keys.of(i));
    });
  }

  T* before(long b, long r, long block) const {  // F before a block; after the last one, what is returned
    long i = b * job.selectors + r;
    if (block == plane.blocks) return (T*)job.after + i * job.n_keys;
    return (T*)job.before + (i * plane.blocks + block) * job.n_keys;
  }

  // F before the first query.
  void start() {
    for (long b = 0; b < job.batch; ++b)
      for (long r = 0; r < job.selectors; ++r) {
        T* to = before(b, r, 0);
        const T* given = (const T*)job.start + (b * job.selectors + r) * plane.earlier;
        for (long j = 0; j < job.n_keys; ++j) to[j] = job.start && j < plane.earlier ? given[j] : T(0);
      }
  }

  struct Scratch {
    Buffer<T> logits, masks, out, largest, total;
    std::vector<Run> runs;
  };

  void attend(long b, long block, Progress& done) {
    static thread_local Scratch s;
    const long area = job.block * job.tile, wide = panels<T>(job.v_size) * NR<T>;
    const long rows = job.heads * job.block;
    s.logits.grow(area);
    s.masks.grow(area * most<long>(1, job.selectors));
    s.out.grow(rows * wide);
    s.largest.grow(rows);
    s.total.grow(rows);
    std::memset(s.out.get(), 0, rows * wide * sizeof(T));
    for (long i = 0; i < rows; ++i) s.largest[i] = -INF<T>, s.total[i] = 0;
    const long tiles = plane.tiles_of(block);
    long n = 0, row = 0;
    for (long t = 0; t < tiles; ++t) {
      Cut c = plane.cut(block, t);
      n = c.n, row = c.row;
      if (job.selectors && block) {
        // keys that the block before did not have are new: nobody voted on them
        if (t < plane.tiles_of(block - 1)) done.wait((block - 1) * job.batch + b, t + 1);
        for (long r = 0; r < job.selectors; ++r)
          for (long key = most(c.left, c.at); key < c.left + c.w; ++key) before(b, r, block)[key] = 0;
      }
      plane.live(b, c, job.selectors ? before(b, 0, block) + c.left : nullptr, plane.blocks * job.n_keys, s.runs);
      bool shares = job.selectors && !job.select_size;  // the logits of head 0 serve twice
      for (long r = 0; r < job.selectors; ++r) {
        const T* packed = job.select_size ? select_keys.of(b * job.selectors + r) : keys.of(b * job.groups);
        plane.select_logits(b, r, c, packed, s.logits);
        T* carry = before(b, r, block + 1) + c.left;
        std::memcpy(carry, before(b, r, block) + c.left, c.w * sizeof(T));
        T scale = T(job.select_size ? job.select_scale : job.scale);
        plane.soft_masks(b, c, s.logits, scale, carry, s.masks + r * area);
      }
      if (job.selectors) done.set(block * job.batch + b, t + 1);
      if (!job.selectors && c.masked) plane.plain_masks(b, c, s.masks);
      if (s.runs.empty()) continue;
      for (long h = 0; h < job.heads; ++h) {
        const long i = b * job.groups + plane.group(h);
        if (h || !shares)
          plane.products(plane.q(b, h, c.row), job.qs[2], job.size, c, s.runs, keys.of(i), s.logits);
        T* out = s.out + h * job.block * wide;
        const T* masks = s.masks + (job.selectors ? plane.selector(h) * area : 0);
        T *largest = s.largest + h * job.block, *total = s.total + h * job.block;
        if (c.masked)
          weigh<true, true>(c, s.runs, s.logits, masks, largest, total, out, wide);
        else if (job.selectors)
          weigh<true, false>(c, s.runs, s.logits, masks, largest, total, out, wide);
        else
          weigh<false, false>(c, s.runs, s.logits, masks, largest, total, out, wide);
        add_values(c, s.runs, s.logits, values.of(i) + c.left * NR<T>, out, wide);
      }
    }
    for (long h = 0; h < job.heads; ++h)
      for (long i = 0; i < n; ++i) {
        T total = s.total[h * job.block + i], factor = total == 0 ? T(0) : 1 / total;
        T* to = (T*)job.out + b * job.os[0] + h * job.os[1] + (row + i) * job.os[2];
        const T* from = s.out + (h * job.block + i) * wide;
        for (long e = 0; e < job.v_size; ++e) to[e] = from[e] * factor;
        ((T*)job.log_sum)[(b * job.heads + h) * job.length + row + i] =
            total == 0 ? T(0) : s.largest[h * job.block + i] + std::log(total);
      }
  }

  // Logits to weights, in place; sums and maxima of the rows go on, and what is there of the output shrinks.
  template <bool SELECTS, bool MASKED>
  void weigh(
      const Cut& c, const std::vector<Run>& runs, T* logits, const T* masks, T* largest, T* total, T* out,
      long wide) const {
    constexpr int L = LANES<T>;
    const T scale = T(job.scale);
    for (long i = 0; i < c.n; ++i, logits += job.tile, masks += job.tile, out += wide) {
      const long seen = c.seen(i);
      Vec<T> top = all<T>(-INF<T>);
      for (const Run& run : runs)
        for (long j = run.from; j < least(run.to, seen); j += L) {
          Vec<T> x = load<T>(logits + j) * scale;
          if constexpr (MASKED) {
            Vec<T> f = load<T>(masks + j);
            x = f == INF<T> ? all<T>(-INF<T>) : x - f;
            store<T>(logits + j, x);
          } else if constexpr (SELECTS) {
            x = x - load<T>(masks + j);
            store<T>(logits + j, x);
          } else {
            store<T>(logits + j, x);
          }
          top = x > top ? x : top;
        }
      T peak = max_of<T>(top);
      if (peak > largest[i]) {
        T shrink = exp_of(all<T>(largest[i] - peak))[0];
        largest[i] = peak;
        total[i] *= shrink;
        for (long e = 0; e < wide; e += L) store<T>(out + e, load<T>(out + e) * shrink);
      }
      const Vec<T> base = all<T>(largest[i] == -INF<T> ? T(0) : largest[i]);
      Vec<T> sums{};
      for (const Run& run : runs)
        for (long j = run.from; j < least(run.to, seen); j += L) {
          Vec<T> x = exp_of(load<T>(logits + j) - base);
          store<T>(logits + j, x);
          sums += x;
        }
      total[i] += sum_of<T>(sums);
    }
  }

  // out (n, wide) += weights times values. What comes after a query is not touched, not even with weight 0.
  void add_values(const Cut& c, const std::vector<Run>& runs, const T* weights, const T* values, T* out, long wide) const {
    for (long e = 0; e < panels<T>(job.v_size); ++e) {
      const T* from = values + e * job.n_keys * NR<T>;
      const int width = int(job.v_size - e * NR<T>);
      for (long i = 0; i < c.n; i += MR) {
        const int rows = int(least<long>(MR, c.n - i));
        const long all_see = c.diagonal ? c.seen(i) : c.w;
        for (const Run& run : runs) {
          long to = least(run.to, all_see);
          if (to > run.from)
            panel<T>(
                rows, width, to - run.from, weights + i * job.tile + run.from, job.tile, 1,
                from + run.from * NR<T>, out + i * wide + e * NR<T>, wide, true);
        }
        for (const Run& run : runs)
          for (long m = i; c.diagonal && m < i + rows; ++m)
            for (long j = most(run.from, all_see); j < least(run.to, c.seen(m)); ++j) {
              T weight = weights[m * job.tile + j];
              T* to = out + m * wide + e * NR<T>;
              for (int x = 0; x < NR<T>; ++x) to[x] += weight * from[j * NR<T> + x];
            }
      }
    }
  }
};

}  // namespace heedful
