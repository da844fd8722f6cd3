"""The files under deploy/ and the image: they parse, offer what the configuration asks for, and run commands of ours.

No cluster, Slurm or Docker is here: what these would say of the files is not known.
"""

import copy
import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from actors.monitors.prometheus import GPU as GPU_METRICS
from actors.monitors.prometheus import SERVICE, STUDENT, TEACHER
from actors.placement import Node
from orchestrator.cli import build_parser
from orchestrator.cluster.ray_session import require_places
from orchestrator.config.load import load_config
from orchestrator.config.run import RunConfig
from tests.test_docs import OURS
from tests.test_gpu_lock import GPU
from tests.test_packaging import PROJECT, ROOMS

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SLURM = DEPLOY / "slurm" / "distil.sbatch"
LARGEST_CONTEXT = 8 << 20
GIB = {"Gi": 1, "Ti": 1024}


def manifests(path: str) -> list[dict[str, Any]]:
    """Return the documents of a file, without what YAML's anchors share between them."""
    return [json.loads(json.dumps(one)) for one in yaml.safe_load_all((DEPLOY / path).read_text())]


(CLUSTER,) = manifests("kuberay/cluster/raycluster.yaml")
(JOB,) = manifests("kuberay/rayjob.yaml")
GROUPS = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}
HEAD = CLUSTER["spec"]["headGroupSpec"]
PODS = {"head": HEAD, **GROUPS}


def pod(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = PODS[name]["template"]["spec"]
    return spec


def container(name: str) -> dict[str, Any]:
    (only,) = pod(name)["containers"]
    return dict(only)


def gib(amount: str) -> float:
    return float(amount[:-2]) * GIB[amount[-2:]]


def command_of(text: str) -> list[str]:
    """Return the arguments of the one call of our command line in a text."""
    found = OURS.search(re.sub(r"\\\n\s*", " ", text))
    assert found is not None
    return shlex.split(found[1])


def configuration_of(command: list[str], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(ROOT)
    options = build_parser().parse_args(command)
    assert options.command == "run"
    return load_config(options.config, options.overrides)


def nodes_of_the_manifest() -> list[Node]:
    """The nodes that KubeRay makes of the cluster, as Ray lists them."""
    nodes = []
    for name, group in GROUPS.items():
        asked = container(name)["resources"]["requests"]
        total = {"CPU": float(asked["cpu"]), "GPU": float(asked["nvidia.com/gpu"])}
        custom = yaml.safe_load(yaml.safe_load(group["rayStartParams"].get("resources", "'{}'")))
        nodes += [Node(f"{name}-{number}", {**total, **custom}, group["labels"]) for number in range(group["replicas"])]
    return nodes


def test_the_cluster_holds_what_the_job_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration_of(command_of(JOB["spec"]["entrypoint"]), monkeypatch)
    assert config.teacher.engine.labels == GROUPS["teachers"]["labels"]
    assert config.workers.labels == GROUPS["students"]["labels"]
    require_places(config, nodes_of_the_manifest())
    custom = config.workers.model_copy(update={"labels": {}, "resources": {"student_node": 1.0}})
    require_places(config.model_copy(update={"workers": custom}), nodes_of_the_manifest())
    with pytest.raises(ValueError, match=r"^17 workers .* do not fit: nodes hold 16 in all"):
        require_places(
            config.model_copy(update={"workers": config.workers.model_copy(update={"count": 17})}), nodes_of_the_manifest()
        )


def test_job_and_cluster_belong_together() -> None:
    assert (CLUSTER["apiVersion"], CLUSTER["kind"]) == (JOB["apiVersion"], "RayCluster")
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert JOB["spec"]["clusterSelector"] == {"ray.io/cluster": CLUSTER["metadata"]["name"]}
    assert CLUSTER["spec"]["rayVersion"] == ray.__version__ == GPU["ray"]
    environment = yaml.safe_load(JOB["spec"]["runtimeEnvYAML"])["env_vars"]
    assert all(isinstance(value, str) for value in environment.values())
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) <= pod("students")["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", PODS)
def test_each_pod_has_what_it_needs(name: str) -> None:
    spec, one = pod(name), container(name)
    variables = {variable["name"]: variable for variable in one["env"]}
    assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True and "value" not in variables["HF_TOKEN"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in one["volumeMounts"]}
    assert variables["HF_HOME"]["value"].startswith("/mnt/shared/")
    claim = mounts["/mnt/shared"]["persistentVolumeClaim"]["claimName"]
    _, made = manifests("kuberay/storage.yaml")
    assert (made["kind"], made["metadata"]["name"]) == ("PersistentVolumeClaim", claim)
    store = int(PODS[name]["rayStartParams"]["object-store-memory"]) / 2**30
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory" and gib(mounts["/dev/shm"]["emptyDir"]["sizeLimit"]) > store
    assert spec["imagePullSecrets"] and spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 1000
    asked, allowed = one["resources"]["requests"], one["resources"]["limits"]
    assert {asked[key] == allowed[key] for key in ("memory", "ephemeral-storage")} == {True}
    assert asked.get("nvidia.com/gpu") == allowed.get("nvidia.com/gpu") == (None if name == "head" else "8")


@pytest.mark.parametrize("name", GROUPS)
def test_pods_with_gpus_find_machines_with_gpus(name: str) -> None:
    assert any("gpu" in key for key in pod(name)["nodeSelector"])
    assert any(one["key"] == "nvidia.com/gpu" for one in pod(name)["tolerations"])
    group = GROUPS[name]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_head_has_no_work_of_rays_and_room_for_the_driver() -> None:
    assert HEAD["rayStartParams"]["num-cpus"] == "0"
    assert gib(container("head")["resources"]["requests"]["memory"]) >= 64


def test_the_volume_is_one_that_all_pods_may_write() -> None:
    volume, claim = manifests("kuberay/storage.yaml")
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert claim["spec"]["accessModes"] == volume["spec"]["accessModes"] == ["ReadWriteMany"]
    assert {"lookupcache=positive", "actimeo=5"} <= set(volume["spec"]["mountOptions"])


def test_prometheus_reads_a_port_that_all_pods_have() -> None:
    (monitor,) = manifests("kuberay/podmonitor.yaml")
    assert monitor["spec"]["selector"]["matchLabels"] == JOB["spec"]["clusterSelector"]
    ports = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert all(ports <= {port["name"] for port in container(name)["ports"]} for name in PODS)


def applied(document: dict[str, Any], patch: list[dict[str, Any]]) -> dict[str, Any]:
    """Apply the additions of a JSON patch."""
    patched = copy.deepcopy(document)
    for operation in patch:
        assert operation["op"] == "add"
        *way, last = (part.replace("~1", "/") for part in operation["path"].removeprefix("/").split("/"))
        place: Any = patched
        for part in way:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if isinstance(place, list):
            place.append(operation["value"])
        else:
            place[last] = operation["value"]
    return patched


def test_rdma_is_added_to_students() -> None:
    (base,), (overlay,) = manifests("kuberay/cluster/kustomization.yaml"), manifests("kuberay/rdma/kustomization.yaml")
    assert base["resources"] == ["raycluster.yaml"] and overlay["resources"] == ["../cluster"]
    (patch,) = overlay["patches"]
    assert patch["target"] == {"kind": CLUSTER["kind"], "name": CLUSTER["metadata"]["name"]}
    (operations,) = yaml.safe_load_all((DEPLOY / "kuberay/rdma" / patch["path"]).read_text())
    students = applied(CLUSTER, operations)["spec"]["workerGroupSpecs"][1]
    assert students["groupName"] == "students"
    (one,) = students["template"]["spec"]["containers"]
    assert {"NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "HF_TOKEN"} <= {variable["name"] for variable in one["env"]}
    assert one["resources"]["limits"]["rdma/ib"] == one["resources"]["requests"]["rdma/ib"]
    assert one["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_the_slurm_script_parses_and_its_nodes_hold_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(["bash", "-n", str(SLURM)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    text = SLURM.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    config = configuration_of(command_of(text), monkeypatch)
    labels = [dict([pair.split("=")]) for pair in re.findall(r"ray start .*--labels=(\S+)", text)]
    assert labels == [{"role": "student"}, {"role": "student"}, {"role": "teacher"}], "the last in a loop over all other nodes"
    roles = labels[:2] + labels[2:] * (int(asked["nodes"]) - 2)
    whole = {"CPU": 64.0, "GPU": float(asked["gpus-per-node"])}
    require_places(config, [Node(f"node {number}", whole, one) for number, one in enumerate(roles)])


def image_instructions(name: str) -> list[list[str]]:
    joined = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    return [shlex.split(line) for line in re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)]


def ignored(path: str, rules: list[str]) -> bool:
    """Whether a path stays out of Docker's context: the last rule that names it, or a folder above it, decides."""
    parts = path.split("/")
    above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    answer = False
    for rule in rules:
        pattern = rule.removeprefix("!")
        anywhere = pattern.startswith("**/")
        names = parts if anywhere else above
        if any(fnmatch.fnmatchcase(one, pattern.removeprefix("**/")) for one in names):
            answer = not rule.startswith("!")
    return answer


RULES = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def test_what_the_image_copies_is_there_and_travels() -> None:
    assert ignored(".git/config", ["*"]) and not ignored("a/b.py", ["*", "!a"])
    assert ignored("a/__pycache__/b", ["!a", "**/__pycache__"])
    sources = [source for words in image_instructions("COPY") for source in words[:-1]]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists() or ignored(source, RULES)] == []
    assert set(ROOMS) <= set(sources)


def test_what_the_image_copies_is_all_that_a_run_imports(tmp_path: Path) -> None:
    for *sources, target in image_instructions("COPY")[1:]:
        for source in sources:
            place = tmp_path / target / source if target == "./" else tmp_path / target
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place)
    code = "import orchestrator.commands, actors.student.loop; print(orchestrator.__file__, actors.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(name.startswith(str(tmp_path)) for name in done.stdout.split())
    shown = subprocess.run(
        [sys.executable, "-m", *shlex.split(JOB["spec"]["entrypoint"].split(" -m ")[1].replace(" run ", " config "))],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shown.returncode == 0 and "name: qwen_7b_to_0.5b_cluster" in shown.stdout, shown.stderr


def test_little_travels_into_the_build() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    context = [name for name in files if not ignored(name, RULES)]
    assert not [name for name in context if name.startswith(("tests/", "docs/", ".git"))]
    assert sum((ROOT / name).stat().st_size for name in context if (ROOT / name).exists()) < LARGEST_CONTEXT
    for unwanted in (".venv/bin/python", "runs/a/checkpoints/x", ".git/HEAD", "actors/__pycache__/a.pyc"):
        assert ignored(unwanted, RULES)


def test_the_image_installs_the_lock_and_ends_as_a_user() -> None:
    (base,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert base.split(":")[1].startswith("13.0."), "the CUDA of torch in the lock"
    runs = [" ".join(words) for words in image_instructions("RUN")]
    assert any("--no-deps --requirement /tmp/gpu.lock" in run and "--compile-bytecode" in run for run in runs)
    assert any("gcc" in run and "python3.11-devel" in run for run in runs)
    assert PROJECT["requires-python"] == ">=3.11"
    assert image_instructions("USER") == [["1000"]]
    assert DOCKERFILE.index("USER") > DOCKERFILE.rindex("RUN")
    assert "env -C /opt/atkd " in JOB["spec"]["entrypoint"] and image_instructions("WORKDIR") == [["/opt/atkd"]]


DASHBOARD = json.loads((DEPLOY / "grafana" / "atkd.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_shows_each_metric_of_ours_and_no_other() -> None:
    queries = " ".join([*EXPRESSIONS, *(one["query"] for one in DASHBOARD["templating"]["list"])])
    ours = {shown.exported_name for table in (STUDENT, GPU_METRICS, TEACHER, SERVICE) for shown in table.values()}
    assert set(re.findall(r"\bray_atkd_\w+", queries)) == ours


def test_what_the_dashboard_takes_from_ray_is_exported_by_ray() -> None:
    named = set(re.findall(r"\bray_(?!atkd_)(\w+)", " ".join(EXPRESSIONS)))
    assert {"node_gpus_utilization", "node_gram_used"} == named
    agent = (Path(ray.__file__).parent / "dashboard/modules/reporter/reporter_agent.py").read_text()
    assert [name for name in named if f'"{name}"' not in agent] == []


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
