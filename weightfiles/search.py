"""Find a model's tensors in a file: in a part of it, under a prefix of its keys, in a layout that can be read.

Training scripts wrap a model in others (`module.`, `teacher.backbone.`) and save it beside heads, decoders and copies. The search
tries every prefix of the file's own keys, and takes what fits the model by keys and shapes. It needs no value for that.
"""

import itertools
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

from utils import UserError, first_line
from weightfiles.conversions import CONVERSIONS, LAYOUTS, Converter, check_kernels
from weightfiles.layouts import LIBRARIES, recognize
from weightfiles.lazy import Weights, part_of
from weightfiles.read import shown_keys
from weightfiles.reading import TIMM, Part, Reading, Wanted

RESEMBLING = 0.5  # the share of a model's tensors by which a part of a file may be that model
ALIKE = 0.1  # and the one below which a file is of another layout altogether
# what torch.compile, FSDP and activation checkpointing insert in the keys of modules that they wrap, and DINOv2's training,
# which puts its blocks into numbered lists
WRAPPERS = re.compile(
    r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|(?<=blocks\.)\d+\.(?=\d+\.)"
)
DEEPEST = 10  # names in a prefix to try
# a key by which a file in timm's own layout tells its family, for a model of another one
TIMMS_OTHERS = {
    "Swin": r"layers\.\d+\.blocks\.\d+\.attn\.qkv\.",
    "ViT": r"blocks\.\d+\.attn\.(qkv|q_proj)\.",
    "ConvNeXt": r"stages\.\d+\.blocks\.\d+\.conv_dw\.",
    "MLP-Mixer": r"blocks\.\d+\.mlp_tokens\.",
    "ResNet": r"layer\d\.\d+\.conv1\.",
}


def find(path: str | Path, weights: Weights, wanted: Wanted, part: Part) -> Reading:
    """Return the reading of a file's tensors that fits the model, without keys that the model lacks.

    Of several in different places, the one in the part that `part.key` names counts. Raises UserError if nothing fits, if
    there are several in one place, or if that part is nearly the model, and only another part fits.
    """
    root = part_of(path, weights, part.key)
    start, preferred = _start(path, weights, root, part)
    readings, fitting = _search(weights, start, wanted)
    here = [each for each in fitting if each.prefix.startswith(preferred) or preferred.startswith(each.prefix)]
    nearly = [each for each in readings if each.prefix.startswith(preferred) and each.share(wanted) > RESEMBLING]
    if not fitting:
        raise UserError(_cut(weights, start, root, part, wanted) or _problem([*nearly, *readings], weights, wanted))
    if nearly and not here:
        raise UserError(_problem(nearly, weights, wanted))
    fitting = here or fitting
    if len(fitting) > 1:
        picks = " or ".join(_pick(start + each.prefix, root, wanted) for each in fitting)
        raise UserError(f"{wanted.option} holds {wanted.name} {len(fitting)} times: pick one with {picks}")
    return _finished(fitting[0], start, weights, wanted)


def _start(path: str | Path, weights: Weights, root: str, part: Part) -> tuple[str, str]:
    """Return the prefix of the keys to search, and which of them are preferred: a prefix of what is left of them."""
    several = "|" in part.key
    if several and not part.prefix:
        return "", root
    for start in (root + part.prefix, *([part.prefix] if several else [])):
        if any(key.startswith(start) for key in weights):
            return start, ""
    raise UserError(f"{path}: no key begins with --model_prefix {part.prefix}; its keys: {shown_keys(weights)}")


def _search(weights: Weights, start: str, wanted: Wanted) -> tuple[list[Reading], list[Reading]]:
    """Return the readings of what is under `start`, and those of them that fit the model."""
    section = _without_wrappers(weights.under(start))
    readings = _under_timms_names(section, wanted)
    fitting = _fitting(readings, wanted)
    if all(each.prefix for each in fitting):  # or one with a prefix: a library's layout may know what lies around it
        check_kernels(section.shapes, wanted.option)
        readings += _converted(section, wanted, LAYOUTS if fitting else CONVERSIONS)
        fitting = _fitting(readings, wanted)
    return readings, fitting


def _cut(weights: Weights, start: str, root: str, part: Part, wanted: Wanted) -> str:
    """Say which model the prefix `start` of the keys cuts apart, and what to give instead; "" if it cuts none."""
    names = start.split(".")
    for count in reversed(range(len(names) if start else 0)):
        shorter = "".join(f"{name}." for name in names[:count])
        for reading in _search(weights, shorter, wanted)[1]:
            whole = shorter + reading.prefix
            beside = {shorter + key for key in reading.left_out}
            beside |= {whole + key for key in reading.weights if key not in wanted.own}
            inside = any(key.startswith(start) and key not in beside for key in weights)
            if inside and whole != start and start.startswith(whole):
                of_key = "--model_key" if wanted.pick == "--model_prefix" else wanted.pick
                option, given = ("--model_prefix", part.prefix) if part.prefix else (of_key, part.key)
                instead = whole.removeprefix(root) if part.prefix else whole.removesuffix(".")
                where = f"under {whole}" if whole else "at the top of the file"
                way_out = f"give {option} {instead}" if instead else "leave it out"
                return f"{wanted.option}: {option} {given} cuts apart {wanted.name}, which lies {where}: {way_out}"
    return ""


def _pick(prefix: str, root: str, wanted: Wanted) -> str:
    """Return the option that picks what is under a prefix: a prefix of the keys in the part `root`, or the key of a part."""
    of_keys = wanted.pick == "--model_prefix"
    return f"{wanted.pick} {prefix.removeprefix(root) if of_keys else prefix.removesuffix('.')}"


def _without_wrappers(weights: Weights) -> Weights:
    """Take out the names that training inserts in the middle of keys."""
    names = {WRAPPERS.sub("", key): key for key in weights}
    return weights.renamed(names) if len(names) == len(weights) else weights


def _under_timms_names(section: Weights, wanted: Wanted) -> list[Reading]:
    """Read a section under each prefix that has most of the model's keys, or else under the one that has more than others."""
    longest = max((key.count(".") for key in wanted.needed), default=0) + 1
    found = Counter()
    for key in section:
        names = key.split(".")
        for count in range(1, min(longest, len(names)) + 1):
            if (end := ".".join(names[-count:])) in wanted.needed:
                found[key.removesuffix(end)] += 1
    alike = [prefix for prefix, count in found.items() if count > RESEMBLING * len(wanted.needed)]
    most = [prefix for prefix, _ in found.most_common(1)] or [""] * (not wanted.needed)
    return [Reading(section.under(prefix), prefix, TIMM, _outside(section, prefix)) for prefix in alike or most]


def _converted(section: Weights, wanted: Wanted, converters: tuple[Converter, ...]) -> list[Reading]:
    """Read a section by the converters of other layouts, under each prefix that enough keys share for the model."""
    shared = Counter("")
    for key in section:
        names = key.split(".")[:DEEPEST]
        shared.update({".".join([*names[:count], ""]) for count in range(len(names))})
    section = Weights(  # several converters may read a tensor
        section.shapes, cache(section.__getitem__), section.whole, section.settings
    )
    readings = []
    for prefix in [prefix for prefix, count in shared.items() if count > RESEMBLING * len(wanted.needed)]:
        converted = filter(None, (_by(convert, section, prefix, wanted) for convert in converters))
        readings += itertools.islice(converted, 1)
    return readings


def _by(convert: Converter, section: Weights, prefix: str, wanted: Wanted) -> Reading | None:
    """Convert what is under a prefix; None if it is not of a layout that `convert` knows."""
    try:
        converted = convert(section.under(prefix), wanted.model)
    except ValueError as error:
        return Reading(section, prefix, "", [], fault=first_line(error))
    if converted is None:
        return None
    weights, layout, unused, remarks = converted
    return Reading(weights, prefix, layout, [*_outside(section, prefix), *(prefix + key for key in unused)], remarks)


def _outside(section: Weights, prefix: str) -> list[str]:
    return [key for key in section if not key.startswith(prefix)]


def _fitting(readings: list[Reading], wanted: Wanted) -> list[Reading]:
    """Return those that fit, without any inside another: a layout may include what lies around a model, and a file a copy."""
    fitting = [each for each in readings if not each.misfit(wanted)]
    prefixes = {each.prefix for each in fitting}
    return [each for each in fitting if not any(each.prefix != p and each.prefix.startswith(p) for p in prefixes)]


def _finished(reading: Reading, start: str, file: Weights, wanted: Wanted) -> Reading:
    """Take the model's own keys of a reading in the section of a file under `start`, and group what is left out."""
    extra = [reading.prefix + key for key in reading.weights if key not in wanted.own]
    left_out = [start + key for key in reading.left_out + extra] + _outside(file, start)
    prefix = start + reading.prefix
    weights = reading.weights.renamed({key: key for key in reading.weights if key in wanted.own})
    return replace(reading, weights=weights, prefix=prefix, left_out=_groups(left_out, file, prefix))


def _groups(left_out: list[str], file: Weights, prefix: str) -> list[str]:
    """Name the largest groups of keys that are left out as a whole; without the prefix, where they have it."""
    taken = {
        ".".join(key.split(".")[:count]) for key in file.shapes.keys() - left_out for count in range(key.count(".") + 1)
    }
    groups = {}
    for key in left_out:
        names = key.split(".")
        group = next(
            (".".join(names[:count]) for count in range(1, len(names)) if ".".join(names[:count]) not in taken), None
        )
        groups[(f"{group}.*" if group else key).removeprefix(prefix)] = True
    return list(groups)


def _problem(tried: list[Reading], weights: Weights, wanted: Wanted) -> str:
    """Say why none of these readings is the model's: how the nearest differs, or what the file's keys look like."""
    shard = re.search(r"-\d{5}-of-(\d{5})\.\w+$", wanted.option)
    if shard and int(shard[1]) > 1:
        return f"{wanted.option} is one of {int(shard[1])} shards: give their .index.json, or the folder"
    nearest = max(tried, key=lambda each: each.share(wanted), default=None)
    if nearest and nearest.share(wanted) > ALIKE:
        return f"{wanted.option} {nearest.misfit(wanted)}"
    line = f"{wanted.option} has no layout that {wanted.name} is known in"
    if layout := recognize(weights):
        return f"{line}: it is a {layout.model} in {layout.library} layout"
    for kind, key in TIMMS_OTHERS.items():
        if any(re.search(rf"(^|\.){key}", each) for each in weights):
            return f"{line}: it is a {kind} by timm's names"
    examples = list(dict.fromkeys(re.sub(r"(?<![A-Za-z\d])\d+", "N", key) for key in weights))  # blocks.N.norm1.bias
    known = ", ".join((TIMM, "its original release", *LIBRARIES))
    return f"{line} ({known}): its keys look like {', '.join(examples[:5])}"
