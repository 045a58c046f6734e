"""Models of timm's hub layout: folders and the hub's cache, what their config.json decides, and what is refused."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.config.option_types import leaves
from lowrank_vit.model.hub import CONFIG, WEIGHTS, find_kept, find_model, is_of, source_of, with_source
from tests.waiting import LONG_S

ARCHITECTURE, COMMIT = "vit_tiny_patch16_224", "0123456789abcdef0123456789abcdef01234567"
ARGS = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "qkv_bias": False, "global_pool": "avg"}
LOOK = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 0.95, "interpolation": "bilinear"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of seven named classes and 16 pixels, as timm itself writes it."""
    made = timm.create_model(ARCHITECTURE, img_size=16, num_classes=7, drop_path_rate=0.1, **ARGS)
    names = {"label_names": [f"class {number}" for number in range(7)]}
    args = {"drop_path_rate": 0.1}
    save_for_hf(made, str(tmp_path / "model"), names, args, safe_serialization=True, data_config=LOOK)
    return tmp_path / "model"


def change(folder: Path, **changed: object) -> None:
    """Write other values into config.json; of pretrained_cfg by `cfg`."""
    content = json.loads((folder / CONFIG).read_text())
    content["pretrained_cfg"] |= changed.pop("cfg", {})
    (folder / CONFIG).write_text(json.dumps(content | changed))


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch) -> Path:
    """The same model as me/tiny in the hub's local cache, without network; gives the snapshot's folder."""
    from huggingface_hub import constants

    repository = tmp_path / "cache" / "models--me--tiny"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / COMMIT


def given(line: str) -> dict:
    config = parse(["--data-dir", "nowhere", *line.split()])
    name = config.model.model
    return {name: value for name, _, value in leaves(with_source(config, find_model(name).flags()))}


def test_the_folder_decides_what_the_flags_leave_open(folder):
    name = f"local-dir:{folder}"
    found = given(f"--model {name}")
    assert (found["model"], found["model-from"], found["img-size"]) == (ARCHITECTURE, name, 16)
    assert (found["mean"], found["std"], found["crop-pct"]) == (LOOK["mean"], LOOK["std"], 0.95)
    assert (found["drop-path"], found["train-interpolation"], found["num-classes"]) == (0.1, "random", None)
    pairs = dict(pair.split("=") for pair in found["model-kwargs"])
    assert pairs == {name: str(value) for name, value in ARGS.items()}


def test_flags_go_before_the_folder(folder):
    line = f"--model local-dir:{folder} --img-size 32 --mean 0.5 --crop-pct 1 --drop-path 0 --model-kwargs depth=3"
    found = given(f"{line} --train-interpolation model")
    assert (found["img-size"], found["mean"], found["crop-pct"], found["drop-path"]) == (32, (0.5,), 1, 0)
    assert found["train-interpolation"] == "bilinear"
    assert "depth=3" in found["model-kwargs"]
    assert "depth=2" not in found["model-kwargs"]
    assert given(f"--model local-dir:{folder} --model-kwargs img_size=32")["img-size"] == 32


def test_weights_come_with_names_of_classes_and_how_images_look(folder):
    read = find_model(f"local-dir:{folder}").weights()
    assert (read.arch, read.source) == (ARCHITECTURE, f"local-dir:{folder}")
    assert read.class_names == [f"class {number}" for number in range(7)]
    assert (read.args["img-size"], read.args["crop-pct"]) == (16, 0.95)
    made = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(tensor, read.weights(use_ema=False)[name]) for name, tensor in made.state_dict().items())


def test_a_model_in_the_cache_is_known_by_its_commit_without_network(cached):
    for name in ("hf-hub:me/tiny", "hf-hub:me/tiny@main", f"hf-hub:me/tiny@{COMMIT}", "hf_hub:me/tiny"):
        found = find_model(name)
        assert found.source == f"hf-hub:me/tiny@{COMMIT}"
    assert find_model(found.source).weights().class_names
    (cached / WEIGHTS).rename(cached / "pytorch_model.safetensors")
    assert find_model(found.source).weight_file().name == "pytorch_model.safetensors"


def test_labels_of_old_weights_begin_behind_the_background(folder):
    change(folder, cfg={"label_offset": 2})
    weights = find_model(f"local-dir:{folder}").weights().weights(use_ema=False)
    assert (len(weights["head.weight"]), len(weights["head.bias"])) == (5, 5)


def test_an_old_config_with_all_in_one_is_read(folder):
    content = json.loads((folder / CONFIG).read_text())
    old = content["pretrained_cfg"] | {"architecture": ARCHITECTURE, "labels": {"0": "cat", "1": "dog"}}
    (folder / CONFIG).write_text(json.dumps(old))
    found = find_model(f"local-dir:{folder}")
    assert (found.class_names, found.cfg.crop_pct, found.flags()["img-size"]) == (["cat", "dog"], 0.95, 16)


def test_the_size_for_tests_is_that_of_scoring(folder):
    change(folder, cfg={"test_input_size": [3, 24, 24], "test_crop_pct": 1.0}, model_args={"patch_size": 4})
    found = find_model(f"local-dir:{folder}")
    assert (found.flags()["img-size"], found.flags()["crop-pct"]) == (16, 0.95)
    assert (found.flags(for_tests=True)["img-size"], found.flags(for_tests=True)["crop-pct"]) == (24, 1.0)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("hf-hub:me/tiny", True),
        ("hf-hub:me/tiny@main", True),
        (f"hf-hub:me/tiny@{COMMIT}", True),
        (f"hf-hub:me/tiny@{COMMIT[::-1]}", False),
        ("hf-hub:me/other", False),
        ("local-dir:me/tiny", False),
        ("vit_tiny_patch16_224", False),
    ],
)
def test_a_model_is_the_same_unless_another_commit_is_named(name, same):
    assert is_of(name, f"hf-hub:me/tiny@{COMMIT}") is same
    assert not is_of(name, "")


def test_a_folder_is_the_same_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_of("local-dir:model/", f"local-dir:{tmp_path / 'model'}")
    assert not is_of("local-dir:other", f"local-dir:{tmp_path / 'model'}")


@pytest.mark.parametrize("name", ["hf-hub:", "local-dir:", "s3:me/tiny", "me/tiny", "./model", "http://host/x"])
def test_what_is_no_name_of_a_model_says_how_one_looks(name):
    with pytest.raises(UserError, match=r"is not a model name.*hf-hub:OWNER/NAME.*local-dir:DIR"):
        source_of(name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "names no `architecture`"),
        ('{"model_type": "vit"}', "for the library transformers"),
        ('{"architecture": "vit_tinny_patch16_224"}', "Did you mean vit_tiny_patch16_224"),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": []}', None),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": [1]}', "must be tables"),
    ],
)
def test_a_config_of_another_kind_is_refused(folder, content, said):
    (folder / CONFIG).write_text(content)
    if said is None:
        assert find_model(f"local-dir:{folder}").model_args == {}
        return
    with pytest.raises(UserError, match=said):
        find_model(f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ({"input_size": [1, 16, 16]}, "channels"),
        ({"std": [0.0, 1.0, 1.0]}, "std="),
        ({"mean": ["a", 0, 0]}, "mean="),
        ({"mean": [0.5, 0.5]}, "mean="),
        ({"crop_pct": -1}, "crop_pct="),
    ],
)
def test_images_that_cannot_look_so_are_refused(folder, cfg, said):
    change(folder, cfg=cfg)
    with pytest.raises(UserError, match=said):
        find_model(f"local-dir:{folder}").flags()


def test_images_that_are_not_square_are_refused(folder):
    change(folder, model_args={"img_size": [16, 32]})
    with pytest.raises(UserError, match="images are square"):
        find_model(f"local-dir:{folder}").flags()


def test_folders_that_are_none_say_what_to_give(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml").touch()
    said_of = {"nothing": "does not exist", "model/config.json": "is a file", "run": "lowrank-vit export"}
    for name, said in said_of.items():
        with pytest.raises(UserError, match=said):
            find_model(f"local-dir:{tmp_path / name}")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"no weights beside its config\.json.*leave out --pretrained"):
        find_model(f"local-dir:{folder}").weights()


def answer(kind: str, status: int) -> Exception:
    """An error as huggingface_hub raises it for an answer of the hub."""
    from httpx import Request, Response
    from huggingface_hub import errors

    response = Response(status, request=Request("GET", "https://huggingface.co/me/tiny"))
    return getattr(errors, kind)("a library's\nlong words", response=response)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (answer("RepositoryNotFoundError", 401), r"me/tiny is not on the hub, or is private.*hf auth login"),
        (answer("GatedRepoError", 403), r"is gated: ask for access on https://huggingface\.co/me/tiny"),
        (answer("RevisionNotFoundError", 404), "not in that revision"),
        (answer("RemoteEntryNotFoundError", 404), r"has no config\.json, so it is not a timm model"),
        (answer("HfHubHTTPError", 401), "not on the hub, or is private"),
        (answer("HfHubHTTPError", 503), r"an error of its own \(503\)"),
        (ConnectionError("reset"), "cannot be reached"),
    ],
)
def test_what_the_hub_answers_becomes_a_line(monkeypatch, error, said):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("lowrank_vit.common.hub.why_out_of_reach", lambda: None)
    with pytest.raises(UserError, match=said) as caught:
        find_model("hf-hub:me/tiny")
    assert "\n" not in str(caught.value)


@pytest.fixture
def answers(tmp_path, monkeypatch) -> Iterator[dict[str, bytes]]:
    """A server in the hub's place with an empty cache; it answers what the test puts into `all`, or nothing."""
    from huggingface_hub import constants

    told: dict[str, bytes] = {}
    server, held = socket.create_server(("127.0.0.1", 0)), list[socket.socket]()

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection = server.accept()[0]
                held.append(connection)
                if told["all"]:
                    connection.recv(65536)
                    connection.sendall(told["all"])
                    connection.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    yield told
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(LONG_S)
    for connection in held:
        connection.close()


def http(status: int, *headers: str, body: bytes = b"") -> bytes:
    lines = (f"HTTP/1.1 {status} X", "Connection: close", f"Content-Length: {len(body)}", *headers, "", "")
    return "\r\n".join(lines).encode() + body


OF_THE_HUB = "ETag: 0123", f"X-Repo-Commit: {COMMIT}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x00\x01 garbage\r\n\r\n", "what answers is not the Hugging Face hub"),
        (http(200, body=b"<html>log in</html>"), "what answers is not the Hugging Face hub"),
        (http(200, *OF_THE_HUB, body=b"<!DOCTYPE html>"), r"its config\.json a web page was received.* It was deleted"),
        (http(302, "Location: /login"), "what answers is not the Hugging Face hub"),
        (http(401), "is private and you have no token"),
        (http(403), "is private and you have no token"),
        (http(429), r"asked too often from here \(429\). Wait some minutes, log in"),
        (http(500), r"an error of its own \(500\)"),
        (b"", "cannot be reached"),
    ],
    ids=["garbage", "page", "page of a mirror", "redirect", "401", "403", "429", "500", "never"],
)
def test_what_a_server_answers_becomes_a_line(answers, tmp_path, capfd, content, said):
    answers["all"] = content
    with pytest.raises(UserError, match=said) as caught:
        find_model("hf-hub:me/tiny")
    assert "\n" not in str(caught.value)
    assert "".join(capfd.readouterr()) == ""
    assert not [path for path in tmp_path.rglob("cache/*/snapshots/**/*") if path.is_file()]


def test_weights_that_a_run_keeps_are_of_its_model(folder):
    source = f"local-dir:{folder}"
    assert find_kept(source, f"{ARCHITECTURE}.augreg_in21k").source == source
    with pytest.raises(UserError, match=rf"is a {ARCHITECTURE}, not --model resnet18.*Remove model-from"):
        find_kept(source, "resnet18")
    with pytest.raises(UserError, match=r"--model-from local-dir:nowhere: .* Remove model-from"):
        find_kept("local-dir:nowhere", ARCHITECTURE)


def test_what_is_not_in_the_cache_needs_the_network(cached):
    with pytest.raises(UserError, match=r"cannot be reached.*local-dir:DIR"):
        find_model("hf-hub:me/other")
    (cached / WEIGHTS).unlink()
    with pytest.raises(UserError, match="cannot be reached"):
        find_model("hf-hub:me/tiny").weights()
    with pytest.raises(UserError, match="`a/b/c` is not a name of the hub"):
        find_model("hf-hub:a/b/c")
