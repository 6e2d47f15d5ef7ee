from benchmarks.load import closed_loop, open_loop
from benchmarks.serving import echo, noop, noop_request, server


def test_callers_of_an_echo_are_all_answered():
    with echo() as (target, cpu_seconds):
        before = cpu_seconds()
        load = closed_loop(target, noop_request(), callers=4, seconds=0.3)
        assert cpu_seconds() > before
        assert dict(load.codes) == {"OK": len(load.answered_s)}
        assert load.rate > 0
        load = open_loop(target, noop_request(), rate=100, seconds=0.3, timeout_s=30)
        assert load.codes.keys() == {"OK"}
        assert 0 < load.seconds < 30


def test_a_server_with_a_network_that_does_nothing(tmp_path):
    with server(tmp_path, noop(tmp_path), "--queue-limit", "1", "--max-batch", "1") as ports:
        load = closed_loop(ports.target, noop_request(), callers=8, seconds=0.3)
    assert set(load.codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert len(load.refused_s) == load.codes["RESOURCE_EXHAUSTED"]
