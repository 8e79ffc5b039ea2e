"""The peers: how each is installed from public packages, configured and started, and what its acknowledgement means."""

import base64
import glob
import json
import os
import shutil
import subprocess

from nodes import NODES, Problem

HERE = os.path.dirname(os.path.abspath(__file__))
INSTALL_SECONDS = 1800


def call(command, directory=None, environment=None, text=None, seconds=60):
    """Its standard output; a problem, if it does not work."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, **(environment or {})},
            input=text,
            stdin=None if text is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except FileNotFoundError as error:
        raise Problem(f"{error.filename} is not here") from None
    except subprocess.TimeoutExpired:
        raise Problem(f"{command[0]} did not end within {seconds} s") from None
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise Problem(f"{' '.join(command[:3])}: {(said or ['no word'])[-1].strip()[:300]}")
    return done.stdout


def build_go(module_directory, package, output):
    """A Go program, from the versions that go.mod and go.sum pin."""
    if not os.path.exists(output):
        call(["go", "build", "-trimpath", "-o", output, package], directory=module_directory, seconds=INSTALL_SECONDS)


class Peer:
    name = title = ack = ""
    protocol = ""  # the load generator's word for it
    synced = False  # whether a majority has synced before the acknowledgement
    one_by_one = False
    has_logs = True  # that are created one by one: W5
    is_java = False

    def __init__(self, software):
        self.software = software
        self.version = ""

    def install(self):
        """Brings what is needed and sets `version`; a problem, if it is not to be had."""
        raise NotImplementedError

    def prepare(self, cluster):
        """Writes what the nodes need before they start."""

    def command(self, cluster, node):
        """What starts a node, and its environment."""
        raise NotImplementedError

    def is_up(self, cluster):
        return True

    def answer(self, cluster, question, log):
        raise Problem(f"nobody knows how to answer {question!r}")


class Nats(Peer):
    name, title, protocol = "nats", "NATS JetStream", "nats"
    ack = "stream with 3 replicas in files, as shipped: a majority has written it, nothing is synced (sync_interval 2 min)"
    sync = ""

    def install(self):
        self.program = os.path.join(self.software, "nats-server")
        build_go(os.path.join(HERE, "servers"), "github.com/nats-io/nats-server/v2", self.program)
        self.version = call([self.program, "--version"]).split()[-1]

    def prepare(self, cluster):
        routes = ", ".join(f'"nats-route://127.0.0.1:{cluster.node_port(node, 1)}"' for node in range(NODES))
        for node in range(NODES):
            directory = cluster.node_directory(node)
            with open(os.path.join(directory, "nats.conf"), "w") as config:
                config.write(
                    f"server_name: n{node}\n"
                    f"listen: 127.0.0.1:{cluster.node_port(node)}\n"
                    f'jetstream {{ store_dir: "{directory}/data" {self.sync} }}\n'
                    f"cluster {{ name: peers, listen: 127.0.0.1:{cluster.node_port(node, 1)}, routes: [{routes}] }}\n"
                )

    def command(self, cluster, node):
        return [self.program, "-c", os.path.join(cluster.node_directory(node), "nats.conf")], None


class NatsSync(Nats):
    name, title = "nats-sync", "NATS JetStream, sync always"
    ack = "stream with 3 replicas in files, sync_interval always: a majority has synced it"
    sync, synced = ", sync_interval: always", True


class Etcd(Peer):
    name, title, protocol = "etcd", "etcd", "etcd"
    ack = "3 members, as shipped: a majority has synced it in the log (a record is a key; a batch is one transaction)"
    synced, has_logs = True, False

    def install(self):
        self.program = os.path.join(self.software, "etcd")
        build_go(os.path.join(HERE, "servers"), "go.etcd.io/etcd/server/v3", self.program)
        self.version = call([self.program, "--version"]).split("\n")[0].split()[-1]

    def command(self, cluster, node):
        def url(which, at=node):
            return f"http://127.0.0.1:{cluster.node_port(at, which)}"

        members = ",".join(f"n{at}={url(1, at)}" for at in range(NODES))
        return [
            self.program,
            f"--name=n{node}",
            f"--data-dir={cluster.node_directory(node)}/data",
            f"--listen-client-urls={url(0)}",
            f"--advertise-client-urls={url(0)}",
            f"--listen-peer-urls={url(1)}",
            f"--initial-advertise-peer-urls={url(1)}",
            f"--initial-cluster={members}",
            "--initial-cluster-state=new",
            # What a run writes and what a batch holds is more than it takes by default.
            f"--quota-backend-bytes={32 << 30}",
            "--max-txn-ops=32768",
            "--log-level=error",
        ], None


class RabbitMq(Peer):
    name, title, protocol = "rabbitmq", "RabbitMQ, quorum queue", "rabbitmq"
    ack = "quorum queue on 3 nodes, as shipped, persistent messages and publisher confirms: a majority has synced it"
    synced, one_by_one = True, True
    packages = ["rabbitmq-server"] + [
        "erlang-" + part
        for part in "asn1 base crypto eldap inets mnesia os-mon parsetools public-key runtime-tools ssl syntax-tools tools xmerl".split()
    ]

    def install(self):
        """Debian's packages, unpacked and not installed: nothing is changed outside, and no service starts."""
        self.root = os.path.join(self.software, "rabbitmq")
        if not os.path.isdir(self.root):
            work = self.root + ".new"
            shutil.rmtree(work, ignore_errors=True)
            os.makedirs(work)
            call(["apt-get", "download", "-qq", *self.packages], directory=work, seconds=INSTALL_SECONDS)
            for package in glob.glob(os.path.join(work, "*.deb")):
                call(["dpkg", "-x", package, work])
                os.remove(package)
            os.rename(work, self.root)
        found = glob.glob(os.path.join(self.root, "usr/lib/rabbitmq/lib/rabbitmq_server-*"))
        if not found:
            raise Problem(f"{self.root} holds no RabbitMQ; remove it to have it brought again")
        self.home = found[0]
        self.erlang = os.path.join(self.root, "usr/lib/erlang/bin")
        # Debian's own script starts what is installed in /usr, wherever it is itself.
        runtime = glob.glob(os.path.join(self.root, "usr/lib/erlang/erts-*/bin"))[0]
        with open(os.path.join(self.root, "erl"), "w") as script:
            script.write(
                "#!/bin/sh\n"
                f"export ROOTDIR='{os.path.dirname(self.erlang)}' BINDIR='{runtime}' EMU=beam PROGNAME=erl\n"
                'exec "$BINDIR/erlexec" "$@"\n'
            )
        os.chmod(script.name, 0o755)
        self.version = os.path.basename(self.home).split("-")[-1]

    def node_name(self, node):
        return f"peer{node}@localhost"

    def environment(self, cluster, node=0):
        return {
            "PATH": os.pathsep.join([self.root, self.erlang, os.environ["PATH"]]),
            "HOME": cluster.directory,
            "ERL_EPMD_PORT": str(cluster.node_port(2, PORT_OF_EPMD)),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": os.path.join(cluster.directory, "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": os.path.join(cluster.directory, "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": os.path.join(cluster.directory, "plugins"),
            "RABBITMQ_NODENAME": self.node_name(node),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(cluster.node_port(node)),
            "RABBITMQ_DIST_PORT": str(cluster.node_port(node, 1)),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": os.path.join(cluster.node_directory(node), "data"),
            "RABBITMQ_LOG_BASE": os.path.join(cluster.node_directory(node), "log"),
            "RABBITMQ_LOGS": "-",
            # The start script becomes the node, and has no parent that could stay.
            "RABBITMQ_ALLOW_INPUT": "1",
        }

    def prepare(self, cluster):
        cookie = os.path.join(cluster.directory, ".erlang.cookie")
        with open(os.open(cookie, os.O_WRONLY | os.O_CREAT, 0o400), "w") as file:
            file.write("PEERS")
        with open(os.path.join(cluster.directory, "plugins"), "w") as file:
            file.write("[].\n")
        with open(os.path.join(cluster.directory, "rabbitmq.conf"), "w") as file:
            file.write("log.console.level = warning\ncluster_formation.peer_discovery_backend = classic_config\n")
            for node in range(NODES):
                file.write(f"cluster_formation.classic_config.nodes.{node + 1} = {self.node_name(node)}\n")
        cluster.start_helper([os.path.join(self.erlang, "epmd")], self.environment(cluster))

    def command(self, cluster, node):
        return [os.path.join(self.home, "sbin", "rabbitmq-server"), "-noinput"], self.environment(cluster, node)

    def ask(self, cluster, node, erlang):
        command = [os.path.join(self.erlang, "erl_call"), "-sname", self.node_name(node), "-c", "PEERS", "-a", erlang]
        return call(command, environment=self.environment(cluster), seconds=10).strip()

    def is_up(self, cluster):
        try:
            return all(self.ask(cluster, node, "rabbit_nodes all_running []").count("peer") == NODES for node in range(NODES))
        except Problem:
            return False

    def answer(self, cluster, question, log):
        """From what each node knows of its own replica."""
        roles = []
        for node in range(NODES):
            try:
                roles.append(self.ask(cluster, node, f"ets lookup [ra_state,'%2F_{log}']"))
            except Problem as problem:
                roles.append(str(problem))
        leaders = [node for node, role in enumerate(roles) if " leader}" in role]
        if question == "leader":
            if len(leaders) != 1:
                raise Problem(f"the queue has {len(leaders)} leaders: {roles}")
            return str(leaders[0])
        if question == "whole":
            followers = sum(" follower}" in role for role in roles)
            return "yes" if len(leaders) == 1 and followers == NODES - 1 else "no"
        return super().answer(cluster, question, log)


PORT_OF_EPMD = 9  # the last one of the last node


class Kafka(Peer):
    name, title, protocol = "kafka", "Apache Kafka", "kafka"
    ack = "3 brokers (KRaft, each a controller too), acks=all, min.insync.replicas 2, as shipped: all in-sync replicas have written it, nothing is synced"
    is_java, flush = True, ""

    def install(self):
        self.jars = os.path.join(self.software, "kafka")
        if not os.path.isdir(self.jars):
            work = self.jars + ".new"
            shutil.rmtree(work, ignore_errors=True)
            command = ["mvn", "-B", "-q", "-f", os.path.join(HERE, "kafka", "pom.xml"), "dependency:copy-dependencies"]
            call([*command, f"-DoutputDirectory={work}"], seconds=INSTALL_SECONDS)
            os.rename(work, self.jars)
        found = glob.glob(os.path.join(self.jars, "kafka_*.jar"))
        if not found:
            raise Problem(f"{self.jars} holds no Kafka; remove it to have it brought again")
        self.version = os.path.basename(found[0])[: -len(".jar")].split("-")[-1]
        call(["java", "-version"])

    def config(self, cluster, node):
        return os.path.join(cluster.node_directory(node), "server.properties")

    def prepare(self, cluster):
        voters = ",".join(f"{node + 1}@127.0.0.1:{cluster.node_port(node, 1)}" for node in range(NODES))
        for node in range(NODES):
            with open(self.config(cluster, node), "w") as config:
                config.write(
                    "process.roles=broker,controller\n"
                    f"node.id={node + 1}\n"
                    f"controller.quorum.voters={voters}\n"
                    f"listeners=PLAINTEXT://127.0.0.1:{cluster.node_port(node)},CONTROLLER://127.0.0.1:{cluster.node_port(node, 1)}\n"
                    "controller.listener.names=CONTROLLER\n"
                    "listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT\n"
                    f"log.dirs={cluster.node_directory(node)}/data\n{self.flush}"
                )
        cluster_id = base64.urlsafe_b64encode(b"logboom's peers.").decode().rstrip("=")
        tools = [
            subprocess.Popen(
                self.java("-Xmx256M") + ["kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", self.config(cluster, node)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for node in range(NODES)
        ]
        for tool in tools:
            try:
                _, said = tool.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                for late in tools:
                    late.kill()
                raise Problem("Kafka's storage tool did not end within 120 s") from None
            if tool.returncode:
                raise Problem(f"Kafka's storage tool: {said.strip()[-300:]}")

    def java(self, *options):
        return ["java", *options, "-cp", os.path.join(self.jars, "*")]

    def command(self, cluster, node):
        # The options of the distribution's start script.
        options = "-Xms1G -Xmx1G -server -XX:+UseG1GC -XX:MaxGCPauseMillis=20 -XX:InitiatingHeapOccupancyPercent=35 -XX:+ExplicitGCInvokesConcurrent -Djava.awt.headless=true"
        return self.java(*options.split()) + ["kafka.Kafka", self.config(cluster, node)], None


class KafkaFlush(Kafka):
    name, title = "kafka-flush", "Apache Kafka, flush.messages=1"
    ack = "3 brokers (KRaft, each a controller too), acks=all, min.insync.replicas 2, flush.messages=1: all in-sync replicas have synced it"
    flush, synced = "log.flush.interval.messages=1\n", True


class Logboom:
    """Runs by itself: `logboom bench` starts three brokers of its own, and ends them."""

    name, title = "logboom", "Logboom"
    ack = "replication factor 3, acks=all, min.insync.replicas 2: a majority has synced it"
    synced, has_logs = True, True

    def __init__(self, program):
        self.program = program
        self.version = ""

    def install(self):
        if not self.program:
            raise Problem("no program: build it with `cargo build --release`, or name it with --logboom")
        self.version = call([self.program, "--version"]).split()[-1]

    def command(self, workload, logs, options, directory):
        """What runs one workload once."""
        command = [self.program, "bench", workload.split("-")[0], "--json", "--runs=1", f"--data={directory}"]
        command += [f"--warmup={options.warmup}", f"--duration={options.duration}", f"--patience={options.patience}"]
        if workload in ("W1", "W1-single", "W6"):
            command += [f"--batch-bytes={options.batch_bytes}", f"--in-flight={options.in_flight}"]
        if workload == "W1-single":
            command.append("--single-records")
        if workload == "W4":
            command += [f"--kills={options.kills}", f"--kill-pause-ms={options.kill_pause_ms}"]
        if workload == "W5":
            command.append(f"--idle-partitions={logs}")
        return command

    @staticmethod
    def result(line):
        """The one run of the one workload, in the form of the load generator."""
        report = json.loads(line)["workloads"][0]
        figures = dict(report["runs"][0])
        verdict = figures.pop("verdict", None)
        keys = ("settings", "errors", "machine", "acknowledgement")
        return {"figures": figures, "verdict": verdict, **{key: report.get(key) for key in keys}}


ALL = [Nats, NatsSync, Etcd, RabbitMq, Kafka, KafkaFlush]
