// attune cache: what the cache on disk holds. Each verb, or a few of a kind, has a file of its own.
#include "tools/command.h"

namespace attune::tools {

void add_cache(CLI::App& app, Session& session) {
  CLI::App* group = app.add_subcommand("cache", "What the cache on disk holds");
  group->require_subcommand(1);
  add_cache_list(*group, session);
  add_cache_show(*group, session);
  add_cache_disasm(*group, session);
  add_cache_verify(*group, session);
  add_cache_prune(*group, session);
  add_cache_stats(*group, session);
  add_cache_pack(*group, session);
  add_cache_unpack(*group, session);
}

}  // namespace attune::tools
