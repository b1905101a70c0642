"""attune devices and attune doctor."""

from harness import CommandTest, doctor, main


class Devices(CommandTest):

    def test_json(self):
        devices = self.attune_json("devices")["devices"]
        self.assertEqual(devices[0]["device"], "cpu")
        self.assertGreaterEqual(devices[0]["threads"], 1)
        for index, device in enumerate(devices[1:]):
            self.assertEqual(device["device"], f"cuda:{index}")
            self.assertGreater(device["memory_bytes"], 0)
        self.assertEqual(len(devices) > 1, doctor()["cuda_works"])

    def test_text(self):
        lines = self.attune("devices").out.splitlines()
        self.assertEqual(lines[0].split(), ["device", "target", "name", "memory"])
        self.assertTrue(lines[1].startswith("cpu "))


class Doctor(CommandTest):

    def doctor(self, **variables):
        works = doctor()["cpu_works"] or doctor()["cuda_works"]
        return self.attune_json("doctor", code=0 if works else 3, **variables)

    def cache_finding(self, **variables):
        return next(entry for entry in self.doctor(**variables)["findings"] if entry["name"] == "cache")

    def test_findings(self):
        report = self.doctor()
        self.assertEqual([entry["name"] for entry in report["findings"]],
                         ["cpu", "cpu compiler", "gpu driver", "gpu", "gpu compiler", "cache"])
        for entry in report["findings"]:
            self.assertEqual(entry["ok"], entry["problem"] is None)
            self.assertEqual(entry["ok"], entry["remedy"] is None)
            self.assertEqual(entry["ok"], entry["found"] is not None)

    def test_environment(self):
        variables = {entry["name"]: entry for entry in self.doctor(ATTUNE_THREADS="1")["environment"]}
        self.assertEqual(variables["ATTUNE_THREADS"]["value"], "1")
        self.assertEqual(variables["ATTUNE_CACHE_DIR"]["value"], str(self.cache))
        self.assertIsNone(variables["ATTUNE_JIT"]["value"])
        self.assertEqual(variables["ATTUNE_JIT"]["values"], "auto|never|always")

    def test_cache(self):
        good = self.cache_finding()
        self.assertTrue(good["ok"])
        self.assertIn(f"{self.cache} (0 kernels, 0 B, mode rw)", good["found"])
        self.assertFalse(self.cache.exists())  # looking creates nothing
        blocker = self.folder / "blocker"
        blocker.write_text("a file")
        bad = self.cache_finding(ATTUNE_CACHE_DIR=str(blocker / "cache"))
        self.assertEqual(bad["problem"], f"{blocker} is not a folder")
        self.assertIn("ATTUNE_CACHE_DIR", bad["remedy"])
        self.cache.mkdir(mode=0o700)
        self.cache.chmod(0o777)
        self.assertIn("others may write", self.cache_finding()["problem"])
        self.assertEqual(self.cache_finding(ATTUNE_CACHE_DIR="", HOME="", XDG_CACHE_HOME="")["problem"],
                         "no folder is named")

    def test_a_bad_variable_is_a_finding(self):
        bad = self.cache_finding(ATTUNE_CACHE_MODE="sometimes")
        self.assertIn("ATTUNE_CACHE_MODE=sometimes: expected one of", bad["problem"])

    def test_text_says_what_is_missing_and_how_to_get_it(self):
        works = doctor()["cpu_works"] or doctor()["cuda_works"]
        text = self.attune("doctor", code=0 if works else 3).out
        self.assertIn("ATTUNE_CACHE_DIR", text)
        for entry in doctor()["findings"]:
            self.assertIn(entry["name"], text)
            if not entry["ok"]:
                self.assertIn(entry["remedy"], text)

    def test_a_missing_nvrtc_is_named(self):
        report = self.doctor(ATTUNE_NVRTC=str(self.folder / "libnvrtc.so"))
        entry = next(e for e in report["findings"] if e["name"] == "gpu compiler")
        self.assertFalse(entry["ok"])
        self.assertTrue(entry["problem"])


if __name__ == "__main__":
    main()
