// attune completion and attune manual: the command line told to shells and to man(1).
#include "tools/command.h"
#include "tools/command_tree.h"

#include <memory>

namespace attune::tools {
namespace {

Result<int> complete(const CLI::App& app, const std::string& shell) {
  const CommandInfo root = command_tree(app);
  ATTUNE_TRY(print(shell == "bash"  ? bash_completion(root)
                   : shell == "zsh" ? zsh_completion(root)
                                    : fish_completion(root)));
  return kOk;
}

}  // namespace

void add_completion(CLI::App& app, Session& session) {
  auto shell = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("completion", "Print a shell's completion script");
  command->add_option("SHELL", *shell, "Which one's")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish"}));
  command->callback(
      [&app, shell, &session] { session.action = [&app, shell] { return complete(app, *shell); }; });
}

void add_manual(CLI::App& app, Session& session) {
  app.add_subcommand("manual", "Print the man page")->callback([&app, &session] {
    session.action = [&app]() -> Result<int> {
      ATTUNE_TRY(print(manual(command_tree(app))));
      return kOk;
    };
  });
}

}  // namespace attune::tools
