#include "runtime/check.h"
#include "runtime/engine.h"
#include "runtime/raise.h"
#include "tools/reference/element.h"
#include "tools/reference/plain.h"
#include "tools/reference/rows.h"
#include "tools/verify/case.h"
#include "tools/verify/verdict.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace attune::verify {
namespace {

using namespace reference;  // NOLINT: cases speak of references and plain values all the time
using kernel::Operation;
using kernel::QueryGradient;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::size_t kPieces = 5;  // of a workspace, each rounded up
constexpr std::size_t kPieceBytes = 256;

/// Every element in one place: what the gradient of a sum is, expanded.
Layout one_number() {
  Layout layout;
  layout.broadcast.fill(true);
  return layout;
}

/// Any strides at all, each element in a place of its own.
Layout random_apart(Random& random, int rank) {
  Layout layout = random_strides(random, rank);
  layout.broadcast = {};
  return layout;
}

GuardedTensor floats(std::size_t bytes) {
  return {DType::f32, {static_cast<std::int64_t>(bytes / sizeof(float))}, Layout{}};
}

std::vector<std::int64_t> shape_of(const GuardedTensor& tensor) {
  const TensorView view = tensor.view();
  return {view.shape.begin(), view.shape.begin() + view.rank};
}

}  // namespace

// ---- Drawing a case ----

BackwardCase::BackwardCase(Random& random, const KernelClass& kernel_class, const MaskClass& mask)
    : problem(random, kernel_class, mask),
      own_forward_(random.chance(0.4)),
      has_grad_lse_(random.chance(0.4)),
      deterministic_(random.chance(kernel_class.deterministic ? 0.3 : 0)),
      function_(random.chance(0.75) ? Function::into : Function::allocate),
      own_workspace_(function_ == Function::into && random.chance(0.5)) {
  grad_spread_ = gradient_spread(random);
  draw_nan_sequence(random);
  draw_forward(random);
  draw_grad_output(random);
  draw_results(random);
  describe();
}

/// Such that every gradient and everything on the way to it stays finite: products of a gradient and a value,
/// divided by 1 - p and summed up over up to a thousand pairs with queries or keys.
double BackwardCase::gradient_spread(Random& random) const {
  const bool half = problem.dtype() == DType::f16 || problem.output_dtype() == DType::f16 ||
                    problem.traits().bias == kernel::Bias::f16;
  const double kept = problem.p() < 1 ? 1 - problem.p() : 1;
  const double most = (half ? 4.0 : 1e33) * kept / std::max(1.0, problem.value_spread());
  return std::min({random.pick({1.0, 1.0, 1.0, 1e-2, most}), most, 1e30});
}

void BackwardCase::draw_nan_sequence(Random& random) {
  const auto sequences = problem.sequences();
  if (sequences.size() < 2 || !random.chance(0.3)) return;
  const auto which = static_cast<std::size_t>(random.integer(0, static_cast<int>(sequences.size()) - 1));
  nan_ = NanSequence{sequences[which], sequences[which].query, random.chance(0.4), problem.query};
  if (random.chance(0.5)) {  // some of its queries alone
    for (std::size_t i = 0; i < nan_->queries.size(); ++i)
      nan_->queries[i] = nan_->queries[i] && random.chance(0.3);
  }
  has_grad_lse_ = false;  // inputs() takes a dO of 0 for a query that gives nothing to anybody
  if (nan_->in_query) poison(problem.query);
}

/// Makes NaN of the elements of the rows that are to be, unless other rows share them.
void BackwardCase::poison(GuardedTensor& tensor) {
  tensor.poison_unused([&](const Index& index) { return !nan_->queries[index[1]]; });
  const auto is_nan = [](double x) { return std::isnan(x); };
  if (std::ranges::none_of(tensor.values(), is_nan)) nan_.reset();
}

/// The results whose gradients are given: those of the reference, rounded to their types, until Attune's own
/// forward writes over them.
void BackwardCase::draw_forward(Random& random) {
  output_ = GuardedTensor(problem.output_dtype(), problem.output_shape(),
                          problem.layout(random, problem.output_dtype(), Access::write));
  lse_ = own_forward_ ? QueryNumbers(problem) : QueryNumbers(random, problem);
  if (own_forward_) return;
  Values values = reference_attention(problem.inputs());
  auto next = values.output.begin();
  output_.fill([&] { return static_cast<float>(*next++); });
  if (random.chance(0.3)) std::ranges::replace(values.lse, -kInfinity, kInfinity);  // others mark rows so
  lse_.fill(values.lse);
}

void BackwardCase::draw_grad_output(Random& random) {
  const auto shape = problem.output_shape();
  const auto rank = static_cast<int>(shape.size());
  const double kind = random.unit();
  Layout layout;
  if (kind < 0.4) {
    grad_output_layout_ = "aligned rows";
    layout = problem.layout(random, problem.output_dtype(), Access::read);
  } else if (kind < 0.8) {
    grad_output_layout_ = "any strides";
    // What can be read where it lies has to suit the copy engine.
    layout = problem.traits().boxes == 0 ? random_strides(random, rank)
                                         : random_scattered(random, problem.output_dtype(), shape);
  } else if (kind < 0.9) {
    grad_output_layout_ = "one number";
    layout = one_number();
  } else {
    grad_output_layout_ = "contiguous";
  }
  const auto next = [&](double spread) {
    return static_cast<float>(spread * std::clamp(random.normal(), -6.0, 6.0));
  };
  grad_output_ = GuardedTensor(problem.output_dtype(), shape, layout);
  grad_output_.fill([&] { return next(grad_spread_); });
  if (nan_ && !nan_->in_query) poison(grad_output_);
  if (!has_grad_lse_) return;
  grad_lse_ = QueryNumbers(random, problem);
  std::vector<double> numbers(problem.queries());
  // As much as reaches the scores through the output.
  for (double& number : numbers) number = next(grad_spread_ * problem.value_spread());
  grad_lse_.fill(numbers);
}

bool BackwardCase::always_adds_query_gradient() const {
  return problem.traits().query_gradient == QueryGradient::atomic;
}

bool BackwardCase::has_bias_gradient() const {
  return problem.has_bias_tensor() && problem.traits().bias != kernel::Bias::boolean;
}

void BackwardCase::draw_results(Random& random) {
  const bool all = function_ == Function::allocate || random.chance(0.6);
  for (const auto& [result, tensor] :
       {std::pair{&query_, &problem.query}, {&key_, &problem.key}, {&value_, &problem.value}}) {
    result->wanted = all || random.chance(0.5);
    result->tensor = GuardedTensor(problem.dtype(), shape_of(*tensor),
                                   problem.layout(random, problem.dtype(), Access::write));
  }
  if (always_adds_query_gradient()) {
    query_.wanted = true;
    value_.wanted = value_.wanted || !key_.wanted;
  }
  if (!has_bias_gradient()) {
    query_.wanted = query_.wanted || (!key_.wanted && !value_.wanted);
    return;
  }
  bias_.wanted = random.chance(0.7) || (!query_.wanted && !key_.wanted && !value_.wanted);
  const auto shape = shape_of(problem.bias_tensor);
  bias_.tensor = GuardedTensor(problem.bias_tensor.view().dtype, shape,
                               random_apart(random, static_cast<int>(shape.size())));
}

void BackwardCase::describe() {
  std::vector<std::string> wanted;
  for (const Result* result : {&query_, &key_, &value_, &bias_}) {
    if (result->wanted) wanted.emplace_back(result->name + std::string_view("grad_").size());
  }
  const std::string gradients = fmt::format("{}", fmt::join(wanted, ", "));
  const std::string lse = own_forward_ ? "of forward" : lse_.padded() ? "padded" : "packed";
  const std::string workspace = own_workspace_ ? "the caller's" : "allocated";
  const bool full = count_of(problem.bias_tensor.view()) == problem.queries() * problem.plan().len_k;
  bias = problem.mask_name();
  aspects = problem.aspects();
  aspects.insert(aspects.end(), {{"function", function_ == Function::into ? "into" : "allocate"},
                                 {"gradients", gradients},
                                 {"bias gradient", !bias_.wanted ? "none"
                                                   : full        ? "full"
                                                                 : "broadcast"},
                                 {"grad_output", grad_output_layout_},
                                 {"lse", lse},
                                 {"grad_lse", !has_grad_lse_       ? "none"
                                              : grad_lse_.padded() ? "padded"
                                                                   : "packed"},
                                 {"NaN", !nan_            ? "none"
                                         : nan_->in_query ? "in a sequence's query"
                                                          : "in a sequence's grad_output"},
                                 {"deterministic", deterministic_ ? "yes" : "no"},
                                 {"workspace", workspace}});
  name = fmt::format("{} backward {} of {}, grad_output {} spread {}, lse {}{}{}{}, workspace {}",
                     problem.text(), function_ == Function::into ? "into" : "allocating", gradients,
                     grad_output_layout_, grad_spread_, lse, has_grad_lse_ ? " with gradient" : "",
                     deterministic_ ? ", deterministic" : "", nan_ ? ", NaN in a sequence" : "", workspace);
}

// ---- What it launches ----

/// What Attune allocates for a gradient without elements is a null pointer: not wanted.
bool BackwardCase::computes(const Result& result) const {
  return result.wanted && (function_ == Function::into || count_of(result.tensor.view()) > 0);
}

QueryGradient BackwardCase::query_gradient(const codegen::Arch& arch) const {
  if (!computes(query_) || (!computes(key_) && !computes(value_))) return QueryGradient::apart;
  return codegen::query_gradient_of(step_of(problem.traits(), Operation::grad_key_value), arch,
                                    deterministic_);
}

int BackwardCase::launches() const {
  const int key = computes(key_), value = computes(value_);
  const int key_value = problem.shares_alike() ? std::max(key, value) : key + value;
  const bool has_queries = problem.batch() > 0 && problem.plan().len_q > 0;
  const int forward = own_forward_ && has_queries ? 1 : 0;
  const int once = forward + 1 + key_value + (computes(query_) ? 1 : 0) + (computes(bias_) ? 1 : 0);
  return deterministic_ ? 2 * once : once;
}

/// grad_key_value may store the bias tensor's gradient where it lies as the copy engine wants it.
int BackwardCase::spared_launches() const {
  const bool may_store = computes(bias_) && computes(query_) && (computes(key_) || computes(value_));
  if (!may_store) return 0;
  return deterministic_ ? 2 : 1;
}

codegen::Problem BackwardCase::last(const codegen::Arch& arch) const {
  if (computes(key_) || computes(value_)) {
    return step_of(problem.traits(), Operation::grad_key_value, query_gradient(arch));
  }
  if (computes(query_)) return step_of(problem.traits(), Operation::grad_query);
  return step_of(problem.traits(), computes(bias_) ? Operation::grad_bias : Operation::delta);
}

// ---- Running it ----

std::vector<Part> BackwardCase::parts() const {
  const Access of_forward = own_forward_ ? Access::write : Access::read;
  std::vector<Part> all = problem.parts();
  all.insert(all.end(), {{"output", &output_, of_forward},
                         {"lse", &lse_.tensor, of_forward},
                         {"grad_output", &grad_output_, Access::read}});
  if (own_workspace_) all.push_back({"workspace", &workspace_, Access::write});
  if (has_grad_lse_) all.push_back({"grad_lse", &grad_lse_.tensor, Access::read});
  for (const Result* result : {&query_, &key_, &value_, &bias_}) {
    if (result->wanted) all.push_back({result->name, &result->tensor, Access::write});
  }
  return all;
}

/// Bytes that a workspace may take at the most: two numbers of each query, a row of its gradient and one of
/// the output's, and at most two turns. Sums of gradients may be those of 16 queries at a time,
/// of each sequence.
std::size_t BackwardCase::most_workspace() const {
  const auto columns = static_cast<std::size_t>(problem.traits().head_dim + problem.traits().head_dim_v);
  const std::size_t numbers = deterministic_ ? 4 : 2;
  const auto len_q = static_cast<std::size_t>(std::max(problem.plan().len_q, 1));
  const std::size_t queries = problem.queries() / len_q * (len_q + 15 + 16 * problem.plan().q_lens.size());
  return queries * (numbers + columns) * sizeof(float) + kPieces * kPieceBytes;
}

void BackwardCase::run(Arena& arena) {
  run_once(arena);
  if (!deterministic_) return;
  std::vector<std::vector<std::byte>> first;
  const auto results = {&query_, &key_, &value_, &bias_};
  for (const Result* result : results) {
    const auto bytes = result->tensor.storage();
    first.emplace_back(bytes.begin(), bytes.end());
  }
  run_once(arena);
  auto before = first.begin();
  for (const Result* result : results) {
    if (!std::ranges::equal(*before++, result->tensor.storage())) {
      wrong_ = fmt::format("{}: two deterministic runs differ", result->name);
    }
  }
}

/// A call's arguments on the device.
struct BackwardCase::Call {
  AttentionProblem::Arguments forward;
  MutableTensorView output, lse;
  TensorView grad_output, grad_lse;
  BackwardOptions options;
};

void BackwardCase::run_once(Arena& arena) {
  if (own_workspace_) workspace_ = floats(most_workspace());
  arena.begin(parts());
  Call call{.forward = problem.on(arena), .output = arena.put(output_), .lse = arena.put(lse_.tensor)};
  if (own_forward_) {
    const auto& [query, key, value, mask, options] = call.forward;
    const runtime::Call whole = runtime::take(  // its keys are never split
        runtime::check({query, key, value, &call.output, &call.lse, /*with_lse=*/true, mask, options}));
    runtime::take(runtime::take(runtime::Engine::global())->run(whole));
  }
  call.grad_output = arena.put(grad_output_);
  call.options.deterministic = deterministic_;
  if (has_grad_lse_) {
    call.grad_lse = arena.put(grad_lse_.tensor);
    call.options.grad_lse = &call.grad_lse;
  }
  if (function_ == Function::into) {
    run_into(arena, call);
  } else {
    run_allocating(arena, call);
  }
  arena.finish();
}

void BackwardCase::run_into(Arena& arena, Call& call) {
  std::array<MutableTensorView, 4> views;
  GradientViews gradients;
  auto view = views.begin();
  for (const auto& [result, pointer] : {std::pair{&query_, &gradients.query},
                                        {&key_, &gradients.key},
                                        {&value_, &gradients.value},
                                        {&bias_, &gradients.bias}}) {
    if (!result->wanted) continue;
    *view = arena.put(result->tensor);
    *pointer = &*view++;
  }
  const auto& [query, key, value, mask, options] = call.forward;
  if (own_workspace_) {
    const std::size_t bytes = backward_workspace_bytes(call.grad_output, call.output, call.lse, query, key,
                                                       value, gradients, mask, options, call.options);
    if (bytes > most_workspace()) {
      wrong_ = fmt::format("a workspace of {} bytes, expected at most {}", bytes, most_workspace());
      return;
    }
    workspace_ = floats(bytes);  // with guards right behind it
    call.options.workspace = arena.put(workspace_).data;
    call.options.workspace_bytes = bytes;
  }
  memory_efficient_attention_backward(call.grad_output, call.output, call.lse, query, key, value, gradients,
                                      mask, options, call.options);
}

void BackwardCase::run_allocating(Arena& arena, Call& call) {
  call.options.bias_gradient = bias_.wanted;
  const auto& [query, key, value, mask, options] = call.forward;
  const Gradients gradients = memory_efficient_attention_backward(
      call.grad_output, call.output, call.lse, query, key, value, mask, options, call.options);
  arena.take(gradients.query, query_.tensor);
  arena.take(gradients.key, key_.tensor);
  arena.take(gradients.value, value_.tensor);
  if (bias_.wanted) arena.take(gradients.bias, bias_.tensor);
}

// ---- Judging it ----

BackwardInputs BackwardCase::all_inputs() const {
  BackwardInputs inputs{
      .forward = problem.inputs(), .grad_output = grad_output_.values(), .output = output_.values()};
  // It enters in the inputs' type, as a framework's cast gives it back: what that costs is no kernel's error.
  for (double& g : inputs.grad_output) {
    g = reference::rounded(problem.dtype(), static_cast<float>(g));
  }
  if (has_grad_lse_) inputs.grad_lse = grad_lse_.values();
  return inputs;
}

/// Queries whose outputs' gradients are 0 give nothing to anybody.
BackwardInputs BackwardCase::inputs() const {
  BackwardInputs inputs = all_inputs();
  if (!nan_) return inputs;
  inputs.forward.query = nan_->query.view();
  const std::size_t row_elements = inputs.output.size() / std::max<std::size_t>(1, nan_->queries.size());
  for (std::size_t i = 0; i < inputs.output.size(); ++i) {
    const bool is_nan = nan_->in_query || std::isnan(inputs.grad_output[i]);  // not where rows share elements
    if (nan_->queries[i / row_elements] && is_nan) inputs.output[i] = inputs.grad_output[i] = 0;
  }
  return inputs;
}

/// Are there gradients of the sequence's own in an element? Of the query's those that the NaNs do not reach,
/// as its query sees no key, are judged all the same.
bool BackwardCase::is_of_nan_sequence(const Result& result, std::size_t element) const {
  if (&result == &query_) return false;
  const TensorView tensor = result.tensor.view();
  const auto columns = static_cast<std::size_t>(tensor.shape[tensor.rank - 1]);
  if (&result != &bias_) return nan_->rows.key[element * nan_->rows.key.size() / count_of(tensor)];
  const auto rows = static_cast<std::size_t>(tensor.shape[tensor.rank - 2]);
  return nan_->rows.key[element % columns] && (rows == 1 || nan_->rows.query[element / columns % rows]);
}

/// What the NaNs reach, by a reference that has seen them, has to be NaN in the query's gradient; it becomes
/// what is right without them, and so does what is the sequence's own.
std::string BackwardCase::overlook_nan(const Result& result, const Gradient& right, const Gradient& reached,
                                       std::vector<double>& gradient) const {
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    const bool is_reached = std::isnan(reached.values[i]);
    if (&result == &query_ && is_reached && !std::isnan(gradient[i])) {
      return fmt::format("element {} is {}, but should be NaN", i, gradient[i]);
    }
    if (is_reached || is_of_nan_sequence(result, i)) gradient[i] = right.tiny[i] == 0 ? 0 : right.values[i];
  }
  return "";
}

std::string BackwardCase::verdict() const {
  if (!wrong_.empty()) return wrong_;
  if (std::string damage = damage_of(parts()); !damage.empty()) return damage;
  const BackwardInputs drawn = inputs();
  const GradientValues right = reference_backward(drawn), plain = plain_backward(drawn);
  const GradientValues reached = nan_ ? reference_backward(all_inputs()) : GradientValues{};
  const std::pair<const Result*, Gradient GradientValues::*> results[] = {{&query_, &GradientValues::query},
                                                                          {&key_, &GradientValues::key},
                                                                          {&value_, &GradientValues::value},
                                                                          {&bias_, &GradientValues::bias}};
  for (const auto& [result, of] : results) {
    if (!result->wanted) continue;
    std::vector<double> gradient = result->tensor.values();
    std::string wrong;
    if (nan_) wrong = overlook_nan(*result, right.*of, reached.*of, gradient);
    if (wrong.empty()) wrong = text_of(plain.*of, right.*of, gradient);
    if (!wrong.empty()) return fmt::format("{}: {}", result->name, wrong);
  }
  return "";
}

}  // namespace attune::verify
