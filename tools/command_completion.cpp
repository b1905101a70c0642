// attune completion and attune manual: the command line told to shells and to man(1).
#include "tools/command.h"
#include "tools/command_tree.h"

#include <nlohmann/json.hpp>

#include <memory>

namespace attune::tools {
namespace {

std::string script_of(const CommandInfo& root, const std::string& shell) {
  return shell == "bash"  ? bash_completion(root)
         : shell == "zsh" ? zsh_completion(root)
                          : fish_completion(root);
}

/// The text, or a JSON object that has it under this name.
Result<int> print_as(const char* name, const std::string& text, bool as_json) {
  ATTUNE_TRY(as_json ? print_json({{name, text}}) : print(text));
  return kOk;
}

}  // namespace

void add_completion(CLI::App& app, Session& session) {
  auto shell = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("completion", "Print a shell's completion script");
  command->add_option("SHELL", *shell, "The shell to complete commands in")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish"}));
  command->callback([&app, shell, &session] {
    session.action = [&app, shell, &session] {
      return print_as("script", script_of(command_tree(app), *shell), session.json);
    };
  });
}

void add_manual(CLI::App& app, Session& session) {
  app.add_subcommand("manual", "Print the man page")->callback([&app, &session] {
    session.action = [&app, &session] { return print_as("manual", manual(command_tree(app)), session.json); };
  });
}

}  // namespace attune::tools
