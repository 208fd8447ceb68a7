"""The fuzzer finds faults that were planted, and judges costs."""

import importlib.util
from random import Random

import pytest

from fuzz.engine import Fault, Fuzzer, Target, Tracer, check, inflate, mutate

pytestmark = pytest.mark.timeout(300)  # of CPU they need a second or two

PLANTED = """
import re

def three_steps(data):
    if data[:1] == b"f":
        if data[1:2] == b"u":
            if data[2:3] == b"z":
                raise KeyError("planted")

def square_of_lines(data):
    for _ in data:
        for _ in data:
            pass

def square_in_c(data):
    re.findall(rb"a+b", data)

def glutton(data):
    return [bytes(10_000) for _ in data]

def endless(data):
    while data:
        pass

def stuck(data):
    re.fullmatch(rb"(a*)*b", b"a" * 40)
"""


@pytest.fixture
def planted(tmp_path):
    """`planted("name")` is a target; the file is in a folder of its own, which the fuzzer looks at."""
    path = tmp_path / "planted.py"
    path.write_text(PLANTED)
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(name, **options):
        return Target(name, getattr(module, name), **options), str(tmp_path)

    return make


@pytest.mark.slow
def test_a_fault_behind_three_conditions_is_found_by_what_was_covered(planted):
    target, folder = planted("three_steps")
    with pytest.raises(Fault, match="KeyError") as found:
        Fuzzer(target, Random(1), folder=folder).run(20)
    assert found.value.data == b"fuz"
    assert isinstance(found.value.__cause__, KeyError)


@pytest.mark.slow
def test_without_the_coverage_it_is_not(planted):
    target, _ = planted("three_steps")
    random = Random(1)
    for _ in range(20_000):
        target.function(mutate(random, b"some seed", b"another", ()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("square_of_lines", {"lines": (1000, 10)}, "lines"),
        ("square_in_c", {"seconds": (0.004, 0), "longest": 8000}, "s of CPU"),
        ("glutton", {"memory": (100_000, 100)}, "bytes of memory"),
        ("endless", {}, "lines"),
    ],
)
def test_costs_out_of_proportion_are_faults(planted, name, options, words):
    target, folder = planted(name, **options)
    with pytest.raises(Fault, match=words):
        Fuzzer(target, Random(1), [b"aaaa"], folder=folder).run(20)


@pytest.mark.slow
def test_what_never_returns_is_stopped_even_in_a_regular_expression(planted, monkeypatch):
    monkeypatch.setattr("fuzz.engine.HANG_SECONDS", 0.2)
    target, folder = planted("stuck")
    with pytest.raises(Fault, match=r"more than 0.2 s of CPU"):
        check(target, b"x", Tracer(folder))


def test_ways_tell_how_often_a_line_was_run(planted):
    target, folder = planted("square_of_lines")
    tracer = Tracer(folder)
    few, again, more = (tracer.run(target.function, data) for data in (b"a", b"b", b"aaaaaaaa"))
    assert few == again
    assert more - few
    assert tracer.lines > 64


def test_mutations_are_of_the_random_numbers_alone():
    made = [mutate(Random(5), b"hello world", b"other", (b"token",)) for _ in range(2)]
    assert made[0] == made[1]
    assert len(inflate(Random(1), b"abc", 50_000)) > 4000
