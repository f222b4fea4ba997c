"""The hub's refusals as sentences: no two of 401, 403, 404 and no network are alike, and none shows a token."""

import os
import subprocess
import sys
import traceback

import pytest

from nbhelpers import export, hub_words, tasks
from nbhelpers.loader import hub
from nbhelpers.training import trainer

SECRET = "hf_SECRETSECRETSECRET"
# A hub on this machine that answers with the status it is told, in a process of its own: huggingface_hub reads the
# address when it is imported.
ASKED = """
import sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
import os
now = {}
class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(now["status"])
        for key, value in now["headers"].items(): self.send_header(key, value)
        self.send_header("Content-Length", "2"); self.end_headers()
        if self.command != "HEAD": self.wfile.write(b"{}")
    do_HEAD = do_POST = do_GET
    def log_message(self, *_): pass
server = HTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
os.environ["HF_HUB_OFFLINE"] = "0"
from nbhelpers import export, tasks
from nbhelpers.loader import hub
os.makedirs("pushed"); open("pushed/config.json", "w").write("{}")
ASKS = {
    "model": lambda: hub.find("me/x"), "data": lambda: tasks.from_data("me/x"),
    "push": lambda: export.push("pushed", "me/x"),
}
def asked(status, headers=None, kinds=("model", "data", "push")):
    now.update(status=status, headers=headers or {})
    for kind in kinds:
        try: ASKS[kind]()
        except BaseException as error:
            code = (headers or {}).get("X-Error-Code", "")
            print(f"{status} {code} {kind} {type(error).__name__}: {error}")
for status in (401, 403, 404, 418): asked(status, kinds=tuple(ASKS))
asked(403, {"X-Error-Code": "GatedRepo"}, ("model", "data"))
asked(401, {"X-Error-Code": "RepoNotFound"}, ("model", "data"))
del os.environ["HF_TOKEN"]
asked(401, kinds=("model", "data"))
server.shutdown(); server.server_close()
import time
time.sleep = lambda seconds: None  # between tries: 23 s
asked(0)
"""
WANTED = """
401  model PermissionError: the hub refuses your token (401): it may be cut off
401  data PermissionError: the hub refuses your token (401): it may be cut off
401  push PermissionError: the hub does not know this token (401)
403  model PermissionError: the hub refuses your token (403): it is valid, and may not read me/x. Accept the model's
403  data PermissionError: the hub refuses your token (403): it is valid, and may not read me/x. Accept the data set's
403  push PermissionError: the hub does not let this token write to me/x (403)
404  model ValueError: the hub has no model 'me/x', or it is private
404  data ValueError: the hub has no data set 'me/x', or it is private
404  push ValueError: the hub has no place 'me/x' for this token (404)
418  model ConnectionError: the hub answered 418 instead of me/x: the network is fine
418  data ConnectionError: the hub answered 418 instead of me/x: the network is fine
418  push ValueError: the hub does not take this upload to me/x (418)
403 GatedRepo model PermissionError: me/x asks for its licence to be accepted. 1. Accept it at https://huggingface.co/me/x
403 GatedRepo data PermissionError: me/x asks for its licence to be accepted. 1. Accept it at https://huggingface.co/datasets/
401 RepoNotFound model ValueError: the hub has no model 'me/x', or it is private
401 RepoNotFound data ValueError: the hub has no data set 'me/x', or it is private
401  model PermissionError: the hub asks who you are (401) before it gives me/x
401  data PermissionError: the hub asks who you are (401) before it gives me/x
0  model ConnectionError: the hub is out of reach and me/x is not in this machine's cache
0  data ConnectionError: the hub is out of reach and me/x is not in this machine's cache
0  push ConnectionError: the hub is out of reach
""".strip().splitlines()


def test_each_answer_of_the_hub_is_a_sentence_of_its_own(tmp_path):
    settings = {"HF_TOKEN": SECRET, "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", ASKED], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    said = ran.stdout.strip().splitlines()
    assert len(said) == len(WANTED), ran.stdout + ran.stderr
    for line, wanted in zip(said, WANTED, strict=True):
        assert line.startswith(wanted), (line, wanted)
    assert SECRET not in ran.stdout + ran.stderr


@pytest.mark.parametrize("garbled", [f"{SECRET}\nx", f"{SECRET} x", f"{SECRET}\0", f"{SECRET}é", f"a\r\n{SECRET}"])
@pytest.mark.parametrize("place", ["argument", "HF_TOKEN"])
def test_no_path_shows_a_garbled_token(tmp_path, monkeypatch, garbled, place):
    if place == "HF_TOKEN":
        monkeypatch.setattr("huggingface_hub.get_token", lambda: garbled)
    token = garbled if place == "argument" else None
    (tmp_path / "config.json").write_text("{}")
    paths = {
        "push": lambda: export.push(tmp_path, "me/x", token=token),
        "model": lambda: hub.find("meta-llama/X", token=token),
    }
    if place == "argument":
        paths["trainer"] = lambda: trainer.LeanGRPOConfig(str(tmp_path), hub_token=token)
    else:
        paths["data"] = lambda: tasks.from_data("me/x")
    for path, go in paths.items():
        with pytest.raises(ValueError, match="copy it once more") as caught:
            go()
        assert SECRET not in "".join(traceback.format_exception(caught.value)), path


def test_white_space_around_a_token_is_no_part_of_it():
    assert hub_words.checked_token(f" {SECRET}\n") == SECRET
    assert hub_words.checked_token("") is None and hub_words.checked_token(None) is None
