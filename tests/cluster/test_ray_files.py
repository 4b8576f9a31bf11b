"""The descriptions of Ray clusters in `cluster/`, by Ray's own checks and by the rules of KubeRay.

YAML is read by the Python of the Ray environment: Ray brings PyYAML and jsonschema, the tests do not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "cluster"
PREFIX = Path(os.environ.get("RAY_PREFIX", REPOSITORY / ".venv-ray"))
MEBI = {"Mi": 1, "Gi": 1024}

READ = """
import json, sys, yaml
print(json.dumps(list(yaml.safe_load_all(sys.stdin))))
"""

VALIDATE = """
import json, jsonschema, sys
value, schema = json.load(sys.stdin)
found = jsonschema.Draft7Validator(schema).iter_errors(value)
print(json.dumps([f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in found]))
"""

PREPARE = """
import json, sys
from ray.autoscaler._private.commands import _bootstrap_config
prepared = _bootstrap_config(json.load(sys.stdin), no_config_cache=True)
print("\\n" + json.dumps(prepared))
"""


@pytest.fixture(autouse=True, scope="session")
def possible_here():
    """Most of these tests need no namespaces, which the tests beside them do."""


@pytest.fixture(scope="module")
def python():
    """The Python of the environment with Ray."""
    if not (PREFIX / "bin" / "ray").exists():
        pytest.skip(f"no Ray environment at {PREFIX}: run make ray-environment")
    return PREFIX / "bin" / "python"


def run(python, script, given):
    """Return what a script prints in the Ray environment, as JSON in its last line."""
    done = subprocess.run(
        [python, "-c", script], input=given, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def read(python):
    """Read the one document of a YAML file in `cluster/`."""

    def reader(name):
        documents = run(python, READ, (CLUSTER / name).read_text())
        assert len(documents) == 1, f"{name} has {len(documents)} documents"
        return documents[0]

    return reader


# ----- ray up


@pytest.mark.parametrize("name", ["ray-local.yaml", "ray-onprem.yaml"])
def test_ray_accepts_the_description(python, read, name):
    """The file fits the schema in Ray's wheel, and Ray prepares it as `ray up` does."""
    described = read(name)
    where = run(python, "import ray.autoscaler as a, json; print(json.dumps(a.__path__[0]))", "")
    schema = json.loads((Path(where) / "ray-schema.json").read_text())
    assert run(python, VALIDATE, json.dumps([described, schema])) == []
    prepared = run(python, PREPARE, json.dumps(described))
    workers = described["provider"]["worker_ips"]
    assert prepared["max_workers"] == len(workers)
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == len(workers)


@pytest.mark.parametrize("name", ["ray-local.yaml", "ray-onprem.yaml"])
def test_ray_up_starts_nothing_open(read, name):
    """Every start asks for the token and says how many processors; the dashboard stays on the loopback."""
    described = read(name)
    head, workers = (described[f"{kind}_start_ray_commands"] for kind in ("head", "worker"))
    starts = [command for command in head + workers if "ray start" in command]
    assert len(starts) == (1 if name == "ray-local.yaml" else 2)
    for command in starts:
        assert "export RAY_AUTH_MODE=token" in command
        assert "--num-cpus=" in command
        assert "0.0.0.0" not in command
    assert "--dashboard-host=127.0.0.1" in starts[0]


# ----- KubeRay

QUANTITY = {"type": "string", "pattern": "^[0-9]+(m|Mi|Gi)?$"}
RESOURCES = {
    "type": "object",
    "required": ["requests", "limits"],
    "additionalProperties": {
        "required": ["cpu", "memory"],
        "properties": {"cpu": QUANTITY, "memory": QUANTITY},
    },
}
CONTAINER = {
    "required": ["name", "image", "resources", "securityContext"],
    "properties": {
        "image": {"pattern": "^[^:]+:[^:]+$"},
        "resources": RESOURCES,
        "securityContext": {
            "required": ["allowPrivilegeEscalation", "capabilities"],
            "properties": {
                "allowPrivilegeEscalation": {"const": False},
                "capabilities": {"const": {"drop": ["ALL"]}},
            },
        },
    },
}
POD = {
    "required": ["restartPolicy", "securityContext", "containers"],
    "properties": {
        "restartPolicy": {"enum": ["Never", "OnFailure"]},
        "securityContext": {
            "required": ["runAsNonRoot", "runAsUser"],
            "properties": {"runAsNonRoot": {"const": True}, "runAsUser": {"minimum": 1}},
        },
        "containers": {"type": "array", "minItems": 1, "maxItems": 1, "items": CONTAINER},
    },
}
MOUNTS = {
    "type": "array",
    "allOf": [
        {"contains": {"const": {"name": "shm", "mountPath": "/dev/shm"}}},
        {"contains": {"const": {"name": "shared", "mountPath": "/shared"}}},
    ],
}
VOLUMES = {
    "type": "array",
    "allOf": [
        {"contains": {"properties": {"name": {"const": "shm"}, "emptyDir": {
            "required": ["sizeLimit"], "properties": {"medium": {"const": "Memory"}}}},
            "required": ["name", "emptyDir"]}},
        {"contains": {"properties": {"name": {"const": "shared"}, "persistentVolumeClaim": {
            "required": ["claimName"]}}, "required": ["name", "persistentVolumeClaim"]}},
    ],
}  # fmt: skip
NODE = {
    "allOf": [
        POD,
        {
            "required": ["volumes"],
            "properties": {
                "volumes": VOLUMES,
                "containers": {
                    "items": {"required": ["volumeMounts"], "properties": {"volumeMounts": MOUNTS}}
                },
            },
        },
    ]
}
GROUP = {
    "required": ["rayStartParams", "template"],
    "properties": {
        "rayStartParams": {"required": ["num-cpus"], "additionalProperties": {"type": "string"}},
        "template": {"required": ["spec"], "properties": {"spec": NODE}},
    },
}
RAY_CLUSTER_SPEC = {
    "type": "object",
    "required": ["rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string"},
        "authOptions": {"const": {"mode": "token"}},
        "headGroupSpec": GROUP,
        "workerGroupSpecs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "allOf": [
                    GROUP,
                    {"required": ["groupName", "replicas", "minReplicas", "maxReplicas", "template"]},
                ]
            },
        },
    },
}
RAY_JOB_SPEC = {
    "type": "object",
    "required": ["entrypoint", "rayClusterSpec", "submissionMode", "shutdownAfterJobFinishes"],
    "additionalProperties": False,
    "properties": {
        "entrypoint": {"type": "string", "pattern": "^distbp train .*--backend ray .*--out /shared/"},
        "runtimeEnvYAML": {"type": "string"},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
        "shutdownAfterJobFinishes": {"const": True},
        "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
        "backoffLimit": {"type": "integer", "minimum": 0},
        "submitterPodTemplate": {"required": ["spec"], "properties": {"spec": POD}},
        "rayClusterSpec": RAY_CLUSTER_SPEC,
    },
}
KINDS = {
    "kuberay-rayjob.yaml": ("RayJob", RAY_JOB_SPEC),
    "kuberay-raycluster.yaml": ("RayCluster", RAY_CLUSTER_SPEC),
}
"""Manifest -> its kind, and what KubeRay and a careful cluster want of its spec: keys that the operator
requires or knows, no root, no more rights, a token, memory at /dev/shm, one shared volume."""


def cluster_of(manifest):
    """Return the specification of the Ray cluster in a manifest."""
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def pods_of(manifest):
    """Return the specifications of all pods in a manifest."""
    cluster = cluster_of(manifest)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    templates = [group["template"] for group in groups]
    if "submitterPodTemplate" in manifest["spec"]:
        templates.append(manifest["spec"]["submitterPodTemplate"])
    return [template["spec"] for template in templates]


def mebibytes(quantity):
    """Return a Kubernetes quantity of memory in MiB."""
    return int(quantity[:-2]) * MEBI[quantity[-2:]]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_manifest_keeps_the_rules(python, read, name):
    """Required keys are there, no key is misspelt, no pod runs as root, and Ray asks for a token."""
    kind, spec = KINDS[name]
    manifest = read(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", manifest["metadata"]["name"])
    assert run(python, VALIDATE, json.dumps([manifest["spec"], spec])) == []


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize(
    "broken",
    ["authOptions", "rayVersion", "rayVersions", "replicas", "runAsNonRoot", "emptyDir", "resources"],
)
def test_the_rules_find_what_is_broken(python, read, name, broken):
    """A manifest without one of the required keys, or with a key that nobody knows, breaks a rule."""
    text = json.dumps(read(name)["spec"])
    if broken == "rayVersions":
        text = text.replace('"rayVersion"', '"rayVersions"')
    else:
        text = re.sub(rf'"{broken}"', '"x-unknown"', text)
    assert run(python, VALIDATE, f"[{text}, {json.dumps(KINDS[name][1])}]") != []


@pytest.mark.parametrize("name", sorted(KINDS))
def test_one_version_of_ray_everywhere(read, name):
    """rayVersion is the version that the container file installs and that the image's tag names."""
    installed = re.search(r"^ARG RAY=(.+)$", (CLUSTER / "Containerfile").read_text(), re.MULTILINE)
    manifest = read(name)
    assert cluster_of(manifest)["rayVersion"] == installed[1]
    images = {container["image"] for pod in pods_of(manifest) for container in pod["containers"]}
    assert len(images) == 1
    assert images.pop().endswith(f"-ray{installed[1]}")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_memory_and_processors_add_up(read, name):
    """/dev/shm holds the 30 % that Ray wants of a pod's memory, and Ray counts the pod's own processors."""
    manifest = read(name)
    cluster = cluster_of(manifest)
    workers = 0
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        shm = next(volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "shm")
        size = mebibytes(shm["emptyDir"]["sizeLimit"])
        assert 0.3 * mebibytes(limits["memory"]) <= size < mebibytes(limits["memory"])
        counted = group["rayStartParams"]["num-cpus"]
        assert counted in ("0", limits["cpu"])
        workers += int(counted) * group.get("replicas", 1)
    asked = manifest["spec"].get("entrypoint") or (CLUSTER / name).read_text()
    assert int(re.search(r"--nproc (\d+)", asked)[1]) == workers


def test_the_container_file_makes_what_the_manifests_want(read):
    """What it copies exists, it installs what jobs need, and it ends as the user of the manifests."""
    lines = (CLUSTER / "Containerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert sources
    assert all((REPOSITORY / source).exists() for source in sources)
    assert any('"ray[default]==${RAY}"' in line and '"/src[ray]"' in line for line in lines)
    user = [line for line in lines if line.startswith("USER ")][-1].split()[1]
    for name in KINDS:
        assert {pod["securityContext"]["runAsUser"] for pod in pods_of(read(name))} == {int(user)}
