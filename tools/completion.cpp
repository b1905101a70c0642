// Each script finds the verb on the line ("attune cache list"), and knows what may follow it: the verbs below
// it and its options, whose values are one of a few words, or else a file.
#include "tools/command_tree.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <functional>

namespace attune::tools {
namespace {

/// In single quotes, for all three shells; fish wants its backslashes doubled.
std::string shell_word(std::string_view text, bool fish = false) {
  std::string result = "'";
  for (const char c : text) {
    if (c == '\'') {
      result += fish ? "\\'" : "'\\''";
    } else if (c == '\\' && fish) {
      result += "\\\\";
    } else {
      result += c;
    }
  }
  return result + "'";
}

/// The first line.
std::string brief(const std::string& description) {
  return description.substr(0, description.find('\n'));
}

/// Every verb below the command, as patterns of a case.
std::string verb_patterns(const CommandInfo& root, const char* separator) {
  std::vector<std::string> patterns;
  for (const CommandInfo* command : all_commands(root)) {
    if (command != &root) patterns.push_back(shell_word(command->path));
  }
  return fmt::format("{}", fmt::join(patterns, separator));
}

/// What may stand after the verb, with descriptions; options of the whole command may stand anywhere.
void for_each_word(
    const CommandInfo& root, const CommandInfo& command,
    const std::function<void(const std::string& word, const std::string& description)>& visit) {
  for (const CommandInfo& below : command.commands) visit(below.name, brief(below.description));
  const auto visit_options = [&](const CommandInfo& owner) {
    for (const OptionInfo& option : owner.options) {
      for (const std::string& choice : option.choices) {
        if (option.positional) visit(choice, brief(option.description));
      }
      if (option.positional) continue;
      for (const std::string& name : option.names) visit(name, brief(option.description));
    }
  };
  visit_options(command);
  if (&command != &root) {
    for (const OptionInfo& option : root.options) {
      for (const std::string& name : option.names) {
        if (name == "--json") visit(name, brief(option.description));
      }
    }
  }
}

using Choose = std::string (*)(const std::vector<std::string>& choices);

/// The cases for what follows an option that takes a value: one of a few words, or anything.
std::string value_cases(const CommandInfo& root, Choose choose, const char* anything) {
  std::string cases;
  for (const CommandInfo* command : all_commands(root)) {
    for (const OptionInfo& option : command->options) {
      if (option.positional || !option.takes_value) continue;
      std::vector<std::string> patterns;
      for (const std::string& name : option.names) patterns.push_back(shell_word(command->path + " " + name));
      cases += fmt::format("    {}) {}; return ;;\n", fmt::join(patterns, "|"),
                           option.choices.empty() ? anything : choose(option.choices));
    }
  }
  return cases;
}

std::string choose_in_bash(const std::vector<std::string>& choices) {
  const std::string list = fmt::format("{}", fmt::join(choices, " "));
  return fmt::format(R"(COMPREPLY=($(compgen -W {} -- "$current")))", shell_word(list));
}

std::string choose_in_zsh(const std::vector<std::string>& choices) {
  std::string command = "compadd --";
  for (const std::string& choice : choices) command += fmt::format(" {}", shell_word(choice));
  return command;
}

}  // namespace

std::string bash_completion(const CommandInfo& root) {
  std::string words;
  for (const CommandInfo* command : all_commands(root)) {
    std::vector<std::string> list;
    for_each_word(root, *command, [&](const std::string& word, const std::string&) { list.push_back(word); });
    words += fmt::format("    {}) words={} ;;\n", shell_word(command->path),
                         shell_word(fmt::format("{}", fmt::join(list, " "))));
  }
  return fmt::format(R"(# bash completion of attune, printed by `attune completion bash`
_attune() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}} verb=attune words= i
  COMPREPLY=()
  for ((i = 1; i < COMP_CWORD; ++i)); do
    case "$verb ${{COMP_WORDS[i]}}" in
    {}) verb="$verb ${{COMP_WORDS[i]}}" ;;
    esac
  done
  case "$verb $previous" in
{}  esac
  case "$verb" in
{}  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _attune attune
)",
                     verb_patterns(root, "|"), value_cases(root, choose_in_bash, ":"), words);
}

std::string zsh_completion(const CommandInfo& root) {
  std::string words;
  for (const CommandInfo* command : all_commands(root)) {
    std::string list;
    for_each_word(root, *command, [&](const std::string& word, const std::string& description) {
      list += fmt::format(" {}", shell_word(fmt::format("{}:{}", word, description)));
    });
    words += fmt::format("    {}) next=({}) ;;\n", shell_word(command->path), list);
  }
  return fmt::format(R"(#compdef attune
# zsh completion of attune, printed by `attune completion zsh`
_attune_words() {{
  local previous=${{words[CURRENT - 1]}} verb=attune i
  for ((i = 2; i < CURRENT; ++i)); do
    case "$verb ${{words[i]}}" in
    {}) verb="$verb ${{words[i]}}" ;;
    esac
  done
  case "$verb $previous" in
{}  esac
  local -a next
  case "$verb" in
{}  esac
  _describe attune next || _files
}}
_attune() {{ _attune_words }}
if [[ $funcstack[1] == _attune ]]; then _attune; else compdef _attune attune; fi
)",
                     verb_patterns(root, "|"), value_cases(root, choose_in_zsh, "_files"), words);
}

std::string fish_completion(const CommandInfo& root) {
  std::string lines;
  for (const CommandInfo* command : all_commands(root)) {
    const std::string at =
        fmt::format("complete -c attune -n {}", shell_word("__attune_at " + command->path, true));
    for (const CommandInfo& below : command->commands) {
      lines += fmt::format("{} -f -a {} -d {}\n", at, shell_word(below.name, true),
                           shell_word(brief(below.description), true));
    }
    for (const OptionInfo& option : command->options) {
      if (option.positional) {
        for (const std::string& choice : option.choices) lines += fmt::format("{} -f -a {}\n", at, choice);
        continue;
      }
      lines += at;
      for (const std::string& name : option.names) {
        lines += name.starts_with("--") ? " -l " + name.substr(2) : " -s " + name.substr(1);
      }
      if (option.takes_value)
        lines += option.choices.empty()
                     ? " -r"
                     : fmt::format(" -x -a {}",
                                   shell_word(fmt::format("{}", fmt::join(option.choices, " ")), true));
      lines += fmt::format(" -d {}\n", shell_word(brief(option.description), true));
    }
  }
  return fmt::format(R"(# fish completion of attune, printed by `attune completion fish`
function __attune_at
    set -l verb attune
    for word in (commandline -opc)[2..-1]
        switch "$verb $word"
            case {}
                set verb "$verb $word"
        end
    end
    test "$verb" = "$argv"
end
complete -c attune -l json -d 'Print one JSON object instead of text'
{})",
                     verb_patterns(root, " "), lines);
}

}  // namespace attune::tools
