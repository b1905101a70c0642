#include "runtime/cpu/thread_pool.h"

#include <fmt/format.h>

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <system_error>
#include <thread>

namespace attune::runtime {
namespace {

constexpr std::size_t kCacheLine = 64;

/// A thread's scratch memory: grows, and lives as long as the thread. Null when there is no memory.
void* thread_scratch(std::size_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::size_t capacity = 0;
  bytes = std::max(bytes, kCacheLine);  // null is a failure, also for kernels that need none
  if (bytes > capacity) {
    const std::size_t rounded = (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
    memory.reset(std::aligned_alloc(kCacheLine, rounded));
    capacity = memory != nullptr ? rounded : 0;
  }
  return memory.get();
}

int affinity_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  // Fails on machines with more CPUs than a cpu_set_t holds.
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

/// "max 100000" or "150000 100000": microseconds of CPU per period. 0 when there is no limit.
int cgroup_threads() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0;
  double period = 0;
  if (!(file >> quota >> period) || period <= 0) return 0;
  return std::max(1, static_cast<int>((quota + period - 1) / period));
}

/// Signals belong to the program's own threads.
class BlockSignals {
 public:
  BlockSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  BlockSignals(const BlockSignals&) = delete;
  BlockSignals& operator=(const BlockSignals&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

int available_threads() {
  const int affinity = affinity_threads();
  const int cgroup = cgroup_threads();
  return cgroup > 0 ? std::min(affinity, cgroup) : affinity;
}

struct ThreadPool::Job {
  const TaskRunner& runner;
  const std::int64_t count;
  const std::size_t scratch_bytes;
  std::atomic<std::int64_t> next{0};

  void work(void* scratch) {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      runner.run_task(i, scratch);
  }
};

Result<void> ThreadPool::run(const TaskRunner& runner, std::int64_t count, std::size_t scratch_bytes) {
  void* scratch = thread_scratch(scratch_bytes);
  if (scratch == nullptr) {
    return environment_failure(
        fmt::format("out of memory: {} bytes of scratch for a CPU kernel", scratch_bytes));
  }
  Job job{.runner = runner, .count = count, .scratch_bytes = scratch_bytes};
  const std::unique_lock owner(owner_, std::try_to_lock);
  if (threads_ == 1 || count == 1 || !owner.owns_lock()) {
    job.work(scratch);
    return done();
  }
  {
    const std::lock_guard lock(mutex_);
    start_helpers();
    job_ = &job;
    ++jobs_posted_;
  }
  job_posted_.notify_all();
  job.work(scratch);
  // No task is left to take. Helpers that come late find no job; those that came are waited for.
  std::unique_lock lock(mutex_);
  job_ = nullptr;
  job_left_.wait(lock, [&] { return busy_helpers_ == 0; });
  return done();
}

void ThreadPool::start_helpers() {
  if (started_) return;
  started_ = true;
  const BlockSignals block;
  for (int i = 1; i < threads_; ++i) {
    try {
      std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
      return;  // the system gives no more threads: those that started do the work
    }
  }
}

void ThreadPool::help() {
  pthread_setname_np(pthread_self(), "attune");
  std::uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    job_posted_.wait(lock, [&] { return job_ != nullptr && jobs_posted_ != seen; });
    seen = jobs_posted_;
    Job& job = *job_;
    ++busy_helpers_;
    lock.unlock();
    if (void* scratch = thread_scratch(job.scratch_bytes)) job.work(scratch);
    lock.lock();
    if (--busy_helpers_ == 0) job_left_.notify_one();
  }
}

}  // namespace attune::runtime
