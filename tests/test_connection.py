"""What becomes of names on the hub if it cannot be reached."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from datasets import config
from huggingface_hub import constants

from layershare.connection import asking_hub


@pytest.fixture
def online(monkeypatch):
    """As without HF_HUB_OFFLINE, with a hub that no one serves."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def test_without_an_answer_the_libraries_do_not_try_again_and_again(online):
    with asking_hub("no-folder"):
        assert constants.HF_HUB_OFFLINE
        assert config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert not config.HF_HUB_OFFLINE


def test_a_folder_needs_no_hub(online, tmp_path):
    with asking_hub(tmp_path):
        assert not constants.HF_HUB_OFFLINE


class Refusal(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(403)
        self.end_headers()

    def log_message(self, format, *args):
        pass


def test_any_answer_will_do(online, monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.handle_request, daemon=True).start()
        with asking_hub():
            assert not constants.HF_HUB_OFFLINE
