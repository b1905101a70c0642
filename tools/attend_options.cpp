#include "codegen/names.h"
#include "tools/attend.h"
#include "tools/option_values.h"

#include <fmt/format.h>

#include <tuple>

namespace attune::tools {
namespace {

/// Any family, or the one that is forced.
std::vector<Family> families_of(const std::string& name) {
  if (name == "cpu") return {Family::cpu};
  if (name == "simt") return {Family::simt};
  if (name == "mma") return {Family::mma};
  if (name == "sm90") return {Family::sm90};
  return {};
}

std::optional<DType> output_dtype_of(const std::string& name) {
  kernel::DType dtype{};
  if (!codegen::parse_text(name, dtype)) return std::nullopt;
  return static_cast<DType>(dtype);
}

}  // namespace

Result<AttentionBias> mask_of(const AttendOptions& options) {
  const auto& [size, left, right] = std::tie(options.window_size, options.window_left, options.window_right);
  const auto takes = [&](bool wants_size, bool wants_reach) -> Result<void> {
    if (size.has_value() != wants_size) {
      return invalid_argument(
          fmt::format("--bias {} {} --window-size N", options.bias, wants_size ? "needs" : "takes no"));
    }
    if (left.has_value() != wants_reach || right.has_value() != wants_reach) {
      return invalid_argument(fmt::format("--bias {} {} --window-left N and --window-right N", options.bias,
                                          wants_reach ? "needs" : "takes no"));
    }
    return done();
  };
  if (options.bias == "lower_triangular_from_bottom_right_local") {
    ATTUNE_TRY(takes(true, false));
    return AttentionBias(LowerTriangularFromBottomRightLocalAttentionMask{*size});
  }
  if (options.bias == "local_from_bottom_right") {
    ATTUNE_TRY(takes(false, true));
    return AttentionBias(LocalAttentionFromBottomRightMask{*left, *right});
  }
  ATTUNE_TRY(takes(false, false));
  if (options.bias == "lower_triangular") return AttentionBias(LowerTriangularMask{});
  if (options.bias == "lower_triangular_from_bottom_right") {
    return AttentionBias(LowerTriangularFromBottomRightMask{});
  }
  return AttentionBias();
}

AttentionOptions attention_of(const AttendOptions& options) {
  return {.scale = options.scale,
          .families = families_of(options.family),
          .p = options.p,
          .dropout = options.dropout,
          .output_dtype = output_dtype_of(options.output_dtype)};
}

void add_options(CLI::App& command, AttendOptions& options) {
  command
      .add_option(
          "FILE", options.input,
          "[B, M, H, K], [B, M, K] or [B, M, G, H, K], F32, F16 or BF16; key and value may have fewer "
          "heads. A tensor attn_bias, [B or 1, H or 1, Mq or 1, Mkv], is added to the scores; a BOOL "
          "one hides keys where it is false")
      ->required();
  command.add_option("-o,--output", options.output, "Where output and lse go")->required();
  command.add_option("--bias", options.bias, "Which keys a query sees")
      ->check(CLI::IsMember({"none", "lower_triangular", "lower_triangular_from_bottom_right",
                             "lower_triangular_from_bottom_right_local", "local_from_bottom_right"}))
      ->capture_default_str();
  command.add_option("--window-size", options.window_size, "Of lower_triangular_from_bottom_right_local")
      ->check(any_integer<std::int64_t>());
  command.add_option("--window-left", options.window_left, "Of local_from_bottom_right")
      ->check(any_integer<std::int64_t>());
  command.add_option("--window-right", options.window_right, "Of local_from_bottom_right")
      ->check(any_integer<std::int64_t>());
  command.add_option("--scale", options.scale, "Factor of query * key; default K ** -0.5");
  command.add_option("--p", options.p, "Dropout probability")->capture_default_str();
  command.add_option("--seed", options.dropout.seed, "Of the dropout")
      ->check(integer_from<std::uint64_t>(0))
      ->capture_default_str();
  command.add_option("--offset", options.dropout.offset, "Calls that have drawn from the seed before")
      ->check(integer_from<std::uint64_t>(0))
      ->capture_default_str();
  command.add_option("--output-dtype", options.output_dtype, "Of the output; default the query's")
      ->check(CLI::IsMember({"f32", "f16", "bf16"}));
  command.add_option("--device", options.device, "auto, cpu, cuda or cuda:N")->capture_default_str();
  command.add_option("--family", options.family, "Kernel family to force")
      ->check(CLI::IsMember({"automatic", "cpu", "simt", "mma", "sm90"}))
      ->capture_default_str();
  command.add_option("--repeat", options.repeat, "Hot calls to time")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  command.add_flag("--check", options.check, "Compare with a float64 reference; exit 1 when wrong");
  CLI::Option* backward = command.add_flag("--backward", options.backward,
                                           "The gradients too, as grad_query, grad_key, grad_value and "
                                           "grad_attn_bias, for the file's grad_output, "
                                           "[B, Mq, H, Kv], and grad_lse, [B, H, Mq]; without these for ones "
                                           "and zeros. They are timed and checked");
  command.add_flag("--deterministic", options.deterministic, "Gradients of the same bits in every run")
      ->needs(backward);
}

}  // namespace attune::tools
