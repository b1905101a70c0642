"""ATTUNE_REMOTE and nginx with its WebDAV module, where that is installed."""

import subprocess
import unittest

from harness import main, needs_cpu
from remote_server import ServerTest, documented, installed

NGINX = installed("nginx")
HAS_DAV = NGINX and "http_dav_module" in subprocess.run([NGINX, "-V"], capture_output=True, text=True, check=True).stderr
FRAME = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
  access_log off;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
{location}
  }}
}}
"""


@needs_cpu
@unittest.skipUnless(HAS_DAV, "no nginx with a WebDAV module on the path")
class NginxTest(ServerTest):

    def start_nginx(self, writer):
        location = documented("location /attune/").replace("/srv/cache", str(self.served)).replace("192.0.2.7", writer)
        configuration = self.folder / "nginx.conf"
        configuration.write_text(FRAME.format(folder=self.folder, port=self.port, location=location))
        self.start(NGINX, "-e", "stderr", "-p", self.folder, "-c", configuration)

    def test_serves(self):
        self.start_nginx(writer="127.0.0.1")
        self.assert_serves("attune")

    def test_only_the_machine_that_writes_may(self):
        self.start_nginx(writer="127.0.0.2")
        source, warnings = self.precompile("writer", "attune", mode="rw")
        self.assertEqual(source, "compiler")
        self.assertIn("status 403", warnings)
        self.assertEqual(self.precompile("reader", "attune"), ("compiler", ""))


if __name__ == "__main__":
    main()
