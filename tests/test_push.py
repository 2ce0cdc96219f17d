"""Exports on their way to a hub: this machine's own, which speaks the hub's protocol."""

import base64
import http.server
import json
import threading

import pytest

import rpo_jax
from rpo_jax import export
from tests.runs import configured, write_rows

NAME = "somebody/aligned"


class Hub(http.server.ThreadingHTTPServer):
    """Repositories in memory: their files by name, and whether they are private."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.refuses = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.startswith(f"/api/models/{NAME}/tree/main"):
            self.answer([{"type": "file", "path": name, "size": 1, "oid": "1"} for name in self.server.files])
            return
        known = self.headers.get("authorization") == "Bearer hf_secret"
        self.answer({"type": "user", "name": "somebody"} if known else {"error": "who?"}, 200 if known else 401)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.server.refuses:
            self.answer({"error": "the quota is used up"}, 403)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.server.private[name] = asked.get("private") or asked.get("visibility") == "private"
            self.answer({"url": f"{self.server.url}/{name}"})
        elif self.path == f"/api/models/{NAME}/preupload/main":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.startswith(f"/api/models/{NAME}/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[line["value"]["path"]]
            self.answer({"commitUrl": f"{self.server.url}/{NAME}/commit/1", "commitOid": "1"})
        else:
            self.answer({"error": self.path}, 404)

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants, hf_api

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    changes = {
        "objective.name": "sft",
        "train.steps": 4,
        "train.save_every": 2,
        "train.eval_every": 2,
        "tracking.tensorboard": False,
    }
    data = write_rows(folder / "pairs.jsonl")
    return rpo_jax.run(configured(data, folder / "run", folder / "cache", changes)).run_dir


def test_an_export_is_pushed_whole_and_private_unless_asked(hub, run_dir, tmp_path, capsys):
    earlier = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json")
    hub.files = dict.fromkeys(earlier, b"what a reader would take for the weights")
    for name, more, private in (("private", [], True), ("public", ["--public"], False)):
        out = tmp_path / name
        arguments = ["--run", str(run_dir), "--out", str(out), "--step", "best", "--push", NAME, *more]
        assert export.main(arguments) == 0, capsys.readouterr().err
        assert hub.url in capsys.readouterr().out.splitlines()[-1]
        assert hub.private == {NAME: private}
        assert hub.files == {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert {"model.safetensors", "README.md", "tokenizer.json"} <= set(hub.files)


def test_who_cannot_push_is_told_before_the_export(hub, run_dir, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["--run", str(run_dir), "--out", str(out), "--push"]
    assert export.main([*arguments, "not/a/name"]) == 2
    assert "--push not/a/name is no name of a repository" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert export.main([*arguments, NAME]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "log in by `hf auth login`, or set HF_TOKEN" in line
    assert not out.exists()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.refuses = True
    assert export.main([*arguments, NAME]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{out} is whole: `hf upload {NAME} {out}` sends it again.")
    assert (out / "model.safetensors").is_file()
