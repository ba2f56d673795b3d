"""Linear probing: how far a linear classifier gets on what a model computes, without changing the model."""

import argparse

import torch
from torch import Tensor, nn

from options.training import computes_features_once
from utils import UserError


class LinearProbe(nn.Module):
    """A model of which the classifier alone trains. The rest is frozen, and in evaluation mode for good.

    It takes images [batch, channels, H, W] or, if it is `on_features`, what `features` gave for them earlier.
    """

    def __init__(self, model: nn.Module, *, on_features: bool):
        super().__init__()
        self.model, self.on_features = model.requires_grad_(False), on_features
        self.classifier.requires_grad_(True)
        self.eval()

    @property
    def classifier(self) -> nn.Linear:
        return self.model.get_classifier()

    def train(self, mode: bool = True) -> "LinearProbe":
        """Stay in evaluation mode: no dropout, no stochastic depth, no update of batch norms' statistics."""
        return super().train(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits [batch, classes]."""
        return self.classifier(inputs if self.on_features else self.features(inputs))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return what the classifier sees of images: [batch, width]."""
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)


def make_probe(model: nn.Module, options: argparse.Namespace) -> LinearProbe:
    """Freeze `model` up to its classifier. UserError unless that is one linear layer."""
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        ending = " and ".join(type(part).__name__ for part in classifier) if isinstance(classifier, tuple) else None
        ending = ending or type(classifier).__name__
        raise UserError(
            f"--linear_probe true needs a model that ends in one Linear, but {options.model} ends in {ending}"
        )
    probe = LinearProbe(model, on_features=computes_features_once(options))
    if options.compile:
        probe.compile(mode=options.compile_mode)  # it calls parts of the model, which is compiled as a whole
    return probe
