#include "tools/verify/masks.h"

#include "runtime/cuda/cuda_backend.h"
#include "runtime/mask_matrix.h"
#include "tools/mask_picture.h"
#include "tools/reference/element.h"
#include "tools/verify/bias_arguments.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>

namespace attune::verify {
namespace {

using nlohmann::json;
using tools::MaskRows;

constexpr std::int64_t kColumns = 128;  // of value: the key rows that one call tells apart
constexpr std::int64_t kHeadDim = kColumns;

std::size_t bytes_of(const MutableTensorView& tensor) {
  std::int64_t count = 1;
  for (int axis = 0; axis < tensor.rank; ++axis) count *= tensor.shape[axis];
  return static_cast<std::size_t>(count * item_bytes(tensor.dtype));
}

void take(const Result<void>& result) {
  if (!result.ok()) throw Error(result.failure().kind, result.failure().message);
}

/// [1, rows, 1, columns] on a device, by a function of row and column.
template <typename Element>
Tensor matrix(DType dtype, Device device, std::int64_t rows, std::int64_t columns, Element&& element) {
  Tensor host(dtype, {}, {1, rows, 1, columns});
  auto* address = static_cast<std::byte*>(host.data());
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j, address += item_bytes(dtype)) {
      reference::store(dtype, address, element(i, j));
    }
  }
  if (device.type == DeviceType::cpu) return host;
  Tensor there(dtype, device, {1, rows, 1, columns});
  if (rows > 0)
    take(runtime::cuda_copy_to_device(device.index, there.data(), host.data(), bytes_of(host.view())));
  return there;
}

/// A copy in host memory.
Tensor to_host(const Tensor& tensor) {
  const MutableTensorView& view = tensor.view();
  Tensor host(view.dtype, {}, {view.shape.begin(), view.shape.begin() + view.rank});
  const std::size_t bytes = bytes_of(view);
  if (bytes == 0) return host;
  if (view.device.type == DeviceType::cuda) {
    take(runtime::cuda_copy_to_host(view.device.index, host.data(), view.data, bytes));
  } else {
    std::memcpy(host.data(), view.data, bytes);
  }
  return host;
}

/// Key rows that lie in some block: all others may hold anything.
std::vector<bool> rows_in_use(const AttentionBias& bias, std::int64_t queries, std::int64_t keys) {
  const runtime::MaskMatrix mask(bias, 1, static_cast<int>(queries), static_cast<int>(keys));
  std::vector<bool> used(static_cast<std::size_t>(keys));
  for (const kernel::Block& block : mask.blocks()) {
    for (int j = 0; j < block.len_k; ++j) used[static_cast<std::size_t>(mask.key_row(block, j))] = true;
  }
  return used;
}

MaskRows rows_of(const std::vector<bool>& visible, std::size_t queries, std::size_t keys) {
  MaskRows rows(queries);
  for (std::size_t i = 0; i < queries; ++i) {
    for (std::size_t j = 0; j < keys; ++j) rows[i] += visible[i * keys + j] ? '1' : '0';
  }
  return rows;
}

/// One entry of the file.
struct Golden {
  std::string name;  // class, route and arguments
  std::string bias;
  std::string via;
  json arguments;
  std::int64_t queries = 0;
  std::int64_t keys = 0;

  Result<AttentionBias> make() const {
    ATTUNE_ASSIGN(route, find_route(bias, via));
    return make_bias(*route, arguments);
  }
};

Golden golden_of(const json& entry) {
  Golden golden{.bias = entry.at("class"),
                .via = entry.at("via"),
                .arguments = entry.at("args"),
                .queries = entry.at("q_len"),
                .keys = entry.at("k_len")};
  golden.name = fmt::format("{} via {} {}", golden.bias, golden.via, golden.arguments.dump());
  return golden;
}

class Verifier {
 public:
  explicit Verifier(const MasksOptions& options) : options_(options) {}

  Result<void> compare(const json& entry) {
    const Golden golden = golden_of(entry);
    const auto expected = entry.at("mask").get<MaskRows>();
    MaskTally& tally = report_.classes[golden.bias];
    ++tally.cases;
    const auto bias = golden.make();
    if (!bias.ok()) {
      report_.differences.push_back(fmt::format("{}: refused: {}", golden.name, bias.failure().message));
      return done();
    }
    if (same(golden, "materialize", expected, tools::mask_rows(*bias, golden.queries, golden.keys))) {
      ++tally.materialized;
    }
    bool all = true;
    bool any = false;
    for (const MaskKernel& kernel : options_.kernels) {
      const auto seen = attended(*bias, golden.queries, golden.keys, options_.device, kernel);
      if (!seen) continue;
      const std::string name = golden.queries > 0 ? last_kernel() : "nothing to run";
      ++report_.ran[name];
      any = true;
      const MaskRows rows =
          rows_of(*seen, static_cast<std::size_t>(golden.queries), static_cast<std::size_t>(golden.keys));
      all = same(golden, name, expected, rows) && all;
    }
    if (all && any) ++tally.attended;
    return done();
  }

  void refuse(const json& entry) {
    const Golden golden = golden_of(entry);
    const std::string error = entry.at("error");  // "ValueError: text"
    const std::string text = error.substr(std::min(error.find(": "), error.size() - 2) + 2);
    ++report_.errors;
    const auto bias = golden.make();
    if (!bias.ok() && bias.failure().kind == ErrorKind::invalid_argument &&
        bias.failure().message.starts_with(text)) {
      ++report_.refused;
      return;
    }
    report_.differences.push_back(fmt::format("{}: expected the refusal \"{}\", got {}", golden.name, text,
                                              bias.ok() ? "a bias" : "\"" + bias.failure().message + "\""));
  }

  MasksReport& report() { return report_; }

 private:
  bool same(const Golden& golden, const std::string& what, const MaskRows& expected, const MaskRows& actual) {
    if (actual == expected) return true;
    report_.differences.push_back(
        fmt::format("{}:\n{}", golden.name, tools::side_by_side("expected", expected, what, actual)));
    return false;
  }

  const MasksOptions& options_;
  MasksReport report_;
};

}  // namespace

MaskTally MasksReport::total() const {
  MaskTally total;
  for (const auto& [name, tally] : classes) {
    total.cases += tally.cases;
    total.materialized += tally.materialized;
    total.attended += tally.attended;
  }
  return total;
}

std::optional<std::vector<bool>> attended(const AttentionBias& bias, std::int64_t queries, std::int64_t keys,
                                          Device device, MaskKernel kernel) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<bool> used = rows_in_use(bias, queries, keys);
  const auto in_use = [&](std::int64_t row) { return used[static_cast<std::size_t>(row)]; };
  const Tensor query = matrix(kernel.dtype, device, queries, kHeadDim, [](auto, auto) { return 0.0f; });
  const Tensor key = matrix(kernel.dtype, device, keys, kHeadDim,
                            [&](std::int64_t row, auto) { return in_use(row) ? 1.0f : kNan; });
  AttentionOptions options;
  options.families = {kernel.family};
  std::vector<bool> seen(static_cast<std::size_t>(queries * keys));
  for (std::int64_t first = 0; first == 0 || first < keys; first += kColumns) {
    const Tensor value =
        matrix(kernel.dtype, device, keys, kColumns, [&](std::int64_t row, std::int64_t column) {
          return !in_use(row) ? kNan : row == first + column ? 1.0f : 0.0f;
        });
    if (kernel.optional &&
        !not_supported_reasons(kernel.family, query.view(), key.view(), value.view(), bias, options)
             .empty()) {
      return std::nullopt;
    }
    const Tensor output = memory_efficient_attention(query.view(), key.view(), value.view(), bias, options);
    const Tensor weights = to_host(output);
    const auto* weight = static_cast<const std::byte*>(weights.data());
    for (std::int64_t i = 0; i < queries; ++i) {
      for (std::int64_t j = first; j < first + kColumns; ++j, weight += item_bytes(kernel.dtype)) {
        // A NaN, which has come from a row that nobody may look at, counts as attended: the mask then
        // differs.
        if (j < keys && reference::load(kernel.dtype, weight) != 0.0f) {
          seen[static_cast<std::size_t>(i * keys + j)] = true;
        }
      }
    }
  }
  return seen;
}

std::size_t count_of_masks(const json& goldens) {
  return goldens.is_object() && goldens.contains("cases") ? goldens.at("cases").size() : 0;
}

Result<MasksReport> verify_masks(const json& goldens, const MasksOptions& options) {
  Verifier verifier(options);
  try {
    for (const json& entry : goldens.at("cases")) {
      ATTUNE_TRY(verifier.compare(entry));
      if (options.progress) options.progress(entry.at("class"));
    }
    for (const json& entry : goldens.value("errors", json::array())) verifier.refuse(entry);
  } catch (const json::exception& error) {
    return invalid_argument(
        fmt::format("not a file of masks: {}; expected {{\"cases\": [{{class, via, args, q_len, k_len, "
                    "mask}}], \"errors\": [{{class, "
                    "via, args, q_len, k_len, error}}]}}",
                    error.what()));
  } catch (const Error& error) {
    return Failure{error.kind(), error.what()};
  }
  return std::move(verifier.report());
}

}  // namespace attune::verify
