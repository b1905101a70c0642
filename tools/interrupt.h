// Ctrl-C and SIGTERM as a request to end well.
#pragma once

namespace attune::tools {

/// From here on the first SIGINT or SIGTERM is only remembered; the second ends the process as it always
/// does.
void watch_interrupts();

bool interrupted();

/// Dies of the signal that was remembered, so that a shell or a make that waits for us sees an interrupt.
/// Call once everything is written. Returns when there was none.
void die_if_interrupted();

}  // namespace attune::tools
