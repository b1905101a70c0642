// Aligned tables of text.
#pragma once

#include <string>
#include <vector>

namespace attune::tools {

class Table {
 public:
  /// A heading that begins with '>' makes its column right-aligned; the mark is not printed. A table without
  /// headings is a list of rows.
  explicit Table(std::vector<std::string> headings = {});

  Table& row(std::vector<std::string> cells);
  /// Every line with its newline; columns are two spaces apart, without trailing spaces.
  std::string text() const;

 private:
  std::vector<bool> right_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace attune::tools
