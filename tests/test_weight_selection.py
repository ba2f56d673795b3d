"""The script: the published method, the files it writes, the files it reads, and what it refuses."""

import hashlib
import json
import re
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from small_models import (
    SCRIPT_STUDENT,
    SCRIPT_TEACHER,
    assert_same,
    plan_of,
    random_tensors,
    selected,
    small_pair,
    vit_layout,
)
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2

import models
import weight_selection
from models import ModelSpec
from selection.rules import evenly_spaced
from selection.tensors import select
from utils import UserError, seed_all
from weight_selection import select_weights

PAIRS = {
    "vit": ("vit_small_patch16_224_in21k", "vit_tiny"),
    "convnext": ("convnext_tiny_in22k", "convnext_femto"),
}


@pytest.fixture(scope="module")
def teachers():
    """The weights of both published teachers, random here."""
    built = {family: models.create(name, {}, device="meta") for family, (name, _) in PAIRS.items()}
    return {family: random_tensors(model, torch.float32) for family, model in built.items()}


@pytest.fixture(scope="module")
def teacher_files(teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for family, tensors in teachers.items():
        safetensors.torch.save_file(tensors, folder / f"{family}.safetensors")
    return {family: str(folder / f"{family}.safetensors") for family in teachers}


@pytest.fixture(scope="module")
def published(teacher_files, tmp_path_factory):
    """The file that the script writes for a published pair."""
    folder = tmp_path_factory.mktemp("published")

    def written(family, suffix=".pth"):
        path = folder / f"{family}{suffix[1:]}{suffix}"
        if not path.exists():
            argv = ["--output_dir", str(path), "--model_type", family, "--pretrained_model", PAIRS[family][0]]
            weight_selection.main([*argv, "--pretrained_path", teacher_files[family]])
        return path

    return written


def run(tmp_path, *argv):
    return weight_selection.main(["--output_dir", str(tmp_path / "out"), *argv])


# ---- the published method ----


def in_docstring():
    """The paper's rule as the script's docstring states it."""
    return textwrap.dedent(re.search(r"(?m)^    def select\(.*\n(?:    .*\n)*", weight_selection.__doc__)[0])


@pytest.mark.parametrize("family", PAIRS)
def test_published_pairs_follow_the_rule_in_the_docstring(family, teachers, teacher_files, published, reference):
    method = {"torch": torch}
    exec(in_docstring(), method)
    teacher, student = PAIRS[family]
    shapes = models.create(student, {}, device="meta").state_dict()
    expected = method["select"](teachers[family], {key: shapes[key] for key in reference["keys"][student]})
    tensors, _ = select_weights(ModelSpec(teacher), ModelSpec(student), pretrained_path=teacher_files[family])
    assert list(tensors) == reference["keys"][student]
    assert all(
        tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values()
    )
    assert_same(tensors, expected)
    for suffix, read in ((".pth", torch.load), (".safetensors", safetensors.torch.load_file)):
        assert_same(read(published(family, suffix)), expected)


def test_the_rule_in_the_readme_is_the_docstrings():
    readme = (Path(weight_selection.__file__).parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    for block in (block for block in blocks if "def select(" in block):
        assert block == in_docstring()


def test_indices_equal_the_originals(reference):
    for sizes, expected in reference["indices"].items():
        source, target = map(int, sizes.split("->"))
        assert evenly_spaced(source, target) == expected, sizes


@pytest.mark.parametrize(("source", "target"), [(3, 4), (4, 0)])
def test_indices_refuse_impossible_sizes(source, target):
    with pytest.raises(ValueError, match=f"{target} of {source}"):
        evenly_spaced(source, target)


def test_selected_tensors_have_the_originals_digests(reference):
    for sizes, digest in reference["tensor_sha256"]["values"].items():
        shape, target = (tuple(json.loads(part)) for part in sizes.split("->"))
        values = np.random.RandomState(zlib.crc32(str(shape).encode())).standard_normal(shape).astype(np.float32)
        tensor = torch.from_numpy(values)
        for axis, size in enumerate(target):
            tensor = tensor.index_select(axis, torch.tensor(evenly_spaced(shape[axis], size)))
        assert hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() == digest, sizes


def test_students_have_the_published_numbers_of_parameters(reference):
    for name, counts in reference["parameters"].items():
        for classes, count in counts.items():
            model = models.create(name, {"num_classes": int(classes)}, device="meta")
            assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_selection_leaves_the_teacher_as_it_was(small_teacher):
    weights = small_teacher[1]
    before = weights["norm.weight"].clone()
    select(weights, plan_of(*2 * [vit_layout({"norm.weight": (48,)})]))["norm.weight"].zero_()
    assert torch.equal(weights["norm.weight"], before)


# ---- the file, and who reads it ----


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("family", PAIRS)
def test_timm_and_torch_read_the_file(family, suffix, published):
    path = published(family, suffix)
    tensors = safetensors.torch.load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    name, kwargs = models.timm_arguments(PAIRS[family][1], {"num_classes": 7})

    by_loader, by_torch = (timm.create_model(name, **kwargs) for _ in range(2))
    load_checkpoint(by_loader, str(path), strict=False)
    missing = by_torch.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys and all(key.startswith("head") for key in missing.missing_keys)
    overlay = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)
    for model in (by_loader, overlay, by_torch):
        own = model.state_dict()
        assert all(torch.equal(own[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("family", PAIRS)
def test_a_training_loop_of_timms_parts_takes_the_file(family, published, image_folder):
    seed_all(0)
    name, kwargs = models.timm_arguments(PAIRS[family][1], {"num_classes": 3})
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(published(family))}, **kwargs)
    images = create_dataset("", root=str(image_folder), split="train")
    loading = {"is_training": True, "use_prefetcher": False, "num_workers": 0, "interpolation": "bicubic"}
    pixels, labels = next(iter(create_loader(images, (3, 224, 224), batch_size=4, **loading)))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    criterion, losses = LabelSmoothingCrossEntropy(0.1), []
    for _ in range(4):
        loss = criterion(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]  # of one batch, learnt by heart; nan is not less
    inherited = torch.load(published(family), weights_only=True)
    assert not any(torch.equal(model.state_dict()[key], value) for key, value in inherited.items() if "bias" in key)


def test_description_says_where_each_value_came_from(small_teacher, tmp_path):
    path, weights = small_teacher
    file = run(tmp_path, *small_pair(path))
    assert file == tmp_path / "out" / "vit.pth"
    description = json.loads(file.with_suffix(".json").read_text())
    assert description["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    student = timm.create_model(description["student"]["model"], **description["student"]["kwargs"])
    missing = student.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert missing == (["head.weight", "head.bias"], [])
    assert description["teacher"]["file"] == path
    groups, tensors = description["plan"]["groups"], description["plan"]["tensors"]
    assert groups["stream"] == {"teacher_size": 48, "indices": list(range(0, 48, 2))}
    assert tensors["blocks.1.attn.qkv.weight"] == {
        "from": "blocks.1.attn.qkv.weight",
        "axes": ["3*blocks.1.attn", "stream"],
    }
    fc1 = torch.load(file, weights_only=True)["blocks.0.mlp.fc1.weight"]
    rows, columns = (groups[axis]["indices"] for axis in tensors["blocks.0.mlp.fc1.weight"]["axes"])
    assert torch.equal(fc1, weights["blocks.0.mlp.fc1.weight"][rows][:, columns])


def test_second_run_replaces_the_first_and_leaves_nothing_else(small_teacher, tmp_path):
    argv = small_pair(small_teacher[0])
    first = run(tmp_path, *argv).read_bytes()
    assert run(tmp_path, *argv).read_bytes() == first
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["vit.json", "vit.pth"]


def test_head_is_taken_if_asked_for_and_if_the_classes_agree(small_teacher, tmp_path):
    path, weights = small_teacher
    assert not any("head" in key for key in selected(path))
    pair = ModelSpec("vit_tiny", {**SCRIPT_TEACHER, "num_classes": 7}), ModelSpec("vit_tiny", SCRIPT_STUDENT)
    tensors, _ = select_weights(*pair, pretrained_path=path, include_head=True)  # the file's classes count
    assert torch.equal(tensors["head.weight"], weights["head.weight"][:, ::2])
    argv = small_pair(path, "num_classes=4", "--include_head")
    with pytest.raises(UserError, match=r"head\.weight.*\[5, 48\].*\[4, 24\]"):
        run(tmp_path, *argv)


# ---- names ----


def test_names_of_old_timm_are_known():
    assert models.timm_arguments("vit_small_patch16_224_in21k", {})[0] == "vit_small_patch16_224.augreg_in21k"
    assert models.timm_arguments("convnext_tiny_in22k", {})[0] == "convnext_tiny.fb_in22k"
    assert models.timm_arguments("hf-hub:timm/vit_small_patch16_224.augreg_in21k", {})[0].startswith("hf-hub:")


WRONG = r"""
--pretrained_model vit_smal_patch16_224 | vit_smal_patch16_224 is not a model.*vit_small_patch16_224
--pretrained_model beit_base_patch16_224_in22k | dropped by timm 1.x without a successor.*beit_base_patch16
--student_model vit_tny | vit_tny is not a model.*vit_tiny
--pretrained_model vit_small_patch16_224.nonsense | patch16_224.nonsense cannot be built: .*tag
--pretrained_model hf-hub:timm/nobody | timm/nobody cannot be loaded: .*--pretrained_path FILE
--student_model densenet121 | is a DenseNet; the families .* are vit \(VisionTransformer\), convnext
--pretrained_model convnext_tiny_in22k --pretrained_path x | x does not exist
--student_kwargs depth=two | vit_tiny cannot be built
--pretrained_model vit_small | shape without weights.*--pretrained_path
--pretrained_path missing.pth | missing.pth does not exist
--pretrained_path missing.npz | missing.npz does not exist
--pretrained_path tests | --pretrained_path tests has no checkpoint of main.py: wanted checkpoint-best.pth or
"""


@pytest.mark.parametrize("row", WRONG.strip().splitlines())
def test_wrong_names_end_in_one_line_and_write_nothing(row, tmp_path):
    argv, message = row.split(" | ")
    with pytest.raises(UserError, match=message):
        run(tmp_path, *argv.split())
    assert not list(tmp_path.rglob("*.pth"))


def test_without_network_the_hint_comes_before_the_download(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    name = "vit_small_patch16_224_in21k"
    with pytest.raises(UserError, match=f"--pretrained_model {name} cannot be loaded: .*give --pretrained_path FILE"):
        run(tmp_path, "--model_type", "vit", "--pretrained_model", name)
    assert "without network, stop and give --pretrained_path" in caplog.text


# ---- where the file goes ----


def test_output_dir_named_like_a_file_is_a_file(small_teacher, tmp_path):
    output = str(tmp_path / "a" / "b.safetensors")
    file = weight_selection.main(["--output_dir", output, *small_pair(small_teacher[0])])
    assert file.is_file() and len(safetensors.torch.load_file(file)) == 30


@pytest.mark.parametrize("name", ["teacher.pth", "mine.pth", "mine.json", "mine.safetensors"])
def test_files_that_are_not_ours_are_not_overwritten(name, small_teacher, tmp_path):
    path, _ = small_teacher
    if name != "teacher.pth":
        (tmp_path / name).write_text("precious")
    before = (tmp_path / name).read_bytes()
    output = tmp_path / name.replace(".json", ".pth").replace(".safetensors", ".pth")
    with pytest.raises(UserError, match=f"{name} .* would be lost"):
        weight_selection.main(["--output_dir", str(output), *small_pair(path)])
    assert (tmp_path / name).read_bytes() == before


def test_output_below_a_file_is_refused(small_teacher, tmp_path):
    (tmp_path / "out").write_text("here first")
    with pytest.raises(UserError, match="--output_dir .*out cannot be made"):
        run(tmp_path, "--pretrained_path", small_teacher[0])
    assert (tmp_path / "out").read_text() == "here first"


@pytest.mark.parametrize("name", ["x.bin", "x.PTH", "x.npz"])
def test_output_named_like_a_file_of_another_kind_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"wanted a folder, or a file ending in \.pth, \.pt, \.safetensors"):
        weight_selection.main(["--output_dir", str(tmp_path / name)])


def test_options_without_effect_are_warned_of(tmp_path, caplog, capsys):
    run(tmp_path, *"--plan --model_type convnext --heads keep".split())
    assert "--heads keep has no effect: the family convnext has none" in caplog.text
    assert "--output_dir has no effect with --plan" in caplog.text
    assert '"heads": null' in capsys.readouterr().out
