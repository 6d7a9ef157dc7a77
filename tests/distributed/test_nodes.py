"""Runs over two hosts: two network namespaces on one machine, joined by a virtual cable, and the real launchers.

Each has a host name of its own, and an /etc/hosts with both.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, metrics, tiny_overrides

pytestmark = pytest.mark.timeout(600)
CABLE = "cable0"  # the network device of either host
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = "29500"  # a namespace has ports of its own
BITWISE = ("step", "window", "stage", "tokens", "loss", "l1", "lr", "sparsity_by_layer", "grad_norm")
STEPS = 5
BIN = Path(sys.executable).parent


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces that reach each other at ADDRESSES, and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the program ip (iproute2)")
    names = [f"prosparse-{uuid.uuid4().hex[:8]}-{number}" for number in (0, 1)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", name, "link", "set", CABLE, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


class Launch:
    """One launch on several hosts; `with Launch() as launch:` kills at its end whatever it left there."""

    def __enter__(self) -> "Launch":
        self.processes: list[subprocess.Popen] = []
        self.hosts: set[str] = set()
        self.logs: list[Path] = []
        return self

    def __exit__(self, *_) -> None:
        for host in self.hosts:
            for process in ip("netns", "pids", host).split():
                os.kill(int(process), signal.SIGKILL)
        for process in self.processes:
            process.wait(timeout=30)

    def start(self, host: str, log: Path, command: list[str], **environment: str) -> None:
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        (table := log.with_name("hosts")).write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} host-{n}\n" for n, address in enumerate(ADDRESSES))
        )
        name = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        named = ["unshare", "--uts", "sh", "-c", name, f"host-{host[-1]}", str(table)]
        with log.open("w") as file:  # exec: what ip becomes is the command itself, under the same process id
            process = subprocess.Popen(
                ["ip", "netns", "exec", host, *named, *command],
                cwd=ROOT, env=inherited | own | environment, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.processes.append(process)
        self.hosts.add(host)
        self.logs.append(log)

    def wait(self) -> list[int]:
        return [process.wait(timeout=240) for process in self.processes]

    def told(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs) + "".join(map(said, self.logs))


def each_rank(log: Path) -> Path:
    """The folder for the logs of a host's ranks, beside that of its launcher."""
    return log.with_name(f"{log.stem}-ranks")


def said(log: Path) -> str:
    """What the one rank of a host wrote into files of its own."""
    return "".join(path.read_text() for path in sorted(each_rank(log).rglob("*.log")))


Command = tuple[list[str], dict[str, str]]


def torchrun(node: int, folder: Path) -> Command:
    where = [f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}", f"--node-rank={node}"]
    where += ["--log-dir", str(each_rank(folder / f"{node}.log")), "--redirects", "3"]
    return [str(BIN / "torchrun"), "--nnodes=2", "--nproc-per-node=1", *where], {}


def deepspeed(node: int, folder: Path) -> Command:
    """With --no_ssh the names in the hostfile are labels, which nothing resolves."""
    (hostfile := folder / "hostfile").write_text("node-0 slots=1\nnode-1 slots=1\n")
    where = ["--master_addr", ADDRESSES[0], "--master_port", PORT, "--node_rank", str(node)]
    where += ["--enable_each_rank_log", str(each_rank(folder / f"{node}.log"))]
    return [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh", *where], {}


def srun(node: int, folder: Path, hosts: int = 2) -> Command:
    """What srun gives task number `node` of two; MASTER_* come from launch/slurm.sbatch."""
    each = 2 // hosts
    slurm = {"PROCID": node, "NTASKS": 2, "STEP_NUM_TASKS": 2, "LOCALID": node % each, "NODEID": node // each}
    slurm |= {"NTASKS_PER_NODE": each, "STEP_TASKS_PER_NODE": f"{each}(x{hosts})" if hosts > 1 else str(each)}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    return [sys.executable], environment | {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT}


def overrides(tiny: dict[str, Path], run_dir: Path) -> list[str]:
    """Five steps of a first stage, and a second one that does not end by itself."""
    endless = [f"recipe.stages.substitution.steps={STEPS}", "recipe.stages.rise.steps=1000000", "save.every=1000000"]
    return [*tiny_overrides(tiny, run_dir), "evaluate.every=0", "evaluate.rows=2", *endless]


def trained(run_dir: Path) -> list[dict]:
    return [{key: row[key] for key in BITWISE} for row in metrics(run_dir) if row["kind"] == "train"]


def sent(host: str) -> int:
    """The bytes that a host has sent through the cable."""
    return json.loads(ip("-n", host, "-s", "-j", "link", "show", CABLE))[0]["stats64"]["tx"]["bytes"]


@pytest.fixture(scope="module")
def on_one_host(hosts, tiny, tmp_path_factory) -> list[dict]:
    """The training of the tests below with both ranks on the first host."""
    folder = tmp_path_factory.mktemp("one_host")
    with Launch() as launch:
        for rank in (0, 1):
            command, environment = srun(rank, folder, hosts=1)
            arguments = ["launch/train.py", *overrides(tiny, folder / "run"), "until=substitution"]
            launch.start(hosts[0], folder / f"{rank}.log", [*command, *arguments], **environment)
        assert launch.wait() == [0, 0], launch.told()
    rows = trained(folder / "run")
    assert len(rows) == STEPS
    return rows


@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_two_hosts_train_bit_for_bit_what_one_host_trains(
    launcher: Callable[[int, Path], Command], hosts, on_one_host, tiny, tmp_path
):
    before = [sent(host) for host in hosts]
    with Launch() as launch:
        for node, host in enumerate(hosts):
            command, environment = launcher(node, tmp_path)
            tracked = ["tracking=wandb", "tracking.wandb=offline"] * (launcher is deepspeed)
            arguments = ["launch/train.py", *overrides(tiny, tmp_path / "run"), "until=substitution", *tracked]
            launch.start(host, tmp_path / f"{node}.log", [*command, *arguments], **environment)
        assert launch.wait() == [0, 0], launch.told()
    one, other = map(said, launch.logs)
    for words in ("preflight 2 ranks on 2 hosts in ", "x 2 ranks x", "substitution  loss"):  # of rank 0 alone
        assert words in one and words not in other, launch.told()
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*"))) == (launcher is deepspeed), launch.told()
    # In each step a rank sends at least its half of the new weights, in bf16; the file holds them in fp32.
    least = STEPS * (tiny["model"] / "model.safetensors").stat().st_size // 4
    assert all(sent(host) - old > least for host, old in zip(hosts, before, strict=True))
    assert trained(tmp_path / "run") == on_one_host


def test_under_srun_a_rank_whose_peer_on_the_other_host_is_killed_ends_by_itself_and_says_so(
    hosts, on_one_host, tiny, tmp_path
):
    with Launch() as launch:
        for node, host in enumerate(hosts):
            command, environment = srun(node, tmp_path)
            arguments = ["launch/train.py", *overrides(tiny, tmp_path / "run")]
            launch.start(host, tmp_path / f"{node}.log", [*command, *arguments], **environment)
        survivor, victim = launch.processes
        deadline = time.monotonic() + 240
        while not (tmp_path / "run" / "metrics.jsonl").is_file() or len(trained(tmp_path / "run")) <= STEPS:
            assert time.monotonic() < deadline and survivor.poll() is None, launch.told()
            time.sleep(0.1)
        victim.kill()
        assert survivor.wait(timeout=60) == 1, launch.told()
    assert trained(tmp_path / "run")[:STEPS] == on_one_host
    assert "rank 1 ended without a word" in launch.logs[0].read_text()


def test_another_config_on_the_second_host_is_refused_by_name(hosts, tiny, tmp_path):
    with Launch() as launch:
        for node, host in enumerate(hosts):
            command, environment = deepspeed(node, tmp_path)
            arguments = ["launch/train.py", *overrides(tiny, tmp_path / "run"), f"recipe.lr.peak={1e-3 / (node + 1)}"]
            launch.start(host, tmp_path / f"{node}.log", [*command, *arguments], **environment)
        assert launch.wait() == [2, 2], launch.told()
    named = "rank 1 on host host-1: recipe.lr.peak is 0.0005, elsewhere 0.001: start every rank with the same overrides"
    assert f"prosparse train: preflight: {named}\n" in said(launch.logs[0]), launch.told()
    assert "prosparse" not in said(launch.logs[1])
    assert not (tmp_path / "run").exists()


def test_other_code_on_the_second_host_is_refused_by_name(hosts, tiny, tmp_path):
    shutil.copytree(ROOT / "prosparse", tmp_path / "other" / "prosparse")
    with (tmp_path / "other" / "prosparse" / "penalty.py").open("a") as file:
        file.write("# of another version\n")
    with Launch() as launch:
        for node, host in enumerate(hosts):
            command, environment = srun(node, tmp_path)
            environment["PYTHONPATH"] = str(tmp_path / "other") if node == 1 else str(ROOT)
            launch.start(
                host,
                tmp_path / f"{node}.log",
                [*command, "launch/train.py", *overrides(tiny, tmp_path / "run"), "preflight=only"],
                **environment,
            )
        assert launch.wait() == [2, 2], launch.told()
    assert "rank 1 on host host-1: prosparse/penalty.py is of digest " in launch.logs[0].read_text(), launch.told()
    assert "prosparse train" not in launch.logs[1].read_text()
    assert not (tmp_path / "run").exists()
