// The plane of queries by keys: who sees whom, what the selection heads vote, what weighs nothing.
#pragma once
#include "job.h"

namespace heedful {

// Some queries by some keys.
struct Cut {
  long row, n;     // the first query and their number
  long at;         // position of the first query among the keys
  long left, w;    // the first key and their number
  long columns;    // w, rounded up to whole panels
  bool diagonal;   // some key comes after some query
  bool masked;     // not every query sees every column

  // How many columns a query sees, counted causally.
  long seen(long i) const { return most<long>(0, least<long>(w, at + i + 1 - left)); }
};

struct Run {
  long from, to;  // columns
};

template <class T> class Plane {
 public:
  explicit Plane(const Job& job) : job(job), earlier(job.n_keys - job.length) {
    blocks = (job.length + job.block - 1) / job.block;
    tiles = (job.n_keys + job.tile - 1) / job.tile;
    irregular = job.real || job.segments;
  }

  const Job& job;
  long earlier, blocks, tiles;
  bool irregular;
  T dead = INF<T>;  // F from which on a key weighs nothing

  long tiles_of(long block) const {
    long last = earlier + least<long>(job.length, (block + 1) * job.block);
    return (last + job.tile - 1) / job.tile;
  }

  Cut cut(long block, long tile) const {
    Cut c;
    c.row = block * job.block;
    c.n = least<long>(job.block, job.length - c.row);
    c.at = earlier + c.row;
    c.left = tile * job.tile;
    c.w = least<long>(job.tile, c.at + c.n - c.left);
    c.columns = panels<T>(c.w) * NR<T>;
    c.diagonal = c.left + c.w > c.at + 1;
    c.masked = c.diagonal || irregular || c.w < c.columns;
    return c;
  }

  const T* q(long b, long h, long row = 0) const {
    return (const T*)job.q + b * job.qs[0] + h * job.qs[1] + row * job.qs[2];
  }
  const T* k(long b, long g) const { return (const T*)job.k + b * job.ks[0] + g * job.ks[1]; }
  const T* v(long b, long g) const { return (const T*)job.v + b * job.vs[0] + g * job.vs[1]; }
  long group(long h) const { return h / (job.heads / job.groups); }
  long selector(long h) const { return h * job.selectors / job.heads; }

  bool related(long b, long query, long key) const {
    const int64_t at = b * job.n_keys;
    if (job.real && !(job.real[at + query] && job.real[at + key])) return false;
    return !job.segments || job.segments[at + query] == job.segments[at + key];
  }
  bool is_first(long b, long key) const { return job.first ? job.first[b * job.n_keys + key] : key == 0; }

  // No logit is larger than this: the product of the lengths of queries and keys.
  void find_limit() {
    std::vector<T> bounds(job.batch * job.groups, T(0));
    each(job, job.batch * job.groups, [&](long i, int) {
      long b = i / job.groups, g = i % job.groups, shared = job.heads / job.groups;
      T queries = 0, keys = longest(k(b, g), job.ks[2], job.n_keys);
      for (long h = g * shared; h < (g + 1) * shared; ++h) queries = larger(queries, longest(q(b, h), job.qs[2], job.length));
      bounds[i] = std::sqrt(queries * keys);
    });
    if (job.every_key) return;
    T bound = 0;
    for (T x : bounds) bound = larger(bound, x);
    bound *= std::fabs(T(job.scale));
    dead = bound < INF<T> ? 2 * bound + (sizeof(T) == 4 ? 30 : 60) : INF<T>;  // NaN drops nothing
  }

  // Raw products of the selection head with the keys of a cut, L (n, columns), rows of `tile`.
  void select_logits(long b, long r, const Cut& c, const T* packed_keys, T* logits) const {
    if (job.select_size) {
      const T* from = (const T*)job.select_q + ((b * job.selectors + r) * job.length + c.row) * job.select_size;
      products(from, job.select_size, job.select_size, c, {{0, c.columns}}, packed_keys, logits);
    } else {
      products(q(b, 0, c.row), job.qs[2], job.size, c, {{0, c.columns}}, packed_keys, logits);
    }
  }

  // X (n, columns) = rows of x times keys that `pack_rows` packed from the first key on; only what is seen.
  void products(
      const T* x, long stride, long size, const Cut& c, const std::vector<Run>& runs, const T* packed, T* out) const {
    packed += c.left * size;  // a tile is whole panels
    for (const Run& run : runs)
      for (long col = run.from; col < run.to; col += NR<T>) {
        long i = 0;
        if (c.diagonal) i = most<long>(0, c.left + col - c.at) / MR * MR;
        for (; i < c.n; i += MR)
          panel<T>(
              int(least<long>(MR, c.n - i)), NR<T>, size, x + i * stride, stride, 1, packed + col * size,
              out + i * job.tile + col, job.tile, false);
      }
  }

  // F (n, columns) from the raw products of the selection head, infinite where a query does not see a key;
  // `carry` (w): F before the first query in, F after the last one out.
  void soft_masks(long b, const Cut& c, const T* logits, T scale, T* carry, T* masks) const {
    for (long i = 0; i < c.n; ++i, logits += job.tile, masks += job.tile) {
      long query = c.at + i;
      if (irregular) {
        for (long j = 0; j < c.columns; ++j) {
          long key = c.left + j;
          if (j >= c.w || key > query || !related(b, query, key)) {
            masks[j] = INF<T>;
            continue;
          }
          masks[j] = carry[j];
          if (key < query && !is_first(b, key)) carry[j] += vote(logits[j] * scale);
        }
        continue;
      }
      long others = most<long>(0, least<long>(c.w, query - c.left));
      T kept = carry[0];
      for (long j = 0; j < others; ++j) {
        T held = carry[j];
        masks[j] = held;
        carry[j] = held + vote(logits[j] * scale);
      }
      if (c.left == 0) carry[0] = kept;
      long j = others;
      if (j < c.w && c.left + j == query) masks[j] = carry[j], ++j;
      if (c.masked)
        for (; j < c.columns; ++j) masks[j] = INF<T>;
    }
  }

  // 0 where a query sees a key, infinite where it does not.
  void plain_masks(long b, const Cut& c, T* masks) const {
    for (long i = 0; i < c.n; ++i, masks += job.tile)
      for (long j = 0; j < c.columns; ++j) {
        long query = c.at + i, key = c.left + j;
        bool seen = j < c.w && key <= query && (!irregular || related(b, query, key));
        masks[j] = seen ? T(0) : INF<T>;
      }
  }

  // The columns of a cut that weigh something for some query, given F before it (R, S); whole panels.
  void live(long b, const Cut& c, const T* carry, long stride, std::vector<Run>& runs) const {
    runs.clear();
    for (long col = 0; col < c.columns; col += NR<T>) {
      bool needed = false;
      for (long j = col; j < least(c.w, col + NR<T>) && !needed; ++j) {
        long key = c.left + j;
        if (job.real && !job.real[b * job.n_keys + key]) continue;
        needed = key >= c.at || !job.selectors;
        for (long r = 0; r < job.selectors && !needed; ++r) needed = !(carry[r * stride + j] >= dead);
      }
      if (!needed) continue;
      if (!runs.empty() && runs.back().to == col)
        runs.back().to = col + NR<T>;
      else
        runs.push_back({col, col + NR<T>});
    }
  }

 private:
  static T vote(T logit) { return logit < 0 ? T(0) : logit; }  // NaN stays
  static T larger(T a, T b) { return b < a ? a : b; }          // a NaN in b stays
  T longest(const T* x, long stride, long rows) const {
    T top = 0;
    for (long i = 0; i < rows; ++i, x += stride) {
      Vec<T> sums{};
      long d = 0;
      for (; d + LANES<T> <= job.size; d += LANES<T>) sums += load<T>(x + d) * load<T>(x + d);
      T total = sum_of<T>(sums);
      for (; d < job.size; ++d) total += x[d] * x[d];
      if (!(total <= top)) top = total;
    }
    return top;
  }
};

// Keys and values, packed for products; of all key heads of all rows of the batch.
template <class T> struct Packed {
  Buffer<T> data;
  long each = 0;  // numbers of one (b, g)
  T* of(long i) const { return data.get() + i * each; }
};

}  // namespace heedful
