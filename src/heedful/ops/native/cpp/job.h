// What Python hands over, and how work is shared among threads.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>
#include <sched.h>
#include <thread>
#include <vector>

#include "gemm.h"

namespace heedful {

typedef void (*ParallelFn)(void (*)(void*), void*, unsigned, unsigned);

// All fields are eight bytes wide; heedful/ops/native/library.py declares the same.
struct Job {
  int64_t batch, heads, groups, length, n_keys, size, v_size;
  int64_t selectors;    // 0: plain attention
  int64_t select_size;  // 0: head 0 selects
  int64_t block;        // queries of a block, a multiple of MR
  int64_t tile;         // keys of a tile, a multiple of NR
  int64_t threads;
  int64_t every_key;  // leave none out
  double scale, select_scale;
  const void *q, *k, *v;  // last stride 1
  int64_t qs[3], ks[3], vs[3];
  const void *select_q, *select_k;  // contiguous
  const uint8_t* real;              // (B, S), null: all
  const int64_t* segments;          // (B, S), null: one
  const uint8_t* first;             // (B, S), null: key 0
  const void* start;                // (B, R, S - T), null: zeros
  void* out;
  int64_t os[3];
  void* log_sum;  // (B, H, T)
  void* before;   // (B, R, blocks, S)
  void* after;    // (B, R, S)
  ParallelFn parallel;  // GOMP_parallel of the OpenMP that torch uses, or null
  // backward
  const void* grad_out;
  int64_t gs[3];
  const void* grad_after;  // (B, R, S), null: zeros
  void *dq, *dk, *dv;      // contiguous
  void *d_select_q, *d_select_k;
  void* d_start;  // (B, R, S)
};

template <class T> class Buffer {
 public:
  explicit Buffer(long n = 0) { grow(n); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  void grow(long n) {
    if (n <= held_) return;
    std::free(data_);
    data_ = nullptr;
    held_ = 0;
    if (posix_memalign(reinterpret_cast<void**>(&data_), 64, (n * sizeof(T) + 127) / 64 * 64)) std::abort();
    held_ = n;
  }
  T* get() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
  long held_ = 0;
};

// Runs body(thread) on some threads at once; those of the pool that torch uses, where there is one.
template <class J, class F> void on_threads(const J& job, long most_useful, F&& body) {
  long n = least<long>(job.threads, most_useful);
  if (n <= 1) {
    FlushDenormals flush;
    body(0);
    return;
  }
  struct Shared {
    F* body;
    std::atomic<int> next{0};
  } shared{&body};
  auto enter = [](void* p) {
    auto* s = static_cast<Shared*>(p);
    FlushDenormals flush;
    (*s->body)(s->next.fetch_add(1));
  };
  if (job.parallel) {
    job.parallel(enter, &shared, unsigned(n), 0);
    return;
  }
  std::vector<std::thread> others;
  for (long i = 1; i < n; ++i) others.emplace_back([&] { enter(&shared); });
  enter(&shared);
  for (auto& t : others) t.join();
}

// Items 0, 1, ... in order, each to the next thread that is free.
template <class J, class F> void each(const J& job, long items, F&& body) {
  std::atomic<long> next{0};
  on_threads(job, items, [&](int thread) {
    for (long i; (i = next.fetch_add(1)) < items;) body(i, thread);
  });
}

// How far each item has come; whoever waits, waits for an item that another thread has begun before.
class Progress {
 public:
  explicit Progress(long n) : at_(new std::atomic<long>[n]) {
    for (long i = 0; i < n; ++i) at_[i].store(0, std::memory_order_relaxed);
  }
  void set(long i, long value) { at_[i].store(value, std::memory_order_release); }
  void wait(long i, long value) const {
    for (long tries = 0; at_[i].load(std::memory_order_acquire) < value; ++tries)
      if (tries > 200) sched_yield();
  }

 private:
  std::unique_ptr<std::atomic<long>[]> at_;
};

}  // namespace heedful
