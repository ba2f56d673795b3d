"""timm's named weights come from the caches of the hub and of torch, or are downloaded and checked."""

import hashlib
import types

import pytest
import torch
from weight_files import TENSORS, assert_equal, save

import models
from utils import UserError
from weightfiles.hub import fetch, pretrained_file
from weightfiles.lazy import open_weights

COMMIT = "0" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Make an empty hub cache; return a function that adds a file as a download would."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repository, name, revision="main", tensors=TENSORS):
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(COMMIT)
        (folder / "snapshots" / COMMIT).mkdir(parents=True, exist_ok=True)
        return save(folder / "snapshots" / COMMIT / name, tensors)

    return put


def known(**config):
    return types.SimpleNamespace(pretrained_cfg=config)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_pretrained_weights_come_from_the_hubs_cache(name, hub):
    path = hub("timm/vit_small_patch16_224.augreg_in21k", name)
    model = models.create("vit_small_patch16_224_in21k", {}, device="meta")
    assert pretrained_file(model, "vit_small_patch16_224_in21k") == path
    assert_equal(open_weights(path), TENSORS)


@pytest.mark.parametrize(
    ("filename", "files", "taken"),
    [
        (None, ["model.safetensors.index.json", "pytorch_model.bin", "model.safetensors"], "model.safetensors"),
        (None, ["model.safetensors.index.json", "pytorch_model.bin"], "pytorch_model.bin"),
        ("open_clip_pytorch_model.bin", ["open_clip_model.safetensors"], "open_clip_model.safetensors"),
        ("open_clip_pytorch_model.bin", ["open_clip_pytorch_model.bin"], "open_clip_pytorch_model.bin"),
        ("tiny.bin", ["tiny.safetensors", "model.safetensors"], "tiny.safetensors"),
        ("tiny.bin", ["tiny.safetensors.index.json"], "tiny.safetensors.index.json"),
        ("own.safetensors", ["own.safetensors", "model.safetensors"], "own.safetensors"),
        ("jax.npz", ["jax.npz", "model.safetensors"], "jax.npz"),
    ],
)
def test_files_of_a_repository_are_tried_in_timms_order(filename, files, taken, hub):
    paths = {name: hub("us/vit", name) for name in files}
    assert pretrained_file(known(hf_hub_id="us/vit", hf_hub_filename=filename), "x") == paths[taken]


def test_revision_of_a_repository_is_kept(hub):
    path = hub("us/vit", "model.safetensors", revision="v2")
    assert pretrained_file(known(hf_hub_id="us/vit@v2"), "x") == path
    with pytest.raises(UserError, match="x cannot be loaded"):
        pretrained_file(known(hf_hub_id="us/vit"), "x")


def test_file_goes_before_the_hub_and_the_hub_before_the_address(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    (tmp_path / "torch" / "checkpoints").mkdir(parents=True)
    at_address = save(tmp_path / "torch" / "checkpoints" / "w-12345678.pth")
    path = hub("us/vit", "model.safetensors")
    address = "https://example.org/a/w-12345678.pth?download=1"
    assert pretrained_file(known(url=address), "x") == at_address
    assert pretrained_file(known(url=address, hf_hub_id="us/vit"), "x") == path
    everything = {"url": address, "hf_hub_id": "us/vit", "file": str(tmp_path / "own.pth")}
    assert pretrained_file(known(**everything), "x") == tmp_path / "own.pth"
    assert pretrained_file(known(**everything, source="hf-hub"), "x") == path


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Serve one file at every address; return its sha256 and the list of requested addresses."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    file, asked, real = save(tmp_path / "w.pth"), [], torch.hub.download_url_to_file

    def from_disk(address, *args, **more):  # the only stand-in: torch's downloader reads file: as it reads https:
        asked.append(address)
        return real(file.as_uri(), *args, **more)

    monkeypatch.setattr(torch.hub, "download_url_to_file", from_disk)
    return hashlib.sha256(file.read_bytes()).hexdigest(), asked


def test_address_is_downloaded_into_torchs_cache_and_checked(downloads, tmp_path):
    name = f"w-{downloads[0][:8]}.pth"
    path = pretrained_file(known(url=f"https://example.org/a/{name}?download=1"), "x")
    assert path == tmp_path / "torch" / "checkpoints" / name
    assert_equal(open_weights(path), TENSORS)
    with pytest.raises(UserError, match="x cannot be loaded: invalid hash value"):
        pretrained_file(known(url="https://example.org/w-00000000.pth"), "x")
    assert [each.name for each in path.parent.iterdir()] == [name]


def test_url_is_fetched_once_and_checked(downloads):
    sha256, asked = downloads
    for _ in range(2):
        assert_equal(open_weights(fetch(f"https://example.org/w.pth#sha256={sha256}")), TENSORS)
    assert asked == ["https://example.org/w.pth"]
    with pytest.raises(UserError, match="could not be downloaded: invalid hash value"):
        fetch(f"https://example.org/w.pth#sha256={'0' * 64}")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hf_hub_id": "timm/vit_small_patch16_224.augreg_in21k"}, "cannot find the requested files"),
        ({"hf_hub_id": "not a name"}, "Repo id must "),
        ({"url": "http://example.org/w-12345678.pth"}, "is not an address of https"),
        ({"url": "https://example.org/w.pth"}, "that names the beginning of its file's sha256"),
        ({}, "timm knows no weights of it"),
    ],
)
def test_absent_weights_end_in_one_line_with_the_hint(config, reason, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    with pytest.raises(UserError) as caught:
        pretrained_file(known(**config), "vit_x")
    line = str(caught.value)
    assert line.startswith("--pretrained_model vit_x cannot be loaded: ") and reason in line and "\n" not in line
    assert line.endswith("; give --pretrained_path FILE, or a name that has weights")


def test_repository_that_lacks_a_file_of_its_index_is_refused(hub):
    hub("us/vit", "model.safetensors.index.json").with_name("model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="x cannot be loaded: .*give --pretrained_path FILE"):
        pretrained_file(known(hf_hub_id="us/vit"), "x")
