#include "attune/version.h"
#include "base/env.h"
#include "tools/command_tree.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace attune::tools {
namespace {

/// roff reads a backslash, a hyphen, and a dot or a quote that begins a line.
std::string roff(std::string_view text) {
  std::string result;
  for (const char c : text) {
    const bool begins = result.empty() || result.back() == '\n';
    if (begins && (c == '.' || c == '\'')) result += "\\&";
    if (c == '\\') {
      result += "\\e";
    } else if (c == '-') {
      result += "\\-";
    } else {
      result += c;
    }
  }
  return result;
}

std::string sentence(const std::string& text) {
  return roff(text) + (text.ends_with('.') ? "" : ".");
}

std::string option_text(const OptionInfo& option) {
  std::vector<std::string> names;
  for (const std::string& name : option.names) names.push_back(fmt::format("\\fB{}\\fR", roff(name)));
  std::string text = fmt::format(".TP\n{}", fmt::join(names, ", "));
  if (option.takes_value && !option.positional) text += " \\fIVALUE\\fR";
  text += "\n" + sentence(option.description);
  if (!option.choices.empty())
    text += " One of " + sentence(fmt::format("{}", fmt::join(option.choices, ", ")));
  if (!option.fallback.empty()) text += " Default: " + sentence(option.fallback);
  return text + "\n";
}

std::string command_text(const CommandInfo& command) {
  std::string text = fmt::format(".SS {}\n{}\n", roff(command.path), sentence(command.description));
  for (const OptionInfo& option : command.options) {
    if (option.names.back() != "--help") text += option_text(option);
  }
  return text;
}

std::string environment_text() {
  std::string text;
  for (const EnvVariable& variable : env_variables()) {
    text += fmt::format(".TP\n\\fB{}\\fR\n{} Values: {}. Default: {}.\n", roff(variable.name),
                        roff(variable.effect), roff(variable.values), roff(variable.fallback));
  }
  return text;
}

}  // namespace

std::string manual(const CommandInfo& root) {
  std::string commands;
  for (const CommandInfo* command : all_commands(root)) {
    if (command != &root && command->commands.empty()) commands += command_text(*command);
  }
  std::string options;
  for (const OptionInfo& option : root.options) options += option_text(option);
  return fmt::format(R"(.\" Printed by `attune manual`. Do not edit.
.TH ATTUNE 1 "" "Attune {}"
.SH NAME
attune \- {}
.SH SYNOPSIS
.B attune
.I COMMAND
[\fIoptions\fR] [\fB\-\-json\fR]
.SH OPTIONS
{}.SH COMMANDS
{}.SH EXIT STATUS
0 ok, 1 wrong result, 2 usage, 3 environment.
.SH ENVIRONMENT
{})",
                     roff(ATTUNE_VERSION), roff(root.description), options, commands, environment_text());
}

}  // namespace attune::tools
