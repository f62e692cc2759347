"""Addresses and labels among the values: taken where Kubernetes takes them, and refused before it is asked."""

import helm_python as helm
import pytest

from tests.helm.charts import Values, render


def refusal(values: Values) -> str:
    """What the schema says of these values; empty where it takes them."""
    try:
        render(values)
    except helm.HelmValuesError as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize(
    ("cidr", "taken"),
    [
        ("0.0.0.0/0", True),
        ("255.249.199.9/32", True),
        ("::/0", True),
        ("fd00:10::1/128", True),
        ("2001:DB8:0:1:2:3:4:5/64", True),
        ("999.1.1.1/99", False),
        ("256.0.0.0/8", False),
        ("10.0.0/8", False),
        ("10.0.0.0", False),
        ("10.0.0.0/33", False),
        ("fd00::/129", False),
        ("fd00:::1/64", False),
        ("fd00:1:2/64", False),
        ("abcde::/16", False),
    ],
)
def test_addresses_are_taken_as_kubernetes_takes_them(cidr: str, taken: bool) -> None:
    """Both what pods may call and who may call them."""
    for policy, key in (
        ({"egressCIDRs": [cidr]}, "/networkPolicy/egressCIDRs/0"),
        ({"clients": [{"ipBlock": {"cidr": cidr}}]}, "/networkPolicy/clients/0/ipBlock/cidr"),
    ):
        said = refusal({"networkPolicy": policy})
        assert (said == "", key in said) == (taken, not taken)


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("team", "a", True),
        ("example.com/Team_1", "", True),
        ("team", "A.b-c_d", True),
        ("te am", "a", False),
        ("-team", "a", False),
        ("Example.com/team", "a", False),
        ("a/b/c", "a", False),
        ("/team", "a", False),
        ("t" * 64, "a", False),
        ("team", "-a", False),
        ("team", "a b", False),
        ("team", "a" * 64, False),
    ],
)
def test_labels_are_taken_as_kubernetes_takes_them(name: str, value: str, taken: bool) -> None:
    for values, key in (
        ({"experts": {"labels": {name: value}}}, "/experts/labels"),
        ({"attention": {"labels": {name: value}}}, "/attention/labels"),
        ({"monitoring": {"labels": {name: value}}}, "/monitoring/labels"),
        ({"head": {"nodeSelector": {name: value}}}, "/head/nodeSelector"),
    ):
        said = refusal(values)
        assert (said == "", key in said) == (taken, not taken)
