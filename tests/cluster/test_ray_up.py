"""`ray up` with the files of `cluster/`: from an emulated laptop to emulated machines.

Stand-ins for ssh and rsync lead to the hosts; everything else is Ray's own.  Homes are on each host's
own /tmp.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

REPOSITORY = Path(__file__).resolve().parents[2]
PREFIX = Path(os.environ.get("RAY_PREFIX", REPOSITORY / ".venv-ray"))

SSH = """#!{python}
import os, subprocess, sys

words = sys.argv[1:]
while words[0].startswith("-"):
    del words[: 2 if words[0] in ("-i", "-o") else 1]
address, command = words[0].split("@")[-1], " ".join(words[1:])
host = {hosts!r}.get(address) or os.uname().nodename
# A login: nothing of this environment goes along, and ~ is on the host's own /tmp.
cluster = os.environ["EMULATED_CLUSTER"]
environment = {{"HOME": "/tmp/home", "PATH": "/usr/bin:/bin", "EMULATED_CLUSTER": cluster}}
agent = [sys.executable, "-I", "-S", {agent!r}, "--run", cluster, host]
prepare = "mkdir -p ~; echo 'export PATH={path}' >~/.bashrc; cd; "
sys.exit(subprocess.run([*agent, "sh", "-c", prepare + command], env=environment, cwd="/").returncode)
"""

RSYNC = """#!{python}
import os, subprocess, sys

source, target = sys.argv[-2:]
source = os.path.expanduser(source)
address, path = target.split(":", 1)
mode = oct(os.stat(source).st_mode & 0o777)[2:]
command = f"cat >{{path}}.new && chmod {{mode}} {{path}}.new && mv {{path}}.new {{path}}"
with open(source) as file:
    sys.exit(subprocess.run([{ssh!r}, address, command], stdin=file).returncode)
"""


@pytest.fixture
def laptop(tmp_path):
    """Three hosts, of which host2 has the token and reaches the others by ssh and rsync; `ray` runs there."""
    from cluster.emulated import EmulatedCluster

    if not (PREFIX / "bin" / "ray").exists():
        pytest.skip(f"no Ray environment at {PREFIX}: run make ray-environment")
    path = f"{tmp_path}:{PREFIX / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin"
    with EmulatedCluster(3, shared=[tmp_path, PREFIX, REPOSITORY]) as hosts:
        known = {address: host for host, address in hosts.addresses.items()}
        values = {
            "python": shutil.which("python3", path="/usr/bin") or sys.executable,
            "hosts": known,
            "agent": str(REPOSITORY / "cluster" / "agent.py"),
            "path": path,
            "ssh": str(tmp_path / "ssh"),
        }
        for name, text in (("ssh", SSH), ("rsync", RSYNC)):
            (tmp_path / name).write_text(text.format(**values))
            (tmp_path / name).chmod(0o755)
        environment = {"HOME": "/tmp/home", "PATH": path, "LANG": "C.UTF-8"}

        def ray(*words, host="host2", **more):
            command = 'mkdir -p ~; touch ~/.bashrc; cd; exec "$@"'
            given = ["sh", "-c", command, "sh", "ray", *words]
            return hosts.run(host, given, env=environment | more, timeout=180)

        ray("get-auth-token", "--generate")
        hosts.run("host2", ["chmod", "600", "/tmp/home/.ray/auth_token"])
        yield hosts, ray


def described_for(hosts, name, tmp_path):
    """Return a file of `cluster/` with the addresses of emulated hosts, and one worker at most."""
    text = (REPOSITORY / "cluster" / name).read_text().replace("ssh_user: you", "ssh_user: root")
    text = text.replace("    - 192.168.1.12\n", "")
    text = text.replace("192.168.1.10", hosts.addresses["host0"]).replace(
        "192.168.1.11", hosts.addresses["host1"]
    )
    (tmp_path / name).write_text(text)
    return tmp_path / name


def listening(hosts, host):
    """The addresses at which a host listens."""
    lines = hosts.run(host, ["ss", "-ltnH"], check=True).stdout.splitlines()
    return {line.split()[3].rsplit(":", 1)[0] for line in lines}


def test_ray_up_makes_a_cluster_of_named_machines(laptop, tmp_path):
    """Head and worker come up with the token, which nobody else may read, and the cluster counts both."""
    hosts, ray = laptop
    file = described_for(hosts, "ray-onprem.yaml", tmp_path)
    up = ray("up", "--yes", "--no-config-cache", str(file))
    assert up.returncode == 0, up.stdout + up.stderr

    def both_are_there():
        shown = ray("status", host="host0", RAY_AUTH_MODE="token").stdout
        return re.search(r"^ 2 local\.cluster\.node$", shown, re.MULTILINE)

    wait_until(both_are_there, 120)
    for host in ("host0", "host1"):
        token = hosts.run(host, ["stat", "-c", "%a %s", "/tmp/home/.ray/auth_token"]).stdout
        assert token == "600 64\n"
    stranger = ray("status", host="host0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    assert stranger.returncode != 0
    down = ray("down", "--yes", str(file))
    assert down.returncode == 0, down.stdout + down.stderr
    assert not [argv for argv in hosts.processes("host0").values() if "gcs_server" in argv[0]]


def test_ray_up_on_one_machine_listens_on_the_loopback_alone(laptop, tmp_path):
    """The cluster of one machine has no port that another machine could reach."""
    hosts, ray = laptop
    file = described_for(hosts, "ray-local.yaml", tmp_path)
    up = ray("up", "--yes", "--no-config-cache", str(file))
    assert up.returncode == 0, up.stdout + up.stderr
    assert listening(hosts, "host2") <= {"127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"}
    submitted = ray(
        "job",
        "submit",
        "--address",
        "http://127.0.0.1:8265",
        "--",
        "echo",
        "$((6 * 7))",
        RAY_AUTH_MODE="token",
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    down = ray("down", "--yes", str(file))
    assert down.returncode == 0, down.stdout + down.stderr
    assert not [argv for argv in hosts.processes("host2").values() if "gcs_server" in argv[0]]
