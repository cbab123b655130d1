"""The manifests of deploy/kuberay: fields that KubeRay knows, and names that fit.

KubeRay's schema comes with no package, so what is used of it stands here as data: the fields of `ray.io/v1` as of
KubeRay 1.7, and those of Kubernetes and of the Prometheus operator.
"""

import re
import shlex
from collections.abc import Mapping
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from tests.integration.kuberay import KUBERAY, commands, containers, groups, manifests, option

pytestmark = pytest.mark.skipif(not KUBERAY.exists(), reason="the manifests are in the repository")

# --- what Kubernetes and the operators know ------------------------------------------------------------------------

Schema = dict[str, Any]


def fields(needed: str = "", **known: Schema) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": known, "required": needed.split(), "additionalProperties": False}


def items(schema: Schema) -> Schema:
    return {"type": "array", "items": schema, "minItems": 1}


def one_of(*words: str) -> Schema:
    return {"enum": list(words)}


TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": ["integer", "string"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGT]i?)?$"}
DURATION: Schema = {"type": "string", "pattern": r"^[0-9]+(s|m|h)$"}

AMOUNTS: Schema = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = fields("requests limits", requests=AMOUNTS, limits=AMOUNTS)
PROBE = fields(
    "httpGet",
    httpGet=fields("path port", path=TEXT, port=PORT),
    **dict.fromkeys(("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold"), COUNT),
)
CONTAINER = fields(
    "name image resources",
    name=NAME,
    image=TEXT,
    command=items(TEXT),
    env=items(fields("name", name=TEXT, valueFrom=fields("fieldRef", fieldRef=fields("fieldPath", fieldPath=TEXT)))),
    ports=items(fields("containerPort", name={**NAME, "maxLength": 15}, containerPort=PORT)),
    resources=RESOURCES,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    volumeMounts=items(fields("name mountPath", name=NAME, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME = fields(
    "name",
    name=NAME,
    persistentVolumeClaim=fields("claimName", claimName=NAME),
    configMap=fields("name", name=NAME),
    secret=fields("secretName", secretName=NAME, defaultMode={"type": "integer", "minimum": 0, "maximum": 0o777}),
    emptyDir=fields(medium=one_of("", "Memory")),
)
POD_TEMPLATE = fields(
    "spec",
    metadata=fields(labels=TEXTS),
    spec=fields(
        "containers",
        securityContext=fields(fsGroup=COUNT),
        initContainers=items(CONTAINER),
        containers=items(CONTAINER),
        volumes=items(VOLUME),
    ),
)
RAY_CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields(mode=one_of("disabled", "token")),
    headGroupSpec=fields("template", rayStartParams=TEXTS, template=POD_TEMPLATE),
    workerGroupSpecs=items(
        fields(
            "groupName template",
            groupName=NAME,
            **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), COUNT),
            rayStartParams=TEXTS,
            template=POD_TEMPLATE,
        )
    ),
)
RAY_JOB = fields(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    **dict.fromkeys(("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"), COUNT),
    shutdownAfterJobFinishes=FLAG,
    rayClusterSpec=RAY_CLUSTER,
)
SPECS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayCluster"): RAY_CLUSTER,
    ("ray.io/v1", "RayJob"): RAY_JOB,
    ("v1", "PersistentVolumeClaim"): fields(
        "accessModes resources",
        accessModes=items(one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")),
        resources=fields("requests", requests=AMOUNTS),
    ),
    ("v1", "Service"): fields(
        "selector ports",
        selector=TEXTS,
        ports=items(fields("port", name=NAME, port=PORT, targetPort={"type": ["integer", "string"]})),
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): fields(
        "selector podMetricsEndpoints",
        selector=fields(matchLabels=TEXTS),
        podMetricsEndpoints=items(fields(port=TEXT, interval=DURATION)),
    ),
    ("monitoring.coreos.com/v1alpha1", "ScrapeConfig"): fields(
        httpSDConfigs=items(fields("url", url=TEXT, refreshInterval=DURATION)), scrapeInterval=DURATION
    ),
}


def check(manifest: Mapping[str, Any]) -> None:
    spec = SPECS[manifest["apiVersion"], manifest["kind"]]
    whole = fields("metadata spec", apiVersion=TEXT, kind=TEXT, metadata=fields("name", name=NAME), spec=spec)
    jsonschema.Draft202012Validator(whole).validate(manifest)


def test_every_field_is_one_that_kubernetes_and_the_operators_know() -> None:
    assert {(one["apiVersion"], one["kind"]) for one in manifests().values()} == set(SPECS)
    for manifest in manifests().values():
        check(manifest)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rayClusterSpecs": {}}, "rayClusterSpecs"),
        ({"backoffLimit": "2"}, "'2' is not of type 'integer'"),
        ({"entrypoint": ["sh", "run.sh"]}, "is not of type 'string'"),
    ],
)
def test_a_field_that_is_wrong_is_seen(wrong: dict[str, Any], said: str) -> None:
    job = manifests()["RayJob"]
    with pytest.raises(jsonschema.ValidationError, match=re.escape(said)):
        check({**job, "spec": {**job["spec"], **wrong}})


# --- names that must fit ---------------------------------------------------------------------------------------------


def test_cluster_and_job_have_the_same_pods() -> None:
    assert manifests()["RayJob"]["spec"]["rayClusterSpec"] == manifests()["RayCluster"]["spec"]


def test_what_is_mounted_is_a_volume_and_what_is_claimed_is_there() -> None:
    claim = manifests()["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name, group in groups().items():
        spec = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        everywhere = [*spec.get("initContainers", []), *spec["containers"]]
        assert {mount["name"] for one in everywhere for mount in one["volumeMounts"]} == set(volumes), name
        assert volumes["state"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert {"name": "state", "mountPath": "/state"} in spec["containers"][0]["volumeMounts"]


def test_pods_get_what_they_ask_for_and_no_more() -> None:
    """Then none of them is evicted for another one, and Ray's view of a node is the node's."""
    for group in groups().values():
        spec = group["template"]["spec"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_shards_are_on_cpu_pods_and_workers_on_gpu_pods() -> None:
    """Where Ray has no CPU to give no shard can be, and a worker needs a GPU."""
    given = {name: group["rayStartParams"].get("num-cpus") for name, group in groups().items()}
    assert given == {"head": "0", "shards": None, "workers": "0"}
    limits = {name: container["resources"]["limits"] for name, container in containers().items()}
    assert [name for name, limit in limits.items() if "nvidia.com/gpu" in limit] == ["workers"]
    replicas = {
        name: [group.get(f"{least}eplicas") for least in ("minR", "r", "maxR")] for name, group in groups().items()
    }
    assert replicas["shards"] == [int(option("up", "--shards"))] * 3
    words = shlex.split(manifests()["RayJob"]["spec"]["entrypoint"])
    least, most = (int(words[words.index("--workers") + place]) for place in (1, 2))
    assert replicas["workers"] == [least, most, most]


def test_the_authority_s_key_is_in_no_container_that_stays() -> None:
    mounted = {mount["name"] for container in containers().values() for mount in container["volumeMounts"]}
    assert "authority" not in mounted


def test_ports_are_those_that_are_scraped() -> None:
    known = manifests()
    ports = {name: {port["name"] for port in container["ports"]} for name, container in containers().items()}
    (endpoint,) = known["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert all(endpoint["port"] in names for names in ports.values())
    (port,) = known["Service"]["spec"]["ports"]
    assert port["targetPort"] in ports["head"]
    (discovery,) = known["ScrapeConfig"]["spec"]["httpSDConfigs"]
    assert discovery["url"] == f"http://{known['Service']['metadata']['name']}:{port['port']}/"
    listening = option("targets", "--listen")
    assert {"name": "targets", "containerPort": int(listening.split(":")[1])} in containers()["head"]["ports"]
    for group in groups().values():  # what the monitors select by; the operator adds the labels of ray.io
        assert group["template"]["metadata"]["labels"]["app.kubernetes.io/part-of"] == "thresher"


def test_the_readme_makes_the_secrets_and_the_files_that_are_mounted() -> None:
    """By the names, and with the keys, under which pods and scripts look for them."""
    made: dict[str, set[str]] = {}
    for words in map(shlex.split, commands(KUBERAY / "README.md")):
        if words[:2] == ["kubectl", "create"]:
            name = words[4] if words[2] == "secret" else words[3]
            files = [word.removeprefix("--from-file=") for word in words if word.startswith("--from-file=")]
            made[name] = {file.split("=")[0].split("/")[-1] for file in files}
    wanted = {"authority": {"ca.pem", "ca.key"}, "shard": {"tokens"}, "worker": {"ca.pem", "token"}}
    wanted["run"] = {"run.sh", "certificate.sh", "ray_train.py"}
    assert made == {f"thresher-{name}": keys for name, keys in wanted.items()}
    volumes = [volume for group in groups().values() for volume in group["template"]["spec"]["volumes"]]
    asked = {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
    asked |= {volume["configMap"]["name"] for volume in volumes if "configMap" in volume}
    assert asked == set(made)


def test_the_job_starts_the_script_that_is_mounted() -> None:
    program, script, *_ = shlex.split(manifests()["RayJob"]["spec"]["entrypoint"])
    mounts = {mount["name"]: mount["mountPath"] for mount in containers()["head"]["volumeMounts"]}
    assert (program, script) == ("sh", f"{mounts['run']}/run.sh")
    assert not set("&;|$\"'`") & set(manifests()["RayJob"]["spec"]["entrypoint"])
