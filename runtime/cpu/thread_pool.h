// ThreadPool: the threads that CPU kernels run on. The calling thread takes part; helpers take tasks from a
// common counter. Callers never wait for each other: while one has the helpers, others work alone.
#pragma once

#include "base/result.h"

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace attune::runtime {

/// Threads that this process may keep busy: its CPU affinity, bounded by its cgroup's quota.
int available_threads();

/// A number of tasks that a kernel can run in any order and on any thread.
class TaskRunner {
 public:
  virtual void run_task(std::int64_t index, void* scratch) const noexcept = 0;

 protected:
  ~TaskRunner() = default;
};

class ThreadPool {
 public:
  /// `threads` counts the caller. Helpers start at the first run() that can use them. A pool is never
  /// destroyed once its helpers run.
  explicit ThreadPool(int threads) : threads_(threads) {}
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  /// Runs the tasks 0 ... count - 1 and returns when all are done. Each thread gets `scratch_bytes` of its
  /// own memory, aligned to a cache line. Fails with environment when the caller's share of it cannot be had.
  Result<void> run(const TaskRunner& runner, std::int64_t count, std::size_t scratch_bytes);

 private:
  struct Job;

  void start_helpers();
  void help();

  const int threads_;
  std::mutex owner_;  // held by the caller whose job the helpers work on

  std::mutex mutex_;  // guards all below
  std::condition_variable job_posted_;
  std::condition_variable job_left_;
  bool started_ = false;
  Job* job_ = nullptr;
  std::uint64_t jobs_posted_ = 0;
  int busy_helpers_ = 0;
};

}  // namespace attune::runtime
