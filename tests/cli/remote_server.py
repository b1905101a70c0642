"""What holds for a server that docs/cache_format.md tells how to run, run as told there."""

import os
import pathlib
import re
import shutil
import socket
import subprocess
import time

from harness import CommandTest

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "cache_format.md"
PATIENCE = 60  # seconds to wait for a server to listen


def installed(program):
    """Its path. Debian keeps servers where users don't look."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")


def documented(begin):
    """The example that begins with this line's start."""
    return re.search(rf"^    {re.escape(begin)}.*\n(?:    .*\n)*", DOCUMENT.read_text(), re.MULTILINE).group()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class ServerTest(CommandTest):

    def setUp(self):
        super().setUp()
        self.served = self.folder / "served"
        self.served.mkdir()
        self.port = free_port()

    def start(self, *command):
        with (self.folder / "server.log").open("wb") as log:
            server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        for _ in range(PATIENCE * 20):
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", self.port)) == 0:
                    return server
            self.assertIsNone(server.poll(), self.log())
            time.sleep(0.05)
        return self.fail(self.log())

    def log(self):
        return (self.folder / "server.log").read_text()

    def url(self, path):
        return f"http://127.0.0.1:{self.port}/{path}"

    def precompile(self, cache, path, mode="ro"):
        """One kernel, with an own cache of this name. Where it came from, and the warnings."""
        outcome = self.attune("precompile", "--problem", "dtype=f32 head_dim=8", "--json", ATTUNE_REMOTE=self.url(path),
                              ATTUNE_REMOTE_MODE=mode, ATTUNE_CACHE_DIR=str(self.folder / cache))
        return outcome.json()["results"][0]["source"], outcome.err

    def assert_serves(self, path):
        """What one machine compiles others get; what is damaged nobody does, until it is replaced."""
        compiled, hit = ("compiler", ""), ("disk", "")
        self.assertEqual(self.precompile("reader", path), compiled)
        self.assertEqual(self.precompile("other reader", path), compiled)  # a reader has sent nothing
        self.assertEqual(self.precompile("writer", path, mode="rw"), compiled)
        self.assertEqual(self.precompile("first", path), hit)
        self.attune("cache", "verify", ATTUNE_CACHE_DIR=str(self.folder / "first"))

        kept, = (file for file in self.served.rglob("*") if file.is_file())
        kept.write_bytes(kept.read_bytes()[:-1] + b"x")
        source, warnings = self.precompile("second", path, mode="rw")
        self.assertEqual(source, "compiler")
        self.assertIn("cache entry refused", warnings)
        self.assertEqual(self.precompile("third", path), hit)
