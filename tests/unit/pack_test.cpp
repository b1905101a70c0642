#include "cache/pack.h"

#include "pack_bytes.h"
#include "pem_keys.h"
#include "tests/support/random.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <functional>
#include <thread>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;
using test::Bytes;
using test::pack_of;
using test::record_field;
using test::sample_entry;
using test::seal;

/// A file for one pack.
struct Fixture {
  test::TempDir dir;
  fs::path path = dir.path() / "the.pack";

  /// A new file each time: some file systems sync one that is truncated and written again.
  void write(const Bytes& bytes) const {
    fs::remove(path);
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  }
  /// Opens the pack and reads all of it.
  std::string refusal(const Bytes& bytes, const VerifyingKey* key = nullptr) const {
    write(bytes);
    const auto pack = Pack::open(path, key);
    if (!pack.ok()) return pack.failure().message;
    for (std::size_t i = 0; i < pack->index().size(); ++i) {
      const auto entry = pack->find(pack->index().at(i).key);
      if (!entry.ok()) return entry.failure().message;
    }
    return "accepted";
  }
};

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

SigningKey signing_key(const std::string& seed) {
  return std::move(*SigningKey::from_pem(test::private_pem(test::ed25519(sha256(seed)).get())));
}
VerifyingKey verifying_key(const std::string& seed) {
  return std::move(*VerifyingKey::from_pem(test::public_pem(test::ed25519(sha256(seed)).get())));
}

std::vector<Entry> samples(int count) {
  std::vector<Entry> entries;
  for (int i = 0; i < count; ++i)
    entries.push_back(sample_entry(std::to_string(i), static_cast<std::size_t>(i * 37)));
  return entries;
}

TEST_CASE("a pack gives back what went in") {
  const Fixture f;
  for (const int count : {0, 1, 2, 3, 100}) {
    const auto entries = samples(count);
    f.write(pack_of(entries, "{\"any\": \"text\"}"));
    const auto pack = Pack::open(f.path);
    REQUIRE(pack.ok());
    CHECK(pack->index().size() == entries.size());
    CHECK(pack->index().manifest() == "{\"any\": \"text\"}");
    CHECK_FALSE(pack->index().header().is_signed);
    for (const Entry& entry : entries) {
      const auto found = pack->find(entry.key);
      REQUIRE(found.ok());
      REQUIRE(found->has_value());
      CHECK((*found)->key == entry.key);
      CHECK((*found)->metadata_json == entry.metadata_json);
      CHECK((*found)->payload == entry.payload);
    }
    for (const Digest& absent : {Digest(), sha256("absent"), *Digest::from_hex(std::string(64, 'f'))}) {
      const auto found = pack->find(absent);
      REQUIRE(found.ok());
      CHECK_FALSE(found->has_value());
    }
  }
}

TEST_CASE("the same entries in any order are the same bytes") {
  auto entries = samples(50);
  const Bytes first = pack_of(entries);
  test::Random random(test::test_seed());
  for (int round = 0; round < 10; ++round) {
    random.shuffle(entries);
    CHECK(pack_of(entries) == first);
  }
  entries.pop_back();
  CHECK(pack_of(entries) != first);
}

TEST_CASE("the bytes of format 1 stay as they are") {
  // Without entries: what Zstandard makes of them may change from version to version.
  const Bytes empty = pack_of({}, "{}");
  CHECK(empty.size() == kPackHeaderBytes + 2);
  CHECK(sha256(empty).hex() == "ab2f669973a34383e778cae1eacc0264610519f739c83dee308fcac794d4c939");
  const Bytes one = pack_of({sample_entry("a")}, "{}");
  CHECK(load_number(one, record_field(0, 64), 8) == kPackHeaderBytes + kPackRecordBytes + 2);
  CHECK(load_digest(one, record_field(0, 0)) == sha256("a"));
  CHECK(load_number(one, record_field(0, 80), 8) == sample_entry("a").metadata_json.size());
  CHECK(load_number(one, record_field(0, 88), 8) == 300);
}

TEST_CASE("a key goes into a pack once, and nothing too large") {
  PackWriter writer;
  REQUIRE(writer.add(sample_entry("a")).ok());
  CHECK(contains(writer.add(sample_entry("a")).failure().message, "is in the pack already"));
  CHECK(contains(writer.add(sample_entry("b", kMaxPackedEntryBytes)).failure().message,
                 "is too large for a pack"));
  CHECK(contains(writer.finish(std::string(kMaxManifestBytes + 1, ' ')).failure().message,
                 "too many for one pack"));
  CHECK(writer.size() == 1);
}

TEST_CASE("every bit of a pack is checked") {
  const Fixture f;
  const SigningKey key = signing_key("ours");
  for (const SigningKey* signer : {static_cast<const SigningKey*>(nullptr), &key}) {
    Bytes pack = pack_of({sample_entry("a"), sample_entry("b")}, "{}", signer);
    REQUIRE(f.refusal(pack) == "accepted");
    for (std::size_t bit = 0; bit < 8 * pack.size(); ++bit) {
      pack[bit / 8] ^= static_cast<std::byte>(1 << bit % 8);
      CAPTURE(bit);
      CHECK(contains(f.refusal(pack), " refused: "));
      pack[bit / 8] ^= static_cast<std::byte>(1 << bit % 8);
    }
  }
}

TEST_CASE("a pack that is cut or goes on is refused when it is opened") {
  const Fixture f;
  const Bytes good = pack_of({sample_entry("a"), sample_entry("b")});
  for (std::size_t size = 0; size < good.size(); ++size) {
    f.write(Bytes(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)));
    CHECK_FALSE(Pack::open(f.path).ok());
  }
  Bytes longer = good;
  longer.push_back(std::byte{0});
  CHECK(contains(f.refusal(longer), "its entries end at"));
}

TEST_CASE("a pack that lies with good checksums is refused") {
  const Fixture f;
  const Bytes good = pack_of({sample_entry("a"), sample_entry("b"), sample_entry("c")});
  const std::size_t kOffset = 64, kStored = 72, kMetadata = 80, kPayload = 88;  // of a record
  struct Lie {
    const char* refusal;
    std::function<void(Bytes&)> tell;
  };
  const auto number = [](std::size_t at, std::size_t size, std::uint64_t value) {
    return [=](Bytes& pack) { store_number(pack, at, size, value); };
  };
  const auto added = [](std::size_t at, std::uint64_t more) {
    return [=](Bytes& pack) { store_number(pack, at, 8, load_number(pack, at, 8) + more); };
  };
  const std::vector<Lie> lies{
      {"not a pack (magic)", number(4, 1, 'N')},
      {"format version 2, this library reads 1", number(8, 4, 2)},
      {"signature of kind 2", number(12, 4, 2)},
      {"a signature that it says it lacks", number(64, 1, 1)},
      {"5 entries and 14 bytes of manifest", number(16, 8, 5)},
      {"entries and 14 bytes of manifest", number(16, 8, kMaxPackEntries + 1)},
      {"entries and 14 bytes of manifest", number(16, 8, ~std::uint64_t{0} / kPackRecordBytes + 2)},
      {"3 entries and 1000000000 bytes of manifest", number(24, 8, 1000000000)},
      {"3 entries and 18446744073709551615 bytes", number(24, 8, ~std::uint64_t{0})},
      {"entry 0 has", added(record_field(0, kOffset), 1)},
      {"entry 1 has", number(record_field(1, kOffset), 8, 0)},
      {"entry 1 has", added(record_field(0, kStored), 1)},
      {"entry 2 has", number(record_field(2, kStored), 8, ~std::uint64_t{0})},
      {"its entries end at", added(record_field(2, kStored), ~std::uint64_t{0})},
      {"entry 1 claims", number(record_field(1, kMetadata), 8, kMaxPackedEntryBytes + 1)},
      {"entry 1 claims", number(record_field(1, kPayload), 8, kMaxPackedEntryBytes)},
      {"entry 1 claims", number(record_field(1, kPayload), 8, ~std::uint64_t{0})},
      {"its frame has another size than the index says", added(record_field(1, kPayload), 1)},
      {"its frame has another size than the index says", number(record_field(1, kMetadata), 8, 0)},
      {"entry 1 is out of order", number(record_field(1, 0), 8, 0)},
      {"entry 2 is out of order",
       [](Bytes& pack) { store_digest(pack, record_field(2, 0), load_digest(pack, record_field(1, 0))); }},
      {"checksum of the compressed bytes", [](Bytes& pack) { pack.back() ^= std::byte{1}; }},
  };
  for (const Lie& lie : lies) {
    Bytes pack = good;
    lie.tell(pack);
    seal(pack);
    CAPTURE(lie.refusal);
    const std::string refusal = f.refusal(pack);
    CAPTURE(refusal);
    CHECK(contains(refusal, lie.refusal));
    CHECK(contains(refusal, f.path.string() + ": pack "));
  }
}

TEST_CASE("a frame that is none is refused although its checksum is right") {
  const Fixture f;
  const Bytes good = pack_of({sample_entry("a")});
  const PackRecord record{.offset = load_number(good, record_field(0, 64), 8)};
  for (std::size_t at = record.offset; at < good.size(); ++at) {
    Bytes pack = good;
    pack[at] ^= std::byte{0xff};
    store_digest(pack, record_field(0, 32), sha256(std::span(pack).subspan(record.offset)));
    seal(pack);
    // A literal of the frame may be any byte, so some of these are entries; none is read out of bounds, and
    // most are refused by name.
    const std::string refusal = f.refusal(pack);
    CHECK((refusal == "accepted" || contains(refusal, "pack entry " + sha256("a").hex() + " refused: ")));
  }
  Bytes headless = good;
  headless[record.offset] ^= std::byte{0xff};
  store_digest(headless, record_field(0, 32), sha256(std::span(headless).subspan(record.offset)));
  seal(headless);
  CHECK(contains(f.refusal(headless), "its frame has another size than the index says"));
}

TEST_CASE("with a key only its own packs open") {
  const Fixture f;
  const SigningKey ours = signing_key("ours");
  const SigningKey theirs = signing_key("theirs");
  const VerifyingKey key = verifying_key("ours");
  const std::vector<Entry> entries{sample_entry("a"), sample_entry("b")};
  const Bytes good = pack_of(entries, "{}", &ours);
  CHECK(f.refusal(good, &key) == "accepted");
  CHECK(f.refusal(good) == "accepted");  // who names no key trusts the file's owner
  CHECK(pack_of(entries, "{}", &ours) == good);
  CHECK(contains(f.refusal(pack_of(entries, "{}"), &key), "it is not signed"));
  CHECK(contains(f.refusal(pack_of(entries, "{}", &theirs), &key),
                 "not signed with the key of ATTUNE_PACK_KEY"));

  // A signature moved to other contents: another manifest, another payload, another order of two sizes.
  for (const Bytes& other :
       {pack_of(entries, "[]"), pack_of({sample_entry("a"), sample_entry("b", 301)}, "{}")}) {
    Bytes forged = other;
    forged.at(12) = good.at(12);  // the kind of the signature
    for (std::size_t i = 64; i < 128; ++i) forged.at(i) = good.at(i);
    seal(forged);
    CHECK(f.refusal(forged) == "accepted");
    CHECK(contains(f.refusal(forged, &key), "not signed with the key of ATTUNE_PACK_KEY"));
  }
}

TEST_CASE("without a key the file must be ours alone") {
  const Fixture f;
  const SigningKey ours = signing_key("ours");
  const VerifyingKey key = verifying_key("ours");
  f.write(pack_of({sample_entry("a")}, "{}", &ours));
  REQUIRE(::chmod(f.path.c_str(), 0666) == 0);
  CHECK(contains(Pack::open(f.path).failure().message, "others may write to " + f.path.string()));
  CHECK(Pack::open(f.path, &key).ok());  // the signature says all that the owner would
  REQUIRE(::chmod(f.path.c_str(), 0444) == 0);
  CHECK(Pack::open(f.path).ok());

  const fs::path link = f.dir.path() / "link.pack";
  fs::create_symlink(f.path, link);
  CHECK_FALSE(Pack::open(link, &key).ok());
  CHECK_FALSE(Pack::open(f.dir.path(), &key).ok());
  CHECK(contains(Pack::open(f.dir.path() / "none").failure().message, "No such file"));
}

TEST_CASE("another user's pack needs a signature") {
  const Fixture f;
  const SigningKey ours = signing_key("ours");
  const VerifyingKey key = verifying_key("ours");
  f.write(pack_of({sample_entry("a")}, "{}", &ours));
  REQUIRE(::chmod(f.path.c_str(), 0644) == 0);
  if (::chown(f.path.c_str(), ::geteuid() + 1, static_cast<gid_t>(-1)) != 0) {
    MESSAGE("skipped: only root can give a file away");
    return;
  }
  CHECK(contains(Pack::open(f.path).failure().message, " belongs to user "));
  CHECK(Pack::open(f.path, &key).ok());
}

TEST_CASE("a pack that changes while it is open is noticed") {
  const Fixture f;
  const Bytes good = pack_of({sample_entry("a"), sample_entry("b")});
  f.write(good);
  const auto pack = Pack::open(f.path);
  REQUIRE(pack.ok());
  const auto find = [&](const char* name) { return pack->find(sha256(name)); };
  const bool a_is_last = sha256("b") < sha256("a");
  const char* last = a_is_last ? "a" : "b";
  const char* first = a_is_last ? "b" : "a";

  std::fstream(f.path, std::ios::binary | std::ios::in | std::ios::out).seekp(-1, std::ios::end).put('\0');
  CHECK(find(first).ok());
  CHECK(contains(find(last).failure().message, "checksum of the compressed bytes"));

  fs::resize_file(f.path, good.size() - 1);
  CHECK(find(first).ok());
  CHECK(contains(find(last).failure().message, "has become shorter"));

  fs::remove(f.path);
  CHECK(find(first).ok());  // it stays readable as long as it is open
}

TEST_CASE("threads read one pack at the same time") {
  const Fixture f;
  const auto entries = samples(64);
  f.write(pack_of(entries));
  const auto pack = Pack::open(f.path);
  REQUIRE(pack.ok());
  std::atomic<int> good{0};
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        for (const Entry& entry : entries) {
          const auto found = pack->find(entry.key);
          if (found.ok() && *found && (*found)->payload == entry.payload) ++good;
        }
      });
    }
  }
  CHECK(good == 4 * 64);
}

}  // namespace
}  // namespace attune::cache
