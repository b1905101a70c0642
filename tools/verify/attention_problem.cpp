#include "tools/verify/attention_problem.h"

#include "attune/philox.h"
#include "codegen/names.h"
#include "tools/reference/mask.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string_view>

namespace attune::verify {
namespace {

using namespace reference;  // NOLINT: cases speak of references and plain values all the time
using codegen::name_of;
using kernel::Dropout;

constexpr std::int64_t kMostProducts = 4'000'000;  // of one case: what the float64 reference does in 4 ms
constexpr int kFewestOutputs = 64;  // so that the plain implementation's error is no matter of luck

std::vector<Family> public_families(codegen::Families families) {
  using enum kernel::Family;
  std::vector<Family> all;
  for (const kernel::Family family : {cpu, simt, mma, sm90}) {
    if (contains(families, family)) all.push_back(static_cast<Family>(static_cast<int>(family) + 1));
  }
  return all;
}

DType dtype_of(kernel::Bias bias) {
  switch (bias) {
    case kernel::Bias::f16: return DType::f16;
    case kernel::Bias::bf16: return DType::bf16;
    case kernel::Bias::boolean: return DType::boolean;
    default: return DType::f32;
  }
}

// ---- Drawing ----

std::optional<double> random_scale(Random& random) {
  const double kind = random.unit();
  if (kind < 0.55) return std::nullopt;
  if (kind < 0.7) return random.unit() * 0.5;
  if (kind < 0.85) return -random.unit() * 0.5;
  if (kind < 0.93) return 0.0;
  return random.unit() * 4;
}

double random_p(Random& random) {
  const double kind = random.unit();
  if (kind < 0.1) return 1.0;
  if (kind < 0.4) return 0.1;
  if (kind < 0.7) return 0.5;
  return 0.001 + 0.998 * random.unit();
}

/// The largest spread at which values, up to 6 standard deviations and divided by 1 - p, stay finite.
double large_values(DType dtype, DType output_dtype, double p) {
  if (dtype != DType::f16 && output_dtype != DType::f16) return 1e30;
  return 1e4 * (p < 1 ? 1 - p : 1);
}

/// [], [H] or [G, H]
std::vector<std::int64_t> random_heads(Random& random, int most) {
  const int axes = random.pick({0, 1, 1, 1, 2, 2});
  if (axes == 0) return {};
  if (axes == 1) return {random.integer(1, most)};
  const int groups = random.integer(1, std::min(most, 3));
  return {groups, random.integer(1, std::max(1, most / groups))};
}

std::int64_t product(const std::vector<std::int64_t>& axes) {
  return std::accumulate(axes.begin(), axes.end(), std::int64_t{1}, std::multiplies<>());
}

/// Heads of key or value, given the query's [heads] or [groups, heads]: as many, or fewer that serve several.
std::vector<std::int64_t> random_fewer_heads(Random& random, std::vector<std::int64_t> heads) {
  if (heads.size() == 1 && random.chance(0.6)) {
    int fewer = random.integer(1, static_cast<int>(heads[0]));
    while (heads[0] % fewer != 0) --fewer;
    heads[0] = fewer;
  }
  if (heads.size() == 2) {
    for (std::int64_t& axis : heads) {
      if (random.chance(0.35)) axis = 1;
    }
  }
  return heads;
}

/// Normal numbers, cut at 6 standard deviations: 6e4 is finite in float16.
class Normal {
 public:
  explicit Normal(Random& random) : random_(random), pool_(1021) {
    for (float& number : pool_) number = static_cast<float>(std::clamp(random.normal(), -6.0, 6.0));
  }
  float operator()() { return pool_[random_.bits() % pool_.size()]; }

 private:
  Random& random_;
  std::vector<float> pool_;
};

/// What a bias tensor holds, element by element; rows are `columns` long.
class BiasElements {
 public:
  BiasElements(Random& random, bool boolean, std::int64_t columns)
      : random_(random),
        normal_(random),
        boolean_(boolean),
        columns_(columns),
        spread_(random.pick({1.0, 1.0, 0.1, 8.0})),
        hidden_(boolean ? random.pick({0.05, 0.5, 0.95}) : random.pick({0.0, 0.0, 0.2})),
        hidden_rows_(random.pick({0.0, 0.0, 0.2})),
        // As programs without -inf hide keys: the weight is 0, but for a row that sees no other key.
        lowered_(boolean ? 0.0 : random.pick({0.0, 0.0, 0.1})) {}

  float operator()() {
    if (at_++ % columns_ == 0) row_is_hidden_ = random_.chance(hidden_rows_);
    const bool hides = row_is_hidden_ || random_.chance(hidden_);
    if (boolean_) return hides ? 0.0f : 1.0f;
    if (hides) return -std::numeric_limits<float>::infinity();
    if (random_.chance(lowered_)) return -200.0f;
    return static_cast<float>(spread_) * normal_();
  }

 private:
  Random& random_;
  Normal normal_;
  bool boolean_;
  std::int64_t columns_;
  double spread_, hidden_, hidden_rows_, lowered_;
  std::int64_t at_ = 0;
  bool row_is_hidden_ = false;
};

/// Any layout that the class's kernels take.
Layout layout_for(Random& random, const codegen::Problem& p, DType dtype, int rank, Access access) {
  if (p.boxes != 0) return random_box_layout(random, dtype, rank);
  return random_layout(random, dtype, rank, p.align_bytes, access);
}

GuardedTensor random_tensor(Random& random, const codegen::Problem& p, const std::vector<std::int64_t>& shape,
                            double spread) {
  const auto dtype = static_cast<DType>(p.dtype);
  GuardedTensor tensor(dtype, shape,
                       layout_for(random, p, dtype, static_cast<int>(shape.size()), Access::read));
  Normal normal(random);
  tensor.fill([&] { return static_cast<float>(spread) * normal(); });
  return tensor;
}

/// [batch, rows, heads..., dim]
std::vector<std::int64_t> shape_of(int batch, int rows, const std::vector<std::int64_t>& heads, int dim) {
  std::vector<std::int64_t> shape{batch, rows};
  shape.insert(shape.end(), heads.begin(), heads.end());
  shape.push_back(dim);
  return shape;
}

// ---- Names for the report ----

std::string scale_text(const std::optional<double>& scale) {
  if (!scale) return "default";
  if (*scale == 0) return "0";
  return *scale < 0 ? "negative" : *scale > 0.5 ? "large" : "explicit";
}

std::string layout_text(const std::vector<std::int64_t>& query, const std::vector<std::int64_t>& key) {
  constexpr const char* kLayouts[] = {"BMK", "BMHK", "BMGHK"};
  const char* fewer = key == query ? "" : product(key) == 1 ? ", one key head" : ", fewer key heads";
  return fmt::format("{}{}", kLayouts[query.size()], fewer);
}

}  // namespace

// ---- What the mask leaves unused ----

/// Of one batch entry: rows that some query sees, rows of some block, and which pair is visible.
struct AttentionProblem::Used {
  std::vector<bool> seen, in_block, pairs;
  bool everything = true;

  Used() = default;
  Used(const AttentionBias& bias, int batch, int len_q, int len_k);
};

AttentionProblem::Used::Used(const AttentionBias& bias, int batch, int len_q, int len_k)
    : seen(len_k), in_block(len_k) {
  const Mask mask(bias, batch, len_q, len_k);
  pairs = mask.dense(0);
  for (std::size_t pair = 0; pair < pairs.size(); ++pair) {
    if (pairs[pair]) seen[pair % len_k] = true;
  }
  for (const kernel::Block& block : mask.blocks()) {
    for (int j = 0; j < block.len_k; ++j) in_block[mask.key_row(block, j)] = true;
  }
  everything = std::ranges::count(pairs, true) == std::ssize(pairs);
}

// ---- Drawing a case ----

AttentionProblem::AttentionProblem(Random& random, const KernelClass& kernel_class, const MaskClass& mask)
    : class_(kernel_class), mask_(mask) {
  draw_extents(random);
  draw_options(random);
  draw_tensors(random);
  const Used used = batch_ == 0 ? Used() : Used(inputs().bias, batch_, plan_.len_q, plan_.len_k);
  poison_unseen(used);
  if (has_bias_tensor()) draw_bias_tensor(random, used);
}

void AttentionProblem::draw_extents(Random& random) {
  const codegen::Problem& p = traits();
  // Few pairs leave room for many heads.
  const std::int64_t most_products = kMostProducts / random.pick({1, 4, 8});
  // A copy engine takes no tensor without rows, and no bias of one key, which has no stride.
  const int fewest_keys = p.boxes == 0 ? 0 : has_bias_tensor() ? 2 : 1;
  // A forward pass without queries needs no kernel, a backward pass does.
  const int fewest_queries = p.boxes != 0 && p.operation != kernel::Operation::forward ? 1 : 0;
  do {
    plan_ = random_plan(random, mask_, most_products / (p.head_dim + p.head_dim_v),
                        p.boxes != 0 ? kBoxGranule : 1);
  } while (plan_.len_k < fewest_keys || plan_.len_q < fewest_queries);
  route_ = random.pick({Route::lists, Route::tables, Route::tables, Route::conversion});
  // Where sequences begin in their pages a copy engine's host has to know.
  const bool unknown_starts = route_ == Route::tables && mask_.keys == Addressing::paged_gappy;
  if (p.boxes != 0 && unknown_starts) route_ = Route::lists;
  const HostTables tables = tables_of(plan_);
  if (route_ == Route::tables) {
    q_starts_ = GuardedTensor(tables.q_starts);
    k_starts_ = GuardedTensor(tables.k_starts);
    k_lens_ = GuardedTensor(tables.k_lens);
    pages_ = GuardedTensor(tables.pages);
  }
  std::int64_t pairs = std::int64_t{plan_.len_q} * plan_.len_k;
  if (!plan_.q_lens.empty()) {
    pairs = 0;
    for (std::size_t b = 0; b < plan_.q_lens.size(); ++b) pairs += plan_.q_lens[b] * plan_.k_lens[b];
  }
  const std::int64_t products = std::max<std::int64_t>(1, pairs * (p.head_dim + p.head_dim_v));
  const auto most = static_cast<int>(std::clamp<std::int64_t>(kMostProducts / products, 1, 8));
  query_heads_ = random_heads(random, most);
  const std::int64_t outputs = product(query_heads_) * plan_.len_q * p.head_dim_v;
  const std::int64_t fewest = outputs == 0 ? 1 : (kFewestOutputs + outputs - 1) / outputs;
  if (mask_.keys == Addressing::whole) {
    const auto drawn = random.integer(1, std::max(1, most / static_cast<int>(product(query_heads_))));
    batch_ = fewest_queries == 0 && random.chance(0.03) ? 0 : std::max(static_cast<int>(fewest), drawn);
  } else if (!query_heads_.empty()) {
    query_heads_.back() *= fewest;
  }
}

void AttentionProblem::draw_options(Random& random) {
  scale = random_scale(random);
  if (traits().dropout == Dropout::on) {
    p_ = random_p(random);
    dropout_ = {random.bits(), random.pick<std::uint64_t>({0, 1, 7, std::uint64_t{1} << 40})};
  }
  // Mostly as after a normalisation, sometimes so wide that one key takes all the weight.
  score_spread_ = random.pick({1.0, 1.0, 1.0, 1.0, 0.01, 3.0});
  value_spread_ = random.pick({1.0, 1.0, 1.0, 1.0, 1e-2, large_values(dtype(), output_dtype(), p_)});
}

void AttentionProblem::draw_tensors(Random& random) {
  const codegen::Problem& p = traits();
  key_heads_ = random_fewer_heads(random, query_heads_);
  value_heads_ = query_heads_.size() == 2 ? random_fewer_heads(random, query_heads_) : key_heads_;
  if (p.boxes != 0 && query_heads_.size() == 2) {  // keys are shared within groups, or not at all
    key_heads_[0] = query_heads_[0];
    value_heads_ = key_heads_;
  }
  query = random_tensor(random, p, shape_of(batch_, plan_.len_q, query_heads_, p.head_dim), score_spread_);
  key = random_tensor(random, p, shape_of(batch_, plan_.len_k, key_heads_, p.head_dim), score_spread_);
  value = random_tensor(random, p, shape_of(batch_, plan_.len_k, value_heads_, p.head_dim_v), value_spread_);
}

/// A key that no query sees may be NaN, and so may be a value outside of every block.
void AttentionProblem::poison_unseen(const Used& used) {
  if (used.everything) return;
  key.poison_unused([&](const Index& index) { return used.seen[index[1]]; });
  value.poison_unused([&](const Index& index) { return used.in_block[index[1]]; });
}

/// [Mq, Mkv], [B, Mq, Mkv] or with all of the query's heads; any axis but the last may broadcast.
void AttentionProblem::draw_bias_tensor(Random& random, const Used& used) {
  Shape shape;
  const int leading = random.pick({0, 1, 2, 2, 2});
  if (leading == 1) shape.push_back(batch_);
  if (leading == 2) {
    shape = lse_shape(batch_, plan_.len_q);
  } else {
    shape.push_back(plan_.len_q);
  }
  for (std::int64_t& axis : shape) {
    if (random.chance(0.25)) axis = 1;
  }
  shape.push_back(plan_.len_k);
  const int rank = static_cast<int>(shape.size());
  const bool boxes = traits().boxes != 0;
  if (boxes && rank == 5 && shape[1] != query_heads_[0]) shape[2] = 1;  // heads of groups, or of all
  const DType dtype = dtype_of(traits().bias);
  bias_tensor = GuardedTensor(
      dtype, shape, boxes ? random_bias_box_layout(random, dtype, rank) : random_strides(random, rank));
  BiasElements next(random, dtype == DType::boolean, std::max<std::int64_t>(1, shape.back()));
  bias_tensor.fill([&] { return next(); });
  if (used.everything) return;
  // The mask overrules whatever stands where it hides a key.
  bias_tensor.poison_unused([&](const Index& index) {
    const std::int64_t row = index[rank - 2], column = index[rank - 1];
    return shape[rank - 2] == 1 ? used.seen[column] : used.pairs[row * plan_.len_k + column];
  });
}

std::vector<AttentionProblem::Sequence> AttentionProblem::sequences() const {
  if (mask_.keys == Addressing::whole) return {};
  const Mask mask(inputs().bias, batch_, plan_.len_q, plan_.len_k);
  std::vector<Sequence> found;
  for (const kernel::Block& block : mask.blocks()) {
    Sequence sequence{std::vector<bool>(plan_.len_q), std::vector<bool>(plan_.len_k)};
    for (int i = 0; i < block.len_q; ++i) sequence.query[block.q_begin + i] = true;
    for (int j = 0; j < block.len_k; ++j) sequence.key[mask.key_row(block, j)] = true;
    found.push_back(std::move(sequence));
  }
  return found;
}

// ---- What was drawn ----

reference::Inputs AttentionProblem::inputs() const {
  const HostTables t = tables_of(plan_);
  AttentionBias made = make_mask(mask_, Route::lists, plan_, {t.q_starts, t.k_starts, t.k_lens, t.pages});
  if (has_bias_tensor()) made = made.add_bias(bias_tensor.view());
  return {.query = query.view(),
          .key = key.view(),
          .value = value.view(),
          .bias = made,
          .scale = scale,
          .p = p_,
          .dropout = dropout_,
          .output_dtype = output_dtype()};
}

std::vector<Part> AttentionProblem::parts() const {
  std::vector<Part> all{
      {"query", &query, Access::read}, {"key", &key, Access::read}, {"value", &value, Access::read}};
  if (has_bias_tensor()) all.push_back({"attn_bias", &bias_tensor, Access::read});
  if (route_ == Route::tables) {
    all.insert(all.end(), {{"q_starts", &q_starts_, Access::read},
                           {"k_starts", &k_starts_, Access::read},
                           {"k_lens", &k_lens_, Access::read},
                           {"block_tables", &pages_, Access::read}});
  }
  return all;
}

AttentionBias AttentionProblem::bias_on(Arena& arena) const {
  const HostTables t = tables_of(plan_);
  const auto make = [&] {
    if (route_ != Route::tables || mask_.from_tables == nullptr) {
      return make_mask(mask_, route_, plan_, {t.q_starts, t.k_starts, t.k_lens, t.pages});
    }
    const auto table = [&](const GuardedTensor& host) { return Int32Table(TensorView(arena.put(host))); };
    return make_mask(mask_, route_, plan_,
                     {table(q_starts_), table(k_starts_), table(k_lens_), table(pages_)});
  };
  AttentionBias made = make();
  if (!has_bias_tensor()) return made;
  const TensorView tensor = arena.put(bias_tensor);
  if (made.name == "None") return tensor;
  if (made.name == "LowerTriangularMask") return LowerTriangularMask{}.add_bias(tensor);
  return made.add_bias(tensor);
}

AttentionProblem::Arguments AttentionProblem::on(Arena& arena) const {
  return {.query = arena.put(query),
          .key = arena.put(key),
          .value = arena.put(value),
          .bias = bias_on(arena),
          .options = {
              .scale = scale, .families = public_families(traits().families), .p = p_, .dropout = dropout_}};
}

AttentionProblem::Shape AttentionProblem::output_shape() const {
  return shape_of(batch_, plan_.len_q, query_heads_, traits().head_dim_v);
}

AttentionProblem::Shape AttentionProblem::lse_shape(std::int64_t batch, std::int64_t length) const {
  Shape shape = query_heads_.empty() ? Shape{1} : query_heads_;
  shape.insert(shape.begin(), batch);
  shape.push_back(length);
  return shape;
}

std::size_t AttentionProblem::queries() const {
  return static_cast<std::size_t>(product(lse_shape(batch_, plan_.len_q)));
}

Layout AttentionProblem::layout(Random& random, DType dtype, Access access) const {
  return layout_for(random, traits(), dtype, query.view().rank, access);
}

std::string AttentionProblem::text() const {
  const codegen::Problem& p = traits();
  return fmt::format(
      "{} {} -> {} B{} heads {} key {} value {} K{} Kv{} {} {} bias tensor {} scale {} p {} align {} spreads "
      "{} {}",
      name_of(class_.family), name_of(p.dtype), name_of(p.output_dtype), batch_, query_heads_, key_heads_,
      value_heads_, p.head_dim, p.head_dim_v, mask_.name, plan_.text(), name_of(p.bias),
      scale ? fmt::format("{}", *scale) : "default", p_, p.align_bytes, score_spread_, value_spread_);
}

std::vector<std::pair<std::string, std::string>> AttentionProblem::aspects() const {
  constexpr std::string_view kRoutes[] = {"lists", "tables", "conversion"};
  const codegen::Problem& p = traits();
  std::vector<std::pair<std::string, std::string>> rows{{"bias", mask_.name},
                                                        {"bias tensor", std::string(name_of(p.bias))},
                                                        {"type", std::string(name_of(p.dtype))},
                                                        {"output type", std::string(name_of(p.output_dtype))},
                                                        {"layout", layout_text(query_heads_, key_heads_)},
                                                        {"dropout", p_ == 0   ? "0"
                                                                    : p_ == 1 ? "1"
                                                                              : "between 0 and 1"},
                                                        {"scale", scale_text(scale)},
                                                        {"family", std::string(name_of(class_.family))}};
  if (!plan_.q_lens.empty()) rows.emplace_back("sequences", kRoutes[static_cast<int>(route_)]);
  return rows;
}

}  // namespace attune::verify
