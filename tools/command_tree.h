// The command line as data, read from the parser itself: what completion scripts and the man page are printed
// from, so that neither can tell of an option that is not there.
#pragma once

#include <CLI/CLI.hpp>

#include <string>
#include <vector>

namespace attune::tools {

struct OptionInfo {
  std::vector<std::string> names;  // "-o", "--output"; of a positional "KEY"
  std::string description;
  std::string fallback;  // its default; empty: none
  std::vector<std::string> choices;
  bool positional = false;
  bool takes_value = false;
};

struct CommandInfo {
  std::string path;  // "attune cache list"
  std::string name;  // "list"
  std::string description;
  std::vector<OptionInfo> options;
  std::vector<CommandInfo> commands;
};

CommandInfo command_tree(const CLI::App& app);

/// The command and all below it, each before those below it.
std::vector<const CommandInfo*> all_commands(const CommandInfo& root);

// ---- completion.cpp, manual.cpp ----

std::string bash_completion(const CommandInfo& root);
std::string zsh_completion(const CommandInfo& root);
std::string fish_completion(const CommandInfo& root);

/// For man(1), in roff.
std::string manual(const CommandInfo& root);

}  // namespace attune::tools
