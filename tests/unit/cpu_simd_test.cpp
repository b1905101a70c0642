// The vector functions of CPU kernels against their scalar definitions, as the plugin compiles them.
#include "attune/num.h"
#include "attune/philox.h"
#include "attune/semantics.h"
#include "codegen/unit.h"
#include "runtime/cpu/cpu_backend.h"
#include "runtime/cpu/shared_object.h"
#include "tests/support/random.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

using namespace attune;
using namespace attune::test;
using attune::runtime::SharedObject;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Vectors go through memory: x in, y out, `lanes` at a time.
constexpr const char* kSource = R"(
#include "attune/cpu/simd.h"
#include "attune/semantics.h"
using namespace attune::kernel;
#if defined(__AVX512F__)
constexpr i32 L = 16;
#else
constexpr i32 L = 8;
#endif
using F = Floats<L>;
extern "C" int lanes() { return L; }
extern "C" void exp2_of(const float* x, float* y) { store(y, exp2<L>(load<F>(x))); }
extern "C" void log2_of(const float* x, float* y) { store(y, log2<L>(load<F>(x))); }
extern "C" void widen_f16(const u16* x, float* y) { store(y, load_as_float<DType::f16, L>(x)); }
extern "C" void widen_bf16(const u16* x, float* y) { store(y, load_as_float<DType::bf16, L>(x)); }
extern "C" void narrow_f16(const float* x, u16* y) { store_as<DType::f16, L>(y, load<F>(x)); }
extern "C" void narrow_bf16(const float* x, u16* y) { store_as<DType::bf16, L>(y, load<F>(x)); }
extern "C" void transpose_of(float* x) {
  F rows[L];
  for (i32 i = 0; i < L; ++i) rows[i] = load<F>(x + i * L);
  transpose<L>(rows);
  for (i32 i = 0; i < L; ++i) store(x + i * L, rows[i]);
}
constexpr KernelSpec kBoth{.window_left = Edge::bounded, .window_right = Edge::bounded};
extern "C" void seen(const Window* window, int i, int j, int* y) {
  store(y, visible_lanes<kBoth>(*window, lane_numbers<L>() + i, Ints<L>(j)));
}
extern "C" void widen_boolean(const u8* x, float* y) { store(y, load_bias_as_float<Bias::boolean, L>(x)); }
/// Four words of bits for each of L queries from `first` on, word by word; then who is kept by its odd half.
extern "C" void bits_of_queries(const DropoutParams* p, int first, u32* y) {
  const Words<L> query = __builtin_convertvector(lane_numbers<L>() + first, Words<L>);
  const Philox<Words<L>> bits = dropout_bits<Words<L>>(*p, 3, 5, query, 7);
  for (i32 w = 0; w < 4; ++w) store(y + w * L, bits.word[w]);
  store(y + 4 * L, kept(*p, bits.word[2], 1));
}
)";

/// The source compiled for one instruction set.
class Compiled {
 public:
  explicit Compiled(const codegen::Arch& arch) : object_(load(arch)) {
    lanes = reinterpret_cast<int (*)()>(symbol("lanes"))();
  }

  template <typename In, typename Out>
  std::vector<Out> map(const char* name, std::vector<In> x) const {
    const auto function = reinterpret_cast<void (*)(const In*, Out*)>(symbol(name));
    const std::size_t count = x.size();
    x.resize((count + lanes - 1) / lanes * lanes);
    std::vector<Out> y(x.size());
    for (std::size_t i = 0; i < x.size(); i += lanes) function(x.data() + i, y.data() + i);
    y.resize(count);
    return y;
  }
  void* symbol(const char* name) const {
    void* address = object_.symbol(name);
    REQUIRE(address != nullptr);
    return address;
  }

  int lanes = 0;

 private:
  static SharedObject load(const codegen::Arch& arch) {
    codegen::Unit unit;
    unit.arch = arch;
    unit.compiler = runtime::clang_compiler(arch);
    unit.source = kSource;
    const auto headers = codegen::embedded_files();
    unit.headers.assign(headers.begin(), headers.end());
    const auto image = runtime::clang_compile(unit);
    if (!image.ok()) FAIL(image.failure().message);
    auto object = SharedObject::load(image->bytes);
    REQUIRE(object.ok());
    return std::move(object).value();
  }

  const SharedObject object_;
};

/// For every instruction set that this CPU has.
template <typename Check>
void on_every_isa(Check check) {
  const auto backend = runtime::cpu_backend();
  REQUIRE(backend.ok());
  std::vector<std::string> targets{"x86-64-v3"};
  if ((*backend)->arch().isa == codegen::Isa::avx512) targets.push_back("x86-64-v4");
  for (const std::string& target : targets) {
    CAPTURE(target);
    check(Compiled(*codegen::arch_from_name(target)));
  }
}

bool same(float a, float b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

}  // namespace

TEST_CASE("exp2 is within 1.2e-7 and exact where softmax relies on it") {
  on_every_isa([](const Compiled& simd) {
    std::vector<float> x;
    for (int i = 0; i <= 4'000'000; ++i) x.push_back(static_cast<float>(-i * (125.9 / 4'000'000)));
    const auto y = simd.map<float, float>("exp2_of", x);
    double worst = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double exact = std::exp2(static_cast<double>(x[i]));
      worst = std::max(worst, std::abs(y[i] - exact) / exact);
    }
    CHECK(worst < 1.2e-7);

    const auto special =
        simd.map<float, float>("exp2_of", {0.0f, -0.0f, -1.0f, -126.0f, -kInf, -1e30f, -200.0f, kNan});
    CHECK(special[0] == 1.0f);
    CHECK(special[1] == 1.0f);
    CHECK(special[2] == 0.5f);
    CHECK(special[3] == 0x1p-126f);
    for (const int i : {4, 5, 6}) CHECK(special[i] == 0.0f);
    CHECK(std::isnan(special[7]));
    for (const float tiny : simd.map<float, float>("exp2_of", {-126.5f, -127.0f, -130.0f, -148.0f})) {
      CHECK(std::abs(tiny) < 0x1p-126f);
    }
  });
}

TEST_CASE("log2 is within 2e-7") {
  on_every_isa([](const Compiled& simd) {
    Random random(test_seed());
    std::vector<float> x{1.0f, 2.0f, 1.41421354f, 1.41421366f, 0.99999994f, 0x1p-126f, 0x1p100f};
    for (int i = 0; i < 1'000'000; ++i) x.push_back(static_cast<float>(std::exp2(random.unit() * 40 - 1)));
    const auto y = simd.map<float, float>("log2_of", x);
    CHECK(y[0] == 0.0f);
    CHECK(y[1] == 1.0f);
    double worst = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double exact = std::log2(static_cast<double>(x[i]));
      worst = std::max(worst, std::abs(y[i] - exact) / std::max(1.0, std::abs(exact)));
    }
    CHECK(worst < 2e-7);
    CHECK(std::isnan(simd.map<float, float>("log2_of", {kNan})[0]));
  });
}

TEST_CASE("every 16-bit number widens as num.h says") {
  std::vector<std::uint16_t> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  on_every_isa([&](const Compiled& simd) {
    const auto f16 = simd.map<std::uint16_t, float>("widen_f16", all);
    const auto bf16 = simd.map<std::uint16_t, float>("widen_bf16", all);
    int wrong = 0;
    for (std::size_t i = 0; i < all.size(); ++i) {
      wrong += !same(f16[i], kernel::f16_to_float(all[i])) || !same(bf16[i], kernel::bf16_to_float(all[i]));
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("floats narrow as num.h says") {
  Random random(test_seed());
  std::vector<float> x{0.0f,       -0.0f,    kInf,     -kInf,    kNan,   65504.0f,
                       65519.996f, 65520.0f, 0x1p-24f, 0x1p-25f, 3.4e38f};
  for (int i = 0; i < 1'000'000; ++i)
    x.push_back(kernel::float_of(static_cast<std::uint32_t>(random.bits())));
  on_every_isa([&](const Compiled& simd) {
    const auto f16 = simd.map<float, std::uint16_t>("narrow_f16", x);
    const auto bf16 = simd.map<float, std::uint16_t>("narrow_bf16", x);
    int wrong = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      wrong += !same(kernel::f16_to_float(f16[i]), kernel::f16_to_float(kernel::float_to_f16(x[i]))) ||
               !same(kernel::bf16_to_float(bf16[i]), kernel::bf16_to_float(kernel::float_to_bf16(x[i])));
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("a tile is transposed") {
  on_every_isa([](const Compiled& simd) {
    const int n = simd.lanes;
    std::vector<float> x(n * n);
    for (int i = 0; i < n * n; ++i) x[i] = static_cast<float>(i);
    reinterpret_cast<void (*)(float*)>(simd.symbol("transpose_of"))(x.data());
    int wrong = 0;
    for (int i = 0; i < n * n; ++i) wrong += x[i] != static_cast<float>(i % n * n + i / n);
    CHECK(wrong == 0);
  });
}

TEST_CASE("visible_lanes is visible, lane by lane") {
  constexpr kernel::KernelSpec kBoth{.window_left = kernel::Edge::bounded,
                                     .window_right = kernel::Edge::bounded};
  constexpr int kLength = 40;
  on_every_isa([&](const Compiled& simd) {
    const auto seen = reinterpret_cast<void (*)(const kernel::Window*, int, int, int*)>(simd.symbol("seen"));
    std::vector<int> mask(simd.lanes);
    int wrong = 0;
    for (int lower = -kLength; lower <= kLength; lower += 3) {
      for (int upper = -kLength; upper <= kLength; upper += 3) {
        const kernel::Window window{lower, upper};
        for (int j = 0; j < kLength; ++j) {
          seen(&window, 5, j, mask.data());
          for (int i = 0; i < simd.lanes; ++i) {
            wrong += mask[i] != (kernel::visible<kBoth>(window, kLength, 5 + i, j) ? -1 : 0);
          }
        }
      }
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("a vector of queries draws each query's bits") {
  constexpr std::uint64_t kSeed = 0x9876543210fedcbaull;
  const kernel::DropoutParams dropout = kernel::make_dropout(0.5, kSeed, 12);
  on_every_isa([&](const Compiled& simd) {
    const auto draw = reinterpret_cast<void (*)(const kernel::DropoutParams*, int, kernel::u32*)>(
        simd.symbol("bits_of_queries"));
    std::vector<kernel::u32> drawn(5 * simd.lanes);
    int wrong = 0;
    for (const int first : {0, 1, 1000, kernel::kMaxLength - 16}) {
      draw(&dropout, first, drawn.data());
      for (int i = 0; i < simd.lanes; ++i) {
        const auto bits =
            kernel::dropout_bits<kernel::u32>(dropout, 3, 5, static_cast<kernel::u32>(first + i), 7);
        for (int w = 0; w < 4; ++w) wrong += drawn[w * simd.lanes + i] != bits.word[w];
        wrong += drawn[4 * simd.lanes + i] != (kernel::kept(dropout, bits.word[2], 1) ? ~0u : 0u);
      }
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("every boolean but 0 widens to something else than 0") {
  std::vector<std::uint8_t> all(256);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint8_t>(i);
  on_every_isa([&](const Compiled& simd) {
    const auto wide = simd.map<std::uint8_t, float>("widen_boolean", all);
    CHECK(wide[0] == 0);
    CHECK(std::ranges::count(wide, 0.0f) == 1);
  });
}
