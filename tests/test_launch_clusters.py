"""The launch folder's files for clusters: what can be held without one.

Scripts are linted, asked what they would do, and run with small programs in the place of gcloud, srun and jaxreason itself. The
commands that they start are read by our own parser, so that they break here when an option changes its name.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxreason.cli import main

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
TRAIN = ["train", "--config", "a name:tiny", "--workdir", "/shared/runs/mine"]
POD = {"TPU_NAME": "mine", "ZONE": "us-west4-a", "TPU_TYPE": "v5litepod-64", "SHARED": "10.0.0.2:/share"}
XPK = {"NAME": "mine", "CLUSTER": "c", "ZONE": "us-west4-a", "PROJECT": "p", "IMAGE": "i", "STORAGE": "s", "TPU_TYPE": "v6e-16"}
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

SCRIPTS = sorted(path for pattern in ("*.sh", "*.sbatch", "*.env") for path in LAUNCH.glob(pattern))


def run(
    *command: str | Path, env: dict[str, str] | None = None, given: str | None = None, seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    words, environment = [str(word) for word in command], {"HOME": os.environ["HOME"], "PATH": PATH} | (env or {})
    return subprocess.run(words, env=environment, input=given, capture_output=True, text=True, timeout=seconds)


def program(folder: Path, name: str, body: str) -> Path:
    """A program of this name in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text("#!/usr/bin/env bash\n" + body)
    file.chmod(0o755)
    return file


def parsed(words: Sequence[str]) -> Namespace:
    """A command as the program itself reads it."""
    given, rest = main.parser().parse_known_args(list(words))
    assert not [each for each in rest if not each.startswith("--config.")]
    return given


def load(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text())


# ------------------------------------------------------------------------------------------------------------------- linted


def shellcheck(*arguments: str | Path, given: str | None = None) -> subprocess.CompletedProcess[str]:
    found = shutil.which("shellcheck", path=PATH)
    assert found, "shellcheck is missing: install jaxreason[test]"
    return run(found, "--external-sources", "--source-path", ROOT, *arguments, given=given)


def test_shellcheck_finds_nothing() -> None:
    assert len(SCRIPTS) >= 8
    checked = shellcheck(*SCRIPTS)
    assert checked.returncode == 0, checked.stdout
    assert "SC2086" in shellcheck("--shell=bash", "-", given="echo $a\n").stdout  # it does look


@pytest.mark.parametrize("key", ["setup", "run"])
def test_shellcheck_finds_nothing_in_skypilot(key: str) -> None:
    checked = shellcheck("--shell=bash", "-", given=load("skypilot.yaml")[key])
    assert checked.returncode == 0, checked.stdout


def test_yamllint_finds_nothing() -> None:
    command = (sys.executable, "-m", "yamllint", "--strict", "--config-file", ROOT / ".yamllint.yaml")
    checked = run(*command, *sorted(LAUNCH.glob("*.yaml")))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "duplication" in run(*command, "-", given="---\na: 1\na: 2\n").stdout  # it does look


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_reads_it(script: Path) -> None:
    shell = "bash" if script.read_text().startswith("#!/usr/bin/env bash") else "sh"
    checked = run(shell, "-n", script)
    assert (checked.returncode, checked.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------------------- compiler flags


def flags(name: str, variable: str) -> list[str]:
    """The flags that a file adds to those that were there before."""
    read = run("sh", "-c", f'. {shlex.quote(str(LAUNCH / name))} && printf %s "${variable}"', env={variable: "--before"})
    assert read.returncode == 0, read.stderr
    before, *added = read.stdout.split()
    assert before == "--before"
    return added


def starts(xla_flags: str) -> subprocess.CompletedProcess[str]:
    code = "from jaxlib import xla_client; xla_client.make_cpu_client()"
    return run(sys.executable, "-c", code, env={"XLA_FLAGS": xla_flags})


def test_xla_knows_the_flags_for_gpus() -> None:
    """XLA reads the flags of all its platforms on each of them, and ends at one that it does not know."""
    given = flags("gpu.env", "XLA_FLAGS")
    assert given and starts(" ".join(given)).returncode == 0
    assert "Unknown flag" in starts("--xla_gpu_no_such_flag=true").stderr


@pytest.mark.parametrize("name", ["tpu.env", "gpu.env"])
def test_no_run_on_the_cpu_instead(name: str) -> None:
    """On a machine that has neither, the program ends where it would have gone on with the CPU."""
    if shutil.which("nvidia-smi") or Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists():
        pytest.skip("has an accelerator")
    code = f". {shlex.quote(str(LAUNCH / name))} && exec {shlex.quote(sys.executable)} -c 'import jax; print(jax.devices())'"
    ended = run("sh", "-c", code, env={"TPU_SKIP_MDS_QUERY": "1"})
    assert ended.returncode != 0 and ended.stdout == "", ended.stdout


COMPILE = """
import jax
from jax.experimental import topologies
for name, chips in (("v5e:2x2", 4), ("v6e:2x2", 4), ("v5:2x2x1", 4)):
    mesh = topologies.make_mesh(topologies.get_topology_desc(topology_name=name, platform="tpu"), (chips,), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((2048, 2048), "bfloat16", sharding=sharding)
    jax.jit(lambda x: x @ x, out_shardings=sharding).lower(x).compile()  # gathers
"""


@pytest.mark.slow
def test_libtpu_knows_the_flags_for_tpus() -> None:
    """For each kind of chip: libtpu refuses some flags on some of them."""
    pytest.importorskip("libtpu", reason="needs jaxreason[tpu]")
    env = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    given = " ".join(flags("tpu.env", "LIBTPU_INIT_ARGS"))
    compiled = run(sys.executable, "-c", COMPILE, env=env | {"LIBTPU_INIT_ARGS": given}, seconds=300)
    assert compiled.returncode == 0, compiled.stderr
    wrong = run(sys.executable, "-c", COMPILE, env=env | {"LIBTPU_INIT_ARGS": "--xla_no_such_flag=true"}, seconds=300)
    assert wrong.returncode != 0 and "xla_no_such_flag" in wrong.stdout + wrong.stderr


@pytest.mark.parametrize(
    ("name", "users"),
    [
        ("tpu.env", ("host.sh", "xpk.sh", "jobset.yaml", "skypilot.yaml", "Dockerfile.tpu")),
        ("gpu.env", ("slurm.sbatch", "skypilot.yaml", "Dockerfile.cuda")),
    ],
)
def test_each_platform_reads_its_own_flags(name: str, users: Sequence[str]) -> None:
    """And no other does: flags that are set for every platform end the program on the wrong one."""
    reads = re.compile(rf"(?m)(?<![\w./])\. (/opt/jaxreason/)?launch/{re.escape(name)}\b")
    texts = {path.name: path.read_text() for path in LAUNCH.iterdir() if path.suffix not in (".md", ".env")}
    assert {name for name, text in texts.items() if reads.search(text)} == set(users)
    sets = re.compile("(XLA_FLAGS|LIBTPU_INIT_ARGS)=")
    assert [name for name, text in texts.items() if sets.search(text)] == ["local.sh"]  # simulated devices


# ---------------------------------------------------------------------------------------------------------------- tpu_pod.sh


def pod(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return run(LAUNCH / "tpu_pod.sh", *arguments, env=POD | {"DRY_RUN": "1"} | (env or {}))


def calls(ended: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The gcloud commands, each without 'gcloud compute tpus' and the zone, which every one has."""
    assert (ended.returncode, ended.stderr) == (0, "")
    found = [shlex.split(line) for line in ended.stdout.splitlines()]
    for words in found:
        assert words[:3] == ["gcloud", "compute", "tpus"] and "--zone=us-west4-a" in words
    return [[word for word in words[3:] if word != "--zone=us-west4-a"] for words in found]


def on_host(words: Sequence[str]) -> list[str]:
    """What a call runs on every host by launch/host.sh."""
    assert list(words[:4]) == ["tpu-vm", "ssh", "mine", "--worker=all"] and words[4].startswith("--command=")
    remote = shlex.split(words[4].removeprefix("--command="))
    assert remote[:3] == ["env", "SHARED=10.0.0.2:/share", "jaxreason/launch/host.sh"]
    return remote[3:]


def test_pod_create() -> None:
    create, describe, answer = calls(pod("create", env={"CAPACITY": "spot", "PROJECT": "p"}))
    expected = "tpu-vm create mine --accelerator-type=v5litepod-64 --version=v2-alpha-tpuv5-lite --spot --project=p"
    assert create == expected.split()
    assert describe[:3] == ["tpu-vm", "describe", "mine"]
    assert answer[:5] == ["tpu-vm", "ssh", "mine", "--worker=all", "--command=true"]
    create, describe, _ = calls(pod("create", env={"QUEUED": "1", "TPU_TYPE": "v6e-16", "CAPACITY": "reserved"}))
    expected = "queued-resources create mine --node-id=mine --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --reserved"
    assert create == expected.split()
    assert describe == ["queued-resources", "describe", "mine", "--format=value(state.state)"]


def test_pod_commands_on_hosts() -> None:
    assert [on_host(each) for each in calls(pod("install"))] == [["install", "tpu"]]
    assert [on_host(each) for each in calls(pod("stop"))] == [["stop"]]
    describe, status = calls(pod("status"))
    assert describe == ["tpu-vm", "describe", "mine", "--format=value(state)"] and on_host(status) == ["status"]
    assert calls(pod("tail")) == [["tpu-vm", "ssh", "mine", "--worker=0", "--command=tail -n 50 -F jaxreason-run/log"]]


def test_pod_run() -> None:
    (words,) = calls(pod("run", *TRAIN, "--config.task.name='a b'"))
    started = on_host(words)
    assert started == ["run", *TRAIN, "--config.task.name='a b'", "--distributed"]
    given = parsed(started[1:])
    assert (given.config, given.workdir, given.distributed) == ("a name:tiny", Path("/shared/runs/mine"), True)


def test_pod_delete_asks_first() -> None:
    assert calls(pod("delete")) == [["tpu-vm", "delete", "mine"]]
    assert calls(pod("delete", env={"QUEUED": "1"})) == [["queued-resources", "delete", "mine", "--force"]]


def test_pod_resume_does_all_again() -> None:
    found = calls(pod("resume", *TRAIN))
    verbs = ["describe", "delete", "create", "describe", "ssh", "scp", "ssh", "ssh", "ssh"]
    assert [words[1] for words in found] == verbs
    assert found[1] == ["tpu-vm", "delete", "mine", "--quiet"]
    assert on_host(found[-2]) == ["install", "tpu"]
    assert found[-1] == calls(pod("run", *TRAIN))[0]


# gcloud, as far as tpu_pod.sh uses it: a slice whose states are the lines of a file, one a question
GCLOUD = """
printf '%s ' "$@" >>"$OUT/calls"; echo >>"$OUT/calls"
case "$4" in
describe) head -n 1 "$OUT/states"; sed -i 1d "$OUT/states" ;;
scp) cp "$5" "$OUT/sent.tar.gz" ;;
esac
"""


def with_gcloud(folder: Path, states: Sequence[str]) -> dict[str, str]:
    (folder / "states").write_text("".join(f"{state}\n" for state in states))
    program(folder / "bin", "gcloud", GCLOUD)
    program(folder / "bin", "sleep", "")
    return {"OUT": str(folder), "PATH": f"{folder / 'bin'}{os.pathsep}{PATH}", "DRY_RUN": ""}


def test_pod_waits_until_a_queued_slice_is_there(tmp_path: Path) -> None:
    ended = pod("create", env=with_gcloud(tmp_path, ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]) | {"QUEUED": "1"})
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines() == ["mine is WAITING_FOR_RESOURCES", "mine is PROVISIONING"]
    assert (tmp_path / "calls").read_text().splitlines()[-1].split()[3:6] == ["ssh", "mine", "--worker=all"]


def test_pod_resumes_what_was_preempted(tmp_path: Path) -> None:
    ended = pod("resume", *TRAIN, env=with_gcloud(tmp_path, ["PREEMPTED", "READY"]))
    assert ended.returncode == 0, ended.stderr
    verbs = [line.split()[3] for line in (tmp_path / "calls").read_text().splitlines()]
    assert verbs == ["describe", "delete", "create", "describe", "ssh", "scp", "ssh", "ssh", "ssh"]


def test_pod_leaves_a_slice_that_is_there(tmp_path: Path) -> None:
    ended = pod("resume", *TRAIN, env=with_gcloud(tmp_path, ["READY"]))
    assert ended.returncode == 2 and "mine is READY, so it was not preempted" in ended.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_pod_says_when_there_will_be_no_slice(tmp_path: Path) -> None:
    ended = pod("create", env=with_gcloud(tmp_path, ["FAILED"]) | {"QUEUED": "1"})
    assert ended.returncode == 2 and ended.stderr == "tpu_pod.sh: mine is FAILED: delete it, and ask again\n"


def test_pod_says_that_there_is_no_gcloud(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    ended = pod("status", env={"DRY_RUN": "", "PATH": str(tmp_path)})
    assert (ended.returncode, ended.stderr) == (2, "tpu_pod.sh: there is no gcloud: install the Google Cloud CLI and log in\n")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_pod_sync_sends_the_checkout(tmp_path: Path) -> None:
    assert pod("sync", env=with_gcloud(tmp_path, [])).returncode == 0
    with tarfile.open(tmp_path / "sent.tar.gz") as sent:
        members = {member.name: member for member in sent.getmembers()}
    assert {"pyproject.toml", "constraints.txt", "jaxreason/cli/main.py", "configs/quickstart.py", "launch/tpu.env"} <= set(members)
    assert members["launch/host.sh"].mode & 0o100
    assert not [name for name in members if "__pycache__" in name or name.startswith((".git/", ".venv", "runs/"))]


# ----------------------------------------------------------------------------------------------------------- one sentence each


@pytest.mark.parametrize(
    ("script", "arguments", "env", "sentence"),
    [
        ("tpu_pod.sh", ["fly"], {}, "the command is 'fly': expected create"),
        ("tpu_pod.sh", [], {}, "the command is '': expected create"),
        ("tpu_pod.sh", ["create"], {"TPU_NAME": "My Pod"}, "TPU_NAME is 'My Pod'"),
        ("tpu_pod.sh", ["create"], {"ZONE": ""}, "ZONE is ''"),
        ("tpu_pod.sh", ["create"], {"TPU_TYPE": "v5e"}, "TPU_TYPE is 'v5e'"),
        ("tpu_pod.sh", ["create"], {"TPU_TYPE": "v9x-8"}, "TPU_TYPE is 'v9x-8', whose image is not known here"),
        ("tpu_pod.sh", ["create"], {"CAPACITY": "cheap"}, "CAPACITY is 'cheap'"),
        ("tpu_pod.sh", ["install"], {"SHARED": "gs://bucket"}, "SHARED is 'gs://bucket'"),
        ("tpu_pod.sh", ["run", "evaluate"], {}, "the command to run is 'evaluate'"),
        ("tpu_pod.sh", ["run", "train", "--workdir", "gs://b/mine"], {}, "'gs://b/mine' is a bucket"),
        ("tpu_pod.sh", ["run", "train", "--distributed"], {}, "--distributed is added by this script"),
        ("tpu_pod.sh", ["resume"], {}, "the command to run is ''"),
        ("xpk.sh", ["train"], {"NAME": "a" * 40}, "NAME is 'aaaa"),
        ("xpk.sh", ["train"], {"TPU_TYPE": "big"}, "TPU_TYPE is 'big'"),
        ("xpk.sh", ["train"], {"STORAGE": ""}, "STORAGE is not set"),
        ("xpk.sh", ["train"], {"IMAGE": ""}, "IMAGE is not set"),
        ("xpk.sh", ["train"], {"RESTARTS": "-1"}, "RESTARTS is '-1'"),
        ("xpk.sh", ["sample"], {}, "the command to run is 'sample'"),
        ("host.sh", ["fly"], {}, "the command is 'fly': expected install"),
        ("host.sh", ["install", "rocm"], {}, "the extra is 'rocm'"),
        ("host.sh", ["install", "tpu"], {"SHARED": "/share"}, "SHARED is '/share'"),
        ("host.sh", ["run", "train"], {"VENV": "/no/such"}, "there is no /no/such/bin/jaxreason: install first"),
        ("slurm.sbatch", ["report"], {"SLURM_SUBMIT_DIR": str(ROOT)}, "the command to run is 'report'"),
        ("slurm.sbatch", ["train"], {"SLURM_SUBMIT_DIR": "/"}, "there is no launch/gpu.env in /"),
        ("slurm.sbatch", ["train"], {"SLURM_SUBMIT_DIR": str(ROOT), "JAXREASON": "/no/such"}, "there is no '/no/such'"),
    ],
)
def test_mistakes_are_one_sentence(script: str, arguments: Sequence[str], env: dict[str, str], sentence: str) -> None:
    settings = XPK if script == "xpk.sh" else POD if script == "tpu_pod.sh" else {}
    bash = shutil.which("bash")
    assert bash
    ended = run(bash, LAUNCH / script, *arguments, env=settings | {"DRY_RUN": "1"} | env)
    assert ended.returncode == main.MISTAKE
    assert sentence in ended.stderr and ended.stderr.count("\n") == 1
    assert ended.stdout == ""


# ------------------------------------------------------------------------------------------------------------------- host.sh

STOPPABLE = """
printf '%s\\n' "$@" >"$STATE/arguments"
printf '%s' "$JAX_PLATFORMS" >"$STATE/platforms"
trap 'echo TERM >>"$STATE/signals"; exit 75' TERM
echo begun
while true; do sleep 0.05; done
"""


def test_host_starts_and_stops_a_run(tmp_path: Path) -> None:
    """It goes on when the connection has ended, hears one SIGTERM, and leaves its code behind."""
    env = {"VENV": str(tmp_path / "venv"), "STATE": str(tmp_path / "state")}
    program(tmp_path / "venv" / "bin", "jaxreason", STOPPABLE)
    state = tmp_path / "state"

    def host(*words: str) -> str:
        ended = run(LAUNCH / "host.sh", *words, env=env)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.split(": ", 1)[1].strip()

    assert host("status") == "was not started"
    started = host("run", *TRAIN, "--distributed")
    number = int(started.removeprefix("runs as process "))
    try:
        end = time.monotonic() + 30
        while "begun" not in (state / "log").read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
        assert host("status") == started
        again = run(LAUNCH / "host.sh", "run", *TRAIN, env=env)
        assert again.returncode == 2 and f"a run is under way as process {number}" in again.stderr
        assert host("stop") == "ended with code 75"
    except BaseException:
        os.kill(number, signal.SIGKILL)
        raise
    assert host("status") == host("stop") == "ended with code 75"
    assert (state / "signals").read_text() == "TERM\n"
    assert parsed((state / "arguments").read_text().splitlines()).distributed
    assert (state / "platforms").read_text() == "tpu,cpu"


# -------------------------------------------------------------------------------------------------------------- slurm.sbatch


def sbatch_options() -> dict[str, str]:
    lines = [line.split()[1] for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.removeprefix("--").partition("=") for line in lines)}


def test_slurm_has_a_process_a_gpu() -> None:
    """JAX gives process I of a node its GPU I, so each process has to see all of them."""
    options = sbatch_options()
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert not {"gpus-per-task", "gpu-bind"} & set(options)
    assert re.fullmatch(r"TERM@\d+", options["signal"])  # B: would send it to the script alone
    assert "requeue" in options and options["open-mode"] == "append"


@pytest.mark.parametrize("code", [main.DONE, main.MISTAKE, main.NON_FINITE, main.INTERRUPTED, 137])
def test_slurm_queues_again_what_was_interrupted(tmp_path: Path, code: int) -> None:
    program(tmp_path, "srun", f'printf "%s\\n" "$@" >"$OUT/srun"; printf %s "$XLA_FLAGS" >"$OUT/flags"; exit {code}')
    program(tmp_path, "scontrol", 'echo "$@" >"$OUT/asked"')
    jaxreason = program(tmp_path, "jaxreason", "")
    env = {"OUT": str(tmp_path), "PATH": f"{tmp_path}{os.pathsep}{PATH}", "JAXREASON": str(jaxreason)}
    ended = run(LAUNCH / "slurm.sbatch", *TRAIN, env=env | {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "17"})
    assert ended.returncode == code, ended.stderr
    assert (tmp_path / "asked").exists() == (code == main.INTERRUPTED)
    if code == main.INTERRUPTED:
        assert (tmp_path / "asked").read_text() == "requeue 17\n"
    words = (tmp_path / "srun").read_text().splitlines()
    own = words.index(str(jaxreason))
    assert words[own + 1 :] == [*TRAIN, "--distributed"] and parsed(words[own + 1 :]).distributed
    assert "--kill-on-bad-exit=0" in words[:own]  # it would send a second SIGTERM
    assert (tmp_path / "flags").read_text().split() == flags("gpu.env", "XLA_FLAGS")


# --------------------------------------------------------------------------------------------------------- xpk and the JobSet


def test_xpk() -> None:
    ended = run(LAUNCH / "xpk.sh", *TRAIN, env=XPK | {"DRY_RUN": "1"})
    assert (ended.returncode, ended.stderr) == (0, "")
    (line,) = ended.stdout.splitlines()
    program_name, group, verb, *options = shlex.split(line)
    assert (program_name, group, verb) == ("xpk", "workload", "create")
    given = dict(each.removeprefix("--").split("=", 1) for each in options)
    assert {"workload": "mine", "tpu-type": "v6e-16", "max-restarts": "20"}.items() <= given.items()
    assert given["restart-on-exit-codes"] == str(main.INTERRUPTED)
    assert int(given["termination-grace-period-seconds"]) >= 300
    before, _, command = given["command"].partition(" && exec jaxreason ")
    assert before == ". /opt/jaxreason/launch/tpu.env"
    assert parsed(shlex.split(command)).workdir == Path("/shared/runs/mine")


# What each level of the manifest may and must hold, of the JobSet and Job API.
JOBSET: dict[str, tuple[set[str], set[str]]] = {
    "": ({"apiVersion", "kind", "metadata", "spec"}, set()),
    "metadata": ({"name", "labels", "annotations"}, set()),
    "spec": ({"failurePolicy", "replicatedJobs"}, {"ttlSecondsAfterFinished"}),
    "spec.failurePolicy": ({"maxRestarts", "rules"}, set()),
    "spec.failurePolicy.rules.0": ({"action", "onJobFailureReasons"}, set()),
    "spec.replicatedJobs.0": ({"name", "replicas", "template"}, set()),
    "spec.replicatedJobs.0.template": ({"spec"}, set()),
    "spec.replicatedJobs.0.template.spec": (
        {"parallelism", "completions", "backoffLimit", "podFailurePolicy", "template"},
        {"completionMode"},
    ),
    "spec.replicatedJobs.0.template.spec.template.spec": (
        {"restartPolicy", "terminationGracePeriodSeconds", "nodeSelector", "tolerations", "containers", "volumes"},
        {"hostNetwork", "dnsPolicy"},
    ),
    "spec.replicatedJobs.0.template.spec.template.spec.containers.0": (
        {"name", "image", "command", "args", "resources", "volumeMounts"},
        {"securityContext"},
    ),
}


def at(document: Any, path: str) -> Any:
    for key in path.split(".") if path else ():
        document = document[int(key)] if key.isdigit() else document[key]
    return document


def wrong_keys(document: Any) -> list[str]:
    wrong = []
    for path, (required, optional) in JOBSET.items():
        keys = set(at(document, path))
        wrong += [f"{path}.{key}" for key in (required - keys) | (keys - required - optional)]
    return wrong


def test_jobset_keys() -> None:
    document = load("jobset.yaml")
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert wrong_keys(document) == []
    del document["spec"]["failurePolicy"]["maxRestarts"]
    document["spec"]["queue"] = "tpu-queue"
    assert sorted(wrong_keys(document)) == ["spec.failurePolicy.maxRestarts", "spec.queue"]
    assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    annotations = document["metadata"]["annotations"]
    assert annotations == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}


def test_jobset_has_a_pod_a_host() -> None:
    job = load("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod_spec = job["template"]["spec"]
    (container,) = pod_spec["containers"]
    selector = pod_spec["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    chips = math.prod(int(size) for size in selector["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] == chips / container["resources"]["limits"]["google.com/tpu"]
    assert pod_spec["terminationGracePeriodSeconds"] >= 300
    mounts = {each["name"] for each in container["volumeMounts"]}
    assert mounts == {each["name"] for each in pod_spec["volumes"]}
    given = parsed(container["args"])
    assert given.distributed and str(given.workdir).startswith("/shared/")


def test_jobset_restarts_as_the_exit_codes_say() -> None:
    spec = load("jobset.yaml")["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    rules = {rule["action"]: rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"]}
    name = job["template"]["spec"]["containers"][0]["name"]
    assert rules == {
        "FailJob": {"containerName": name, "operator": "In", "values": [main.MISTAKE, main.NON_FINITE]},
        "Count": {"containerName": name, "operator": "In", "values": [main.INTERRUPTED]},
    }
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["failurePolicy"]["maxRestarts"] > 0  # any failure restarts all, but for this rule's
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]


# ------------------------------------------------------------------------------------------------------------- skypilot.yaml


def test_skypilot_keys() -> None:
    task = load("skypilot.yaml")
    assert set(task) == {"name", "workdir", "resources", "num_nodes", "envs", "setup", "run"}
    assert set(task["resources"]) == {"accelerators", "use_spot", "job_recovery"}
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [main.INTERRUPTED]}
    assert task["envs"]["SHARED"] is None  # SkyPilot then demands it
    assert all(isinstance(value, str | None) for value in task["envs"].values())


@pytest.mark.parametrize("gpus", [False, True])
def test_skypilot_joins_the_nodes(tmp_path: Path, gpus: bool) -> None:
    """Its command, run in a copy of the folder as node 2 of 3, arrives as process 2 with the first node's address."""
    task = load("skypilot.yaml")
    (tmp_path / "launch").mkdir()
    for name in ("tpu.env", "gpu.env"):
        shutil.copy(LAUNCH / name, tmp_path / "launch")
    report = 'printf "%s\\n" "$@" >arguments; env >environment; exit 75'
    program(tmp_path / ".venv" / "bin", "jaxreason", report)
    program(tmp_path / "bin", "nvidia-smi", f"exit {0 if gpus else 9}")
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3", "SKYPILOT_NUM_NODES": "3", "SKYPILOT_NODE_RANK": "2"}
    env = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{PATH}", "CONFIG": "a name:tiny", "RUN": "mine"} | nodes
    ended = subprocess.run(["bash", "-c", task["run"]], env=env, cwd=tmp_path, timeout=60)
    assert ended.returncode == 75  # the program's own
    given = parsed((tmp_path / "arguments").read_text().splitlines())
    assert (given.coordinator, given.processes, given.process) == ("10.0.0.1:8476", 3, 2)
    assert (given.config, given.workdir) == ("a name:tiny", Path("/shared/runs/mine"))
    environment = (tmp_path / "environment").read_text()
    assert ("XLA_FLAGS=" in environment, "LIBTPU_INIT_ARGS=" in environment) == (gpus, not gpus)


# ---------------------------------------------------------------------------------------------------------------- Dockerfiles


def instructions(name: str) -> list[tuple[str, str]]:
    lines = [line for line in (LAUNCH / name).read_text().splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


@pytest.mark.parametrize(("extra", "env"), [("tpu", "tpu.env"), ("cuda", "gpu.env")])
def test_image(tmp_path: Path, extra: str, env: str) -> None:
    """What it copies is there; its entry point, run here, is replaced by the program with the flags set."""
    steps = instructions(f"Dockerfile.{extra}")
    found = dict(steps)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", found["FROM"])
    copied = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    assert {"pyproject.toml", "constraints.txt", "jaxreason", "configs", f"launch/{env}"} <= set(copied)
    assert f"-c constraints.txt '.[{extra}]'" in found["RUN"]
    assert found.get("USER") == (None if extra == "tpu" else "jaxreason")

    program(tmp_path, "jaxreason", 'printf "%s\\n" "$@" >"$OUT/arguments"; echo "$$" >"$OUT/process"; exit 75')
    entry = [word.replace("/opt/jaxreason", str(ROOT)) for word in json.loads(found["ENTRYPOINT"])]
    process = subprocess.Popen([*entry, *TRAIN], env={"PATH": f"{tmp_path}{os.pathsep}{PATH}", "OUT": str(tmp_path)})
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "arguments").read_text().splitlines() == TRAIN
    assert int((tmp_path / "process").read_text()) == process.pid  # SIGTERM to the container's first process reaches it
    command = load("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert extra == "cuda" or command == json.loads(found["ENTRYPOINT"])  # the manifest says it again


def test_slurm_leaves_it_when_told_to_stop(tmp_path: Path) -> None:
    program(tmp_path, "srun", f"exit {main.INTERRUPTED}")
    program(tmp_path, "scontrol", 'echo "$@" >"$OUT/asked"')
    program(tmp_path / ".venv" / "bin", "jaxreason", "")
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "gpu.env", tmp_path / "launch")
    env = {"OUT": str(tmp_path), "PATH": f"{tmp_path}{os.pathsep}{PATH}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17"}
    for name, queued in (("slurm-18.stop", True), ("slurm-17.stop", False)):
        (tmp_path / name).touch()
        assert run(LAUNCH / "slurm.sbatch", *TRAIN, env=env).returncode == main.INTERRUPTED
        assert (tmp_path / "asked").exists() == queued
        (tmp_path / "asked").unlink(missing_ok=True)


# srun, as far as it matters: two processes with Slurm's variables; the first time both get SIGTERM after a step
SRUN = """
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do
    SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=2 SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids+=("$!")
done
if [[ ! -e $OUT/asked ]]; then
    until [[ -s $OUT/run/metrics.jsonl ]]; do kill -0 "${pids[@]}" || exit 1; sleep 0.1; done
    kill -TERM "${pids[@]}"
fi
highest=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    [[ $code -le $highest ]] || highest=$code
done
exit "$highest"
"""


@pytest.mark.slow
def test_slurm_variables_make_one_run(tmp_path: Path) -> None:
    """Two real processes find each other by --distributed alone, save at SIGTERM, are queued again, and end the run."""
    program(tmp_path, "srun", SRUN)
    program(tmp_path, "scontrol", 'echo "$@" >"$OUT/asked"')
    jaxreason = program(tmp_path, "jaxreason", f'exec {shlex.quote(sys.executable)} -m jaxreason "$@"')
    env = {
        "HOME": os.environ["HOME"],
        "PATH": f"{tmp_path}{os.pathsep}{PATH}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "OUT": str(tmp_path),
        "JAXREASON": str(jaxreason),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),  # JAX takes the port from it
    }
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"]
    command = [str(LAUNCH / "slurm.sbatch"), "train", "--config", "quickstart:tiny", "--workdir", str(tmp_path / "run"), *mesh]
    first = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert first.returncode == main.INTERRUPTED, first.stdout + first.stderr
    assert (tmp_path / "asked").read_text() == f"requeue {os.getpid()}\n"
    assert not (tmp_path / "run" / "summary.json").exists()
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == main.DONE, again.stdout + again.stderr
    assert "resuming stage" in again.stdout
    assert (tmp_path / "run" / "summary.json").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kinds = [(row["stage"], row["step"], *row) for row in rows]
    assert len(kinds) > 4 and len(kinds) == len(set(kinds))  # written by one process, and no step twice
