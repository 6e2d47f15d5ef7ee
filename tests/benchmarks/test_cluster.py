"""The parts of the simulated cluster; all of it, in a short form, in test_cluster_slow.py."""

import socket
import struct
from types import SimpleNamespace
from xml.etree import ElementTree

import grpc
import pytest

from benchmarks.cluster import phases, picture
from benchmarks.cluster_load import Call
from benchmarks.cluster_network import NameServer
from benchmarks.timeline import COLOURS, Column, Panel, Series, svg

SVG = "{http://www.w3.org/2000/svg}"


def ask(server, kind):
    """(number of answers, addresses) to a question for weakseg.test."""
    name = b"\x07weakseg\x04test\0"
    question = struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + name + struct.pack("!2H", kind, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.sendto(question, ("127.0.0.1", server.port))
        answer = client.recv(4096)
    assert answer[:2] == question[:2] and answer[2] & 0x80 and answer[len(name) + 12 : len(question)] == question[-4:]
    n = struct.unpack("!H", answer[6:8])[0]
    records = answer[len(question) :]
    assert len(records) == 16 * n
    return n, {socket.inet_ntoa(records[16 * i + 12 : 16 * i + 16]) for i in range(n)}


def test_the_name_server_answers_for_those_that_are_ready():
    server = NameServer("127.0.0.1")
    assert ask(server, 1) == (0, set())
    server.addresses = ["127.0.1.2", "127.0.1.3"]
    assert ask(server, 1) == (2, {"127.0.1.2", "127.0.1.3"})
    assert ask(server, 28) == (0, set()), "there is no IPv6"


def test_grpc_resolves_by_it(shared_serving):
    server = NameServer("127.0.0.1")
    server.addresses = ["127.0.0.1"]
    target = f"dns://127.0.0.1:{server.port}/weakseg.test:{shared_serving.server.port}"
    with grpc.insecure_channel(target) as channel:
        grpc.channel_ready_future(channel).result(60)  # raises where the name leads nowhere


CALLS = [
    Call(0.0, 0.5, "1", "", False),
    Call(1.0, 1.2, "2", "", False),
    Call(1.5, 4.5, "", "UNAVAILABLE: gone", True),
    Call(4.0, 4.1, "2", "", True),
]


def test_phases_are_told_from_event_to_event():
    lines = phases([(0.9, "update"), (3.0, "updated")], CALLS).splitlines()
    assert lines[1].split() == ["three", "servers", "1", "0", "0.50", "0.50", "1:", "1"]
    assert lines[2].split() == ["update", "2", "1", "2.97", "3.00", "2:", "1"]
    assert lines[3].split()[:3] == ["updated", "1", "0"]


def test_the_picture_has_events_pods_and_failures():
    pods = [SimpleNamespace(release=release, seen=[(0.0, 0.0), (2.0, 4.0), (4.0, 4.0)]) for release in "aaab"]
    scenario = SimpleNamespace(cluster=SimpleNamespace(pods=pods), events=[(1.0, "node <lost>")])
    drawn = ElementTree.fromstring(picture(scenario, CALLS))
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert {"node <lost>", "release a", "release b", "version 1", "4 calls, 1 failed"} <= set(texts)
    assert len(list(drawn.iter(f"{SVG}circle"))) == 1


@pytest.mark.parametrize("stacked", [False, True])
def test_panels_put_values_where_they_belong(stacked):
    series = [Series("one", [0, 10], [0, 2]), Series("two", [0, 10], [1, 2], 1)]
    drawn = ElementTree.fromstring(svg([Column("c", [Panel("p", series, stacked)], "s")], 400, 100))
    kind = "polygon" if stacked else "polyline"
    one, two = [
        [tuple(map(float, p.split(","))) for p in shape.get("points").split()] for shape in drawn.iter(SVG + kind)
    ]
    assert one[0][0] < one[1][0] and one[0][1] > one[1][1], "right is later, up is more"
    assert (two[1][1] < one[1][1]) == stacked, "on top of the first, or beside it"
    assert {shape.get("fill" if stacked else "stroke") for shape in drawn.iter(SVG + kind)} == set(COLOURS[:2])
