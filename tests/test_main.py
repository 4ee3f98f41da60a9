"""The command in a process of its own: how it is stopped, completed and cut off."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

START = "import os, signal, sys, time\nfrom layershare import __main__ as command\n"


def script(lines: str, *, code: int, **environment: str) -> tuple[str, str]:
    """Run a script that must end with this exit code; what it wrote to standard output and error."""
    done = subprocess.run(
        [sys.executable, "-c", START + lines],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_it_can_be_stopped_while_it_imports():
    stopped = """
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stop())
sys.argv = ["layershare", "plan", "sample"]
command.main()
"""
    assert script(stopped, code=130)[1] == "Stopped.\n"


def test_it_ends_even_where_stopping_is_swallowed():
    deaf = """
import layershare.cli
def main():
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        try:
            time.sleep(1)
        except SystemExit:
            pass
layershare.cli.main = main
command.GRACE = 0.1
sys.argv = ["layershare", "compress"]
command.main()
"""
    assert script(deaf, code=143)[1] == "Stopped; the same command continues.\n"


def test_nohup_is_respected():
    ignored = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
import layershare.cli
layershare.cli.main = lambda: os.kill(os.getpid(), signal.SIGINT)
command.main()
print("done")
"""
    assert script(ignored, code=0) == ("done\n", "")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ctrl_c_stops_a_healing_under_its_progress_bar(folder):
    command = ["heal", str(folder), "-o", "healed", "--train", "norms", "--text", "text.txt", "--length", "32"]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder.parent)
        os.execv(sys.executable, [sys.executable, "-m", "layershare", *command, "--epochs", "10000"])
    seen = b""
    while b"step 0 of" not in seen and b"Error" not in seen:
        seen += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    try:
        while more := os.read(terminal, 4096):
            seen += more
    except OSError:  # the other end is closed
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130, seen.decode()
    assert seen.decode().rstrip().endswith("Stopped; the same command continues."), seen.decode()
    assert b"Traceback" not in seen


def test_the_shell_completes_verbs_and_methods_without_torch():
    ask = """
import atexit
atexit.register(lambda: print("torch" in sys.modules))
sys.argv = ["layershare"]
command.main()
"""
    for words, expected in {"layershare comp": "compress", "layershare compress --method sv": "svd-llm svd"}.items():
        number = str(len(words.split()) - 1)
        out, _ = script(ask, code=0, _LAYERSHARE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=number)
        assert out.split() == [*expected.split(), "False"]


def test_a_closed_pipe_ends_it_quietly():
    line = f"{sys.executable} -m layershare --help | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_module_is_the_command():
    entry = Path(__file__).parents[1] / "pyproject.toml"
    assert 'layershare = "layershare.__main__:main"' in entry.read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "layershare"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Usage:" in done.stderr
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
