"""The firewall rules that the local cluster calls its own."""

from localcluster.network import has_own_rules, without_own_rules

FOREIGN = """*nat
:PREROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE
COMMIT
"""
OWN = """*nat
:PREROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE
-A POSTROUTING -s 10.88.0.0/16 ! -d 10.88.0.0/16 -m comment --comment finetune-cluster -j MASQUERADE
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -j ACCEPT
COMMIT
"""


def test_rules_of_others_are_kept() -> None:
    assert without_own_rules(OWN) == FOREIGN


def test_own_rules_are_recognised() -> None:
    assert has_own_rules(OWN)
    assert not has_own_rules(FOREIGN)
