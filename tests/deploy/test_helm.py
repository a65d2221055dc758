"""The Helm chart: rendered by Helm's own library, compared with snapshots, and valid for Kubernetes."""

import copy
import functools
import ipaddress
import json
import os
import tomllib
from pathlib import Path

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy" / "helm" / "syncbn"
SNAPSHOTS = Path(__file__).parent / "snapshots"
FULL = yaml.safe_load((Path(__file__).parent / "full-values.yaml").read_text())
VALUES = {"default": {}, "full": FULL}
VERSIONS = ("1.30.0", "1.37.0")
"""Oldest version of the chart's `kubeVersion`, and the newest with published schemas."""


def render(values):
    with helm_python.Chart.load(str(CHART)) as chart:
        chart.validate_schema(values)
        return chart.render(values, name="demo", namespace="training")


def documents_of(values):
    return copy.deepcopy(parsed(json.dumps(values)))


@functools.cache
def parsed(values):
    rendered = render(json.loads(values))
    texts = [text for path, text in sorted(rendered.items()) if path.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="module", params=VALUES)
def documents(request):
    return documents_of(VALUES[request.param])


def find(documents, kind, name):
    (found,) = [one for one in documents if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def templates_of(documents):
    """Yield each template of pods with its name."""
    for document in documents:
        if document["kind"] == "Deployment":
            yield document["metadata"]["name"], document["spec"]["template"]
        if document["kind"] == "RayCluster":
            yield "head", document["spec"]["headGroupSpec"]["template"]
            for group in document["spec"]["workerGroupSpecs"]:
                yield group["groupName"], group["template"]


@pytest.mark.parametrize("name", VALUES)
def test_the_manifests_equal_their_snapshots(name):
    rendered = render(VALUES[name])
    text = "".join(f"# Source: {path}\n{content.strip()}\n\n" for path, content in sorted(rendered.items()))
    snapshot = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("UPDATE") == "helm":
        snapshot.write_text(text)
    assert snapshot.read_text() == text, (
        "the manifests have changed: `UPDATE=helm pytest tests/deploy/test_helm.py -k snapshots`"
    )


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_helm_finds_nothing_to_criticise(values):
    found = helm_python.lint(str(CHART), values, strict=True, kube_version="v1.37.0")
    assert not found["errors"]
    assert [message["error"] for message in found["messages"]] == ["icon is recommended"]


def text(**rules):
    return {"type": "string", **rules}


def fields(required=(), **properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


NUMBER, ANY, TEXTS = {"type": "integer"}, {"type": "object"}, {"additionalProperties": text()}
POD_PARTS = {"securityContext": ANY, "env": {"type": "array"}, "volumeMounts": {"type": "array"}}
# The fields that the chart uses, as in KubeRay's CRD rayclusters.ray.io (v1); maxItems is Kueue's.
RAY_CLUSTER = fields(
    ["headGroupSpec"],
    rayVersion=text(),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=fields(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=NUMBER,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        imagePullPolicy=text(),
        resources=ANY,
        **POD_PARTS,
    ),
    headGroupSpec=fields(["template"], serviceType=text(), rayStartParams=TEXTS, template=ANY),
    workerGroupSpecs={
        "type": "array",
        "maxItems": 7,
        "items": fields(
            ["groupName", "maxReplicas", "minReplicas", "template"],
            groupName=text(),
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            idleTimeoutSeconds=NUMBER,
            rayStartParams=TEXTS,
            template=ANY,
        ),
    },
)
# The fields that the chart uses, as in the CRD servicemonitors.monitoring.coreos.com (v1).
SERVICE_MONITOR = fields(
    ["endpoints", "selector"],
    selector=fields(matchLabels=TEXTS),
    endpoints={
        "type": "array",
        "items": fields(
            port=text(),
            path=text(pattern="^/"),
            interval=text(pattern="^[0-9]+(ms|s|m|h)$"),
            authorization=fields(type=text(), credentials=fields(["key"], name=text(), key=text())),
        ),
    },
)
CUSTOM = {
    "RayCluster": ("ray.io/v1", RAY_CLUSTER),
    "ServiceMonitor": ("monitoring.coreos.com/v1", SERVICE_MONITOR),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_satisfy_the_published_schemas(documents, version):
    for document in documents:
        if document["kind"] in CUSTOM:
            api_version, schema = CUSTOM[document["kind"]]
            assert document["apiVersion"] == api_version
            jsonschema.validate(document["spec"], schema)
        else:
            kubernetes_validate.validate(document, version, strict=True)
    for name, template in templates_of(documents):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
        kubernetes_validate.validate(pod, version, strict=True)
    autoscaler = find(documents, "RayCluster", "demo-syncbn")["spec"]["autoscalerOptions"]
    container = {"name": "autoscaler"} | {
        part: autoscaler[part] for part in (*POD_PARTS, "resources", "imagePullPolicy")
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "head"},
        "spec": {"containers": [container]},
    }
    kubernetes_validate.validate(pod, version, strict=True)


def test_the_schemas_refuse_what_kubernetes_would():
    broken = copy.deepcopy(documents_of({}))
    find(broken, "Deployment", "demo-syncbn-api")["spec"]["template"]["spec"]["hostNetworks"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="hostNetworks"):
        kubernetes_validate.validate(find(broken, "Deployment", "demo-syncbn-api"), VERSIONS[-1], strict=True)
    cluster = find(broken, "RayCluster", "demo-syncbn")["spec"]
    cluster["workerGroupSpecs"][0]["minReplicas"] = "one"
    with pytest.raises(jsonschema.ValidationError, match="'one' is not of type 'integer'"):
        jsonschema.validate(cluster, RAY_CLUSTER)


def test_all_pods_satisfy_the_restricted_standard(documents):
    """Pod Security Standards, level `restricted`, and more."""
    for name, template in templates_of(documents):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys(), name
        assert pod["enableServiceLinks"] is False, name
        for volume in pod["volumes"]:
            (kind,) = volume.keys() - {"name"}
            assert kind in {"emptyDir", "persistentVolumeClaim", "secret"}, name
            assert kind != "emptyDir" or "sizeLimit" in volume["emptyDir"], name
        (container,) = pod["containers"]
        assert is_restricted(container), name
        for field in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][field].keys(), name
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys(), name
        ports = {port["name"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            (kind,) = {"httpGet", "tcpSocket"} & container[probe].keys()
            assert container[probe][kind]["port"] in ports, name
    assert is_restricted(find(documents, "RayCluster", "demo-syncbn")["spec"]["autoscalerOptions"])


def is_restricted(container):
    return container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"


@pytest.mark.parametrize("is_autoscaled", [True, False])
def test_no_container_of_ours_has_a_token_of_kubernetes(is_autoscaled):
    documents = documents_of({"ray": {"autoscaling": {"enabled": is_autoscaled}}})
    accounts = {one["metadata"]["name"]: one for one in documents if one["kind"] == "ServiceAccount"}
    for name, template in templates_of(documents):
        pod = template["spec"]
        if name == "head" and is_autoscaled:
            # The account is KubeRay's, for the autoscaler that it adds to this pod. Kubernetes mounts no
            # token where a container has a mount of its own.
            assert "serviceAccountName" not in pod
            (container,) = pod["containers"]
            (mount,) = [one for one in container["volumeMounts"] if one["mountPath"] == TOKEN_FOLDER]
            (volume,) = [one for one in pod["volumes"] if one["name"] == mount["name"]]
            assert "emptyDir" in volume
            continue
        assert pod["automountServiceAccountToken"] is False, name
        assert accounts[pod["serviceAccountName"]]["automountServiceAccountToken"] is False, name
    assert not {one["kind"] for one in documents} & {
        "Role",
        "ClusterRole",
        "RoleBinding",
        "ClusterRoleBinding",
    }


def test_no_manifest_holds_a_secret(documents):
    assert "Secret" not in {document["kind"] for document in documents}
    for name, template in templates_of(documents):
        for variable in template["spec"]["containers"][0]["env"]:
            if (
                any(word in variable["name"] for word in ("TOKEN", "SECRET", "PASSWORD"))
                and "value" in variable
            ):
                assert variable["name"] == "SYNCBN_SECRETS_FOLDER", name


def environment_of(documents, name):
    container = dict(templates_of(documents))[name]["spec"]["containers"][0]
    return {variable["name"]: variable.get("value") for variable in container["env"]}


def test_the_variables_of_the_api_are_settings(documents, monkeypatch):
    environment = environment_of(documents, "demo-syncbn-api")
    known = {f"SYNCBN_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in environment if name.startswith("SYNCBN_")} <= known
    for name, value in environment.items():
        monkeypatch.setenv(name, value or "a-secret-of-16-characters")
    settings = Settings()
    assert settings.nodes_url() == "http://demo-syncbn-api:8000"
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    by_operator = {"SYNCBN_ALLOWED_IMPORTS", "SYNCBN_ALLOWED_ROOTS", "SYNCBN_SECRETS_FOLDER"}
    assert services["api"]["environment"].keys() - by_operator <= environment.keys()


def test_the_service_knows_what_the_autoscaler_may_add():
    environment = environment_of(documents_of(FULL), "demo-syncbn-api")
    assert environment["SYNCBN_AUTOSCALED_CPUS"] == str(10 * 8 + 4 * 64)
    assert environment["SYNCBN_AUTOSCALED_GPUS"] == str(4 * 8)
    fixed = documents_of({"ray": {"autoscaling": {"enabled": False}}})
    assert "SYNCBN_AUTOSCALED_CPUS" not in environment_of(fixed, "demo-syncbn-api")
    assert "autoscalerOptions" not in find(fixed, "RayCluster", "demo-syncbn")["spec"]


def test_gpu_groups_request_gpus_where_they_are():
    group = dict(templates_of(documents_of(FULL)))["gpu-a100"]["spec"]
    assert group["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert group["nodeSelector"] == {"nvidia.com/gpu.product": "A100-SXM4-80GB"}
    assert group["tolerations"][0]["key"] == "nvidia.com/gpu"
    (spread,) = group["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"]["ray.io/group"] == "gpu-a100"
    cpus = dict(templates_of(documents_of(FULL)))["cpu"]["spec"]
    assert "nvidia.com/gpu" not in cpus["containers"][0]["resources"]["limits"]


def test_images_with_torch_run_where_it_is_needed(documents):
    images = {
        name.removeprefix("demo-syncbn-"): template["spec"]["containers"][0]["image"]
        for name, template in templates_of(documents)
    }
    service = {name for name, image in images.items() if "/syncbn-service" in f"/{image}"}
    assert service == {"api", "mlflow"}
    trainer = {name for name, image in images.items() if "/syncbn-trainer" in f"/{image}"}
    assert trainer == images.keys() - service


def test_tag_and_digest_belong_to_one_image_each():
    images = {template["spec"]["containers"][0]["image"] for _, template in templates_of(documents_of(FULL))}
    digest = FULL["images"]["service"]["digest"]
    assert images == {
        f"registry.example.org/syncbn-service@{digest}",
        "registry.example.org/syncbn-trainer:0.2.0-cuda",
    }


def test_the_api_finds_the_checker_and_gives_it_no_secret(documents):
    host, _, port = environment_of(documents, "demo-syncbn-api")["SYNCBN_CHECKER"].partition(":")
    service = find(documents, "Service", host)["spec"]
    deployment = find(documents, "Deployment", "demo-syncbn-checker")["spec"]
    (container,) = deployment["template"]["spec"]["containers"]
    assert selects({"matchLabels": service["selector"]}, deployment["template"]["metadata"]["labels"])
    assert service["ports"] == [{"name": "checks", "port": int(port), "targetPort": "checks"}]
    assert container["ports"] == [{"name": "checks", "containerPort": 7000}]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["checker"]
    assert container["args"] == compose["command"]
    environment = environment_of(documents, "demo-syncbn-checker")
    assert environment == compose["environment"] | {"HOME": "/tmp"}
    assert deployment["template"]["spec"]["volumes"] == [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}]


def test_monitoring_has_the_token_that_opens_the_metrics_alone():
    documents = documents_of(FULL)
    api = find(documents, "Deployment", "demo-syncbn-api")["spec"]["template"]["spec"]["containers"][0]
    references = {
        one["name"]: one["valueFrom"]["secretKeyRef"]
        for one in api["env"]
        if "secretKeyRef" in one.get("valueFrom", {})
    }
    (endpoint,) = find(documents, "ServiceMonitor", "demo-syncbn")["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == references["SYNCBN_METRICS_TOKEN"]
    assert references["SYNCBN_METRICS_TOKEN"] != references["SYNCBN_TOKEN"]


def test_kueue_admits_the_cluster():
    metadata = find(documents_of(FULL), "RayCluster", "demo-syncbn")["metadata"]
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert metadata["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert "kueue" not in json.dumps(documents_of({}))


def labels_of(documents):
    """Return the labels of each kind of pod, with those that KubeRay adds, and of pods of others."""
    added = {"head": {"ray.io/node-type": "head"}, "cpu": {"ray.io/node-type": "worker"}}
    ours = {
        name.removeprefix("demo-syncbn-"): template["metadata"]["labels"]
        | ({"ray.io/cluster": "demo-syncbn"} | added[name] if name in added else {})
        for name, template in templates_of(documents)
        if name != "gpu-a100"
    }
    return ours | {"other": {"app": "other"}}


def selects(selector, labels):
    return selector.get("matchLabels", {}).items() <= labels.items()


def allows(rules, peer, port):
    """Return whether one of the rules admits a peer, pod labels or an address, on a port."""
    for rule in rules:
        ports = rule.get("ports")
        if ports is not None and port not in {one["port"] for one in ports}:
            continue
        for one in rule.get("from", rule.get("to")):
            if isinstance(peer, dict):
                if (
                    "podSelector" in one
                    and "namespaceSelector" not in one
                    and selects(one["podSelector"], peer)
                ):
                    return True
            elif "ipBlock" in one:
                block = one["ipBlock"]
                inside = [
                    ipaddress.ip_network(network) for network in (block["cidr"], *block.get("except", ()))
                ]
                if peer in inside[0] and not any(peer in network for network in inside[1:]):
                    return True
    return False


def can_reach(documents, source, target, port):
    """Return whether the policies let a pod open a connection to another pod or an address."""
    policies, labels = (
        [one["spec"] for one in documents if one["kind"] == "NetworkPolicy"],
        labels_of(documents),
    )

    def passes(direction, pod, peer):
        kind = direction.capitalize()
        on = [
            one for one in policies if selects(one["podSelector"], labels[pod]) and kind in one["policyTypes"]
        ]
        assert on, "the default policy selects all pods"
        return any(allows(one.get(direction, []), peer, port) for one in on)

    if target not in labels:
        return passes("egress", source, ipaddress.ip_address(target))
    return passes("egress", source, labels[target]) and passes("ingress", target, labels[source])


PORTS = (5000, 5432, 6379, 6443, 7000, 8000, 8080, 8265, 10001, 40000, 52365)
DATABASE, KUBERNETES, OUTSIDE, METADATA = "10.1.2.3", "10.9.0.1", "1.1.1.1", "169.254.169.254"


def test_the_network_policies_open_these_ways_and_no_other():
    documents = documents_of(FULL)
    pods = labels_of(documents)
    assert pods.keys() == {"api", "checker", "mlflow", "head", "cpu", "other"}
    ways = {
        (source, target, port)
        for source in pods
        for target in (*pods, DATABASE, KUBERNETES, OUTSIDE, METADATA)
        for port in PORTS
        if can_reach(documents, source, target, port)
    }
    among_ray = {(one, two, port) for one in ("head", "cpu") for two in ("head", "cpu") for port in PORTS}
    assert ways - among_ray == {
        ("api", "mlflow", 5000),
        ("api", "checker", 7000),
        ("api", "head", 8265),
        ("api", DATABASE, 5432),
        ("mlflow", DATABASE, 5432),
        ("head", "api", 8000),
        ("cpu", "api", 8000),
        ("head", KUBERNETES, 6443),
    }
    assert among_ray <= ways
    # Webhooks go to public addresses only.
    assert can_reach(documents, "api", OUTSIDE, 443)
    assert not can_reach(documents, "api", METADATA, 443)
    assert not can_reach(documents, "cpu", OUTSIDE, 443)


def test_only_ingress_and_monitoring_reach_the_api_from_other_namespaces():
    policies = [one for one in documents_of(FULL) if one["kind"] == "NetworkPolicy"]
    from_outside = {
        (policy["metadata"]["name"], peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"])
        for policy in policies
        for rule in policy["spec"].get("ingress", [])
        for peer in rule["from"]
        if "namespaceSelector" in peer or "ipBlock" in peer
    }
    assert from_outside == {("demo-syncbn-api", "ingress-nginx"), ("demo-syncbn-api", "monitoring")}
    assert {one["spec"]["type"] for one in documents_of(FULL) if one["kind"] == "Service"} == {"ClusterIP"}


def test_replicas_have_their_own_names_and_leave_one_by_one():
    api = find(documents_of(FULL), "Deployment", "demo-syncbn-api")["spec"]
    assert api["replicas"] == 3
    assert api["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    (replica,) = [
        one for one in api["template"]["spec"]["containers"][0]["env"] if one["name"] == "SYNCBN_REPLICA"
    ]
    assert replica["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    budgets = [one for one in documents_of(FULL) if one["kind"] == "PodDisruptionBudget"]
    assert {one["metadata"]["name"].removeprefix("demo-syncbn-") for one in budgets} == {
        "api",
        "mlflow",
        "ray-head",
    }


def test_versions_are_those_of_the_project():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert yaml.safe_load((CHART / "values.yaml").read_text())["ray"]["version"] == pins["ray"]


def with_group(**changes):
    group = {"name": "cpu", "cpus": 1, "memory": "1Gi", "minReplicas": 0, "maxReplicas": 1}
    return {"ray": {"workerGroups": [group | changes]}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"api": {"replica": 3}}, "'/api': additional properties 'replica' not allowed"),
        ({"api": {"replicas": 0}}, "'/api/replicas': minimum: got 0, want 1"),
        ({"api": {"settings": {"SYNCBN_TOKEN": "x" * 20}}}, "'/api/settings/SYNCBN_TOKEN': false schema"),
        ({"user": {"id": 0}}, "'/user/id': minimum: got 0, want 1"),
        ({"images": {"trainer": {"digest": "sha256:12"}}}, "'/images/trainer/digest'.*match pattern"),
        ({"image": {"tag": "1"}}, "additional properties 'image' not allowed"),
        ({"api": {"settings": {"SYNCBN_CHECKER": "x:1"}}}, "'/api/settings/SYNCBN_CHECKER': false schema"),
        ({"database": {"host": "a@b"}}, "'/database/host'.*does not match pattern"),
        ({"database": {"sslMode": "allow"}}, "'/database/sslMode': value must be one of"),
        ({"jobSecrets": {"items": [{"key": "a", "path": "../x"}]}}, "'/jobSecrets/items/0/path'"),
        ({"ingress": {"enabled": True}}, "'/ingress/host': minLength: got 0, want 1"),
        ({"ray": {"workerGroups": []}}, "'/ray/workerGroups': minItems: got 0, want 1"),
        (with_group(name="head"), "'/ray/workerGroups/0/name'"),
        (with_group(gpus="8"), "'/ray/workerGroups/0/gpus': got string, want integer"),
        ({"networkPolicy": {"database": []}}, "'/networkPolicy/database': minItems: got 0, want 1"),
        (with_group(minReplicas=2), r"minReplicas: must be at most maxReplicas.*\(got 2\)"),
        ({"kueue": {"queue": "training"}}, r"kueue.elastic: must be true with kueue.queue"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_their_path(values, message):
    with pytest.raises(helm_python.HelmError, match=message):
        render(values)
