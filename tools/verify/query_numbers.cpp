#include "tools/verify/query_numbers.h"

#include <algorithm>
#include <cmath>

namespace attune::verify {

QueryNumbers::QueryNumbers(Random& random, const AttentionProblem& problem) {
  const auto& lens = problem.plan().q_lens;
  const bool padded = !lens.empty() && random.chance(0.5);
  const auto needed = padded ? static_cast<int>(*std::ranges::max_element(lens)) : problem.plan().len_q;
  resize(problem, padded, needed + random.pick({0, 0, 3}));
  const AttentionProblem::Shape shape =
      problem.lse_shape(static_cast<std::int64_t>(rows_.size()), static_cast<std::int64_t>(length_));
  Layout layout = random_strides(random, static_cast<int>(shape.size()));
  layout.broadcast = {};
  tensor = GuardedTensor(DType::f32, shape, layout);
}

QueryNumbers::QueryNumbers(const AttentionProblem& problem) {
  resize(problem, /*padded=*/false, problem.plan().len_q);
  tensor = GuardedTensor(DType::f32, problem.lse_shape(problem.batch(), problem.plan().len_q), Layout{});
}

void QueryNumbers::resize(const AttentionProblem& problem, bool padded, int length) {
  padded_ = padded;
  length_ = static_cast<std::size_t>(length);
  len_q_ = static_cast<std::size_t>(problem.plan().len_q);
  for (const std::int64_t axis : problem.lse_shape(1, 1)) heads_ *= static_cast<std::size_t>(axis);
  if (!padded) {
    for (int b = 0; b < problem.batch(); ++b) rows_.push_back({static_cast<std::size_t>(b), 0, len_q_});
    return;
  }
  std::size_t begin = 0;
  for (const std::int64_t len : problem.plan().q_lens) {
    rows_.push_back({0, begin, static_cast<std::size_t>(len)});
    begin += static_cast<std::size_t>(len);
  }
}

void QueryNumbers::for_each(const std::function<void(std::optional<std::size_t>)>& visit) const {
  for (const Rows& rows : rows_) {
    for (std::size_t head = 0; head < heads_; ++head) {
      for (std::size_t i = 0; i < length_; ++i) {
        const std::size_t first = (rows.batch * heads_ + head) * len_q_ + rows.begin;
        visit(i < rows.count ? std::optional(first + i) : std::nullopt);
      }
    }
  }
}

void QueryNumbers::fill(const std::vector<double>& numbers) {
  std::vector<float> elements;
  for_each([&](std::optional<std::size_t> row) {
    elements.push_back(row ? static_cast<float>(numbers[*row]) : std::nanf(""));
  });
  auto next = elements.begin();
  tensor.fill([&] { return *next++; });
}

std::vector<double> QueryNumbers::values() const {
  const std::vector<double> elements = tensor.values();
  std::vector<double> numbers;
  auto next = elements.begin();
  for_each([&](std::optional<std::size_t> row) {
    if (row) {
      numbers.resize(std::max(numbers.size(), *row + 1));
      numbers[*row] = *next;
    }
    ++next;
  });
  return numbers;
}

}  // namespace attune::verify
