"""The files in examples/deployment/kubernetes: against published schemas, each other, and what the program does."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from gtcpserver.supervisor.fleet import KILL_MARGIN
from gtcpserver.supervisor.monitor import KILL_SECONDS
from kit.paths import ROOT
from kit.patience import SOON
from kit.ports import free_port
from kit.waiting import wait_until

yaml = pytest.importorskip("yaml", reason="PyYAML is missing")

FOLDER = ROOT / "examples" / "deployment" / "kubernetes"

#: Versions of Kubernetes: the oldest that the files are for, and the newest whose schemas are published there.
VERSIONS = ("1.30", "1.37")

#: Requests of the rolling update, for a long one; a short one lasts until the update is done.
REQUESTS = int(os.environ.get("GTCPSERVER_ROLLOUT_REQUESTS", "0"))

#: The parts of custom resources that the files use, as the Prometheus Operator defines them (its API reference).
CUSTOM = {
    "ServiceMonitor": {
        "selector": {"matchLabels": dict},
        "endpoints": [{"port": str, "path": str, "interval": str}],
    },
    "PrometheusRule": {"groups": [{"name": str, "rules": [{"alert": str, "expr": str, "for": str}]}]},
}
REQUIRED = {"selector", "endpoints", "groups", "name", "expr"}


def read():
    return [
        document
        for path in sorted(FOLDER.glob("*.yaml"))
        if path.name != "kustomization.yaml"
        for document in yaml.safe_load_all(path.read_text())
    ]


def find(kind, name="lines"):
    (found,) = (one for one in read() if (one["kind"], one["metadata"]["name"]) == (kind, name))
    return found["spec"]


def pod():
    return find("Deployment")["template"]


def container():
    (only,) = pod()["spec"]["containers"]
    return only


def option(name):
    (value,) = (word.partition("=")[2] for word in container()["command"] if word.split("=")[0] == f"--{name}")
    return value


# -- schemas -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_published_schemas_know_every_field(version):
    validator = pytest.importorskip("kubernetes_validate")
    ours = [one for one in read() if one["kind"] not in CUSTOM]
    assert {one["kind"] for one in ours} == {
        *("Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy"),
    }
    for one in ours:
        validator.validate(one, version, strict=True)
    del ours[0]["metadata"]["name"]
    ours[0]["spec"]["replica"] = 1
    with pytest.raises(validator.ValidationError):
        validator.validate(ours[0], version, strict=True)


def check(value, shape):
    if isinstance(shape, dict):
        assert value.keys() <= shape.keys()
        assert REQUIRED & shape.keys() <= value.keys()
        for key, inside in value.items():
            check(inside, shape[key])
    elif isinstance(shape, list):
        assert value
        for inside in value:
            check(inside, shape[0])
    else:
        assert isinstance(value, shape)


@pytest.mark.parametrize("kind", CUSTOM)
def test_custom_resources_have_the_fields_that_the_operator_knows(kind):
    (one,) = (document for document in read() if document["kind"] == kind)
    assert one["apiVersion"] == "monitoring.coreos.com/v1"
    check(one["spec"], CUSTOM[kind])


def test_the_alerts_are_those_of_the_documentation():
    page = (ROOT / "docs" / "monitoring.md").read_text()
    blocks = re.findall(r"```yaml\n(groups:.*?)```", page, re.DOTALL)
    assert [yaml.safe_load(block) for block in blocks] == [find("PrometheusRule")]


def test_kustomize_lists_every_file():
    told = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert told.keys() == {"apiVersion", "kind", "resources", "images"}
    assert sorted([*told["resources"], "kustomization.yaml"]) == sorted(path.name for path in FOLDER.glob("*.yaml"))
    assert [one["name"] for one in told["images"]] == [container()["image"]]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is missing")
def test_kustomize_builds_them():
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(read())
    assert "image: registry.example.com/lines:1" in done.stdout


# -- what must agree ---------------------------------------------------------------------------------------------------


def test_names_and_labels_find_each_other():
    labels = pod()["metadata"]["labels"].items()
    ports = {port["name"] for port in container()["ports"]}
    services = [one for one in read() if one["kind"] == "Service"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert find(kind)["selector"]["matchLabels"].items() <= labels
    assert find("NetworkPolicy")["podSelector"]["matchLabels"].items() <= labels
    assert pod()["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"].items() <= labels
    for one in services:
        assert one["spec"]["selector"].items() <= labels
        assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports
    for rule in find("NetworkPolicy")["ingress"]:
        assert {port["port"] for port in rule["ports"]} <= ports
    monitor = find("ServiceMonitor")
    (scraped,) = (
        one for one in services if monitor["selector"]["matchLabels"].items() <= one["metadata"]["labels"].items()
    )
    assert [one["port"] for one in monitor["endpoints"]] == [port["name"] for port in scraped["spec"]["ports"]]
    assert find("HorizontalPodAutoscaler")["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": "lines",
    }
    assert "replicas" not in find("Deployment")


def test_the_grace_period_is_long_enough_for_a_stop_at_its_slowest():
    before = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    stop = float(option("drain-delay")) + float(option("stop-timeout"))
    assert before + stop + KILL_MARGIN + KILL_SECONDS < pod()["spec"]["terminationGracePeriodSeconds"]


def test_a_pod_may_do_nothing_that_it_need_not():
    spec = pod()["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["runAsGroup"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    text = (FOLDER.parent / "container" / "Containerfile").read_text()
    assert "USER 10001:10001" in text
    assert "/src[cli,metrics]" in text  # --metrics


def test_the_autoscaler_s_targets_are_parts_of_what_a_pod_has():
    per_cpu = {"m": 0.001}
    limit, request = (container()["resources"][kind]["cpu"] for kind in ("limits", "requests"))
    limit, request = (float(text.rstrip("m")) * per_cpu.get(text[-1], 1) for text in (limit, request))
    handlers, cpu = find("HorizontalPodAutoscaler")["metrics"]
    assert option("workers") == "auto"  # a worker for each CPU of the limit
    places = int(option("pool")) * limit
    assert 0.5 < int(handlers["pods"]["target"]["averageValue"]) / places < 0.8
    assert 0.5 < cpu["resource"]["target"]["averageUtilization"] / 100 * request / limit < 0.8


# -- the program -------------------------------------------------------------------------------------------------------


class Program:
    """The container's command line, with other addresses, and no more workers than a test needs."""

    def __init__(self, folder):
        shutil.copy(FOLDER.parent / "container" / "app.py", folder)
        ports = {port["containerPort"]: free_port() for port in container()["ports"]}
        self.ports = {port["name"]: ports[port["containerPort"]] for port in container()["ports"]}
        here = {f"*:{port}": f"127.0.0.1:{ours}" for port, ours in ports.items()}
        here |= {"/run/app": str(folder), "workers=auto": "workers=1"}
        command = " ".join(container()["command"][1:])
        for there, ours in here.items():
            assert command.count(there) == 1
            command = command.replace(there, ours)
        self._log = open(folder / "log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gtcpserver", *command.split()], cwd=folder, stderr=self._log
        )

    def probe(self, kind):
        """The status of a probe of the YAML, and the answer."""
        wanted = container()[kind]["httpGet"]
        return self.get(wanted["port"], wanted["path"])

    def get(self, port, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[port], timeout=SOON)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def end(self):
        self.process.kill()
        self.process.wait()
        self._log.close()


@pytest.fixture
def program(tmp_path):
    made = Program(tmp_path)
    yield made
    made.end()


@pytest.mark.slow
def test_the_program_serves_what_probes_services_and_alerts_ask_for(program):
    wait_until(lambda: program.probe("startupProbe") == (200, "ready\n"))
    assert program.probe("readinessProbe") == (200, "ready\n")
    assert program.probe("livenessProbe") == (200, "ok\n")
    with socket.create_connection(("127.0.0.1", program.ports["lines"]), SOON) as client:
        client.sendall(b"hello\n")
        assert client.recv(100) == b"hello\n"
        (endpoint,) = find("ServiceMonitor")["endpoints"]
        status, text = program.get(endpoint["port"], endpoint["path"])
        assert status == 200
        served = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
        asked = {find("HorizontalPodAutoscaler")["metrics"][0]["pods"]["metric"]["name"]}
        for group in find("PrometheusRule")["groups"]:
            for rule in group["rules"]:
                asked |= set(re.findall(r"gtcpserver_\w+", rule["expr"]))
        assert {re.sub("_(sum|count|bucket)$", "", name) for name in asked} <= served
        program.process.send_signal(signal.SIGTERM)
        wait_until(lambda: program.probe("readinessProbe") == (503, "draining\n"))
        assert program.probe("livenessProbe") == (200, "ok\n")
        with socket.create_connection(("127.0.0.1", program.ports["lines"]), SOON) as late:
            late.sendall(b"late\n")
            assert late.recv(100) == b"late\n"
        program.process.send_signal(signal.SIGTERM)  # a second one does not wait
        assert program.process.wait(SOON) == 0


# -- a rolling update --------------------------------------------------------------------------------------------------

ALONE = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def roll(*arguments):
    """Run kit/rolling_update.py; return what its clients met."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for namespaces")
    missing = [name for name in ("haproxy", "ip", "setpriv", "unshare") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    can = [*ALONE, "sh", "-ec", "mount --make-rprivate / && mount -o remount,bind,ro / && ip link add type veth"]
    done = subprocess.run(can, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no namespaces with veth here: {done.stderr}")
    command = [*ALONE, sys.executable, str(ROOT / "tests" / "kit" / "rolling_update.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=None if REQUESTS else 2 * SOON)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_rolling_update_under_load_loses_no_request():
    """GTCPSERVER_ROLLOUT_REQUESTS=100000, or `make rollout`: in the times of the YAML, and clients make no pauses."""
    if REQUESTS:
        met = roll("--requests", REQUESTS, "--replicas", 3, "--clients", 16, "--pause", 0, "--faster", 1)
    else:
        met = roll()
    assert met["errors"] == []
    assert met["failures"] == []
    assert met["requests"] >= max(500, REQUESTS)
    assert met["pods"] >= 4


@pytest.mark.slow
@pytest.mark.skipif(not REQUESTS, reason="with GTCPSERVER_ROLLOUT_REQUESTS only")
def test_the_same_loses_requests_where_endpoints_are_later_than_the_drain_delay():
    met = roll("--lag", 1.5)
    assert met["failed"] > 0
