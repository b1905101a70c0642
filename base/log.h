// The logger: the only way in which the library says anything. Silent below the level of ATTUNE_LOG
// (error, warn, info, debug; default warn), to stderr unless the application installs a sink.
#pragma once

#include <functional>
#include <string>

namespace attune {

enum class LogLevel { error, warn, info, debug };

using LogSink = std::function<void(LogLevel, const std::string&)>;

/// Replaces the sink; an empty function restores stderr. Thread-safe.
void set_log_sink(LogSink sink);
void set_log_level(LogLevel level);
bool log_enabled(LogLevel level);
void log(LogLevel level, const std::string& message);

}  // namespace attune
