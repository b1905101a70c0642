#include "tools/interrupt.h"

#include <atomic>
#include <csignal>

namespace attune::tools {
namespace {

std::atomic<int> signal_seen{0};
static_assert(std::atomic<int>::is_always_lock_free, "a signal handler stores to it");

void remember(int signal) {
  signal_seen = signal;
}

}  // namespace

void watch_interrupts() {
  struct sigaction action {};
  action.sa_handler = remember;
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool interrupted() {
  return signal_seen != 0;
}

void die_if_interrupted() {
  if (!interrupted()) return;
  std::signal(signal_seen, SIG_DFL);
  std::raise(signal_seen);
}

}  // namespace attune::tools
