"""Two models side by side: each student tensor's teacher tensor, the groups its axes belong to, what only one side has."""

import math
import re
from collections.abc import Mapping

from selection.family import HAVE_TO_AGREE, Family, Layout, Refused
from selection.plan import Axis, Group, Outline, Source
from selection.positions import TOKENS, position_steps, sides, token_rows
from selection.rules import Choices, select_layers


def match(family: Family, teacher: Layout, student: Layout, choices: Choices) -> Outline:
    """Each student tensor's teacher tensor and axes; raises Refused, naming the tensor, for a pair that does not fit."""
    return _Matching(family, teacher, student, choices).outline()


class _Matching:
    """One pair being matched."""

    def __init__(self, family: Family, teacher: Layout, student: Layout, choices: Choices):
        self.family, self.teacher, self.student, self.choices = family, teacher, student, choices
        self.head_is_taken = any(re.match(r"(head|fc)\.", key) for key in student.shapes)
        self.notes: dict[str, int] = {}
        self._check_kinds()
        self.table = family.axes(student.shapes)
        self._check_gates(family.axes(teacher.shapes))
        self.whole_heads = any(".heads*-" in words for words in self.table.values())
        if self.whole_heads and choices.heads == "blend":
            raise Refused(
                "heads",
                "--heads blend: slots of different heads cannot be mixed here (rotary positions, or norms in each head): "
                "use --heads keep",
            )
        self.blend = not self.whole_heads and choices.heads != "keep"
        self.layers = self._match_layers()
        self.sizes: dict[str, tuple[int, int]] = {}
        self.shared: dict[str, tuple[int, int]] = {}  # the same, of groups that lie on several tensors
        self.folds = self._folds()
        if self.whole_heads and choices.heads is None:
            self._note("heads are kept whole: slots of different heads cannot be mixed here")

    def outline(self) -> Outline:
        sources = {key: self._source(key, shape) for key, shape in self.student.shapes.items()}
        self._check_leftovers(sources)
        heads = ("blend" if self.blend else "keep") if any(".heads" in words for words in self.table.values()) else None
        return Outline(sources, self.sizes, self.layers, heads, self.notes)

    def _note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1

    def _check_kinds(self) -> None:
        """Refused if the two are made of other layers, norms or rotations; another activation or pooling is noted."""
        for kind in self.teacher.kinds | self.student.kinds:
            there, here = (layout.kinds.get(kind, "none") for layout in (self.teacher, self.student))
            if there == here:
                continue
            if kind in HAVE_TO_AGREE:
                raise Refused("other layers", f"{kind}: the teacher's are {there}, the student's {here}")
            if kind != "pooling" or self.head_is_taken:
                self._note(f"{kind}: the teacher's is {there}, the student's {here}")

    def _check_gates(self, table: Mapping[str, str]) -> None:
        """Refused if an MLP has a gate, packed into its first projection, on one side only."""
        for key in self.student.shapes if table != self.table else ():
            gated = [" ".join(self.family.words(words, key) or ()).startswith("2*") for words in (table, self.table)]
            if gated[0] != gated[1]:
                raise Refused(
                    "other layers", f"{key}: the MLP of the {'teacher' if gated[0] else 'student'} alone has a gate"
                )

    # ---- layers ----

    def _match_layers(self) -> dict[str, Group]:
        """The teacher's layer of each student layer, by stage."""
        depths, wanted = (self._depths(layout) for layout in (self.teacher, self.student))
        layers = {}
        for stage, depth in wanted.items():
            if depth > depths.get(stage, 0):
                raise Refused("depth", f"{stage}: the student has {depth} layers, the teacher {depths.get(stage, 0)}")
            kinds = {"first_stays": self.family.first_stays, "turns": self.family.turns}
            layers[stage] = Group(
                depths[stage], select_layers(self.choices.layer_selection, depths[stage], depth, **kinds)
            )
        return layers

    def _depths(self, layout: Layout) -> dict[str, int]:
        depths = {}
        for found in filter(None, map(re.compile(self.family.layers).match, layout.shapes)):
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
        return depths

    def in_teacher(self, name: str) -> str:
        """The teacher's name of what the student calls `name`: that of the layer it takes."""
        found = re.match(self.family.layers, name if name.endswith(".") else f"{name}.")
        if found is None:
            return name
        return f"{name[: found.start(2)]}{self.layers[found[1]].kept[int(found[2])]}{name[found.end(2) :]}"

    # ---- tensors ----

    def _source(self, key: str, shape: tuple[int, ...]) -> Source:
        found = self._counterpart(key)
        if found is None:
            return self._beginning(key, shape)
        steps, prefix = [], key.rpartition(".")[0]
        if prefix in self.folds:
            steps.append(("times", self.folds[prefix]))
            self._note(f"LayerScale folded into {_any_layer(key)}")
        there = self.teacher.shapes[found]
        if len(there) != len(shape) and {len(there), len(shape)} == {2, 4}:
            # a 1x1 convolution and a linear layer
            steps.append(("reshape", list(shape)))
            there, shape = ([*sizes, 1, 1][:4] for sizes in (there, shape))
        if len(there) != len(shape):
            raise Refused("axes", f"{self._pair(key, there, shape)} have other numbers of axes")
        words = self.family.words(self.table, key)
        if words is None:
            raise Refused("unknown tensor", f"{key} is not a tensor that this family knows how to cut")
        words = [*words, *["-"] * len(shape)][: len(shape)]
        axes = tuple(self._axis(key, number, word, there, shape) for number, word in enumerate(words))
        if "~" in words:
            steps += self._resampled(key, found, there, shape)
        return Source(found, axes, tuple(steps + self._merged_row(found)))

    def _pair(self, key: str, there: tuple, shape: tuple) -> str:
        return f"{key}: the teacher's {list(there)} and the student's {list(shape)}"

    def _counterpart(self, key: str) -> str | None:
        """The teacher tensor that a student tensor takes, or None."""
        name = self.in_teacher(key)
        if name in self.teacher.shapes:
            return name
        for pair in self.family.same:
            for own, other in (pair, pair[::-1]):
                renamed = other + name.removeprefix(own)
                if name.startswith(own) and renamed in self.teacher.shapes and renamed not in self.student.shapes:
                    self._note(f"{key} from the teacher's {renamed}")
                    return renamed
        if key == "dist_token" and "cls_token" in self.teacher.shapes:
            self._note("dist_token from the teacher's cls_token")
            return "cls_token"
        return None

    def _beginning(self, key: str, shape: tuple[int, ...]) -> Source:
        """The source of a tensor that the teacher has nothing for: a value that changes nothing, or a fresh token."""
        value, _ = self.family.find(self.family.neutral, key)
        if value is None and key.endswith(".bias") and self._counterpart(f"{key[:-4]}weight"):
            value = 0.0
        if value is not None:
            self._note(f"{_any_layer(key)} begins at {value:g}, which changes nothing: the teacher has none")
            return Source(None, (), (("fill", value, list(shape)),))
        if key in TOKENS:
            self._note(f"{key} begins as noise of 1e-6: the teacher has none")
            return Source(None, (), (("noise", 1e-6, list(shape), self.choices.seed, key),))
        raise Refused(
            "no teacher tensor",
            f"the teacher has no tensor {self.in_teacher(key)}, which the student needs {list(shape)}",
        )

    def _axis(self, key: str, number: int, word: str, there: tuple, shape: tuple) -> Axis:
        """The factors of one axis; their sizes are noted, and compared with what other tensors on them say."""
        if word == "~":
            return None
        names = word.split("*")
        if self.blend and any(name.endswith(".slots") for name in names):
            place = next(i for i, name in enumerate(names) if name.endswith(".slots"))
            names[place - 1 : place + 1] = [names[place].removesuffix(".slots")]
        sizes = [
            self._factor_sizes(key, names, layout, size)
            for layout, size in ((self.teacher, there[number]), (self.student, shape[number]))
        ]
        factors: list[str | int] = []
        for name, size, target in zip(names, *sizes, strict=True):
            if name == "-" or name.isdigit():
                if size != target:
                    raise self._whole(key, names, size, target, there, shape)
                factors.append(size)
                continue
            if not target:
                raise Refused("widths", f"{key}: the student's {list(shape)} has no slots of {name}")
            if target > size:
                raise self._too_small(key, name, size, target, there, shape)
            if self.shared.setdefault(name, (size, target)) != (size, target):
                raise Refused("widths", f"{key} does not agree with the tensors before it on the width of {name}")
            if self.choices.element_selection == "random_inconsistent":
                name = f"{name} of {key}[{number}]"
            self.sizes[name] = size, target
            factors.append(name)
        return tuple(factors) if any(isinstance(factor, str) for factor in factors) else None

    def _factor_sizes(self, key: str, names: list[str], layout: Layout, size: int) -> list[int]:
        """The size of each factor of an axis of `size` slots, at most one of which is not known beforehand."""
        known = [int(name) if name.isdigit() else self._count(name, layout) for name in names]
        if known.count(None) > 1:
            raise Refused("unknown tensor", f"{key}: how its {size} slots divide into {' x '.join(names)} is not known")
        if None in known:
            others = math.prod(count for count in known if count is not None)
            known[known.index(None)] = size // others
        if math.prod(known) != size:
            raise Refused("widths", f"{key}: {size} slots are no whole number of {' x '.join(names)}")
        return known

    def _count(self, name: str, layout: Layout) -> int | None:
        return layout.counts.get(self.in_teacher(name) if layout is self.teacher else name)

    def _whole(self, key: str, names: list[str], size: int, target: int, there: tuple, shape: tuple) -> Refused:
        if len(names) > 1:
            return Refused(
                "heads",
                f"{key}: the teacher's heads have {size} slots, the student's {target}; they have to be equal, because "
                "slots of different heads cannot be mixed here (rotary positions, or norms in each head)",
            )
        return Refused("fixed axis", f"{self._pair(key, there, shape)} differ along an axis that is not selected from")

    def _too_small(self, key: str, name: str, size: int, target: int, there: tuple, shape: tuple) -> Refused:
        if name.endswith((".heads", ".slots")):
            what = "heads" if name.endswith(".heads") else "slots in each head"
            # a table of relative positions has an axis of heads, blended or not
            alone = name.endswith(".heads") and any(words.endswith(".heads") for words in self.table.values())
            hint = (
                "" if self.whole_heads or self.blend or alone else "; --heads blend takes a head's slots from several"
            )
            return Refused("heads", f"{key}: the student has {target} {what}, the teacher {size}{hint}")
        if all(own <= size for own, size in zip(shape, there, strict=True)):
            return Refused("narrower", f"{key}: the student has {target} slots of {name}, the teacher {size}")
        return Refused("narrower", f"{key}: the teacher's {list(there)} is smaller than the student's {list(shape)}")

    # ---- what is resampled ----

    def _resampled(self, key: str, found: str, there: tuple, shape: tuple) -> list[tuple]:
        """The steps for the axes marked "~", none where nothing differs."""
        if key == "pos_embed":
            steps, notes = position_steps(self.teacher, self.student)
            for note in notes:
                self._note(note)
            return steps
        if key.endswith(".relative_position_bias_table"):
            old = self.teacher.windows[found.rpartition(".")[0]]
            new = self.student.windows[key.rpartition(".")[0]]
            what, step = "windows", ("window", list(old), list(new))
        else:
            old, new = tuple(there[2:]), tuple(shape[2:])
            what, step = "patches", ("patch", list(new))
        if old == new:
            return []
        self._note(f"{_any_layer(key)} resampled from {what} of {sides(old)} to {sides(new)}")
        return [step]

    def _merged_row(self, key: str) -> list[tuple]:
        """A token keeps its row of the teacher's position embedding where the student's has no rows for tokens."""
        if key not in TOKENS or token_rows(self.student):
            return []
        first, count = token_rows(self.teacher).get(key, (0, 0))
        if not count:
            return []
        self._note(f"row of {key} in pos_embed added to it")
        return [("plus", "pos_embed", first, count)]

    # ---- what nobody takes ----

    def _folds(self) -> dict[str, str]:
        """The student's projections whose teacher has a LayerScale that the student has not: projection -> LayerScale."""
        there, own = self._scales(self.teacher), self._scales(self.student)
        projections = {key.rpartition(".")[0] for key in self.student.shapes} - own.keys()
        return {name: there[self.in_teacher(name)] for name in projections if self.in_teacher(name) in there}

    def _scales(self, layout: Layout) -> dict[str, str]:
        """The projections that a LayerScale follows: projection -> LayerScale."""
        found = {}
        for key in layout.shapes:
            template, named = self.family.find(self.family.scales, key)
            if named:
                found[named.expand(template)] = key
        return found

    def _check_leftovers(self, sources: Mapping[str, Source]) -> None:
        """Refused if a layer that is taken has a tensor that nobody takes: dropping it would change the layer."""
        taken = {source.key for source in sources.values()}
        taken |= {step[1] for source in sources.values() for step in source.steps if step[0] == "times"}
        kept = {stage: group.kept for stage, group in self.layers.items()}
        for key, shape in self.teacher.shapes.items():
            layer = re.match(self.family.layers, key)
            if key in taken or (layer and int(layer[2]) not in kept.get(layer[1], ())):
                continue
            if re.fullmatch(self.family.left_out, key):
                self._note(f"{key.partition('.')[0]} left out: the student has none")
                continue
            raise Refused(
                "leftover", f"the teacher's {key} {list(shape)} has no counterpart in the student; see --student_kwargs"
            )


def _any_layer(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key)
