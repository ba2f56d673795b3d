"""Check that weights fit a model, and copy them into it."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from models.families import head_prefixes
from utils import UserError


def check_fit(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    problem: str,
    optional: tuple[str, ...] = (),
    left_out: Collection[str] = (),
) -> None:
    """Raise a UserError starting with `problem` unless `tensors` fill the model.

    Keys that start with `optional`, and the keys `left_out`, may be missing.
    """
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    given = {key: list(value.shape) for key, value in tensors.items()}
    faults = [f"{key} is {given[key]}, not {own[key]}" for key in given if key in own and given[key] != own[key]]
    faults += [f"{key} is missing" for key in own if not (key in given or key in left_out or key.startswith(optional))]
    faults += [f"{key} is unknown" for key in given if key not in own]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{problem}: {'; '.join(faults[:3])}{more}")


def inherit(model: nn.Module, tensors: Mapping[str, Tensor], problem: str, left_out: Collection[str] = ()) -> list[str]:
    """Copy `tensors` into the model. A head that is missing, or has other shapes, keeps its own values.

    So do the keys `left_out`, if they are missing.
    Returns the head's keys that have other shapes. If anything else does not fit, raises a UserError that starts with
    `problem` and names the keys.
    """
    head, own = head_prefixes(model), model.state_dict()
    other_head = [
        key for key in tensors if key.startswith(head) and key in own and own[key].shape != tensors[key].shape
    ]
    kept = {key: value for key, value in tensors.items() if key not in other_head}
    check_fit(kept, model, problem, optional=head, left_out=left_out)
    model.load_state_dict(kept, strict=False)
    return other_head
