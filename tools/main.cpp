// The `attune` command: parses, runs one subcommand, reports its failure. Interrupting it leaves the cache
// and every output file whole, since both are only ever replaced by a rename.
#include "attune/attune.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/option_values.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <exception>
#include <functional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace attune::tools {

int exit_code_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::invalid_argument:
    case ErrorKind::unsupported: return kUsage;
    case ErrorKind::environment: return kEnvironment;
    case ErrorKind::internal: return kWrongResult;
  }
  return kWrongResult;
}

Result<void> print(const std::string& text) {
  const bool written = std::fwrite(text.data(), 1, text.size(), stdout) == text.size();
  if (!written || std::fflush(stdout) != 0) return environment_failure("cannot write to stdout");
  return done();
}

Result<void> print_json(const nlohmann::json& value) {
  // In ASCII: names from files may hold characters that a terminal would obey.
  return print(value.dump(2, ' ', true, nlohmann::json::error_handler_t::replace) + '\n');
}

namespace {

int report(const std::string& message, int exit_code) {
  fmt::print(stderr, "{} {}\n", paint("attune:", Colour::red, Stream::err), printable(message, Lines::many));
  return exit_code;
}

/// The public API throws; everything else returns its failure.
int run(const std::function<Result<int>()>& action) {
  try {
    const Result<int> result = action();
    if (!result.ok()) return report(result.failure().message, exit_code_of(result.failure().kind));
    return *result;
  } catch (const Error& error) {
    return report(error.what(), exit_code_of(error.kind()));
  } catch (const std::exception& error) {
    return report(fmt::format("unexpected failure: {}", error.what()), kWrongResult);
  }
}

/// What is wrong with the command line. The parser would say of a subcommand that it doesn't know that one is
/// missing.
std::string fault_of(const CLI::ParseError& error, const CLI::App& app) {
  const std::vector<std::string> unknown = app.remaining(/*recurse=*/true);
  const bool misses_subcommand = error.what() == std::string_view("A subcommand is required");
  if (misses_subcommand && !unknown.empty()) return fmt::format("{} is no subcommand", unknown.front());
  return error.what();
}

/// What --help or --version prints; the parser reports it as an error.
Result<int> help_or_version(const CLI::App& app, const CLI::ParseError& error) {
  std::ostringstream text;
  app.exit(error, text, text);
  ATTUNE_TRY(print(text.str()));
  return kOk;
}

/// A standard stream that is closed would be the number of the next file that is opened, a lock or a kernel,
/// and what is printed would be written there. This one can't be written to, so printing fails.
void occupy_closed_streams() {
  int descriptor = 0;
  do {
    descriptor = ::open("/dev/null", O_RDONLY);
  } while (descriptor >= 0 && descriptor <= STDERR_FILENO);
  if (descriptor >= 0) ::close(descriptor);
}

int main(int argc, char** argv) {
  occupy_closed_streams();
  CLI::App app{"Memory-efficient attention, compiled for the exact problem at first use.", "attune"};
  Session session;
  app.set_version_flag("--version", "attune " ATTUNE_VERSION);
  app.add_flag("--json", session.json, "Print one JSON object instead of text");
  app.require_subcommand(1);
  app.fallthrough();  // --json may stand behind the subcommand
  app.footer(
      "Exit codes: 0 ok, 1 wrong result, 2 usage, 3 environment. `attune doctor` says what is missing.");
  add_attend(app, session);
  add_explain(app, session);
  add_emit(app, session);
  add_precompile(app, session);
  add_bench(app, session);
  add_cache(app, session);
  add_mask(app, session);
  add_verify(app, session);
  add_devices(app, session);
  add_doctor(app, session);
  add_completion(app, session);
  add_manual(app, session);
  refuse_empty_values(app);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return run([&] { return help_or_version(app, error); });
    return report(fmt::format("{}; try `attune --help`", fault_of(error, app)), kUsage);
  }
  return run(session.action);
}

}  // namespace
}  // namespace attune::tools

int main(int argc, char** argv) {
  return attune::tools::main(argc, argv);
}
