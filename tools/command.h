// What the subcommands of `attune` share. Each has one file, command_NAME.cpp, which adds its options to the
// parser and hands its work to the session; main.cpp runs it and reports.
#pragma once

#include "base/result.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json_fwd.hpp>

#include <functional>
#include <string>

namespace attune::tools {

// Exit codes of the command.
inline constexpr int kOk = 0;
inline constexpr int kWrongResult = 1;  // a check failed, or a defect of Attune
inline constexpr int kUsage = 2;        // the arguments or the input, or nothing runs them here
inline constexpr int kEnvironment = 3;  // driver, compiler or disk

/// The exit code that a failure of this kind has.
int exit_code_of(ErrorKind kind);

struct Session {
  bool json = false;                    // --json
  std::function<Result<int>()> action;  // the chosen subcommand; returns the exit code
};

void add_attend(CLI::App& app, Session& session);
void add_explain(CLI::App& app, Session& session);
void add_emit(CLI::App& app, Session& session);
void add_precompile(CLI::App& app, Session& session);
void add_bench(CLI::App& app, Session& session);
void add_cache(CLI::App& app, Session& session);
void add_cache_list(CLI::App& cache, Session& session);
void add_cache_show(CLI::App& cache, Session& session);
void add_cache_disasm(CLI::App& cache, Session& session);
void add_cache_verify(CLI::App& cache, Session& session);
void add_cache_prune(CLI::App& cache, Session& session);
void add_cache_stats(CLI::App& cache, Session& session);
void add_cache_pack(CLI::App& cache, Session& session);
void add_cache_unpack(CLI::App& cache, Session& session);
void add_mask(CLI::App& app, Session& session);
void add_verify(CLI::App& app, Session& session);
void add_devices(CLI::App& app, Session& session);
void add_doctor(CLI::App& app, Session& session);
void add_completion(CLI::App& app, Session& session);
void add_manual(CLI::App& app, Session& session);

/// Prints to stdout. Fails with environment when stdout is gone.
Result<void> print(const std::string& text);
Result<void> print_json(const nlohmann::json& value);

}  // namespace attune::tools
