"""Random initial values: the classic ones and mimetic as baselines beside timm's own, and a head of timm's."""

import math

import torch
from torch import Tensor, nn

from models.build import ModelSpec, create
from models.families import family_of, head_prefixes
from utils import Stream, UserError, derive_seed


def initialize(model: nn.Module, scheme: str) -> None:
    """Draw a model's weights anew, by `--init` and torch's global generator; "timm" leaves them as they are.

    "xavier" (Glorot and Bengio 2010, uniform) and "kaiming" (He et al. 2015, normal, by inputs, for ReLU) draw every dense
    layer and convolution, and set their biases to 0. "mimetic" draws the attention of a ViT, see `mimetic`. Norms, tokens
    and position embeddings keep timm's values. Raises UserError if the model has no such attention.
    """
    if scheme == "mimetic":
        mimetic(model)
    elif scheme != "timm":
        fill = {"xavier": nn.init.xavier_uniform_, "kaiming": _kaiming}[scheme]
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                # three layers in one, or one for each group of channels
                parts = 3 if name.endswith("qkv") else getattr(layer, "groups", 1)
                with torch.no_grad():
                    for part in layer.weight.chunk(parts):
                        fill(part)
                    if layer.bias is not None:
                        layer.bias.zero_()


def check_scheme(scheme: str, name: str, kwargs: dict) -> None:
    """Raise UserError if `initialize` will, before a model with its classes can be built."""
    if scheme == "mimetic":
        _attentions(create(name, kwargs, device="meta"))


def fresh_head(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Draw timm's own initial values for the head of a model, by `seed`; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(Stream.HEAD, seed))
        model = create(spec.name, spec.kwargs)
    return {key: value for key, value in model.state_dict().items() if key.startswith(head_prefixes(model))}


def _kaiming(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


@torch.no_grad()
def mimetic(model: nn.Module) -> None:
    """Draw the attention of a ViT so that its products resemble those of trained ones (Trockman and Kolter 2023).

    In each head, query and key make a low-rank approximation of 0.7 Z + 0.7 I. Value and output projection make 0.4 Z -
    0.4 I. Z is normal with variance 1 / width. Biases are 0. Raises UserError unless the model is a ViT with one
    attention in each block.
    """
    for attention in _attentions(model):
        width, heads = attention.proj.weight.shape[0], attention.num_heads
        query, key, value = attention.qkv.weight.chunk(3)
        for rows in torch.arange(width).chunk(heads):
            left, right = _factors(0.7, 0.7, width, len(rows))
            query[rows], key[rows] = left.T, right
        left, right = _factors(0.4, -0.4, width, width)
        attention.proj.weight.copy_(left)
        value.copy_(right)
        for bias in (attention.qkv.bias, attention.proj.bias):
            if bias is not None:
                bias.zero_()


def _attentions(model: nn.Module) -> list[nn.Module]:
    if family_of(model) != "vit":
        raise UserError(f"--init mimetic is for ViTs, not for a {type(model).__name__}: it draws their attention")
    attentions = [getattr(block, "attn", None) for block in model.blocks]
    if not all(hasattr(each, "qkv") for each in attentions):
        raise UserError("--init mimetic needs one attention in each block, and this ViT's blocks have others")
    return attentions


def _factors(noise: float, identity: float, width: int, rank: int) -> tuple[Tensor, Tensor]:
    """Draw a square matrix and return the factors [width, rank], [rank, width] of its best approximation of this rank."""
    matrix = noise / math.sqrt(width) * torch.randn(width, width) + identity * torch.eye(width)
    left, sizes, right = torch.linalg.svd(matrix)
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
