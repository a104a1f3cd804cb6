"""Hub ids: the same rows as a local folder, and a quick word when the hub is out of reach."""

import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from surefoot.data import hub, load
from surefoot.errors import InputError

SENTENCES = {"sentence": ["good one", "bad one"] * 5, "label": [1, 0] * 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny").mkdir()
    for split in ("train", "validation"):
        pq.write_table(pa.table(SENTENCES), tmp_path / "tiny" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "tiny"


def test_ids() -> None:
    for name in ("org/name", "zalando-datasets/fashion_mnist", "nyu-mll/glue:sst2", "a/b.c"):
        assert hub.is_hub_id(name)
    for name in ("digits", "./org/name", "/org/name", "a/b/c", "a/b:", "org/", "../name", "~/name"):
        assert not hub.is_hub_id(name)


def test_a_hub_id_gives_what_the_folder_gives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(repository: str, config: str | None) -> datasets.DatasetDict:
        asked.append((repository, config))
        return datasets.DatasetDict.from_parquet(
            {split: str(folder / f"{split}-00000-of-00001.parquet") for split in ("train", "validation")}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    there, here = load("org/tiny:plain"), load(str(folder))
    assert asked == [("org/tiny", "plain")]
    assert (there.name, there.source) == ("tiny:plain", "org/tiny:plain")
    assert torch.equal(there.train_x, here.train_x)
    assert torch.equal(there.test_x, here.test_x)
    assert (there.vocabulary, there.classes, there.notes) == (here.vocabulary, here.classes, here.notes)


def test_out_of_reach_is_said_at_once(network_calls: list[str]) -> None:
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        load("org/nothing")
    assert time.monotonic() - start < 5
    assert network_calls  # it did ask
    for part in ("'org/nothing'", "no such file or folder", "cannot be reached", "no copy", "local folder"):
        assert part in str(caught.value)
    assert not datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_an_id_that_the_hub_would_not_have(network_calls: list[str]) -> None:
    with pytest.raises(
        InputError, match=r"'a\.\.b/c': there is no such file or folder here, and the Hugging Face hub has no"
    ):
        load("a..b/c")
    assert not network_calls


def test_offline_mode_asks_nothing(monkeypatch: pytest.MonkeyPatch, network_calls: list[str]) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="offline mode"):
        load("org/nothing")
    assert not network_calls


def test_out_of_reach_uses_the_copy_on_this_machine(folder: Path) -> None:
    """The hub's cache has a folder a data set, named after its id: a copy of ours put under such a name is found."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    rows = datasets.DatasetDict.from_parquet(
        {split: str(folder / f"{split}-00000-of-00001.parquet") for split in ("train", "validation")}
    )
    built = Path(rows["train"].cache_files[0]["filename"]).parent
    copy = cache / "org___tiny" / "default" / "0.0.0" / built.name
    copy.parent.mkdir(parents=True)
    built.rename(copy)
    for file in copy.glob("parquet-*.arrow"):
        file.rename(copy / file.name.replace("parquet-", "tiny-"))
    assert torch.equal(load("org/tiny").train_x, load(str(folder)).train_x)


class _NothingThere(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_hub_that_does_not_have_it(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _NothingThere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {
            **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        code = "from surefoot.data import load; load('org/nothing')"
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    finally:
        server.shutdown()
        server.server_close()
    assert run.returncode == 1
    assert (
        "InputError: data 'org/nothing': there is no such file or folder here, and the Hugging Face hub has no"
        in run.stderr
    )
