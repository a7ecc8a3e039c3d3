"""Checkpoints are whole or refused: real files, real corruption, a real child process that is killed."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxreason.batch import TrainState
from jaxreason.training.checkpoint import Checkpointer

ROOT = Path(__file__).parents[2]


def make_mesh(rows: int, columns: int) -> Mesh:
    return jax.make_mesh((rows, columns), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def placed(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Matrices are sharded by `spec`, all else is replicated."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec())), tree)


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def make_state(step: int, *, size: int = 64) -> TrainState:
    """A state that is a function of the step, so that a restored one can be told from every other."""
    noise = np.random.default_rng(step).normal(size=(size, size))
    params = {
        "w": jnp.asarray(noise, jnp.float32),
        "half": jnp.asarray(noise[0], jnp.bfloat16),
        "count": jnp.arange(size, dtype=jnp.int32) + step,
    }
    floats = {"w": params["w"], "half": params["half"]}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))  # EmptyState, tuples, NamedTuples
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), optimizer.init(floats))
    state = TrainState(step=jnp.asarray(step, jnp.int32), params=params, opt_state=opt_state, algorithm={})
    return placed(state, make_mesh(4, 2), PartitionSpec("data", "model"))


def bits(tree: Any) -> list[tuple[str, str, bytes]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), str(leaf.dtype), np.asarray(leaf).tobytes()) for path, leaf in leaves]


def assert_same(given: Any, expected: Any) -> None:
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    assert bits(given) == bits(expected)


@pytest.fixture
def checkpointer(tmp_path: Path) -> Iterator[Checkpointer]:
    with closing(Checkpointer(tmp_path / "run")) as it:
        yield it


@pytest.fixture
def saved(checkpointer: Checkpointer, tmp_path: Path) -> Path:
    """A directory with whole checkpoints 1 and 2."""
    for step in (1, 2):
        checkpointer.save(step, make_state(step), {"seen": step})
    checkpointer.wait()
    return tmp_path / "run"


def biggest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_round_trip_is_bitwise(checkpointer: Checkpointer) -> None:
    state, extra = make_state(3), {"position": [1, 2], "name": "x", "none": None}
    checkpointer.save(3, state, extra)
    extra["name"] = "changed after the save"
    restored = checkpointer.restore_latest(abstract(state))
    assert restored is not None and restored.step == 3 and restored.rejected == []
    assert restored.extra == {"position": [1, 2], "name": "x", "none": None}
    assert_same(restored.state, make_state(3))


def test_an_empty_directory_has_no_checkpoint(checkpointer: Checkpointer) -> None:
    assert checkpointer.restore_latest(abstract(make_state(0))) is None


def test_a_chosen_step_is_restored(checkpointer: Checkpointer, saved: Path) -> None:
    restored = checkpointer.restore(1, abstract(make_state(0)))
    assert restored.step == 1 and restored.extra == {"seen": 1}
    assert_same(restored.state, make_state(1))
    with pytest.raises(ValueError, match="Checkpoint 7 in .* was refused: no complete save of it is there"):
        checkpointer.restore(7, abstract(make_state(0)))


@pytest.fixture
def x64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def test_float64_is_bitwise(checkpointer: Checkpointer, x64: None) -> None:
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)))
    state = placed({"d": noise}, make_mesh(8, 1), PartitionSpec("data"))
    assert state["d"].dtype == jnp.float64
    checkpointer.save(1, state, {})
    restored = checkpointer.restore_latest(abstract(state))
    assert restored is not None
    assert_same(restored.state, state)
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(ValueError, match=r"Leaf \['d'\] was given as float64\[8, 8\].*jax_enable_x64"):
        checkpointer.restore_latest({"d": jax.ShapeDtypeStruct((8, 8), np.float64, sharding=state["d"].sharding)})


@pytest.mark.parametrize("spec", [PartitionSpec("data", "model"), PartitionSpec()])
def test_the_state_may_be_donated_at_once(checkpointer: Checkpointer, spec: PartitionSpec) -> None:
    """The buffers are overwritten while the save runs; big enough (16 MB) that the save is not over by then."""
    mesh = make_mesh(4, 2)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: -x - jnp.ones((), x.dtype), tree), donate_argnums=0)
    for step in range(1, 5):
        state = placed({str(i): jnp.full((1024, 1024), float(step + i)) for i in range(4)}, mesh, spec)
        template = abstract(state)
        jax.block_until_ready(state)
        checkpointer.save(step, state, {})
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        restored = checkpointer.restore_latest(template)
        assert restored is not None and restored.step == step
        for i in range(4):
            assert (np.asarray(restored.state[str(i)]) == step + i).all()


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (1, 1)])
def test_another_mesh(checkpointer: Checkpointer, saved: Path, shape: tuple[int, int]) -> None:
    devices = np.asarray(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    template = abstract(placed(make_state(0), mesh, PartitionSpec("model", "data")))
    restored = checkpointer.restore_latest(template)
    assert restored is not None
    assert_same(restored.state, make_state(2))
    assert [x.sharding for x in jax.tree.leaves(restored.state)] == [x.sharding for x in jax.tree.leaves(template)]


def truncate(folder: Path) -> None:
    path = biggest(folder)
    os.truncate(path, path.stat().st_size - 1)


def flip(folder: Path) -> None:
    path = biggest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_a_file(folder: Path) -> None:
    biggest(folder).unlink()


def lose_the_manifest(folder: Path) -> None:
    folder.with_name("2.manifest.json").unlink()


def garble_the_manifest(folder: Path) -> None:
    path = folder.with_name("2.manifest.json")
    path.write_text(path.read_text()[:-20])


def lose_the_folder(folder: Path) -> None:
    folder.rename(folder.parents[1] / "elsewhere")


def leave_only_a_temporary_folder(folder: Path) -> None:
    folder.rename(folder.with_name("2.orbax-checkpoint-tmp"))
    folder.with_name("2.manifest.json").unlink()


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (truncate, r"file state/.* has \d+ bytes, its manifest says \d+\."),
    (flip, r"file state/.* was altered, its SHA-256 differs from its manifest's\."),
    (lose_a_file, r"file state/.* is missing\."),
    (lose_the_manifest, r"it is half-written, 2.manifest.json is missing\."),
    (garble_the_manifest, r"2.manifest.json is unreadable \(.*\)\."),
    (lose_the_folder, r"its folder .* is missing\."),
    (leave_only_a_temporary_folder, r"no complete save of it is there\."),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    checkpointer: Checkpointer, saved: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(saved / "2")
    before = sorted(path.name for path in saved.iterdir())
    restored = checkpointer.restore_latest(abstract(make_state(0)))
    assert restored is not None and restored.step == 1 and restored.extra == {"seen": 1}
    assert_same(restored.state, make_state(1))
    (sentence,) = restored.rejected
    assert re.fullmatch(f"Checkpoint 2 was refused: {reason}", sentence), sentence
    assert sorted(path.name for path in saved.iterdir()) == before  # restoring deletes nothing

    checkpointer.save(2, make_state(2), {"seen": "again"})  # the run goes on and comes to the same step
    again = checkpointer.restore_latest(abstract(make_state(0)))
    assert again is not None and (again.step, again.extra, again.rejected) == (2, {"seen": "again"}, [])
    assert_same(again.state, make_state(2))
    assert sorted(path.name for path in saved.iterdir()) == ["1", "1.manifest.json", "2", "2.manifest.json"]


def test_all_refused_is_an_error(checkpointer: Checkpointer, saved: Path) -> None:
    flip(saved / "1")
    lose_the_manifest(saved / "2")
    with pytest.raises(ValueError, match=r"Every checkpoint in .*Checkpoint 2 .*half-written.*Checkpoint 1 .*altered"):
        checkpointer.restore_latest(abstract(make_state(0)))
    assert (saved / "1").is_dir() and (saved / "2").is_dir()


def test_leftovers_of_a_first_save_are_no_checkpoint(checkpointer: Checkpointer, tmp_path: Path) -> None:
    (tmp_path / "run" / "1.orbax-checkpoint-tmp").mkdir()
    assert checkpointer.restore_latest(abstract(make_state(0))) is None
    checkpointer.save(1, make_state(1), {})
    checkpointer.wait()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "1.manifest.json"]


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_stay_with_their_manifests(tmp_path: Path, keep: int) -> None:
    with closing(Checkpointer(tmp_path, keep=keep)) as checkpointer:
        for step in (1, 5, 9, 10, 11):
            checkpointer.save(step, make_state(step), {})
    expected = {1: ["11", "11.manifest.json"], 2: ["10", "10.manifest.json", "11", "11.manifest.json"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == expected[keep]


def test_an_interrupted_removal_is_completed(checkpointer: Checkpointer, saved: Path) -> None:
    biggest(saved / "1").unlink()  # 1 was on its way out when the process died
    (saved / "0.manifest.json").write_text("{}")  # and of 0 only the manifest was left
    checkpointer.save(3, make_state(3), {})
    checkpointer.wait()
    assert sorted(path.name for path in saved.iterdir()) == ["2", "2.manifest.json", "3", "3.manifest.json"]


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep was 0, expected at least 1"):
        Checkpointer(tmp_path, keep=0)


def test_a_checkpoint_that_was_not_refused_is_never_overwritten(checkpointer: Checkpointer, saved: Path) -> None:
    lose_the_manifest(saved / "2")  # half-written, but nobody has looked at it
    for step in (1, 2):
        with pytest.raises(ValueError, match=rf"Checkpoint {step} .* already holds checkpoint 2; expected a later step"):
            checkpointer.save(step, make_state(step), {})
    assert (saved / "1").is_dir() and (saved / "2").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda params: params | {"w": jnp.zeros((64, 32))},
            r"\['w'\] was given as float32\[64, 32\], expected float32\[64, 64\]",
        ),
        (
            lambda params: params | {"w": jnp.zeros((64, 64), jnp.bfloat16)},
            r"\['w'\] was given as bfloat16\[64, 64\], expected fl",
        ),
        (lambda params: params | {"new": jnp.zeros(2)}, r"\['new'\] was given as float32\[2\], expected nothing"),
        (
            lambda params: {"w": params["w"], "half": params["half"]},
            r"\['count'\] was given as nothing, expected int32\[64\]",
        ),
    ],
    ids=["shape", "dtype", "new leaf", "lost leaf"],
)
def test_another_tree_is_named(checkpointer: Checkpointer, saved: Path, change: Callable[[Any], Any], message: str) -> None:
    state = make_state(0)
    given = state.replace(params=change(state.params))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"Leaf \.params" + message + r".*checkpoint 2 in .*\(1 of \d+ leaves differ\)"):
        checkpointer.restore_latest(abstract(given))


def test_a_leaf_needs_a_sharding(checkpointer: Checkpointer, saved: Path) -> None:
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state(0))
    with pytest.raises(ValueError, match=r"Leaf \.step was given without a sharding"):
        checkpointer.restore_latest(template)


def test_extra_must_be_json(checkpointer: Checkpointer) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(1, make_state(1), {"array": np.zeros(2)})
    assert checkpointer.restore_latest(abstract(make_state(0))) is None


# tensorstore reports the other writes of the failed save to an event loop that orbax has closed by then
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_fails_is_reported_once_and_can_be_repeated(checkpointer: Checkpointer, saved: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = make_state(3, size=512)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as if the disk were full
        with pytest.raises(Exception, match="(?i)file too large"):  # the type is orbax's choice
            checkpointer.save(3, state, {})
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    restored = checkpointer.restore_latest(abstract(make_state(0)))
    assert restored is not None and restored.step == 2
    checkpointer.save(3, state, {})
    again = checkpointer.restore_latest(abstract(state))
    assert again is not None and again.step == 3
    assert_same(again.state, state)


CHILD = """
import itertools, sys, warnings
from pathlib import Path
warnings.simplefilter("error")
sys.path[:0] = sys.argv[2:4]
from test_checkpoint import Checkpointer, abstract, assert_same, make_state
checkpointer = Checkpointer(Path(sys.argv[1]))
restored = checkpointer.restore_latest(abstract(make_state(0)))
if restored is not None:
    assert_same(restored.state, make_state(restored.step))
    assert restored.extra == {"seen": restored.step}
sys.stdout.write("go\\n"); sys.stdout.flush()
for step in itertools.count(1 + (restored.step if restored else 0)):
    checkpointer.save(step, make_state(step), {"seen": step})
"""


@pytest.mark.slow
def test_a_killed_run_resumes_from_a_consistent_state(tmp_path: Path) -> None:
    """kill -9 of a real process that saves without pause, three times, each resuming from the one before."""
    moments, reached = np.random.default_rng(0), 0
    for _ in range(3):
        command = [sys.executable, "-c", CHILD, str(tmp_path), str(ROOT), str(Path(__file__).parent)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout is not None
        started = child.stdout.readline() == "go\n"
        deadline = time.monotonic() + 60
        sealed = tmp_path / f"{reached + 1}.manifest.json"  # from here on there is something to resume from
        while child.poll() is None and not sealed.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.3))
        child.send_signal(signal.SIGKILL)
        errors = child.communicate()[1]
        assert started and child.returncode == -signal.SIGKILL, errors
        with closing(Checkpointer(tmp_path)) as checkpointer:
            restored = checkpointer.restore_latest(abstract(make_state(0)))
        assert restored is not None and restored.step > reached
        assert_same(restored.state, make_state(restored.step))
        assert restored.extra == {"seen": restored.step}
        reached = restored.step


PROCESS = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("error")
sys.path[:0] = sys.argv[4:6]
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from test_checkpoint import Checkpointer, abstract, flip, make_mesh

def values(step):
    return np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32)

def make(step, mesh, spec):
    whole = values(step)
    return {"w": jax.make_array_from_callback(whole.shape, NamedSharding(mesh, spec), lambda index: whole[index])}

def check(restored, step, refused):
    assert (restored.step, restored.extra) == (step, {"seen": step}), restored
    assert len(restored.rejected) == refused, restored.rejected
    for shard in restored.state["w"].addressable_shards:
        assert (np.asarray(shard.data) == values(step)[shard.index]).all()

directory = Path(sys.argv[1])
checkpointer = Checkpointer(directory)
for step in (1, 2, 3):
    checkpointer.save(step, make(step, make_mesh(4, 2), PartitionSpec("data", "model")), {"seen": step})
checkpointer.wait()
names = sorted(path.name for path in directory.iterdir())
assert names == ["2", "2.manifest.json", "3", "3.manifest.json"], names
jax.experimental.multihost_utils.sync_global_devices("names were read")
if jax.process_index() == 0:
    flip(directory / "3")
other = make(0, make_mesh(2, 4), PartitionSpec("model"))
check(checkpointer.restore_latest(abstract(other)), 2, refused=1)
try:
    checkpointer.save(2, other, {})
    raise AssertionError("checkpoint 2 was overwritten")
except ValueError as error:
    assert "already holds checkpoint 2" in str(error), error
checkpointer.save(3, make(3, make_mesh(2, 4), PartitionSpec()), {"seen": 3})
check(checkpointer.restore_latest(abstract(other)), 3, refused=0)
checkpointer.close()

# a larger one: each process writes about its half of the bytes, and reads no more than its shards
def bytes_read():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

whole = np.random.default_rng(0).normal(size=(1024, 2048)).astype(np.float32)
sharded = NamedSharding(make_mesh(4, 2), PartitionSpec("data", "model"))
state = {"w": jax.make_array_from_callback(whole.shape, sharded, lambda index: whole[index])}
checkpointer = Checkpointer(directory / "large")
checkpointer.save(1, state, {})
checkpointer.wait()
def stored(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

folder = directory / "large" / "1" / "state"
total = stored(folder)
assert 0.4 * total < stored(folder / f"ocdbt.process_{jax.process_index()}") < 0.6 * total
if Path("/proc/self/io").exists():
    before = bytes_read()
    restored = checkpointer.restore(1, abstract(state)).state["w"]
    share = (bytes_read() - before) / total
    compared = jax.process_index() == 0  # process 0 reads all of it, to compare it with the manifest
    assert 0.4 + compared < share < 0.6 + compared, share
    assert all((np.asarray(shard.data) == whole[shard.index]).all() for shard in restored.addressable_shards)
checkpointer.close()
"""


def test_two_processes_agree(tmp_path: Path) -> None:
    """Two processes of four devices save one sharded state, agree on what is refused, and restore on another mesh."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    paths = [str(ROOT), str(Path(__file__).parent)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path / "run"), address, str(index), *paths],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
