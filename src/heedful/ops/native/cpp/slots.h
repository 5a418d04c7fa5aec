// A decoding step over the slots of an evicting cache: one query per row of the batch, votes added in place, and
// the slot that goes next.
#pragma once
#include <algorithm>

#include "job.h"

namespace heedful {

// All fields are eight bytes wide; heedful/ops/native/library.py declares the same.
struct Slots {
  int64_t batch, heads, groups, n_keys, size, v_size, threads;
  int64_t grace, first;  // tokens that never go: the newest, the next one included, and the first
  int64_t subtract;      // 0: votes only say who goes
  int64_t select_size;   // 0: head 0 votes
  double scale;
  const void *q, *k, *v;  // q (B, H, D) and keys and values (B, G, C, .), last stride 1
  const void *select_q, *select_k;  // (B, D'), (B, C, D'), last stride 1
  int64_t ss[3];
  int64_t qs[2], ks[3], vs[3];
  void* mask;                         // (B, C), F before; F after in the end
  const int64_t *positions, *newest;  // (B, C), (B)
  int64_t ms, ps;                     // row strides of mask and positions
  // Of a store of rows, of which each sequence has one; null: row b is sequence b, and its token is in its slot.
  const int64_t* rows;                        // (B)
  const int64_t* seen;                        // (B), tokens before this one
  const void *new_k, *new_v, *new_select_k;   // the tokens, (B, G, D), (B, G, E), (B, D'), last stride 1
  const void* own_votes;                      // (B), what F begins with; null: 0
  int64_t nks[2], nvs[2], nss, budget;
  int64_t ns;                                 // row stride of next, where the slot of this token is named, too
  void* out;                          // (B, H, E)
  int64_t* next;                      // (B)
  ParallelFn parallel;
};

template <class T> class Step {
 public:
  explicit Step(const Slots& job) : job(job) {}

  void run() {
    votes.grow(job.batch * job.n_keys);
    for (long b = 0; job.rows && b < job.batch; ++b) place(b);
    Job pool{};
    pool.parallel = job.parallel;
    const long work = job.batch * job.heads * job.n_keys * (job.size + job.v_size);
    pool.threads = work < 200000 ? 1 : job.threads;  // waking a thread costs some microseconds
    each(pool, job.batch * job.heads, [&](long i, int) { attend(i / job.heads, i % job.heads); });
    FlushDenormals flush;
    for (long b = 0; b < job.batch; ++b) vote(b);
  }

 private:
  const Slots& job;
  Buffer<T> votes;

  long row(long b) const { return job.rows ? job.rows[b] : b; }
  long keys(long b) const { return job.rows ? std::min<long>(job.seen[b] + 1, job.budget) : job.n_keys; }
  long newest(long b) const { return job.rows ? job.next[row(b) * job.ns] : job.newest[b]; }

  // Write a token over the one that goes.
  void place(long b) {
    const long slot = newest(b);
    for (long g = 0; g < job.groups; ++g) {
      const T* k = (const T*)job.new_k + b * job.nks[0] + g * job.nks[1];
      const T* v = (const T*)job.new_v + b * job.nvs[0] + g * job.nvs[1];
      std::copy_n(k, job.size, (T*)job.k + row(b) * job.ks[0] + g * job.ks[1] + slot * job.ks[2]);
      std::copy_n(v, job.v_size, (T*)job.v + row(b) * job.vs[0] + g * job.vs[1] + slot * job.vs[2]);
    }
    if (job.select_size) {
      const T* k = (const T*)job.new_select_k + b * job.nss;
      std::copy_n(k, job.select_size, (T*)job.select_k + row(b) * job.ss[1] + slot * job.ss[2]);
    }
    ((T*)job.mask)[row(b) * job.ms + slot] = job.own_votes ? ((const T*)job.own_votes)[b] : T(0);
    const_cast<int64_t*>(job.positions)[row(b) * job.ps + slot] = job.seen[b];
  }

  void attend(long b, long h) {
    constexpr int L = LANES<T>;
    static thread_local Buffer<T> held, padded;
    const long n = keys(b), whole = up<T>(n), g = h / (job.heads / job.groups);
    held.grow(whole);
    T* weights = held;
    const T* q = (const T*)job.q + b * job.qs[0] + h * job.qs[1];
    const T* k = (const T*)job.k + row(b) * job.ks[0] + g * job.ks[1];
    const T* v = (const T*)job.v + row(b) * job.vs[0] + g * job.vs[1];
    const T* mask = (const T*)job.mask + row(b) * job.ms;
    const T scale = T(job.scale);
    T top = -INF<T>;
    for (long j = 0; j < n; ++j, k += job.ks[2]) {
      Vec<T> sums{}, more{};
      long d = 0;
      for (; d + 2 * L <= job.size; d += 2 * L) {
        sums += load<T>(q + d) * load<T>(k + d);
        more += load<T>(q + d + L) * load<T>(k + d + L);
      }
      T logit = sum_of<T>(sums + more);
      for (; d < job.size; ++d) logit += q[d] * k[d];
      logit *= scale;
      if (h == 0 && !job.select_size) votes[b * job.n_keys + j] = logit < 0 ? T(0) : logit;
      weights[j] = job.subtract ? logit - mask[j] : logit;
      if (weights[j] > top) top = weights[j];
    }
    for (long j = n; j < whole; ++j) weights[j] = -INF<T>;
    const Vec<T> base = all<T>(top == -INF<T> ? T(0) : top);
    Vec<T> total{};
    for (long j = 0; j < whole; j += L) {
      Vec<T> x = exp_of(load<T>(weights + j) - base);
      store<T>(weights + j, x);
      total += x;
    }
    const T factor = 1 / sum_of<T>(total);
    T* out = (T*)job.out + (b * job.heads + h) * job.v_size;
    long e = 0;
    for (; e + 8 * L <= job.v_size; e += 8 * L) add_values<8>(weights, v + e, n, factor, out + e);
    for (; e + L <= job.v_size; e += L) add_values<1>(weights, v + e, n, factor, out + e);
    for (; e < job.v_size; ++e) {
      T sum = 0;
      for (long j = 0; j < n; ++j) sum += weights[j] * v[j * job.vs[2] + e];
      out[e] = sum * factor;
    }
  }

  template <int W> void add_values(const T* weights, const T* v, long n, T factor, T* out) const {
    constexpr int L = LANES<T>;
    Vec<T> sums[W];
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) sums[w] = Vec<T>{};
    for (long j = 0; j < n; ++j, v += job.vs[2])
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) sums[w] += load<T>(v + w * L) * weights[j];
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) store<T>(out + w * L, sums[w] * factor);
  }

  // What a selection head of its own casts.
  void select(long b) {
    const T* q = (const T*)job.select_q + b * job.ss[0];
    const T* k = (const T*)job.select_k + row(b) * job.ss[1];
    const long n = keys(b);
    for (long j = 0; j < n; ++j, k += job.ss[2]) {
      Vec<T> sums{};
      long d = 0;
      for (; d + LANES<T> <= job.select_size; d += LANES<T>) sums += load<T>(q + d) * load<T>(k + d);
      T logit = sum_of<T>(sums);
      for (; d < job.select_size; ++d) logit += q[d] * k[d];
      logit *= T(job.scale);
      votes[b * job.n_keys + j] = logit < 0 ? T(0) : logit;
    }
  }

  // The most votes among those that may go, the oldest among equals; slot 0 holds the first token, which nobody votes
  // on and which stays.
  void vote(long b) {
    const long n = keys(b), newest = this->newest(b);
    if (job.select_size) select(b);
    T* mask = (T*)job.mask + row(b) * job.ms;
    const T* cast = votes + b * job.n_keys;
    const int64_t* positions = job.positions + row(b) * job.ps;
    for (long j = 1; j < n; ++j) mask[j] += j == newest ? T(0) : cast[j];
    const int64_t youngest = positions[newest] + 1 - job.grace;
    long best = 0;
    for (long j = 1; j < n; ++j) {
      if (positions[j] < job.first || positions[j] > youngest) continue;
      if (!best || mask[j] > mask[best] || (mask[j] == mask[best] && positions[j] < positions[best])) best = j;
    }
    if (!job.rows)
      job.next[b] = best ? best : 1;
    else  // a slot that is free, as long as there is one
      job.next[row(b) * job.ns] = n < job.budget ? n : best ? best : 1;
  }
};

}  // namespace heedful
