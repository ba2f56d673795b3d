"""Folders of images: what they hold, what is left out, and which folder was meant if one is a level too deep or too high."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torchvision.datasets as tv

from images.images import Images, printable
from utils import UserError, few, nearest

log = logging.getLogger(__name__)

ENDINGS = ", ".join(tv.folder.IMG_EXTENSIONS)
LAYOUT = "wanted: train/CLASS/IMAGE and val/CLASS/IMAGE in --data_path, or CLASS/IMAGE in --eval_data_path"
# what systems leave in folders, besides names that begin with a dot
LITTER = {"__macosx", "__pycache__", "$recycle.bin", "recycler", "system volume information", "lost+found"}
LITTER |= {"@eadir", "@recycle", "@tmp", "#recycle", "#snapshot"}  # of network drives
LITTER |= {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
OTHER_NAMES = {"train": {"training", "train"}, "val": {"val", "valid", "validation", "test", "testing", "eval"}}
PARTS = OTHER_NAMES["train"] | OTHER_NAMES["val"]
FARTHEST = 3  # levels between the folder that is given and the one that may be meant
MOST = 100  # folders to look into on each level


class Listing:
    """Lists folders and images below a folder, and collects the paths that are left out: hidden ones and other files."""

    def __init__(self):
        self.hidden, self.others = [], []

    def entries(self, folder: str | Path) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the files in a folder, sorted, without what is hidden."""
        folders, files = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower() in LITTER:
                    self.hidden.append(entry.path)
                # is_dir() raises for a link that cannot be followed; we list it as a file, which then cannot be read
                elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    folders.append(entry.name)
                else:
                    files.append(entry.name)
        return sorted(folders), sorted(files)

    def images(self, folder: str) -> list[str]:
        """List the images at any depth in torchvision's order; UserError for a link back to a folder that it is in."""
        found = []
        for inner, files in sorted(self._walk(folder, ())):
            for name in files:
                (found if tv.folder.is_image_file(name) else self.others).append(os.path.join(inner, name))
        return found

    def _walk(self, folder: str, parents: tuple):
        status = os.stat(folder)
        identity = status.st_dev, status.st_ino
        if identity in parents:
            raise UserError(f"{printable(folder)} is a link to a folder that it is in")
        folders, files = self.entries(folder)
        yield folder, files
        for name in folders:
            yield from self._walk(os.path.join(folder, name), (*parents, identity))

    def report(self, outside: Sequence[str] = ()) -> None:
        """Log what is left out, with the files `outside` of the class folders, in one line."""
        kinds = {"hidden": self.hidden, f"not ending in {ENDINGS}": self.others, "in no class folder": outside}
        left_out = [f"{few(map(printable, sorted(paths)))} ({kind})" for kind, paths in kinds.items() if paths]
        if left_out:
            log.warning("left out: %s", "; ".join(left_out))


def list_classes(name: str, root: str | Path) -> Images:
    """List the images of torchvision's ImageFolder, without hidden ones; UserError for a class without images."""
    listing = Listing()
    classes, outside = listing.entries(root)
    if not classes:
        some = f", only files such as {printable(outside[0])}{_holder_of_class(Path(root))}" if outside else ""
        raise UserError(f"--data_set {name}: no class folder in {root}{some}; {LAYOUT}")
    paths, labels, deeper = [], [], []
    for label, class_name in enumerate(classes):
        folder = os.path.join(root, class_name)
        images = listing.images(folder)
        if not images:
            where = f"no file in folder {printable(class_name)} ends in {ENDINGS}"
            raise UserError(f"--data_set {name}: {root}: {where}; {LAYOUT}")
        deeper += [path for path in images[-1:] if os.path.dirname(path) != folder]
        paths += images
        labels += [label] * len(images)
    listing.report([os.path.join(root, file) for file in outside])
    if deeper and len(classes) > 1:
        class_name = os.path.relpath(deeper[0], root).split(os.sep)[0]
        log.info("%s is of class %s: folders within a class folder belong to it", deeper[0], class_name)
    return Images(name, labels, paths=paths, class_names=classes)


def list_unlabelled(name: str, data_path: str) -> Images:
    """List all images in train/ or, if there is none, in the folder itself; their labels mean nothing."""
    root = os.path.join(data_path, "train")
    root = root if os.path.isdir(root) else data_path
    if not os.path.isdir(root):
        meant = folder_meant(Path(data_path))
        raise UserError(f"--data_path {data_path}: no such folder{meant}; wanted images in it or in its train/")
    listing = Listing()
    paths = listing.images(root)
    if not paths:
        raise UserError(f"--data_path {data_path}: no file in {root} ends in {ENDINGS}")
    listing.report()
    return Images(name, [0] * len(paths), paths=paths)


def announce_download(name: str, folder: str) -> None:
    """Log where a set will be downloaded to; UserError if not even the folder above exists, as when a path is mistyped."""
    path = Path(folder).absolute()
    if not path.parent.is_dir():
        raise UserError(
            f"--data_set {name} cannot be downloaded to {path}: there is no folder {path.parent}; make it first"
        )
    new = "" if path.is_dir() else ", which does not exist yet"
    log.info("--data_set %s: downloading what is missing to %s%s", name, path, new)


# ---- which folder is meant ----


def class_root(name: str, data_path: str, train: bool, eval_data_path: str | None) -> Path:
    """Return the folder with the class folders of the part to train or to evaluate on; UserError if there is none."""
    base, part = Path(data_path), "train" if train else "val"
    root = base / part
    if not train and eval_data_path:
        root = base = Path(eval_data_path)
    elif train and eval_data_path and not root.is_dir() and base.is_dir():
        # like image_folder in the paper's code: with a path for evaluation, --data_path itself may hold the classes
        return base
    if root.is_dir():
        return root
    hint = folder_meant(base) if not base.is_dir() else _misplaced(base, part)
    raise UserError(f"--data_set {name}: no folder {root if base.is_dir() else base}{hint}; {LAYOUT}")


def folder_meant(folder: Path) -> str:
    """Return a hint at an existing folder whose path is spelt like that of one that does not exist, "" if there is none."""
    folder = folder.absolute()
    above = next(parent for parent in folder.parents if os.path.isdir(parent))
    first, *rest = folder.relative_to(above).parts
    beside = Listing().entries(above)[0] if os.access(above, os.R_OK | os.X_OK) else []
    similar = [above.joinpath(name, *rest) for name in nearest(first, beside)]
    return next((f" (did you mean {each}?)" for each in similar if os.path.isdir(each)), "")


def _misplaced(base: Path, part: str) -> str:
    """Return a hint where the images are if `base` has no folder `part`, "" if nothing near looks like them."""
    absolute = base.absolute()
    for levels, above in enumerate(absolute.parents[:FARTHEST], 1):
        if absolute.parts[-levels].lower() in PARTS and (above / part).is_dir():
            return f" ({base} is {_levels(levels)} too deep: did you mean --data_path {above}?)"
    if hint := _too_high(base, part, 1):
        return hint
    folders, _ = Listing().entries(base)
    if other := _part_in(base, part):
        return f" (is it {other}? Rename it, or give both parts: --data_path FOLDER --eval_data_path FOLDER)"
    if hint := _too_high(base, part, FARTHEST):
        return hint
    if len(folders) > 1 and not PARTS & set(folders):
        return f" (if its {len(folders)} folders, {few(folders)}, are the classes, share them out to train/ and val/)"
    return ""


def _too_high(base: Path, part: str, farthest: int) -> str:
    """Return a hint at the folders up to so many levels below `base` that have a folder `part`, "" if none has."""
    level = [base]
    for levels in range(1, farthest + 1):
        readable = [folder for folder in level[:MOST] if os.access(folder, os.R_OK | os.X_OK)]
        level = [folder / name for folder in readable for name in Listing().entries(folder)[0]]
        meant = [str(folder) for folder in level[:MOST] if os.path.isdir(folder / part)]
        if meant:
            return f" ({base} is {_levels(levels)} too high: did you mean --data_path {' or '.join(meant[:3])}?)"
    return ""


def _part_in(base: Path, part: str) -> Path | None:
    """Return the folder of `base` that is called as a part may be, such as valid/; None if there is none."""
    names = [name for name in Listing().entries(base)[0] if name.lower() in OTHER_NAMES[part]]
    return base / min(names, key=lambda name: name != part) if names else None


def _holder_of_class(root: Path) -> str:
    """Return a hint at the folder of the class folders if `root`, which has none, looks like a class, "" otherwise."""
    root = root.absolute()
    for levels, above in enumerate(root.parents[:FARTHEST], 1):
        beside = [] if root.name.lower() in PARTS else Listing().entries(above)[0] if levels == 1 else []
        if above.name.lower() in PARTS or len([name for name in beside if name.lower() not in PARTS]) > 1:
            return f" ({_levels(levels)} too deep: did you mean {above}?)"
    return ""


def parts_as_classes(root: Path, train: bool) -> str:
    """Return a hint at the part of `root` that is meant if its class folders are parts, "" if none is called so."""
    meant = _part_in(root, "train" if train else "val")
    return f": did you mean {meant}?" if meant else ""


def too_deep(root: Path, train: bool) -> str:
    """Return a hint if the one class folder in `root` holds folders that look like the classes, "" otherwise."""
    holder, (folders, _) = root, Listing().entries(root)
    while len(folders) == 1:
        holder, (folders, _) = holder / folders[0], Listing().entries(holder / folders[0])
    if not folders:
        return ""
    levels = len(holder.relative_to(root).parts)
    if {name.lower() for name in folders} <= PARTS:
        return f"; {root} is {_levels(levels + 1)} too high{parts_as_classes(holder, train)}"
    return (
        f"; {holder} holds {len(folders)} folders, {few(folders)}: if these are the classes, they are {_levels(levels)} "
        f"too deep: move them up into {root}, or name the folders that they are in by --data_path and --eval_data_path"
    )


def _levels(count: int) -> str:
    return "one level" if count == 1 else f"{count} levels"
