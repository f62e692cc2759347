"""What tests that install the chart have in common."""

from collections.abc import Iterator

import helm_python as helm
import pytest

from tests.helm.fake_api import FakeApi
from tests.helm.fake_store import NAMESPACE


@pytest.fixture
def config(api: FakeApi) -> Iterator[helm.Config]:
    with helm.Config(kubeconfig_content=api.kubeconfig, namespace=NAMESPACE, qps=1000, burst_limit=1000) as config:
        yield config
