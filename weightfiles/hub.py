"""Find the files of weights that timm knows by name, in the caches of the hub and of torch, or download them."""

import hashlib
import http.client
import re
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn

from utils import UserError, first_line
from weightfiles.folder import INDEX_SUFFIX
from weightfiles.lazy import read_index

# safetensors files that the hub names differently from the .bin file
SAFE_NAMES = {
    "pytorch_model.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}


def pretrained_file(model: nn.Module, name: str, options: str = "--pretrained") -> Path:
    """The local file of the pretrained weights of timm's `model`, downloaded unless the hub's or torch's cache has it.

    Sources are tried in timm's order (timm/models/_builder.py, _resolve_pretrained_source, at 1.0.31): file, hub, URL.
    If a repository splits its weights over several files, this is their index. Raises UserError, beginning
    with --pretrained_model `name` (or other `options`), if there are no weights or they cannot be downloaded.
    """
    config = model.pretrained_cfg
    try:
        if config.get("file") and config.get("source") != "hf-hub":
            return Path(config["file"])
        if config.get("hf_hub_id"):
            return _from_hub(config["hf_hub_id"], config.get("hf_hub_filename") or "pytorch_model.bin")
        if config.get("url"):
            return _from_address(config["url"])
        raise LookupError("timm knows no weights of it")
    except Exception as error:  # the hub's client passes on errors of whatever HTTP library it uses
        raise UserError(
            f"{options}_model {name} cannot be loaded: {first_line(error)}; "
            f"give {options}_path FILE, or a name that has weights"
        ) from error


def _from_hub(repository: str, filename: str) -> Path:
    """Fetch the first file that `repository`, or `repository@revision`, has under the names that stand for `filename`."""
    repository, _, revision = repository.partition("@")
    get = partial(hf_hub_download, repository, revision=revision or None)
    # timm's order (load_state_dict_from_hf), followed by the indices, which timm does not look for
    safe = SAFE_NAMES.get(filename, re.sub(r"\.bin$", ".safetensors", filename))
    candidates = list(dict.fromkeys([safe, filename]))
    candidates += [f"{name}{INDEX_SUFFIX}" for name in candidates if name.endswith((".safetensors", ".bin"))]
    unreachable = None
    for candidate in candidates:
        try:
            path = Path(get(candidate))
            break
        except LocalEntryNotFoundError as error:
            # without network each request waits half a minute: look for the rest in the cache only
            get, unreachable = partial(get, local_files_only=True), unreachable or error
        except EntryNotFoundError:
            pass  # reported below if all are missing
    else:
        raise unreachable or LookupError(f"{repository} has none of the files {', '.join(candidates)}")
    if path.name.endswith(INDEX_SUFFIX):
        for name in sorted({file.name for file in read_index(path).values()}):
            get(str(PurePosixPath(candidate).with_name(name)))
    return path


def _from_address(address: str) -> Path:
    """The copy of a URL's file in torch's cache, where `torch.hub.load_state_dict_from_url` keeps it too.

    Downloads only over https, and only if the file's name ends in the beginning of its sha256, by torch's convention.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(urlparse(address).path).name
    if not path.is_file():
        sha256 = re.search(r"-([0-9a-f]{8,64})$", path.stem)
        if not address.startswith("https://") or not sha256:
            raise LookupError(f"{address} is not an address of https that names the beginning of its file's sha256")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path), hash_prefix=sha256[1], progress=False)
    return path


def fetch(url: str) -> Path:
    """The local copy of `https://…#sha256=<hex>`, downloaded unless torch's cache has it; its sha256 is always checked."""
    address, _, sha256 = url.partition("#sha256=")
    path = (
        Path(torch.hub.get_dir()) / "checkpoints" / f"{sha256.lower()}{Path(urlparse(address).path).suffix or '.pth'}"
    )
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256.lower():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(address, str(path), hash_prefix=sha256.lower(), progress=False)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:  # network, hash, address
        raise UserError(f"{address} could not be downloaded: {first_line(error)}") from error
    return path
