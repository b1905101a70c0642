// attune attend: attention over the tensors of a file, or its gradients, timed and, on request, checked.
#include "runtime/check.h"
#include "tools/attend.h"
#include "tools/command.h"
#include "tools/device_option.h"

#include <memory>

namespace attune::tools {
namespace {

Result<int> attend(const AttendOptions& options, bool as_json) {
  ATTUNE_ASSIGN(mask, mask_of(options));
  ATTUNE_ASSIGN(host, read_tensors(options));
  const AttentionOptions attention = attention_of(options);
  // The shapes are checked before a device is looked for.
  const TensorView views[] = {host.query.view(), host.key.view(), host.value.view()};
  ATTUNE_TRY(runtime::check(
      {views[0], views[1], views[2], nullptr, nullptr, /*with_lse=*/true, host.with(mask), attention}));
  ATTUNE_ASSIGN(device, parse_device(options.device));
  const Attend pass{options, host, mask, attention, device, as_json};
  return options.backward ? attend_backward(pass) : attend_forward(pass);
}

}  // namespace

void add_attend(CLI::App& app, Session& session) {
  auto options = std::make_shared<AttendOptions>();
  CLI::App* command =
      app.add_subcommand("attend", "Attention over the tensors query, key and value of a .safetensors file");
  add_options(*command, *options);
  command->callback([options, &session] {
    session.action = [options, &session] { return attend(*options, session.json); };
  });
}

}  // namespace attune::tools
