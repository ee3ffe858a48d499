"""Masked rounds of a whole Flower deployment on loopback: the twin of `maskwork bench round`.

    benchmarks/peers/.venv/bin/python benchmarks/peers/flower_round.py --participants 4 --params 100000 --plain

A `flower-superlink`, a `flower-supernode` for each participant, and the app in `app/`, which trains nothing; every
command is Flower's own with its own defaults. Over TLS, and each SuperNode signs its requests with a key of its own
that the SuperLink knows (`--enable-supernode-auth`): Flower has no mutual TLS, and this is the nearest to it.

SuperNodes reach the SuperLink through a relay that counts bytes, and the memory of all processes is looked at four
times a second. `--bare` leaves both out, which shows what they cost.

Rules it upholds:

1. Every process is this script's own, and is ended by its id, with the children that it had, whatever happens.
2. Nothing waits longer than `--timeout`.
3. Nothing reaches beyond this machine: telemetry, update checks and installing at run time are switched off.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import ipaddress
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST: Final = "127.0.0.1"
APP: Final = Path(__file__).parent / "app"
COMMANDS: Final = Path(sys.executable).parent
SUPERLINK: Final = "superlink"
CONNECTION: Final = "bench"
WARM_UP: Final = 1
"""Rounds at the beginning of each run that are not counted."""
MIB: Final = 1 << 20
LOOK_EVERY_S: Final = 0.25
STOP_GRACE_S: Final = 10.0


class RunFailed(Exception):
    """The deployment did not do what it should; says what to read."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured."""

    participants: int
    params: int
    rounds: int
    plain: bool
    bare: bool
    timeout_s: float


# --- files ----------------------------------------------------------------------------------------------------------


def write_certificates(folder: Path) -> None:
    """A CA, and the SuperLink's certificate for this machine's loopback: ca.pem, cert.pem, key.pem."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench CA")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "superlink")])
    now = datetime.datetime.now(datetime.UTC)

    def unsigned(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    ca = unsigned(ca_name, ca_key.public_key()).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST)), x509.DNSName("localhost")])
    own = unsigned(name, key.public_key()).add_extension(loopback, False)
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    (folder / "cert.pem").write_bytes(own.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    _write_private(folder / "key.pem", key, serialization.PrivateFormat.PKCS8)


def write_node_key(folder: Path, name: str) -> None:
    """A SuperNode's key pair, as Flower reads it: NAME.key and NAME.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(folder / f"{name}.key", key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public)


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def free_port() -> int:
    """One that nobody listens at just now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


# --- processes ------------------------------------------------------------------------------------------------------


def tree(pid: int) -> list[int]:
    """A process and all its descendants, as far as they are still there."""
    found = [pid]
    for parent in found:
        for thread in Path(f"/proc/{parent}/task").glob("*/children"):  # a child belongs to the thread that started it
            with suppress(OSError):
                found += [int(child) for child in thread.read_text().split()]
    return found


def started_at(pid: int) -> str | None:
    """When a process began, by which it is told from a later one of the same id; None if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def pss_bytes(pid: int) -> int:
    """Proportional set size: a page that several processes share counts once among them. 0 if it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


class Processes:
    """The deployment's processes: started, watched, ended by their ids."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """Logs go into the folder."""
        self._folder = folder
        self._environment = environment
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        """Run one of Flower's commands."""
        with (self._folder / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(
                [str(COMMANDS / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,
            )

    def pids(self) -> dict[str, int]:
        """Of all that were started, by name."""
        return {name: process.pid for name, process in self._running.items()}

    def check(self) -> None:
        """Raises RunFailed if one has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise RunFailed(f"{name} ended with {process.returncode}; its log ends:\n{self.log_tail(name)}")

    def log_tail(self, name: str) -> str:
        """The end of a process's log."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-3000:]

    def end(self) -> None:
        """End them all, SuperNodes first, and wait; what does not end of its own is killed, children too."""
        order = sorted(self._running.items(), key=lambda item: item[0] == SUPERLINK)
        descendants = {pid: started_at(pid) for _, process in order for pid in tree(process.pid)[1:]}
        for _, process in order:
            with suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + STOP_GRACE_S
        for _, process in order:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        while time.monotonic() < deadline and any(began and started_at(p) == began for p, began in descendants.items()):
            time.sleep(0.1)
        for pid, began in descendants.items():
            if began and started_at(pid) == began:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._running.clear()


@dataclass(slots=True)
class Memory:
    """The peak of every process with its children, in a thread of its own."""

    roots: Mapping[str, int]
    peaks: dict[str, int] = field(default_factory=dict)
    _end: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Read it once."""
        for name, root in self.roots.items():
            self.peaks[name] = max(self.peaks.get(name, 0), sum(map(pss_bytes, tree(root))))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look again and again."""
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()

    def _watch(self) -> None:
        while not self._end.wait(LOOK_EVERY_S):
            self.look()

    def in_mib(self) -> dict[str, float]:
        """Of the server's side, and of the participant that took most."""
        nodes = [peak for name, peak in self.peaks.items() if name != SUPERLINK]
        return {
            "superlink and serverapp": round(self.peaks[SUPERLINK] / MIB, 1),
            "supernode and clientapp": round(max(nodes) / MIB, 1),
        }


# --- the relay ------------------------------------------------------------------------------------------------------


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, count: Callable[[int], None]) -> None:
    with suppress(OSError):
        while piece := await source.read(1 << 18):
            count(len(piece))
            sink.write(piece)
            await sink.drain()
    sink.close()


def relay(port: int, target: int, counted: Any) -> None:  # noqa: ANN401 - multiprocessing's arrays have no public type
    """Pass connections on and count: up in counted[0], down in counted[1].

    In a process of its own; runs until it is ended.
    """

    def counter(direction: int) -> Callable[[int], None]:
        def count(size: int) -> None:
            counted[direction] += size

        return count

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            there, back = await asyncio.open_connection(HOST, target)
            await asyncio.gather(_pump(reader, back, counter(0)), _pump(there, writer, counter(1)))

    async def run() -> None:
        server = await asyncio.start_server(serve, HOST, port)
        await server.serve_forever()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(run())


@contextmanager
def relaying(port: int, target: int) -> Iterator[Any]:
    """A relay, and what it has counted."""
    spawn = multiprocessing.get_context("spawn")
    counted = spawn.Array("q", 2, lock=False)  # only the relay's one thread writes
    process = spawn.Process(target=relay, args=(port, target, counted), daemon=True)
    process.start()
    try:
        yield counted
    finally:
        process.kill()
        process.join()


# --- the deployment -------------------------------------------------------------------------------------------------


class Deployment:
    """A SuperLink and SuperNodes, and the command that starts runs on it."""

    def __init__(self, folder: Path, options: Options) -> None:
        """Write all files; nothing is started."""
        self._folder, self._options = folder, options
        self.port = free_port()
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join((str(COMMANDS), os.environ.get("PATH", ""))),
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self.processes = Processes(folder, self.environment)
        write_certificates(folder)
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "{HOST}:{self.port}"\nroot-certificates = "{folder / "ca.pem"}"\n',
            encoding="utf-8",
        )

    def start(self, nodes_port: int) -> None:
        """Start everything; SuperNodes dial `nodes_port`."""
        own = ("--ssl-certfile", "cert.pem", "--ssl-keyfile", "key.pem", "--ssl-ca-certfile", "ca.pem")
        where = ("--host", HOST, "--port", str(self.port))
        switches = ("--enable-supernode-auth", "--disable-runtime-dependency-installation")
        self.processes.start(SUPERLINK, "flower-superlink", *own, *where, *switches)
        self._wait_until_it_listens()
        for name in self.names:
            write_node_key(self._folder, name)
            self._flwr("supernode", "register", str(self._folder / f"{name}.pub"), CONNECTION)
            identity = ("--root-certificates", "ca.pem", "--auth-supernode-private-key", f"{name}.key")
            where = ("--superlink", f"{HOST}:{nodes_port}", "--host", HOST, "--port", str(free_port()))
            self.processes.start(name, "flower-supernode", *identity, *where)

    @property
    def names(self) -> list[str]:
        """Of the SuperNodes."""
        return [f"supernode-{i}" for i in range(self._options.participants)]

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            self.processes.check()
            with suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
                return
            time.sleep(0.1)
        raise RunFailed(f"the SuperLink does not listen; its log ends:\n{self.processes.log_tail(SUPERLINK)}")

    def _flwr(self, *command: str) -> str:
        done = subprocess.run(
            [str(COMMANDS / "flwr"), *command, "--format", "json"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RunFailed(f"flwr {' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def run(self, kind: str, after_round: Callable[[int], None]) -> dict[str, Any]:
        """All rounds of one kind; what the ServerApp reports in the end. `after_round` is told how many are done."""
        path, asked = self._folder / f"{kind}.json", self._options
        config = self._folder / f"{kind}.toml"
        rounds = WARM_UP + asked.rounds
        config.write_text(
            f"participants = {asked.participants}\nparams = {asked.params}\nrounds = {rounds}\n"
            f'masked = {str(kind == "masked").lower()}\nreport = "{path}"\n',
            encoding="utf-8",
        )
        self._flwr("run", str(APP), CONNECTION, "--run-config", str(config))
        deadline = time.monotonic() + asked.timeout_s
        done, report = 0, {}
        while done < rounds:
            if time.monotonic() > deadline:
                raise RunFailed(f"{done} rounds after {asked.timeout_s:g} s; {self.processes.log_tail(SUPERLINK)}")
            self.processes.check()
            time.sleep(0.05)
            with suppress(FileNotFoundError):
                report = json.loads(path.read_text(encoding="utf-8"))
            if report and len(report["round_s"]) > done:
                done = len(report["round_s"])
                after_round(done)
        return report


def measure(folder: Path, options: Options) -> dict[str, Any]:
    """Masked rounds, then plain ones if asked for, on one deployment."""
    deployment = Deployment(folder, options)
    measured: dict[str, Any] = {"shape": asdict(options), "transport": "TLS, SuperNodes authenticated by signatures"}
    with ExitStack() as stack:
        nodes_port, counted = deployment.port, [0, 0]
        if not options.bare:
            nodes_port = free_port()
            counted = stack.enter_context(relaying(nodes_port, deployment.port))
        stack.callback(deployment.processes.end)
        deployment.start(nodes_port)
        if not options.bare:
            time.sleep(5)  # until all are up and idle: what they take before there is any work
            idle = Memory(deployment.processes.pids())
            idle.look()
            measured["idle_memory_mib"] = idle.in_mib()
        for kind in ("masked", "plain") if options.plain else ("masked",):
            bytes_after: dict[int, list[int]] = {}
            memory = Memory(deployment.processes.pids())
            with ExitStack() as watched:
                if not options.bare:
                    watched.enter_context(memory.watching())
                report = deployment.run(kind, lambda done, kept=bytes_after: kept.setdefault(done, list(counted)))
            measured[kind] = _figures(report)
            if not options.bare:
                counts = zip(bytes_after[WARM_UP + options.rounds], bytes_after[WARM_UP], strict=True)
                up, down = ((at_the_end - before) // options.rounds for at_the_end, before in counts)
                measured[kind]["wire_bytes_per_round"] = {"up": up, "down": down}
                measured[kind]["peak_memory_mib"] = memory.in_mib()
    return measured


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    seconds = report["round_s"]
    return {
        "round_s": round(statistics.median(seconds[WARM_UP:]), 3),
        "all_rounds_s": [round(s, 3) for s in seconds],
        "largest_error": report["largest_error"],
        "model_type": report["model_type"],
    }


# --- the command ----------------------------------------------------------------------------------------------------


def show(measured: Mapping[str, Any]) -> None:
    """For people."""
    shape = measured["shape"]
    print(f"n = {shape['participants']}, d = {shape['params']:,}, {shape['rounds']} rounds; {measured['transport']}")
    for kind in ("masked", "plain"):
        if kind not in measured:
            continue
        found = measured[kind]
        print(f"{kind:6} {found['round_s']:.2f} s a round {found['all_rounds_s']}; the mean is {found['model_type']}")
        if not shape["bare"]:
            up, down = found["wire_bytes_per_round"]["up"], found["wire_bytes_per_round"]["down"]
            print(f"       {up / 1e6:.2f} MB up and {down / 1e6:.2f} MB down a round, all participants together")
            for name, mib in found["peak_memory_mib"].items():
                print(
                    f"       {name}: {mib:.0f} MiB at most, {measured['idle_memory_mib'][name]:.0f} MiB before the run"
                )


def interrupted(number: int, _: object) -> None:
    """Leave by way of all that ends processes."""
    raise SystemExit(128 + number)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="masked rounds of a Flower deployment on loopback")
    parser.add_argument("--participants", type=int, default=4)
    parser.add_argument("--params", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2, help=f"that count; {WARM_UP} more comes first")
    parser.add_argument("--plain", action="store_true", help="the same without masking, too")
    parser.add_argument("--bare", action="store_true", help="no relay, and no look at memory")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for all rounds of one kind")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.participants < 3:
        raise SystemExit("--participants: SecAgg+ takes 3 or more here, as Maskwork does")
    options = Options(asked.participants, asked.params, asked.rounds, asked.plain, asked.bare, asked.timeout)
    signal.signal(signal.SIGTERM, interrupted)
    with tempfile.TemporaryDirectory(prefix="flower-round-", ignore_cleanup_errors=True) as folder:
        try:
            measured = measure(Path(folder), options)
        except RunFailed as failure:
            raise SystemExit(str(failure)) from None
    if asked.json:
        print(json.dumps(measured, indent=2))
    else:
        show(measured)


if __name__ == "__main__":
    main()
