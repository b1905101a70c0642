#include "tools/command_tree.h"

#include <sstream>

namespace attune::tools {
namespace {

/// CLI11 keeps the values that an option takes in its type: "TEXT:{key,size}".
std::vector<std::string> choices_of(const CLI::Option& option) {
  const std::string type = option.get_type_name();
  const std::size_t begin = type.find('{');
  const std::size_t end = type.find('}', begin);
  std::vector<std::string> choices;
  if (end == std::string::npos) return choices;
  std::istringstream list(type.substr(begin + 1, end - begin - 1));
  for (std::string choice; std::getline(list, choice, ',');) choices.push_back(choice);
  return choices;
}

OptionInfo option_info(const CLI::Option& option) {
  OptionInfo info{.description = option.get_description(),
                  .fallback = option.get_default_str(),
                  .choices = choices_of(option),
                  .positional = option.nonpositional() == false,
                  .takes_value = option.get_items_expected_max() > 0};
  for (const std::string& name : option.get_snames()) info.names.push_back("-" + name);
  for (const std::string& name : option.get_lnames()) info.names.push_back("--" + name);
  if (info.positional) info.names = {option.get_name()};
  return info;
}

CommandInfo command_info(const CLI::App& app, const std::string& above) {
  CommandInfo info{
      .path = above + app.get_name(), .name = app.get_name(), .description = app.get_description()};
  for (const CLI::Option* option : app.get_options()) info.options.push_back(option_info(*option));
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    info.commands.push_back(command_info(*command, info.path + " "));
  }
  return info;
}

void collect(const CommandInfo& command, std::vector<const CommandInfo*>& all) {
  all.push_back(&command);
  for (const CommandInfo& below : command.commands) collect(below, all);
}

}  // namespace

CommandInfo command_tree(const CLI::App& app) {
  return command_info(app, "");
}

std::vector<const CommandInfo*> all_commands(const CommandInfo& root) {
  std::vector<const CommandInfo*> all;
  collect(root, all);
  return all;
}

}  // namespace attune::tools
