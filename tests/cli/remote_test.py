"""ATTUNE_REMOTE: a server on loopback that behaves, and ones that don't."""

import http.server
import socket
import ssl
import subprocess
import threading
import time

from harness import CommandTest, Problem, main, needs_cpu, read_safetensors, worst

LONG = 20  # seconds: longer than any request may last
PROBLEM = "dtype=f32 head_dim=8 lse=write"


class Server(http.server.ThreadingHTTPServer):
    """Keeps what it is sent. `answer`, where set, sends something else for each request in its place."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects, self.requests, self.answer = {}, [], None
        self.closing, self.scheme = threading.Event(), "http"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self):
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}/kernels"

    def secure(self, tls):
        """From now on it speaks HTTPS."""
        self.scheme = "https"
        self.socket = tls.wrap_socket(self.socket, server_side=True)

    def handle_error(self, *_):
        """Clients may break off, as those do that refuse a certificate."""

    def methods(self):
        return [method for method, _ in self.requests]

    def stop(self):
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = LONG

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:
            pass  # the client may go when it has seen enough

    def handle_request(self):
        self.server.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.answer:
            self.server.answer(self)
        elif self.command == "PUT":
            self.server.objects[self.path] = body
            self.send(201)
        elif self.path in self.server.objects:
            self.send(200, self.server.objects[self.path])
        else:
            self.send(404, b"no such kernel")

    do_GET = do_PUT = handle_request

    def log_message(self, *_):
        pass


@needs_cpu
class RemoteTest(CommandTest):

    def setUp(self):
        super().setUp()
        self.problem = Problem(len_q=6, len_k=6)
        self.source = self.problem.write(self.folder / "in.safetensors")
        self.target = self.folder / "out.safetensors"
        self.server = Server()
        self.addCleanup(self.server.stop)

    def attend(self, mode="ro", cache="cache", **variables):
        """Runs with the remote, checks the result, and returns the report and the warnings."""
        self.target.unlink(missing_ok=True)
        variables = {"ATTUNE_REMOTE": self.server.url(), "ATTUNE_REMOTE_MODE": mode,
                     "ATTUNE_CACHE_DIR": str(self.folder / cache)} | variables
        outcome = self.attune("attend", self.source, "-o", self.target, "--repeat", 1, "--json", **variables)
        tensors, _ = read_safetensors(self.target)
        self.assertLess(worst(tensors["output"][2], self.problem.reference()[0]), 1e-5)
        return outcome.json(), outcome.err

    def assert_compiled(self, times, warning="", **variables):
        """The call is right whatever the remote does, and costs a warning that holds this text, or none."""
        report, warnings = self.attend(**variables)
        self.assertEqual(report["compiles"], times, warnings)
        if warning:
            self.assertIn(warning, warnings)
        else:
            self.assertEqual(warnings, "")
        return report

    def fill(self):
        """One kernel on the server. Its path there and its bytes."""
        self.assert_compiled(1, mode="rw", cache="first")
        (path, body), = self.server.objects.items()
        self.server.requests.clear()
        return path, body

    def test_what_is_compiled_is_sent_and_serves_others(self):
        self.assert_compiled(1, mode="rw")
        entry, = self.entries()
        path = f"/kernels/{entry.parent.name}{entry.name}"
        self.assertEqual(self.server.requests, [("GET", path), ("PUT", path)])
        self.assertEqual(self.server.objects, {path: entry.read_bytes()})
        self.assert_compiled(0, mode="rw")
        self.assertEqual(len(self.server.requests), 2)  # the user's own cache comes first

        report, log = self.attend(cache="second", ATTUNE_JIT="never", ATTUNE_LOG="debug")
        self.assertEqual((report["compiles"], report["cache_hits"], report["source"]), (0, 1, "disk"))
        self.assertIn(f"is from {self.server.url()}", log)
        self.assertEqual(self.server.methods(), ["GET", "PUT", "GET"])
        self.assert_compiled(0, cache="second")  # it was stored
        self.assertEqual(len(self.server.requests), 3)
        self.attune("cache", "verify", ATTUNE_CACHE_DIR=str(self.folder / "second"))

    def test_only_read_by_default(self):
        self.assert_compiled(1, mode="")
        self.assert_compiled(1, cache="second")
        self.assertEqual(self.server.methods(), ["GET", "GET"])

    def test_what_the_caches_mode_forbids(self):
        self.assert_compiled(1, mode="rw", ATTUNE_CACHE_MODE="ro")
        self.assertEqual(self.server.methods(), ["GET"])
        for mode in ("off", "refresh"):
            self.assert_compiled(1, mode="rw", ATTUNE_CACHE_MODE=mode)
        self.assertEqual(self.server.methods(), ["GET"])
        self.fill()
        self.assert_compiled(0, cache="third", ATTUNE_CACHE_MODE="ro")
        self.assertFalse((self.folder / "third").exists())

    def test_explaining_asks_nobody(self):
        self.fill()
        told = self.attune_json("explain", "--problem", PROBLEM, ATTUNE_REMOTE=self.server.url())
        self.assertEqual(told["state"], "absent")
        self.assertEqual(self.server.requests, [])

    def test_defective_bodies_are_misses(self):
        path, whole = self.fill()
        other = Problem(len_q=6, len_k=6, head_dim=16).write(self.folder / "other.safetensors")
        self.attune("attend", other, "-o", self.target, ATTUNE_REMOTE=self.server.url(), ATTUNE_REMOTE_MODE="rw")
        stranger = next(body for name, body in self.server.objects.items() if name != path)
        for what, body in (("a flipped bit", whole[:-1] + bytes([whole[-1] ^ 1])), ("truncated", whole[:-1]),
                           ("extended", whole + b"\0"), ("empty", b""), ("of another key", stranger),
                           ("a page", b"<html>Please log in</html>" * 10)):
            with self.subTest(what=what):
                self.server.objects[path] = body
                self.assert_compiled(1, "cache entry refused", cache=what)

    def test_answers_that_are_no_kernel(self):
        elsewhere, whole = self.fill()
        self.server.objects["/elsewhere"] = whole
        for what, warning, answer in (
                ("404", "", lambda handler: handler.send(404, whole)),
                ("403", "status 403", lambda handler: handler.send(403, whole)),
                ("500", "status 500", lambda handler: handler.send(500, whole)),
                ("redirect", "status 302", lambda handler: handler.send(302, Location="/elsewhere")),
                ("partial", "status 206", lambda handler: handler.send(206, whole)),
                ("too large", "Maximum file size exceeded",
                 lambda handler: handler.send(200, whole, Content_Length=str((64 << 20) + 1))),
                ("cut off", "partial file",
                 lambda handler: handler.send(200, whole[:-9], Content_Length=str(len(whole)))),
                ("no HTTP", "ATTUNE_REMOTE: ", lambda handler: handler.wfile.write(b"SSH-2.0-hello\r\n"))):
            with self.subTest(what=what):
                self.server.answer = answer
                self.server.requests.clear()
                self.assert_compiled(1, warning, cache=what)
                self.assertEqual(self.server.requests, [("GET", elsewhere)])

    def test_too_large_without_a_length(self):
        hung_up = threading.Event()

        def endless(handler):
            handler.send_response(200)
            handler.end_headers()
            block = b"x" * (1 << 20)
            try:
                for _ in range(100):
                    handler.wfile.write(block)
            except ConnectionError:
                hung_up.set()

        self.server.answer = endless
        self.assert_compiled(1, "ATTUNE_REMOTE: ")
        self.assertTrue(hung_up.wait(LONG))

    def test_a_failed_send_costs_a_warning(self):
        def refuse(handler):
            handler.send(404 if handler.command == "GET" else 405)

        self.server.answer = refuse
        self.assert_compiled(1, "status 405", mode="rw")
        self.assertEqual(self.server.methods(), ["GET", "PUT"])
        self.assertEqual(len(self.entries()), 1)

    def precompile(self, **variables):
        """Four kernels one after another in one process. Its warnings."""
        problems = [f"--problem=dtype=f32 head_dim={dim}" for dim in (8, 16, 24, 32)]
        return self.attune("precompile", *problems, "--jobs", 1, ATTUNE_REMOTE=self.server.url(), **variables).err

    def test_failures_in_a_row_turn_it_off(self):
        self.server.answer = lambda handler: handler.send(500)
        warnings = self.precompile()
        self.assertEqual(self.server.methods(), ["GET"] * 3)
        self.assertEqual(len(self.entries()), 4)
        self.assertEqual(warnings.count("status 500"), 3)
        self.assertEqual(warnings.count("it is not asked again for 60 s"), 1)

    def test_misses_do_not(self):
        self.assertEqual(self.precompile(), "")
        self.assertEqual(self.server.methods(), ["GET"] * 4)

    def test_a_server_that_hangs(self):
        self.server.answer = lambda handler: handler.server.closing.wait(LONG)
        begin = time.monotonic()
        warnings = self.precompile(ATTUNE_REMOTE_MODE="rw")
        self.assertEqual(self.server.methods(), ["GET", "PUT", "GET"])
        self.assertEqual(len(self.entries()), 4)
        self.assertEqual(warnings.count("Timeout was reached"), 3)
        print(f"four kernels and a server that hangs: {time.monotonic() - begin:.1f} s", flush=True)

    def test_nobody_listens(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
            self.assert_compiled(1, "ATTUNE_REMOTE: ", ATTUNE_REMOTE=url)

    def test_proxies_of_the_environment_are_not_used(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
            self.assert_compiled(1, http_proxy=nobody, all_proxy=nobody, no_proxy="")
        self.assertEqual(self.server.methods(), ["GET"])

    def test_a_certificate_that_nobody_vouches_for(self):
        key, certificate = self.folder / "key.pem", self.folder / "certificate.pem"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                        "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
                       check=True, capture_output=True)
        path, body = self.fill()
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)
        self.server.secure(tls)
        self.assert_compiled(1, "certificate", cache="second")
        self.assertEqual((self.server.requests, self.server.objects), ([], {path: body}))

    def test_without_libcurl(self):
        (self.folder / "libcurl.so.4").write_bytes(b"no library")
        broken = {"LD_LIBRARY_PATH": str(self.folder)}
        self.assert_compiled(1, "no libcurl: ", **broken)
        self.assertEqual(self.server.requests, [])
        finding = self.doctor_finding(**broken)
        self.assertFalse(finding["ok"])
        self.assertIn("libcurl.so.4", finding["problem"])

    def test_who_names_no_remote_loads_no_libcurl(self):
        loads = {"LD_DEBUG": "files"}
        self.assertIn("libcurl.so.4", self.attend(**loads)[1])
        self.assertNotIn("libcurl.so.4", self.attend(ATTUNE_REMOTE="", cache="second", **loads)[1])

    def doctor_finding(self, **variables):
        told = self.attune_json("doctor", ATTUNE_REMOTE=self.server.url(), **variables)
        return next(finding for finding in told["findings"] if finding["name"] == "remote")

    def test_doctor(self):
        finding = self.doctor_finding()
        self.assertTrue(finding["ok"])
        self.assertRegex(finding["found"], rf"^{self.server.url()} \(ro\), libcurl/[0-9.]+ in .*libcurl\.so")
        self.assertEqual(self.server.requests, [])
        self.assertNotIn("remote", [each["name"] for each in self.attune_json("doctor")["findings"]])

    def test_what_is_no_remote(self):
        command = ("attend", self.source, "-o", self.target)
        self.assert_fails(2, "ATTUNE_REMOTE=ftp://cache: expected http://HOST or https://HOST", *command,
                          ATTUNE_REMOTE="ftp://cache")
        self.assert_fails(2, "ATTUNE_REMOTE_MODE=on: expected one of ro, rw", *command, ATTUNE_REMOTE_MODE="on")


if __name__ == "__main__":
    main()
