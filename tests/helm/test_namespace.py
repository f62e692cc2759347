"""What the pods read of the namespace: Helm asks the stand-in for Kubernetes, and refuses what would not start."""

from collections.abc import Iterator

import helm_python as helm
import pytest

from tests.helm.charts import Values
from tests.helm.fake_api import FakeApi, fake_cluster
from tests.helm.fake_store import NAMESPACE, Place
from tests.helm.test_release import KEYS, install, present, put

REACH: Values = {"networkPolicy": {"egressCIDRs": ["10.0.0.0/8"]}}
REDIS = REACH | {"ray": {"gcs": {"faultTolerance": "redis", "redisAddress": "redis:6379", "redisSecret": "redis"}}}
STORE = REACH | {"model": {"source": "objectStore", "path": "/models", "objectStore": {"url": "s3:m", "secret": "s3"}}}
PVC: Values = {"model": {"source": "pvc", "path": "/models/m", "pvc": {"claim": "models"}}}


@pytest.fixture
def api() -> Iterator[FakeApi]:
    """Where every job ends well."""
    with fake_cluster() as api:
        put(api, "ConfigMap", "configmaps", "kube-root-ca.crt")
        put(api, "Secret", "secrets", "shoal-auth", KEYS)
        yield api


def test_a_missing_secret_is_refused_with_the_command_that_makes_it(api: FakeApi, config: helm.Config) -> None:
    with pytest.raises(helm.HelmReleaseError, match="create secret generic other-keys --from-literal=api-key="):
        install(config, {"auth": {"existingSecret": "other-keys"}})
    assert present(api) == set()
    put(api, "Secret", "secrets", "other-keys", KEYS)
    install(config, {"auth": {"existingSecret": "other-keys"}})


@pytest.mark.parametrize("lacks", ["api-key", "admin-token"])
def test_a_secret_without_a_key_is_refused(api: FakeApi, config: helm.Config, lacks: str) -> None:
    put(api, "Secret", "secrets", "half", KEYS | {lacks: ""})
    with pytest.raises(helm.HelmReleaseError, match=f"secret half .* has no entry {lacks}, .* by auth.apiKeyEntry"):
        install(config, {"auth": {"existingSecret": "half"}})
    assert present(api) == {("secrets", "half")}


@pytest.mark.parametrize(
    ("values", "resource", "name", "create", "entries"),
    [
        ({"tls": {"secret": "pem"}}, "secrets", "pem", "--from-file=ca.crt", ("tls.crt", "tls.key", "ca.crt")),
        ({"ray": {"tokenSecret": "ray"}}, "secrets", "ray", "--from-literal=auth_token=", ("auth_token",)),
        (REDIS, "secrets", "redis", "--from-file=password", ("password",)),
        (STORE, "secrets", "s3", "--from-env-file=", ()),
        (PVC, "persistentvolumeclaims", "models", "such that all pods can read", ()),
        ({"outputs": {"claim": "out"}}, "persistentvolumeclaims", "out", "such that all pods can write", ()),
    ],
)
def test_what_the_pods_read_of_the_namespace_must_be_there(
    api: FakeApi, config: helm.Config, values: Values, resource: str, name: str, create: str, entries: tuple[str, ...]
) -> None:
    with pytest.raises(helm.HelmReleaseError, match=f"there is no .* {name} in namespace default.*{create}"):
        install(config, values)
    kind = "Secret" if resource == "secrets" else "PersistentVolumeClaim"
    for missing in entries:
        put(api, kind, resource, name, {entry: "eA==" for entry in entries if entry != missing})
        with pytest.raises(helm.HelmReleaseError, match=f"{name} in namespace default has no entry {missing}"):
            install(config, values)
        api.store.delete(Place(resource, NAMESPACE, name))
    put(api, kind, resource, name, dict.fromkeys(entries, "eA=="))
    install(config, values)
