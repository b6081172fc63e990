"""Ports of a new cluster."""

from itertools import count

from localcluster.state import MAIN_PORTS, choose_ports, preferred_ports


def test_main_gets_its_fixed_ports_where_they_are_free() -> None:
    ports = choose_ports(preferred_ports("main"), is_free=lambda _: True, any_free_port=lambda: 0)

    assert ports == MAIN_PORTS


def test_other_clusters_get_free_ports() -> None:
    numbers = count(40000)
    ports = choose_ports(preferred_ports("other"), is_free=lambda port: port != 0, any_free_port=lambda: next(numbers))

    assert sorted(ports.values()) == list(range(40000, 40000 + len(MAIN_PORTS)))


def test_taken_port_is_replaced_and_none_is_given_twice() -> None:
    offers = iter((7, 2, 2, 3))
    ports = choose_ports({"a": 1, "b": 2}, is_free=lambda port: port not in {1, 7}, any_free_port=lambda: next(offers))

    assert ports == {"a": 2, "b": 3}
