"""Scores by activation: what is written, what is seen, and which channels explain the others; and the script's refit."""

import json

import numpy as np
import pytest
import torch
from conftest import error_of, write_images
from small_models import PAIRS, random_tensors, small_pair

import models
import weight_selection
from selection.activations.scores import activation_scores, coverage
from selection.activations.scratch import Calibration, Scratch
from selection.activations.segments import Segments
from selection.families import FAMILIES
from selection.family import Layout
from selection.match import match
from selection.rules import Choices
from selection.tensors import magnitudes
from utils import UserError
from weightfiles.lazy import open_weights


@pytest.fixture
def folder(tmp_path):
    """48 images without classes, some in a folder below."""
    write_images(tmp_path / "pictures", ".", {"a": 24, "b/c": 24}, size=40)
    return tmp_path / "pictures"


def arguments(path, folder, *more):
    """Options that refit the script's small student from the small teacher in `path`, on the images of `folder`."""
    return small_pair(path, "--refit", "true", "--data_path", str(folder), *map(str, more))


@pytest.fixture
def refit(small_teacher, folder, tmp_path):
    """Return a function: run the script with more options, and return the tensors and the `.json`."""

    def run(*more, name="out.pth"):
        path = weight_selection.main(
            [*arguments(small_teacher[0], folder, *more), "--output_dir", str(tmp_path / name)]
        )
        return open_weights(path), json.loads(path.with_suffix(".json").read_text())

    return run


# ---- scores ----


def scored(kind, rule, tmp_path):
    """The scores of a small pair's groups, the teacher, its images and the outline."""
    teacher_name, teacher_kwargs, name, kwargs = PAIRS[kind]
    torch.manual_seed(0)
    teacher, student = models.create(teacher_name, teacher_kwargs), models.create(name, kwargs, device="meta")
    family = FAMILIES[models.family_of(teacher)]
    outline = match(family, Layout.of(teacher, family), Layout.of(student, family), Choices(heads="keep"))
    size = kwargs.get("img_size", 32)
    pixels = torch.randn(20, 3, size, size)
    images = Calibration([pixels], 20, tmp_path)
    norms = magnitudes(teacher.state_dict(), outline)
    scores = activation_scores(
        Segments(teacher, family.layers, images.shape, "m"), outline, family, images, rule, norms
    )
    return scores, models.create(teacher_name, teacher_kwargs), teacher.state_dict(), pixels[:16], norms


def test_heads_and_units_count_by_the_energy_they_write(tmp_path):
    scores, teacher, tensors, pixels, _ = scored("vit", "energy", tmp_path)
    teacher.load_state_dict(tensors)
    seen = {}
    for name in ("blocks.1.attn.proj", "blocks.1.mlp.fc2", "blocks.1.attn.qkv"):
        teacher.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
    teacher.eval()(pixels)
    x, weight = seen["blocks.1.mlp.fc2"].double(), tensors["blocks.1.mlp.fc2.weight"].double()
    by_hand = x.square().sum((0, 1)) * weight.square().sum(0)
    np.testing.assert_allclose(scores["blocks.1.mlp"], by_hand.detach(), rtol=1e-5)
    x, weight = seen["blocks.1.attn.proj"].double(), tensors["blocks.1.attn.proj.weight"].double()
    heads = [
        (x[..., 6 * head : 6 * head + 6] @ weight[:, 6 * head : 6 * head + 6].mT).square().sum() for head in range(4)
    ]
    np.testing.assert_allclose(scores["blocks.1.attn.heads"], torch.stack(heads).detach(), rtol=1e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_every_group_of_every_family_has_finite_scores(kind, tmp_path):
    scores, _, _, _, norms = scored(kind, "energy", tmp_path)
    assert scores.keys() == norms.keys()
    assert all(np.isfinite(score).all() and score.shape == norms[name].shape for name, score in scores.items())


def test_stream_counts_by_its_mean_squares_or_by_its_norms(tmp_path):
    by_energy, teacher, tensors, pixels, norms = scored("vit", "energy", tmp_path)
    by_norm, *_ = scored("vit", "magnitude_energy", tmp_path)
    np.testing.assert_array_equal(by_norm["stream"], norms["stream"])
    np.testing.assert_array_equal(by_norm["blocks.0.mlp"], by_energy["blocks.0.mlp"])
    teacher.load_state_dict(tensors)
    inputs = []
    for name, module in teacher.named_modules():
        if name.endswith(("qkv", "fc1")) and not name.startswith("blocks.2."):  # the layer that the student has not
            module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double().square().mean((0, 1))))
    teacher.head.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double().square().mean(0)))
    teacher.eval()(pixels)
    by_hand = sum(each / each.mean() for each in inputs).detach()
    np.testing.assert_allclose(by_energy["stream"], by_hand, rtol=1e-5)


@pytest.mark.parametrize("kind, group", [("convnext", "stages.0"), ("swin", "layers.1")])
def test_channels_of_a_stage_are_stream_for_the_layer_behind_it(kind, group, tmp_path):
    """Outside of blocks, the layer that reads a stage's last output is none of its hidden ones."""
    by_norm, *_, norms = scored(kind, "magnitude_energy", tmp_path)
    np.testing.assert_array_equal(by_norm[group], norms[group])


def test_coverage_takes_channels_that_explain_the_others():
    """Channels 0 and 1 are one value at two scales, 2 is another, 3 is always 0: 2 and one of the first two explain all."""
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.stack([3 * a, a, 2 * b, 0 * a], 1)
    first, second, *_ = np.argsort(-coverage(x.mT @ x)).tolist()
    assert first in (0, 1) and second == 2


# ---- the script ----


def test_refit_is_said_in_the_file_and_in_a_line(refit, caplog):
    tensors, about = refit("--calibration_images", 40)
    said = about["refit"]
    assert (said["images"], said["held_out"], said["input_size"], said["ridge"]) == (40, 8, 32, 0.01)
    assert said["data_set"] == "image_folder" and len(said["images_sha256"]) == 64
    assert said["refitted"] == 9 and said["left_as_selected"] == {} and said["top1_agreement"] is None
    assert (
        said["explained_variance"].keys() == {"blocks.0", "blocks.1"} == said["selected"]["explained_variance"].keys()
    )
    assert said["explained_variance"]["blocks.1"] > said["selected"]["explained_variance"]["blocks.1"]
    assert about["choices"]["element_selection"] == "energy" and about["choices"]["heads"] == "keep"
    assert "9 of 9 layers refitted; left as selected: none" in caplog.messages
    assert "--refit: --element_selection energy and --heads keep" in caplog.messages
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors.values())


def test_equal_images_and_seed_give_equal_files(refit):
    first, again, other = refit("--seed", 1), refit("--seed", 1, name="again.pth"), refit("--seed", 2, name="other.pth")
    assert first[1]["sha256"] == again[1]["sha256"] != other[1]["sha256"]
    assert first[1]["refit"] == again[1]["refit"]


def test_infinite_ridge_gives_the_selected_tensors(refit):
    refitted, about = refit("--ridge", "inf")
    selected, _ = refit("--refit", "false", "--element_selection", "energy", "--heads", "keep", name="plain.pth")
    assert all(torch.equal(refitted[key], selected[key]) for key in selected) and refitted.keys() == selected.keys()
    assert about["refit"]["ridge"] == "inf" and about["refit"]["refitted"] == 0


def test_only_layers_that_match_are_refitted(refit):
    refitted, about = refit("--refit_layers", r"\.mlp\.")
    selected, _ = refit("--refit", "false", "--element_selection", "energy", "--heads", "keep", name="plain.pth")
    changed = {key for key in selected if not torch.equal(refitted[key], selected[key])}
    assert changed == {f"blocks.{n}.mlp.fc{m}.{kind}" for n in (0, 1) for m in (1, 2) for kind in ("weight", "bias")}
    assert about["refit"]["refitted"] == 4
    assert about["refit"]["left_as_selected"]["patch_embed.proj.weight"] == r"--refit_layers \.mlp\."


def test_the_layers_own_outputs_can_be_the_targets(refit):
    (stream, about), (outputs, own) = refit(), refit("--refit_target", "outputs", name="own.pth")
    assert (about["refit"]["target"], own["refit"]["target"]) == ("stream", "outputs")
    assert torch.equal(stream["patch_embed.proj.weight"], outputs["patch_embed.proj.weight"])
    assert not torch.equal(stream["blocks.0.mlp.fc2.weight"], outputs["blocks.0.mlp.fc2.weight"])


def test_folder_of_the_output_may_be_new(refit, tmp_path):
    refit(name="new/below/out.pth")
    assert sorted(path.name for path in (tmp_path / "new/below").iterdir()) == ["out.json", "out.pth"]


def test_head_that_is_taken_is_refitted_and_agrees_more(refit):
    tensors, about = refit("--include_head", "true")
    assert tensors["head.weight"].shape == (5, 24) and about["refit"]["refitted"] == 10
    assert 0 <= about["refit"]["selected"]["top1_agreement"] <= about["refit"]["top1_agreement"] <= 1


def test_plan_by_activation_reads_images_and_writes_nothing(small_teacher, folder, tmp_path, capsys):
    weight_selection.main([*arguments(small_teacher[0], folder), "--plan"])
    about = json.loads(capsys.readouterr().out)
    assert about["calibration"]["images"] == 48 and "refit" not in about
    assert not list(tmp_path.glob("out*"))


def test_what_is_refitted_is_float32_and_copies_keep_their_dtype(small_teacher, folder, tmp_path):
    path, weights = small_teacher
    torch.save({key: tensor.bfloat16() for key, tensor in weights.items()}, path)
    out = weight_selection.main([*arguments(path, folder), "--output_dir", str(tmp_path / "out.pth")])
    left = {"cls_token", "pos_embed", "norm.weight", "norm.bias"}
    left |= {"patch_embed.proj.weight", "patch_embed.proj.bias"}  # they give the teacher's values already
    left |= {
        f"blocks.{block}.norm{number}.{part}" for block in (0, 1) for number in (1, 2) for part in ("weight", "bias")
    }
    for key, tensor in open_weights(out).items():
        assert tensor.dtype == (torch.bfloat16 if key in left else torch.float32), key


def test_teacher_of_colours_sees_a_grey_students_images(refit):
    same = "in_chans=1 embed_dim=48 depth=3 num_heads=4".split()
    _, about = refit("--imagenet_default_mean_and_std", "false", "--student_kwargs", *same)
    said = about["refit"]
    assert (said["mean"], said["std"]) == ([0.5], [0.5])
    # equal means: the kernel, summed over the channels, gives on grey what the teacher's gives on three equal channels
    assert all(share == pytest.approx(1, abs=1e-6) for share in said["selected"]["explained_variance"].values())


def test_teacher_is_rebuilt_at_the_students_grid(tmp_path, folder):
    """DINOv2's ViT-S, 518 px in patches of 14, to a ViT-T of 32 px in patches of 8, three layers deep."""
    name, depth = "vit_small_patch14_dinov2", {"depth": 3}
    teacher = random_tensors(models.create(name, depth, device="meta"), torch.float32)
    torch.save({key: tensor / 10 for key, tensor in teacher.items()}, tmp_path / "teacher.pth")
    student = "--student_model vit_tiny --student_kwargs img_size=32 patch_size=8 depth=2 --refit true"
    teacher = f"--pretrained_model {name} --pretrained_kwargs depth=3 --pretrained_path {tmp_path}/teacher.pth"
    argv = f"{teacher} {student} --data_path {folder} --output_dir {tmp_path}/out.pth".split()
    about = json.loads(weight_selection.main(argv).with_suffix(".json").read_text())
    assert about["refit"]["teacher_rebuilt_with"] == {"img_size": [32, 32], "patch_size": [8, 8]}
    assert about["refit"]["refitted"] == 9 and about["refit"]["left_as_selected"] == {}
    shares = about["refit"]["explained_variance"], about["refit"]["selected"]["explained_variance"]
    assert shares[0]["blocks.1"] > shares[1]["blocks.1"]


# ---- what is refused ----


@pytest.mark.parametrize(
    "options, message",
    [
        ("--refit true", "--refit true needs --data_path: images to run the teacher on"),
        ("--element_selection coverage", "--element_selection coverage needs --data_path"),
        ("--refit true --data_path x --element_selection random_inconsistent", "needs channels that agree"),
        ("--refit true --data_path x --element_selection l1_inconsistent", "needs channels that agree"),
        ("--refit true --data_path x --ridge -1", "-1 is not at least 0"),
        ("--refit true --data_path x --calibration_images 15", "15 is not at least 16"),
        ("--refit true --data_path x --refit_layers (", "( is not a regular expression"),
    ],
)
def test_usage_errors_are_said_before_anything_is_read(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        weight_selection.main(["--output_dir", "out", *options.split()])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_folder_that_takes_no_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none: 1 MiB are needed for images and activations: No such file"):
        Scratch(tmp_path / "none", range(1), 2**18)


def test_bad_images_and_bad_teachers_end_in_one_line(small_teacher, folder, tmp_path):
    path, weights = small_teacher

    def message(*more, at=folder):
        return error_of(weight_selection, *arguments(path, at, "--output_dir", tmp_path / "out.pth", *more))

    assert f"--data_path {tmp_path}/none: no such folder" in message(at=tmp_path / "none")
    write_images(tmp_path / "few", ".", {"a": 15})
    assert message(at=tmp_path / "few") == f"--data_path {tmp_path}/few has 15 images; at least 16 are needed"
    assert "does not take images of 40 x 40" in message("--input_size", 40)
    assert "--student_kwargs in_chans=4: images have 3 channels" in message("--student_kwargs", "in_chans=4")
    (folder / "a" / "000.jpg").write_bytes(b"no picture")
    assert "cannot read" in message() and "000.jpg" in message()
    (folder / "a" / "000.jpg").unlink()
    torch.save({**weights, "norm.bias": weights["norm.bias"], "blocks.0.norm1.bias": weights["norm.bias"] * 1e38}, path)
    assert "activations are not finite for these images" in message()
    assert "activations are not finite for these images" in message("--refit", "false", "--element_selection", "energy")
    assert not list(tmp_path.glob("out*"))
