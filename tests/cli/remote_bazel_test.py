"""ATTUNE_REMOTE and bazel-remote, where that is installed."""

import unittest

from harness import main, needs_cpu
from remote_server import ServerTest, documented, installed

BAZEL_REMOTE = installed("bazel-remote")


@needs_cpu
@unittest.skipUnless(BAZEL_REMOTE, "no bazel-remote on the path")
class BazelRemoteTest(ServerTest):

    def start_bazel_remote(self, without=""):
        """As documented, but for this option."""
        command = documented("bazel-remote ").replace(without, "").replace("/srv/cache", str(self.served)).split()
        return self.start(BAZEL_REMOTE, *command[1:], "--http_address", f"127.0.0.1:{self.port}", "--grpc_address", "none")

    def test_serves(self):
        self.start_bazel_remote()
        self.assert_serves("ac")

    def assert_refused(self, path, status):
        source, warnings = self.precompile("writer", path, mode="rw")
        self.assertEqual(source, "compiler")
        self.assertIn(f"status {status}", warnings)

    def test_an_entry_is_no_action_result(self):
        self.start_bazel_remote(without="--disable_http_ac_validation")
        self.assert_refused("ac", 400)

    def test_a_key_is_not_the_digest_of_its_entry(self):
        self.start_bazel_remote()
        self.assert_refused("cas", 500)

    def test_it_keeps_entries_when_it_is_killed(self):
        server = self.start_bazel_remote()
        self.precompile("writer", "ac", mode="rw")
        server.kill()
        server.wait()
        self.start_bazel_remote()
        self.assertEqual(self.precompile("reader", "ac"), ("disk", ""))


if __name__ == "__main__":
    main()
