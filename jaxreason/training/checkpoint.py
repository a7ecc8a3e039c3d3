"""Checkpoints that are whole or refused.

Orbax writes sharded arrays in the background, from every process, and reads them onto another mesh; but it restores
flipped bits without a word. So once a save is final, process 0 writes a manifest beside the step's folder, and nothing
is restored that differs from its manifest:

    <directory>/<step>/                 what orbax wrote
    <directory>/<step>.manifest.json    size and SHA-256 of each of its files; a step without is half-written

A refused checkpoint is reported in a sentence and the one before it is used; restoring deletes nothing, so an
evaluation may read what a run is writing. The next `save` removes what was refused. One run writes to a directory. In a
run of several processes each of them makes every call, and all see the same directory (a shared or mounted filesystem).

Deliberately absent: when to save (the loop knows), the comparison of configurations, retention by a metric, bucket URLs
(mount the bucket), in-memory emergency checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

_ENTRY = re.compile(r"(0|[1-9]\d*)(\.manifest\.json(?:\.tmp)?|\.orbax-checkpoint-tmp.*)?")


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint; `rejected` holds a sentence for each newer one that was refused, newest first."""

    step: int
    state: Any
    extra: dict[str, Any]
    rejected: list[str]


@final
class Checkpointer:
    """Saves and restores a run's state in one directory, of which the newest `keep` checkpoints stay."""

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep was {keep}, expected at least 1: a run that keeps no checkpoint cannot resume")
        self._directory = Path(directory).absolute()
        self._keep = keep
        # Orbax would remove an old step before the new one has its manifest, so retention is ours.
        told = ocp.AsyncOptions(barrier_sync_fn=_meet) if jax.process_count() > 1 else None
        options = ocp.CheckpointManagerOptions(max_to_keep=None, lightweight_initialize=True, async_options=told)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-manifest")
        self._sealing: Future[None] | None = None
        self._refused: set[int] = set()

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Saves `state` (a pytree of jax arrays) and `extra` (JSON) as checkpoint `step`, in the background.

        The caller may donate or mutate both at once: orbax has the values on the host when this returns (on the CPU
        backend it holds a reference to the buffer, and jax copies a referenced buffer instead of donating it).
        Steps must grow: a checkpoint that was not refused by `restore_latest` is never overwritten.
        """
        self.wait()
        problem = _agree(self._make_room(step) if jax.process_index() == 0 else None)
        if problem:
            raise ValueError(problem)
        self._manager.reload()  # it remembers the steps that were there
        host = {"leaves": _describe(state), "extra": dict(extra)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            host=ocp.args.JsonSave(json.loads(json.dumps(host))),  # a copy, and non-JSON is found out here
        )
        self._manager.save(step, args=items, force=True)
        if jax.process_index() == 0:
            self._sealing = self._background.submit(self._seal, step)

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest whole checkpoint, or None where the directory holds none.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct`s with shardings, on any mesh. Raises ValueError where
        checkpoints exist but all are refused, and where the state's leaves differ from the checkpoint's.
        """
        self.wait()
        step, refused, finished = _agree(self._newest() if jax.process_index() == 0 else None)
        self._refused = {number for number, _ in refused}
        rejected = [f"Checkpoint {number} was refused: {reason}." for number, reason in refused]
        if step is not None:
            return self._load(step, abstract_state, rejected)
        if not finished:  # at most leftovers of a first save that never became a checkpoint
            return None
        raise ValueError(
            f"Every checkpoint in {self._directory} was refused, expected one that is whole; restore it from a copy, "
            f"or delete the directory to start anew. {' '.join(rejected)}"
        )

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """Checkpoint `step`; raises ValueError where it is absent, refused or of another shape."""
        self.wait()
        reason = _agree(self._refusal(step) if jax.process_index() == 0 else None)
        if reason:
            raise ValueError(f"Checkpoint {step} in {self._directory} was refused: {reason}; choose another step")
        return self._load(step, abstract_state, [])

    def wait(self) -> None:
        """Returns when the last save is final and has its manifest; raises what went wrong in it."""
        sealing, self._sealing = self._sealing, None  # first: a failed save is reported once
        self._manager.wait_until_finished()
        if sealing is not None:
            sealing.result()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("jaxreason checkpoint is sealed")

    def close(self) -> None:
        """Waits for the last save and releases the threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._manager.close()

    def _load(self, step: int, abstract_state: Any, rejected: list[str]) -> Restored:
        host = self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]
        _check_leaves(abstract_state, host["leaves"], where=f"checkpoint {step} in {self._directory}")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        state = self._manager.restore(step, args=items)["state"]
        # Orbax reads in threads, which do not see a local `jax.enable_x64`: without the global flag float64 is cut.
        _check_leaves(abstract_state, _describe(state), where="the restored state (is jax_enable_x64 off?)")
        return Restored(step=step, state=state, extra=host["extra"], rejected=rejected)

    # What follows touches files, and runs in process 0 alone.

    def _folder(self, step: int) -> Path:
        return self._directory / str(step)

    def _manifest(self, step: int) -> Path:
        return self._directory / f"{step}.manifest.json"

    def _seal(self, step: int) -> None:
        """Writes the manifest when the save is final (orbax has heard from every process), then removes old steps."""
        self._manager.wait_until_finished()
        folder = self._folder(step)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        with ThreadPoolExecutor() as pool:
            files = dict(zip(names, pool.map(lambda name: _fingerprint(folder / name), names), strict=True))
        _write_durably(self._manifest(step), json.dumps(files, indent=1))
        sealed = sorted(int(path.name.split(".")[0]) for path in self._directory.glob("*.manifest.json"))
        for old in sealed[: -self._keep]:
            self._remove(old)

    def _remove(self, step: int) -> None:
        if self._folder(step).exists():
            shutil.rmtree(self._folder(step))
        self._manifest(step).unlink(missing_ok=True)  # last: a removal that was cut short is found and done again

    def _make_room(self, step: int) -> str | None:
        """Removes refused checkpoints and leftovers of interrupted saves; says what stands in the way of `step`."""
        for path in list(self._directory.iterdir()):
            match = _ENTRY.fullmatch(path.name)
            if match and match[2] and match[2] != ".manifest.json":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        while self._refused:
            self._remove(self._refused.pop())
        newest = max(self._steps(), default=step - 1)
        if newest < step:
            return None
        return (
            f"Checkpoint {step} was to be saved in {self._directory}, which already holds checkpoint {newest}; "
            "expected a later step: resume with restore_latest, or save to another directory"
        )

    def _steps(self) -> set[int]:
        """Steps with a folder, a manifest or only leftovers."""
        matches = (_ENTRY.fullmatch(path.name) for path in self._directory.iterdir())
        return {int(match[1]) for match in matches if match}

    def _newest(self) -> tuple[int | None, list[tuple[int, str]], bool]:
        """The newest whole step, the refused ones above it with the reason, and whether any save ever ended.

        A kill leaves at most one folder without its manifest: alone, it is a first save that did not end.
        """
        refused: list[tuple[int, str]] = []
        steps = self._steps()
        finished = any(self._manifest(step).exists() for step in steps) or sum(self._folder(step).exists() for step in steps) > 1
        for step in sorted(steps, reverse=True):
            reason = self._refusal(step)
            if reason is None:
                return step, refused, True
            refused.append((step, reason))
        return None, refused, finished

    def _refusal(self, step: int) -> str | None:
        """Why the step must not be used, None where every file is as its manifest says."""
        folder, manifest = self._folder(step), self._manifest(step)
        if not folder.is_dir():
            return f"its folder {folder} is missing" if manifest.exists() else "no complete save of it is there"
        if not manifest.exists():
            return f"it is half-written, {manifest.name} is missing"
        try:
            listed = json.loads(manifest.read_text())
            files = {name: (int(size), str(digest)) for name, (size, digest) in listed.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            return f"{manifest.name} is unreadable ({error})"
        if not files:
            return f"{manifest.name} lists no files"
        with ThreadPoolExecutor() as pool:
            reasons = pool.map(lambda name: _difference(folder / name, *files[name]), files)
            return next((f"file {name} {reason}" for name, reason in zip(files, reasons, strict=True) if reason), None)


def _fingerprint(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _difference(path: Path, size: int, digest: str) -> str | None:
    """What is wrong with a file; the size first, because it costs no reading."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"has {found} bytes, its manifest says {size}"
        return None if _fingerprint(path)[1] == digest else "was altered, its SHA-256 differs from its manifest's"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"is unreadable ({error})"


def _write_durably(path: Path, text: str) -> None:
    """Afterwards the file is there in full, or (a crash on the way) not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _describe(tree: Any) -> dict[str, str]:
    """Path of each leaf -> its dtype and shape, such as `float32[8, 2]`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _check_leaves(abstract_state: Any, stored: Mapping[str, str], *, where: str) -> None:
    """Raises one ValueError that names the first leaf in which the two trees differ."""
    given = _describe(abstract_state)
    paths = [*given, *(path for path in stored if path not in given)]
    differ = [path for path in paths if given.get(path) != stored.get(path)]
    if differ:
        path = differ[0]
        raise ValueError(
            f"Leaf {path} was given as {given.get(path, 'nothing')}, expected {stored.get(path, 'nothing')} as in "
            f"{where}; restore with the configuration that saved it ({len(differ)} of {len(paths)} leaves differ)"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state):
        if getattr(leaf, "sharding", None) is None:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"Leaf {name} was given without a sharding, expected a jax.ShapeDtypeStruct that has one")


def _meet(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier, at which a process whose own save has failed would wait 20 minutes for the others before it says so."""
    failure = sys.exc_info()[1]
    if failure is not None:
        raise failure
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _agree(value: Any) -> Any:
    """Process 0's value (JSON) in every process."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    padded = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
