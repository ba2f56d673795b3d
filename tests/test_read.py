"""A teacher's file is opened at once and read where it is asked for; what is damaged there is found there."""

import hashlib
import json
import os
import random
import sys
import types
import zipfile

import pytest
import safetensors.torch
import torch

import models
from utils import UserError
from weightfiles.hub import pretrained_file
from weightfiles.lazy import open_weights
from weightfiles.read import read_weights

TENSORS = {
    "norm.weight": torch.arange(6.0),
    "norm.bias": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "head.weight": torch.arange(1000.0, 1040.0).reshape(5, 8),
    "step": torch.tensor(7),
    "mask": torch.tensor([True, False, True]),
}
BUFFER = torch.arange(100.0, 120.0)
# what torch.save keeps and safetensors does not: strides, parts of a buffer, storages that two share or that are empty
VIEWS = {
    "transposed": TENSORS["head.weight"].T,
    "part": BUFFER[3:9].reshape(2, 3)[:, 1:],
    "other": BUFFER[::4],
    "empty": torch.empty(0, 4),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}
COMMIT = "0" * 40


def save(path, tensors=TENSORS):
    """Write `tensors` in the way that the file's name tells."""
    if path.name.endswith(".index.json"):
        parts = {f"model-{i + 1:05}.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
        for name, part in parts.items():
            safetensors.torch.save_file(part, path.with_name(name))
        files = {key: name for name, part in parts.items() for key in part}
        path.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        nested = {"state_dict": tensors, "epoch": 3, "optimizer": {"moments": [torch.ones(6), torch.zeros(6)]}}
        content = nested if path.stem == "nested" else tensors
        torch.save(content, path, _use_new_zipfile_serialization=path.stem != "old")
    return path


def flip(path, tensor):
    """Change one bit of a tensor's values in its file."""
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


def repack(path, compression=zipfile.ZIP_STORED, change=lambda name, content: content, more=()):
    """Write an archive's entries anew by another writer than torch's."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in [*entries, *more]:
            archive.writestr(name, change(name, content))


def assert_equal(weights, tensors):
    assert weights.keys() == tensors.keys()
    assert weights.shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        assert weights[key].dtype == tensor.dtype and torch.equal(weights[key], tensor), key


# ---- one answer from every kind of file ----


NAMES = ["w.safetensors", "w.safetensors.index.json", "w.pth", "w.pt", "w.bin", "nested.pth", "old.pth"]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_tensors(name, prefix, tmp_path):
    path = save(tmp_path / name, {prefix + key: tensor for key, tensor in TENSORS.items()})
    weights = open_weights(path)
    assert_equal(weights, TENSORS)
    assert len(weights) == 5 and "step" in weights and "module.step" not in weights
    assert weights.whole == ("a file of torch's old format is read whole" if name == "old.pth" else "")
    with pytest.raises(KeyError):
        weights["module.step"]


@pytest.mark.parametrize("name", ["w.pth", "nested.pth", "old.pth"])
def test_views_are_read_as_they_were_saved(name, tmp_path):
    weights = open_weights(save(tmp_path / name, VIEWS))
    assert_equal(weights, VIEWS)
    assert weights["transposed"].stride() == (1, 8)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_writing_to_a_tensor_does_not_reach_the_file(name, tmp_path):
    path = save(tmp_path / name)
    before = path.read_bytes()
    open_weights(path)["head.weight"].zero_()
    assert path.read_bytes() == before and torch.equal(open_weights(path)["head.weight"], TENSORS["head.weight"])


def test_model_key_chooses_the_part(tmp_path):
    torch.save({"model": TENSORS, "ema": {"norm.weight": torch.ones(2)}}, tmp_path / "x.pth")
    assert open_weights(tmp_path / "x.pth", "ema").shapes == {"norm.weight": (2,)}
    for name in ("x.pth", "w.safetensors", "w.safetensors.index.json"):
        path = tmp_path / name if name == "x.pth" else save(tmp_path / name)
        with pytest.raises(UserError, match="no weights under --model_key model_ema; its keys: "):
            open_weights(path, "model_ema")


@pytest.mark.parametrize("how", ["compressed", "byte order", "entry too many", "other layout"])
def test_archive_that_cannot_be_mapped_is_read_whole(how, tmp_path):
    path = save(tmp_path / "w.pth", {"norm.weight": TENSORS["norm.weight"]})
    expected = TENSORS["norm.weight"]
    if how == "compressed":
        repack(path, zipfile.ZIP_DEFLATED)
    elif how == "byte order":
        other = b"big" if sys.byteorder == "little" else b"little"
        repack(path, change=lambda name, content: other if name.endswith("/byteorder") else content)
        expected = torch.from_numpy(expected.numpy().byteswap())
    elif how == "entry too many":
        repack(path, more=[("w/data/7", bytes(24))])
    else:
        torch.save({"norm.weight": (expected + 0j).conj()}, path)
        expected = expected + 0j
    weights = open_weights(path)
    assert weights.whole == "an archive that is not laid out as torch.save does is read whole"
    assert torch.equal(weights["norm.weight"], expected)


# ---- no more than is asked for ----


def private_memory():
    """Bytes of this process that are not a file's."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["w.safetensors", "w.safetensors.index.json", "w.pth"])
def test_a_large_tensor_takes_no_private_memory(name, tmp_path):
    size = 64 * 2**20
    path = save(tmp_path / name, {"large": torch.zeros(size // 4), "small": torch.ones(3)})
    open_weights(path)["small"]
    before = private_memory()
    large = open_weights(path)["large"]
    assert large[:: 2**16].sum() == 0
    assert private_memory() - before < size / 8  # a copy would take all of it


def test_shapes_are_known_without_reading_a_value(tmp_path):
    path = save(tmp_path / "w.pth")
    for tensor in (TENSORS["norm.weight"], TENSORS["head.weight"]):
        flip(path, tensor)
    weights = open_weights(path)
    assert weights.shapes["head.weight"] == (5, 8) and "head.weight" in weights and list(weights) == list(TENSORS)


@pytest.mark.parametrize("name", ["w.pth", "nested.pth", "w.bin"])
def test_flipped_bit_is_found_where_it_is_asked_for_and_only_there(name, tmp_path):
    path = save(tmp_path / name)
    flip(path, TENSORS["head.weight"])
    weights = open_weights(path)
    for key in TENSORS.keys() - {"head.weight"}:
        assert torch.equal(weights[key], TENSORS[key])
    with pytest.raises(UserError, match=rf"{name} cannot be read as weights: head\.weight does not match its checksum"):
        weights["head.weight"]


def test_flipped_bit_beside_the_part_that_is_shown_is_found(tmp_path):
    path = save(tmp_path / "w.pth", VIEWS)
    flip(path, BUFFER)  # in the second value of the buffer, which neither view shows
    with pytest.raises(UserError, match="part does not match its checksum"):
        open_weights(path)["part"]


def test_flipped_bit_in_the_pickle_is_found_at_once(tmp_path):
    path = save(tmp_path / "w.pth")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"norm.bias", b"norm.biat", 1))
    with pytest.raises(UserError, match=r"w\.pth cannot be read as weights: Bad CRC-32"):
        open_weights(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "old.pth"])
@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_truncated_file_is_refused_at_once(name, kept, tmp_path):
    path = save(tmp_path / name)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=name):
        open_weights(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_file_that_is_gone_or_another_by_then_is_named(name, tmp_path):
    path = save(tmp_path / name)
    weights = open_weights(path)
    save(path, {"norm.weight": torch.ones(1), "norm.bias": torch.ones(1)})
    for key in ("norm.weight", "head.weight"):
        with pytest.raises(UserError, match=rf"{name}.*{key}"):
            weights[key]
    path.unlink()
    with pytest.raises(UserError, match=rf"{name} cannot be read as weights: step: "):
        weights["step"]


@pytest.mark.parametrize("name", ["w.safetensors", "nested.pth"])
def test_damaged_bytes_end_in_one_line_or_do_not_matter(name, tmp_path):
    path = save(tmp_path / name)
    intact, generator, refused = path.read_bytes(), random.Random(0), 0
    header = 8 + int.from_bytes(intact[:8], "little") if name == "w.safetensors" else len(intact)
    for _ in range(300):
        damaged = bytearray(intact)
        for _ in range(3):
            damaged[generator.randrange(header)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            weights = open_weights(path)
            tensors = {key: weights[key] for key in weights}
        except UserError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
        else:
            # of an archive only padding, dates and values that are not asked for are not compared with anything;
            # a changed name or shape in a safetensors header cannot be seen
            assert name != "nested.pth" or all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
    assert refused > 100


# ---- what is no file of weights ----


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {"epoch": 3},
        torch.ones(2),
        {"norm.weight": torch.eye(2).to_sparse()},
        {"norm.weight": torch.empty(2, device="meta")},
        {"model": {}},
        {1: torch.ones(2)},
        {"code": types.SimpleNamespace()},
        b"<html>404 not found</html>",
        b"\x80",
        bytes(5000),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_read_weights_refuses_is_refused_in_the_same_words(content, zipped, tmp_path):
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as expected:
        read_weights(path)
    with pytest.raises(UserError) as caught:
        open_weights(path)
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.safetensors.index.json"])
def test_folder_and_absent_file_are_named(name, tmp_path):
    with pytest.raises(UserError, match=f"{name} does not exist"):
        open_weights(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is not a file"):
        open_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "cannot be read as an index of weights: Expecting value"),
        (b"\xff\xfe\x00", "cannot be read as an index of weights: "),
        ("[" * 100_000, "cannot be read as an index of weights: "),
        ("[1]", "has no weight_map"),
        ({"metadata": {}}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"a": 3}}, "a is in 3, which is not the name of a file"),
        ({"weight_map": {"a": "../w.safetensors"}}, r"a is in '\.\./w\.safetensors', which is not the name"),
        ({"weight_map": {"a": "/w.safetensors"}}, r"a is in '/w\.safetensors', which is not the name"),
        ({"weight_map": {"a": ".."}}, r"a is in '\.\.', which is not the name"),
        ({"weight_map": {"a": ""}}, "a is in '', which is not the name"),
        ({"weight_map": {"a": "gone.safetensors"}}, r"a is in gone\.safetensors, which does not exist"),
        ({"weight_map": {"a": "w.safetensors"}}, r"a is in w\.safetensors, which has no such tensor"),
        ({"weight_map": {"a": "text.safetensors"}}, r"text\.safetensors cannot be read as weights"),
    ],
)
def test_bad_index_is_refused(content, message, tmp_path):
    save(tmp_path / "w.safetensors")
    (tmp_path / "text.safetensors").write_text("no header")
    path = tmp_path / "x.safetensors.index.json"
    text = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        open_weights(path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_index_decides_which_tensors_of_its_files_count(tmp_path):
    save(tmp_path / "w.safetensors")
    (tmp_path / "x.safetensors.index.json").write_text('{"weight_map": {"step": "w.safetensors"}}')
    assert_equal(open_weights(tmp_path / "x.safetensors.index.json"), {"step": TENSORS["step"]})


# ---- the weights that timm knows ----


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub, empty; what it gives writes a file into it as a download would."""
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
    ("filename", "there", "taken"),
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
def test_files_of_a_repository_are_tried_in_timms_order(filename, there, taken, hub):
    paths = {name: hub("us/vit", name) for name in there}
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


def test_address_is_downloaded_into_torchs_cache_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    file, real = save(tmp_path / "w.pth"), torch.hub.download_url_to_file
    # the only stand-in: torch's downloader reads file: as it reads https:
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda _, *args, **more: real(file.as_uri(), *args, **more))
    name = f"w-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"
    path = pretrained_file(known(url=f"https://example.org/a/{name}?download=1"), "x")
    assert path == tmp_path / "torch" / "checkpoints" / name
    assert_equal(open_weights(path), TENSORS)
    with pytest.raises(UserError, match="x cannot be loaded: invalid hash value"):
        pretrained_file(known(url="https://example.org/w-00000000.pth"), "x")
    assert [each.name for each in path.parent.iterdir()] == [name]


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
def test_weights_that_cannot_be_had_end_in_one_line_with_the_hint(config, reason, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    with pytest.raises(UserError) as caught:
        pretrained_file(known(**config), "vit_x")
    line = str(caught.value)
    assert line.startswith("--pretrained_model vit_x cannot be loaded: ") and reason in line and "\n" not in line
    assert line.endswith("; give --pretrained_path FILE, or a name that has weights")


def test_repository_that_lacks_a_file_of_its_index_is_refused(hub):
    hub("us/vit", "model.safetensors.index.json").with_name("model-00002.safetensors").unlink()
    with pytest.raises(UserError, match="x cannot be loaded: .*give --pretrained_path FILE"):
        pretrained_file(known(hf_hub_id="us/vit"), "x")
