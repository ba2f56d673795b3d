"""The loss of a run: of the labels or, with --distillation, of the labels and of a teacher's outputs."""

import argparse
from collections.abc import Callable

import torch
from timm.layers import Mlp
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from models.pixels import image_channels
from options.training import mixes
from training.teacher import Teacher, make_teacher
from utils import Stream, UserError, derive_seed, first_line


class Distillation:
    """A frozen teacher, and the loss of a student that learns from it.

    The teacher sees the images that the student sees, augmented and mixed, in the run's precision. It is neither in DDP
    nor in checkpoints, which hold its `source`. The loss has two terms, whose sum is optimized: the `task`, as without a
    teacher, and `alpha` times

    - "logits": tau^2 KL(teacher || student), both softened by the temperature tau (Hinton et al., arXiv 1503.02531), in
      the mean over the batch.
    - "features": the mean absolute difference between the teacher's pooled output and the student's, which goes through
      an MLP, the `distiller`, that is trained with the student.

    `student` is the model to train: the one given or, for features, a `WithDistiller`.

    timm.task has such losses too, but not the MLP or L1, and its teacher makes the host wait for the device in each step.
    """

    def __init__(
        self, teacher: Teacher, student: nn.Module, task: Callable, *, alpha: float = 1.0, tau: float = 1.0
    ) -> None:
        self.teacher, self.student, self.task, self.alpha, self.tau = teacher, student, task, alpha, tau

    @property
    def distiller(self) -> nn.Module | None:
        return self.student.distiller if isinstance(self.student, WithDistiller) else None

    def __call__(self, student: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [batch, classes] and the terms of the loss [2]: the task's, the teacher's.

        `student` is `self.student`, or DDP around it.
        """
        output = student(images)
        logits, features = output if isinstance(output, tuple) else (output, None)
        task = self.task(logits, targets)
        # After the student, so that its random draws are those of a run without a teacher.
        taught = self.teacher(images).float()
        if features is None:
            ours, theirs = ((each / self.tau).log_softmax(1) for each in (logits.float(), taught))
            distance = nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * self.tau**2
        else:
            distance = nn.functional.l1_loss(features.float(), taught)
        return logits, torch.stack([task.float(), self.alpha * distance])

    def state(self) -> dict:
        """Return what a checkpoint holds of it: the MLP, if there is one."""
        return {} if self.distiller is None else {"distiller": self.distiller.state_dict()}

    def load_state(self, state: dict) -> None:
        """Load what `state` returned."""
        if self.distiller is not None:
            self.distiller.load_state_dict(state["distiller"])


class WithDistiller(nn.Module):
    """A model, and an MLP from its pooled output to outputs as wide as the teacher's."""

    def __init__(self, model: nn.Module, distiller: nn.Module):
        super().__init__()
        self.model, self.distiller = model, distiller

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the model's logits [batch, classes] and the MLP's outputs [batch, teacher's width]."""
        features = self.model.forward_features(images)
        # Pooling twice costs little, and holds for any of timm's heads; not all are a classifier on the pooled output.
        logits, pooled = self.model.forward_head(features), self.model.forward_head(features, pre_logits=True)
        return logits, self.distiller(pooled)


def make_criterion(options: argparse.Namespace, classes: list[str] | int, model: nn.Module) -> nn.Module | Distillation:
    """Make the loss of the run: of (logits, targets) or, with a teacher, a `Distillation` of `model`.

    `classes` are the data's. UserError if the teacher cannot be read, or does not fit the run.
    """
    smooth = LabelSmoothingCrossEntropy(options.smoothing) if options.smoothing > 0 else nn.CrossEntropyLoss()
    task = SoftTargetCrossEntropy() if mixes(options) else smooth  # the mixer smooths the labels
    if options.distillation == "none":
        return task
    device = next(model.parameters()).device
    teacher = make_teacher(options, classes, device)
    if options.distillation == "features":
        torch.manual_seed(derive_seed(Stream.DISTILLER, options.seed))
        model = WithDistiller(model, Mlp(pooled_width(model, options), teacher.width, teacher.width).to(device))
        if options.compile:
            model.compile(mode=options.compile_mode)  # it calls parts of the model, which is compiled as a whole
    return Distillation(teacher, model, task, alpha=options.distillation_alpha, tau=options.distillation_tau)


@torch.no_grad()
def pooled_width(model: nn.Module, options: argparse.Namespace) -> int:
    """Return the width of a model's pooled output. UserError if it is not one of timm's models that have one."""
    shape = (image_channels(options.model_kwargs, "--model_kwargs"), options.input_size, options.input_size)
    images = torch.zeros(2, *shape, device=next(model.parameters()).device)
    try:
        return model.eval().forward_head(model.forward_features(images), pre_logits=True).shape[1]
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = f"--model {options.model} has none ({first_line(error)})"
        raise UserError(f"--distillation features needs a student with a pooled output, but {reason}") from error
