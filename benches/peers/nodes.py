"""Processes of one run: three nodes of a peer, started, killed and ended.

Owns every process it starts: none outlives this program, however it ends.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time

NODES = 3
PORTS = 10  # for each node


class Problem(Exception):
    """Something that one line can tell a person."""


LIBC = ctypes.CDLL(None)


def die_with_parent():
    """For a child between fork and exec: it ends when this program does, even by force."""
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Cluster:
    """Three nodes below one directory. What is theirs alone is the peer's: see `peers.py`."""

    def __init__(self, peer, directory, port, patience):
        self.peer, self.directory, self.port, self.patience = peer, directory, port, patience
        self.processes = {}
        self.helpers = []

    def node_port(self, node, which=0):
        return self.port + node * PORTS + which

    def node_directory(self, node):
        return os.path.join(self.directory, f"n{node}")

    @property
    def addresses(self):
        return [f"127.0.0.1:{self.node_port(node)}" for node in range(NODES)]

    @property
    def pids(self):
        return [self.processes[node].pid for node in range(NODES)]

    def start(self):
        self.check_ports()
        for node in range(NODES):
            os.makedirs(self.node_directory(node))
        self.peer.prepare(self)
        for node in range(NODES):
            self.start_node(node)
            if self.peer.one_by_one:
                self.wait_for(node)
        for node in range(NODES):
            self.wait_for(node)
        self.until(lambda: self.peer.is_up(self), "the nodes do not find each other")

    def check_ports(self):
        for port in range(self.port, self.port + NODES * PORTS):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as error:
                    raise Problem(f"port {port} cannot be used ({error.strerror}); choose others with --port") from None

    def spawn(self, command, log, environment=None):
        with open(os.path.join(self.directory, log), "ab") as output:
            return subprocess.Popen(
                command,
                cwd=self.directory,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def start_helper(self, command, environment=None):
        self.helpers.append(self.spawn(command, "helper.log", environment))

    def start_node(self, node):
        command, environment = self.peer.command(self, node)
        self.processes[node] = self.spawn(command, f"n{node}.log", environment)

    def restart(self, node):
        """After its process was killed; the number of the new one."""
        self.processes[node].wait(timeout=30)
        self.start_node(node)
        return self.processes[node].pid

    def wait_for(self, node):
        """Until somebody listens."""

        def answers():
            if self.processes[node].poll() is not None:
                raise Problem(f"node {node} of {self.peer.name} has ended, see its log: {self.last_words(node)}")
            try:
                with socket.create_connection(("127.0.0.1", self.node_port(node)), timeout=1):
                    return True
            except OSError:
                return False

        self.until(answers, f"node {node} does not listen")

    def until(self, good, what):
        end = time.monotonic() + self.patience
        while not good():
            if time.monotonic() > end:
                raise Problem(f"{self.peer.name}: {what} after {self.patience} s")
            time.sleep(0.1)

    def last_words(self, node):
        with open(os.path.join(self.directory, f"n{node}.log"), errors="replace") as log:
            lines = [line.strip() for line in log if line.strip()]
        return lines[-1][:300] if lines else "it is empty"

    def stop(self):
        """Ends all processes at once and removes the data; logs stay."""
        everything = [*self.processes.values(), *self.helpers]
        for process in everything:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for process in everything:
            process.wait(timeout=30)
        self.processes, self.helpers = {}, []
        for node in range(NODES):
            # A process of the group may still be ending, and writing.
            shutil.rmtree(self.node_directory(node), ignore_errors=True)
            shutil.rmtree(self.node_directory(node), ignore_errors=True)
