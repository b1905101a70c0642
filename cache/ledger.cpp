#include "cache/ledger.h"

#include "base/file.h"
#include "cache/folder.h"
#include "cache/lock.h"

#include <fmt/format.h>

#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;

constexpr std::array<char, 8> kMagic{'A', 'T', 'T', 'N', 'C', 'N', 'T', '1'};
constexpr std::uint64_t kUnknown = std::numeric_limits<std::uint64_t>::max();

/// The file. Written whole by one call, so that whoever dies when, it is the old one or the new one.
struct Record {
  std::array<char, 8> magic = kMagic;
  Totals totals;
  std::uint64_t bytes = kUnknown;
};
static_assert(sizeof(Record) == 64 && std::is_trivially_copyable_v<Record>);
static_assert(std::endian::native == std::endian::little, "the file's numbers are little endian");

/// A new record where there is none, or one that nobody can read: statistics are not worth a failure.
Record record_in(std::span<const std::byte> bytes) {
  Record record;
  if (bytes.size() < sizeof record || std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) return {};
  std::memcpy(&record, bytes.data(), sizeof record);
  return record;
}

Record read_record(const Descriptor& file) {
  std::array<std::byte, sizeof(Record)> bytes;
  const ssize_t count = ::pread(file.get(), bytes.data(), bytes.size(), 0);
  return record_in(std::span(bytes).first(static_cast<std::size_t>(std::max<ssize_t>(count, 0))));
}

std::uint64_t moved(std::uint64_t bytes, std::int64_t by) {
  const std::uint64_t distance = by < 0 ? 0 - static_cast<std::uint64_t>(by) : static_cast<std::uint64_t>(by);
  return by < 0 ? bytes - std::min(bytes, distance) : bytes + distance;
}

Result<std::optional<Lock>> lock_counters(const fs::path& root, std::chrono::milliseconds patience) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point deadline = Clock::now() + patience;
  for (;;) {
    auto lock = try_lock(root, counters_slot);
    if (!lock.ok() || lock->has_value() || Clock::now() >= deadline) return lock;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

/// Those that can't be written are forgotten.
void write_hits(const fs::path& root, const std::vector<Digest>& keys) {
  const auto file = open_private_file(hits_in(root));
  for (const Digest& key : keys) {
    if (!file.ok() || !add_hit(*file, key)) return;
  }
}

}  // namespace

Totals& Totals::operator+=(const Totals& more) {
  hits += more.hits;
  misses += more.misses;
  defects += more.defects;
  stores += more.stores;
  compiles += more.compiles;
  evictions += more.evictions;
  return *this;
}

void Ledger::note(const Totals& more, std::int64_t bytes) {
  const std::lock_guard guard(mutex_);
  noted_ += more;
  noted_bytes_ += bytes;
}

void Ledger::note_hit(const Digest& key) {
  const std::lock_guard guard(mutex_);
  noted_.hits += 1;
  noted_hits_.push_back(key);
}

Result<std::optional<std::uint64_t>> Ledger::write(std::chrono::milliseconds patience) {
  return update(std::nullopt, patience);
}

Result<std::optional<std::uint64_t>> Ledger::write_bytes(std::uint64_t found) {
  return update(found, kStorePatience);
}

Result<std::optional<std::uint64_t>> Ledger::update(std::optional<std::uint64_t> found,
                                                    std::chrono::milliseconds patience) {
  const std::lock_guard guard(mutex_);
  const auto lock =
      lock_counters(root_, patience);  // where locks don't work, two writers at once lose a count
  if (lock.ok() && !lock->has_value()) return environment_failure("the cache's counters are in use");
  const fs::path path = counters_in(root_);
  ATTUNE_ASSIGN(file, open_private_file(path));
  Record record = read_record(file);
  record.totals += noted_;
  if (found) {
    record.bytes = *found;
  } else if (record.bytes != kUnknown) {
    record.bytes = moved(record.bytes, noted_bytes_);
  }
  if (::pwrite(file.get(), &record, sizeof record, 0) != sizeof record) {
    return environment_failure(
        fmt::format("cannot write {}: {}", path.string(), std::generic_category().message(errno)));
  }
  noted_ = {};
  noted_bytes_ = 0;
  if (!noted_hits_.empty()) write_hits(root_, std::exchange(noted_hits_, {}));
  return record.bytes == kUnknown ? std::nullopt : std::optional(record.bytes);
}

Result<KernelHits> Ledger::kernel_hits() const {
  ATTUNE_ASSIGN(bytes, read_private_file(hits_in(root_)));
  return KernelHits(bytes ? std::move(*bytes) : std::vector<std::byte>());
}

Result<Totals> Ledger::totals() const {
  ATTUNE_ASSIGN(bytes, read_private_file(counters_in(root_)));
  return bytes ? record_in(*bytes).totals : Totals{};
}

}  // namespace attune::cache
