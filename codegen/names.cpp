#include "codegen/names.h"

#include <charconv>

namespace attune::codegen {

std::string text_of(Families families) {
  if (families == Families::any) return "any";
  std::string text;
  for (std::size_t i = 0; i < EnumNames<kernel::Family>::kValues.size(); ++i) {
    const auto family = static_cast<kernel::Family>(i);
    if (!contains(families, family)) continue;
    if (!text.empty()) text += '|';
    text += name_of(family);
  }
  return text;
}

bool parse_text(std::string_view text, int& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

bool parse_text(std::string_view text, Families& families) {
  families = Families::any;
  if (text == "any") return true;
  families = Families{0};
  while (true) {
    const std::size_t bar = text.find('|');
    kernel::Family family{};
    if (!parse_text(text.substr(0, bar), family)) return false;
    families = families | only(family);
    if (bar == std::string_view::npos) return true;
    text.remove_prefix(bar + 1);
  }
}

}  // namespace attune::codegen
