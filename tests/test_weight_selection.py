import hashlib
import json
import zlib

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import convnext_as_released
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2

import models
import weight_selection
from selection.families import FAMILIES
from selection.family import Layout
from selection.match import match
from selection.plan import choose
from selection.rules import Choices, select_indices
from selection.tensors import select
from utils import UserError
from weight_selection import initialize

PAIRS = {
    "vit": ("vit_small_patch16_224_in21k", "vit_tiny", 150),
    "convnext": ("convnext_tiny_in22k", "convnext_femto", 124),
}
TEACHER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5}
STUDENT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
WORDS = [f"{key}={value}" for key, value in TEACHER.items()]
STUDENT_WORDS = [f"{key}={value}" for key, value in STUDENT.items()]


def random_values(model, seed=0):
    """A state dict of the model's shapes with values that no constructor gives: norms are not 1, biases not 0."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def teachers():
    """The weights of both published teachers, random here."""
    return {family: random_values(models.create(name, {}, device="meta")) for family, (name, _, _) in PAIRS.items()}


@pytest.fixture(scope="module")
def teacher_files(teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for family, tensors in teachers.items():
        safetensors.torch.save_file(tensors, folder / f"{family}.safetensors")
    return {family: str(folder / f"{family}.safetensors") for family in teachers}


@pytest.fixture
def small_teacher(tmp_path):
    """A file with the weights of a ViT 48 wide, and these weights."""
    weights = random_values(models.create("vit_tiny", TEACHER))
    torch.save(weights, tmp_path / "teacher.pth")
    return str(tmp_path / "teacher.pth"), weights


PUBLISHED = Choices()


def plan_of(teacher, student, choices=PUBLISHED):
    """The plan of a ViT with these tensors, by name, from one with those."""
    layouts = (Layout(shapes, {}, {}, None, {}) for shapes in (teacher, student))
    return choose(match(FAMILIES["vit"], *layouts, choices), choices)


def run(tmp_path, *argv):
    return weight_selection.main(["--output_dir", str(tmp_path / "out"), *argv])


# ---- the published method ----


def test_indices_equal_the_originals(reference):
    for sizes, expected in reference["indices"].items():
        source, target = map(int, sizes.split("->"))
        assert select_indices(source, target) == expected, sizes


@pytest.mark.parametrize(("source", "target"), [(3, 4), (4, 0)])
def test_indices_refuse_impossible_sizes(source, target):
    with pytest.raises(ValueError, match=f"{target} of {source}"):
        select_indices(source, target)


def test_selected_tensors_have_the_originals_digests(reference):
    for sizes, digest in reference["tensor_sha256"]["values"].items():
        shape, target = (tuple(json.loads(part)) for part in sizes.split("->"))
        values = np.random.RandomState(zlib.crc32(str(shape).encode())).standard_normal(shape).astype(np.float32)
        tensor = torch.from_numpy(values)
        for axis, size in enumerate(target):
            tensor = tensor.index_select(axis, torch.tensor(select_indices(shape[axis], size)))
        assert hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() == digest, sizes


@pytest.mark.parametrize("family", PAIRS)
def test_published_pairs_equal_the_originals_axis_by_axis_selection(family, teachers, teacher_files, reference):
    teacher, student, count = PAIRS[family]
    tensors, _ = initialize(teacher, student, pretrained_path=teacher_files[family])
    assert list(tensors) == reference["keys"][student]
    assert len(tensors) == count
    shapes = models.create(student, {}, device="meta").state_dict()
    for key, tensor in tensors.items():
        expected = teachers[family][key]
        for axis, size in enumerate(shapes[key].shape):
            expected = expected.index_select(axis, torch.tensor(select_indices(expected.shape[axis], size)))
        assert torch.equal(tensor, expected), key
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes, key


def test_students_have_the_published_numbers_of_parameters(reference):
    for name, counts in reference["parameters"].items():
        for classes, count in counts.items():
            model = models.create(name, {"num_classes": int(classes)}, device="meta")
            assert sum(parameter.numel() for parameter in model.parameters()) == count


# ---- consistency ----


def test_qkv_is_cut_in_three_blocks_where_widths_do_not_divide():
    shapes = {"blocks.0.attn.qkv.weight": (30, 10), "blocks.0.attn.proj.weight": (10, 10)}
    smaller = {"blocks.0.attn.qkv.weight": (21, 7), "blocks.0.attn.proj.weight": (7, 7)}
    plan = plan_of(shapes, smaller)
    kept = [0, 2, 3, 4, 6, 8, 9]  # 10 -> 7 of the original
    rows, columns = plan.indices("blocks.0.attn.qkv.weight")
    assert rows == kept + [10 + i for i in kept] + [20 + i for i in kept]
    assert columns == kept
    assert plan.indices("blocks.0.attn.proj.weight") == [kept, kept]


def test_tensors_on_one_axis_group_keep_the_same_slots():
    teacher, student = (
        Layout.of(models.create("vit_tiny", kwargs, device="meta"), FAMILIES["vit"], ("head.",)).shapes
        for kwargs in (TEACHER, {**STUDENT, "embed_dim": 28})
    )
    plan = plan_of(teacher, student)
    on_stream = [indices for key, source in plan.sources.items()
        for axis, indices in zip(source.axes, plan.indices(key), strict=True) if axis == ("stream",)]  # fmt: skip
    assert len(on_stream) > 20 and all(indices == on_stream[0] for indices in on_stream)
    assert len(on_stream[0]) == 28 == len(set(on_stream[0]))


def test_student_of_the_teachers_size_is_the_teacher(small_teacher):
    path, weights = small_teacher
    tensors, _ = initialize(
        "vit_tiny", "vit_tiny", teacher_kwargs=TEACHER, student_kwargs=TEACHER, pretrained_path=path, include_head=True
    )
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[key], weights[key]) for key in weights)


def test_selection_leaves_the_teacher_as_it_was(small_teacher):
    _, weights = small_teacher
    before = {key: value.clone() for key, value in weights.items()}
    plan = plan_of({"norm.weight": (48,)}, {"norm.weight": (48,)})
    select(weights, plan)["norm.weight"].zero_()
    assert all(torch.equal(weights[key], before[key]) for key in weights)


# ---- the file, and who reads it ----


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("family", PAIRS)
def test_timm_and_torch_read_the_file(family, suffix, teacher_files, tmp_path):
    teacher, student, count = PAIRS[family]
    path = tmp_path / f"init{suffix}"
    weight_selection.main(["--output_dir", str(path), "--model_type", family, "--pretrained_model", teacher,
        "--pretrained_path", teacher_files[family]])  # fmt: skip
    tensors = safetensors.torch.load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert len(tensors) == count
    name, kwargs = models.timm_arguments(student, {})

    by_loader = timm.create_model(name, num_classes=7, **kwargs)
    load_checkpoint(by_loader, str(path), strict=False)
    overlay = timm.create_model(
        name, pretrained=True, num_classes=7, pretrained_cfg_overlay={"file": str(path)}, **kwargs
    )
    by_torch = timm.create_model(name, num_classes=7, **kwargs)
    missing = by_torch.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys and all(key.startswith("head") for key in missing.missing_keys)
    for model in (by_loader, overlay, by_torch):
        own = model.state_dict()
        assert all(torch.equal(own[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("family", PAIRS)
def test_the_file_trains_in_timms_hands(family, teacher_files, image_folder, tmp_path):
    teacher, student, _ = PAIRS[family]
    path = tmp_path / "init.pth"
    weight_selection.main(["--output_dir", str(path), "--model_type", family, "--pretrained_model", teacher,
        "--pretrained_path", teacher_files[family]])  # fmt: skip
    name, kwargs = models.timm_arguments(student, {})
    overlay = {"file": str(path)}
    model = timm.create_model(name, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay, **kwargs)
    images = create_dataset("", root=str(image_folder), split="train")
    batches = create_loader(
        images, (3, 224, 224), batch_size=4, is_training=True, use_prefetcher=False, num_workers=0, interpolation="bicubic"
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    criterion = LabelSmoothingCrossEntropy(0.1)
    (pixels, labels), losses = next(iter(batches)), []
    for _ in range(4):
        loss = criterion(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]  # of one batch, learnt by heart; nan is not less
    inherited = torch.load(path, weights_only=True)
    assert not any(torch.equal(model.state_dict()[key], value) for key, value in inherited.items() if "bias" in key)


def test_description_tells_where_each_slot_came_from(small_teacher, tmp_path):
    path, weights = small_teacher
    file = run(tmp_path, "--pretrained_model", "vit_tiny", "--pretrained_kwargs", *WORDS, "--pretrained_path", path,
        "--student_model", "vit_tiny", "--student_kwargs", *STUDENT_WORDS)  # fmt: skip
    assert file == tmp_path / "out" / "vit.pth"
    description = json.loads(file.with_suffix(".json").read_text())
    assert description["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    student = timm.create_model(description["student"]["model"], **description["student"]["kwargs"])
    student.load_state_dict(
        torch.load(file, weights_only=True) | {k: v for k, v in student.state_dict().items() if "head" in k}
    )
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
    argv = ["--pretrained_model", "vit_tiny", "--pretrained_kwargs", *WORDS, "--pretrained_path", small_teacher[0],
        "--student_model", "vit_tiny", "--student_kwargs", *STUDENT_WORDS]  # fmt: skip
    first = run(tmp_path, *argv).read_bytes()
    assert run(tmp_path, *argv).read_bytes() == first
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["vit.json", "vit.pth"]


# ---- every kind of teacher file ----


def selected(path, **more):
    return initialize(
        "vit_tiny", "vit_tiny", teacher_kwargs=TEACHER, student_kwargs=STUDENT, pretrained_path=str(path), **more
    )[0]


@pytest.mark.parametrize("name", ["t.safetensors", "t.pth", "t.pt", "t.bin", "old.pth", "ddp.pth", "nested.pth"])
def test_same_weights_from_every_kind_of_file(name, small_teacher, tmp_path):
    path, weights = small_teacher
    file = tmp_path / name
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(weights, file)
    else:
        content = {
            "ddp.pth": {f"module.{key}": value for key, value in weights.items()},
            "nested.pth": {"state_dict": weights, "epoch": 3},
        }
        torch.save(content.get(name, weights), file, _use_new_zipfile_serialization=name != "old.pth")
    expected = selected(path)
    tensors = selected(file)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_training_checkpoint_gives_its_weights_or_their_average(small_teacher, tmp_path):
    path, weights = small_teacher
    average = {key: value + 1 for key, value in weights.items()}
    torch.save(
        {"model": weights, "model_ema": average, "epoch": 2, "optimizer": {"state": {}}}, tmp_path / "checkpoint-2.pth"
    )
    plain = selected(tmp_path / "checkpoint-2.pth")
    ema = selected(tmp_path / "checkpoint-2.pth", model_key="model_ema")
    assert torch.equal(plain["norm.weight"], selected(path)["norm.weight"])
    assert torch.equal(ema["norm.weight"], plain["norm.weight"] + 1)


def test_vit_npz_of_the_original_release_is_read(small_teacher, tmp_path):
    path, weights = small_teacher
    w, dim, heads = {key: value.numpy() for key, value in weights.items()}, TEACHER["embed_dim"], TEACHER["num_heads"]
    arrays = {
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"],
        "cls": w["cls_token"],
        "Transformer/posembed_input/pos_embedding": w["pos_embed"],
        "Transformer/encoder_norm/scale": w["norm.weight"],
        "Transformer/encoder_norm/bias": w["norm.bias"],
        "head/kernel": w["head.weight"].T,
        "head/bias": w["head.bias"],
    }
    for i in range(TEACHER["depth"]):
        to, of = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays |= {f"{to}{theirs}/scale": w[f"{of}{ours}.weight"], f"{to}{theirs}/bias": w[f"{of}{ours}.bias"]}
        attention = to + "MultiHeadDotProductAttention_1/"
        for name, kernel, bias in zip(
            ("query", "key", "value"),
            np.split(w[of + "attn.qkv.weight"], 3),
            np.split(w[of + "attn.qkv.bias"], 3),
            strict=True,
        ):
            arrays |= {
                f"{attention}{name}/kernel": kernel.T.reshape(dim, heads, -1),
                f"{attention}{name}/bias": bias.reshape(heads, -1),
            }
        arrays |= {
            attention + "out/kernel": w[of + "attn.proj.weight"].T.reshape(heads, -1, dim),
            attention + "out/bias": w[of + "attn.proj.bias"],
        }
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays |= {
                f"{to}MlpBlock_3/{theirs}/kernel": w[f"{of}mlp.{ours}.weight"].T,
                f"{to}MlpBlock_3/{theirs}/bias": w[f"{of}mlp.{ours}.bias"],
            }
    np.savez(tmp_path / "vit.npz", **arrays)
    # the original release numbers its norms and MLPs so; timm tells by the keys
    expected, tensors = selected(path), selected(tmp_path / "vit.npz")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_original_convnext_layout_is_read(tmp_path):
    kwargs = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5}
    weights = random_values(models.create("convnext_femto", kwargs))
    torch.save({"model": convnext_as_released(weights)}, tmp_path / "convnext.pth")
    torch.save(weights, tmp_path / "timm.pth")
    student = {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 16)}
    from_release, from_timm = (
        initialize(
            "convnext_femto",
            "convnext_femto",
            teacher_kwargs=kwargs,
            student_kwargs=student,
            pretrained_path=str(tmp_path / name),
        )[0]
        for name in ("convnext.pth", "timm.pth")
    )
    assert from_release.keys() == from_timm.keys()
    assert all(torch.equal(from_release[key], from_timm[key]) for key in from_timm)


def test_head_is_taken_only_when_asked_for_and_when_the_classes_agree(small_teacher, tmp_path):
    path, weights = small_teacher
    assert not any("head" in key for key in selected(path))
    assert torch.equal(selected(path, include_head=True)["head.weight"], weights["head.weight"][:, ::2])
    argv = ["--pretrained_model", "vit_tiny", "--pretrained_kwargs", *WORDS, "--pretrained_path", path,
        "--student_model", "vit_tiny", "--student_kwargs", *STUDENT_WORDS, "num_classes=4", "--include_head"]  # fmt: skip
    with pytest.raises(UserError, match=r"head\.weight.*\[5, 48\].*\[4, 24\]"):
        run(tmp_path, *argv)


# ---- names ----


def test_names_of_old_timm_are_known():
    assert models.timm_arguments("vit_small_patch16_224_in21k", {})[0] == "vit_small_patch16_224.augreg_in21k"
    assert models.timm_arguments("convnext_tiny_in22k", {})[0] == "convnext_tiny.fb_in22k"
    assert models.timm_arguments("hf-hub:timm/vit_small_patch16_224.augreg_in21k", {})[0].startswith("hf-hub:")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pretrained_model", "vit_smal_patch16_224"], r"vit_smal_patch16_224 is not a model.*vit_small_patch16_224"),
        (
            ["--pretrained_model", "beit_base_patch16_224_in22k"],
            r"dropped by timm 1.x without a successor.*beit_base_patch16_224",
        ),
        (["--student_model", "vit_tny"], "vit_tny is not a model.*vit_tiny"),
        (
            ["--pretrained_model", "vit_small_patch16_224.nonsense"],
            "vit_small_patch16_224.nonsense cannot be built: .*tag",
        ),
        (
            ["--pretrained_model", "hf-hub:timm/nobody_knows"],
            "hf-hub:timm/nobody_knows cannot be loaded: .*--pretrained_path FILE",
        ),
        (
            ["--student_model", "densenet121"],
            r"densenet121 is a DenseNet; the families to select from are vit \(VisionTransformer\), convnext",
        ),
        (["--pretrained_model", "convnext_tiny_in22k", "--pretrained_path", "x"], "x does not exist"),
        (["--student_kwargs", "depth=two"], r"vit_tiny cannot be built"),
        (["--pretrained_model", "vit_small"], "shape without weights.*--pretrained_path"),
        (["--pretrained_path", "missing.pth"], "missing.pth does not exist"),
        (["--pretrained_path", "missing.npz"], "missing.npz does not exist"),
        (["--pretrained_path", "."], r"--pretrained_path \. is not a file"),
    ],
)
def test_wrong_names_end_in_one_line_and_write_nothing(argv, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, *argv)
    assert not list(tmp_path.rglob("*.pth"))


def test_without_network_the_hint_comes_before_the_download(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        UserError,
        match=r"--pretrained_model vit_small_patch16_224_in21k cannot be loaded: .*give --pretrained_path FILE",
    ):
        run(tmp_path, "--model_type", "vit", "--pretrained_model", "vit_small_patch16_224_in21k")
    assert "without network, stop and give --pretrained_path" in caplog.text


def test_other_family_is_refused(teacher_files, tmp_path):
    with pytest.raises(UserError, match=r"convnext_tiny_in22k is of the family convnext, vit_tiny of the family vit"):
        initialize("convnext_tiny_in22k", "vit_tiny", pretrained_path=teacher_files["convnext"])


# ---- pairs that do not fit ----


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"embed_dim": 96}, r"cls_token: the teacher's \[1, 1, 48\] is smaller than the student's \[1, 1, 96\]"),
        ({"depth": 4}, "blocks: the student has 4 layers, the teacher 3"),
        (
            {"mlp_ratio": 10.0},
            r"blocks\.0\.mlp\.fc1\.weight: the teacher's \[192, 48\] is smaller than the student's \[240, 24\]",
        ),
        (
            {"in_chans": 1},
            r"patch_embed.*\[48, 3, 8, 8\].*\[24, 1, 8, 8\] differ along an axis that is not selected from",
        ),
        ({"qkv_bias": False}, r"blocks\.0\.attn\.qkv\.bias .* has no counterpart in the student"),
    ],
)
def test_pairs_that_do_not_fit_name_the_tensor_and_both_shapes(student, message, small_teacher):
    with pytest.raises(UserError, match=message):
        initialize(
            "vit_tiny",
            "vit_tiny",
            teacher_kwargs=TEACHER,
            student_kwargs={**STUDENT, **student},
            pretrained_path=small_teacher[0],
        )


@pytest.mark.parametrize("fault", ["lacks", "shape", "extra", "nan"])
def test_teacher_file_of_another_model_is_refused(fault, small_teacher, tmp_path):
    weights = dict(small_teacher[1])
    if fault == "lacks":
        del weights["blocks.1.norm1.bias"]
    elif fault == "shape":
        weights["norm.bias"] = torch.zeros(47)
    elif fault == "extra":
        weights["blocks.7.norm1.bias"] = torch.zeros(48)
    else:
        weights["norm.bias"] = weights["norm.bias"].clone().fill_(torch.nan)
    torch.save(weights, tmp_path / "bad.pth")
    key = {"lacks": "blocks.1.norm1.bias", "extra": "blocks.7.norm1.bias"}.get(fault, "norm.bias")
    with pytest.raises(UserError, match=rf"bad\.pth.*{key}"):
        selected(tmp_path / "bad.pth")


def test_output_dir_named_like_a_file_is_a_file(small_teacher, tmp_path):
    argv = ["--pretrained_model", "vit_tiny", "--pretrained_kwargs", *WORDS, "--pretrained_path", small_teacher[0],
        "--student_model", "vit_tiny", "--student_kwargs", *STUDENT_WORDS]  # fmt: skip
    file = weight_selection.main(["--output_dir", str(tmp_path / "a" / "b.safetensors"), *argv])
    assert file.is_file() and len(safetensors.torch.load_file(file)) == 30


@pytest.mark.parametrize("there", ["teacher.pth", "mine.pth", "mine.json", "mine.safetensors"])
def test_files_that_are_not_ours_are_not_overwritten(there, small_teacher, tmp_path):
    path, _ = small_teacher
    if there != "teacher.pth":
        (tmp_path / there).write_text("precious")
    before = (tmp_path / there).read_bytes()
    output = tmp_path / there.replace(".json", ".pth").replace(".safetensors", ".pth")
    argv = ["--output_dir", str(output), "--pretrained_model", "vit_tiny", "--pretrained_kwargs", *WORDS, "--pretrained_path", path,
        "--student_model", "vit_tiny", "--student_kwargs", *STUDENT_WORDS]  # fmt: skip
    with pytest.raises(UserError, match=f"{there} is there and would be lost"):
        weight_selection.main(argv)
    assert (tmp_path / there).read_bytes() == before


def test_file_of_another_family_under_a_teachers_name_is_refused(small_teacher, tmp_path):
    with pytest.raises(UserError, match=r"teacher\.pth has no layout that convnext_tiny is known in"):
        initialize("convnext_tiny", "convnext_femto", pretrained_path=small_teacher[0])


def test_output_below_a_file_is_refused(small_teacher, tmp_path):
    (tmp_path / "out").write_text("here first")
    with pytest.raises(UserError, match="--output_dir .*out cannot be made"):
        run(tmp_path, "--pretrained_path", small_teacher[0])
    assert (tmp_path / "out").read_text() == "here first"
