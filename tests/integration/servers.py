"""Private Redis, RabbitMQ and nginx servers on free ports, and a TCP proxy to break connections with.

Every server keeps its files in a folder of its own and can be killed, stopped and started again on the same port.
Nothing here touches a server that runs on the machine already.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

RABBITMQ_BIN = Path(os.environ.get("RABBITMQ_BIN", "/usr/lib/rabbitmq/bin"))


_given: set[int] = set()


class ServerFailed(Exception):
    """A server did not start; the message ends with the tail of its log."""


def missing_programs(*names: str) -> list[str]:
    """Return those of redis-server, rabbitmq-server and nginx that this machine lacks."""
    places = {"rabbitmq-server": str(RABBITMQ_BIN / "rabbitmq-server")}
    return [name for name in names if shutil.which(places.get(name, name)) is None]


def free_port() -> int:
    """Return a TCP port that nobody listens on now.

    It is none of those that the system gives to connections (on Linux from 32768 on): one could take it before the
    server does for which it is meant. Nor is it one that was returned before.
    """
    while True:
        port = random.randint(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it did not come true in time.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s} s: {what}")
        time.sleep(0.02)


class Server:
    """A child process with a folder, a log and a port."""

    name = "server"
    start_timeout_s = 20.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log_path(self) -> Path:
        return self.folder / "output.log"

    def start(self) -> None:
        """Start and return when it answers."""
        with self.log_path.open("ab") as output:
            self.process = subprocess.Popen(
                self.command(),
                env=self.environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        end = time.monotonic() + self.start_timeout_s
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > end:
                tail = self.log_path.read_text(errors="replace")[-1500:]
                self.stop()
                raise ServerFailed(f"{self.name} did not start:\n{tail}")
            time.sleep(0.05)

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}

    def ready(self) -> bool:
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The process that does the work."""
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self._kill_group()

    def pause(self) -> None:
        """SIGSTOP: the process hangs, its connections stay."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it for good."""
        self._kill_group()

    def _kill_group(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self.process = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class RedisServer(Server):
    """A Redis that keeps every acknowledged write (``appendfsync always``), optionally with an ACL file."""

    name = "redis-server"

    def __init__(self, folder: Path, *, acl: str | None = None, extra: str = "") -> None:
        super().__init__(folder)
        self.data = folder / "data"
        self.data.mkdir(exist_ok=True)
        self.user_info = ""
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"dir {self.data}",
            "daemonize no",
            'save ""',
            "appendonly yes",
            "appendfsync always",
            "auto-aof-rewrite-percentage 0",
        ]
        if acl is not None:
            (folder / "users.acl").write_text(acl)
            lines.append(f"aclfile {folder / 'users.acl'}")
        (folder / "redis.conf").write_text("\n".join(lines) + "\n" + extra)

    def command(self) -> list[str]:
        return ["redis-server", str(self.folder / "redis.conf")]

    def url(self, user: str = "", password: str = "") -> str:
        """Return a URL, with a user's name and password if given."""
        return f"redis://{user}:{password}@127.0.0.1:{self.port}/0" if user else f"redis://127.0.0.1:{self.port}/0"

    def ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                reply = connection.recv(64)
        except OSError:
            return False
        return reply.startswith((b"+PONG", b"-NOAUTH"))

    def append_only_file(self) -> Path:
        """Return the file that is being appended to."""
        return max((self.data / "appendonlydir").glob("*.incr.aof"))


class RabbitServer(Server):
    """A RabbitMQ node of its own, with its own epmd, cookie and database."""

    name = "rabbitmq-server"
    start_timeout_s = 60.0

    def __init__(self, folder: Path, *, conf: str = "") -> None:
        super().__init__(folder)
        self.dist_port = free_port()
        self.epmd_port = free_port()
        self.node = f"axon{self.port}@localhost"
        home = folder / "home"
        home.mkdir(exist_ok=True)
        cookie = home / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text("AXONTESTS")
            cookie.chmod(0o400)
        (folder / "plugins").write_text("[].")
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\ndisk_free_limit.absolute = 50MB\n{conf}"
        )

    def command(self) -> list[str]:
        return [str(RABBITMQ_BIN / "rabbitmq-server")]

    def environment(self) -> dict[str, str]:
        folder = self.folder
        return {
            **super().environment(),
            "HOME": str(folder / "home"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"
            ),
        }

    def url(self, user: str = "guest", password: str = "guest") -> str:
        return f"amqp://{user}:{password}@127.0.0.1:{self.port}/%2F"

    def ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.settimeout(2)
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                return connection.recv(8)[:1] == b"\x01"
        except OSError:
            return False

    @property
    def pid(self) -> int:
        """The ``beam.smp`` process."""
        text = (self.folder / "pid").read_text().strip()
        return int(text)

    def ctl(self, *arguments: str, timeout_s: float = 60) -> str:
        """Run ``rabbitmqctl`` on this node; returns what it prints."""
        result = subprocess.run(
            [str(RABBITMQ_BIN / "rabbitmqctl"), "-n", self.node, "--quiet", *arguments],
            env=self.environment() | {"RABBITMQ_CTL_ERL_ARGS": "+S 1:1"},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if result.returncode:
            raise ServerFailed(f"rabbitmqctl {arguments[0]}: {result.stderr[-500:]}")
        return result.stdout

    def stop(self) -> None:
        super().stop()
        for _ in range(50):  # refused until epmd has noticed that the node is gone
            result = subprocess.run(
                ["epmd", "-port", str(self.epmd_port), "-kill"], capture_output=True, timeout=10, check=False
            )
            if b"not allowed" not in result.stdout + result.stderr:
                return
            time.sleep(0.1)


class NginxServer(Server):
    """An nginx with a configuration of the caller's; ``{port}`` and ``{folder}`` in it are filled in."""

    name = "nginx"

    def __init__(self, folder: Path, conf: str) -> None:
        super().__init__(folder)
        paths = "".join(
            f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        text = conf.replace("{port}", str(self.port)).replace("{folder}", str(folder)).replace("{temp_paths}", paths)
        (folder / "nginx.conf").write_text(text)

    def command(self) -> list[str]:
        return ["nginx", "-p", f"{self.folder}/", "-c", f"{self.folder}/nginx.conf", "-e", "stderr"]

    def ready(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def reload(self) -> None:
        """SIGHUP: new workers take over, old ones finish what they have."""
        os.kill(self.pid, signal.SIGHUP)


class TcpProxy:
    """Forwards to a port, and can hang (``partition``), cut (``cut``) or slow down (``delay_s``) every connection.

    ``hang`` lets those that come later work.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay_s = 0.0
        self._open = threading.Event()
        self._open.set()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._hung: set[tuple[socket.socket, socket.socket]] = set()
        self._said: dict[tuple[socket.socket, socket.socket], bytes] = {}  # the first that each client said
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def partition(self) -> None:
        """Let nothing through, without closing anything: half-open connections, and connects that get no answer."""
        self._open.clear()

    def hang(self, said: bytes = b"") -> None:
        """Let nothing through the connections on which a client has said this, without closing them."""
        with self._lock:
            self._hung |= {pair for pair in self._pairs if said in self._said[pair]}

    def heal(self) -> None:
        """Let things through again; what was held back arrives late."""
        self._open.set()

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        self._closed = True
        self._open.set()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self._open.wait()
        try:
            server = socket.create_connection(("127.0.0.1", self._target_port), timeout=5)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair = (client, server)
        with self._lock:
            self._pairs.add(pair)
            self._said[pair] = b""
        for source, sink in (pair, pair[::-1]):
            threading.Thread(target=self._pump, args=(source, sink, pair), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                if source is pair[0] and len(self._said[pair]) < 10_000:
                    self._said[pair] += data
                if pair in self._hung:
                    continue
                if self.delay_s:
                    time.sleep(self.delay_s)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def rabbit_running(folder: Path) -> Iterator[RabbitServer]:
    """Run a RabbitMQ node for the length of a block."""
    server = RabbitServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
