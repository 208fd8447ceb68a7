"""Each fuzzer: the seeds, then some seconds of inputs that nobody has thought of. `make fuzz` goes on for longer."""

from random import Random

import pytest

from fuzz.engine import SEEDS, WORK, Fault, Fuzzer, Tracer, check, name_of, seed_paths
from fuzz.targets import TARGETS

pytestmark = pytest.mark.timeout(300)  # which count on a busy machine, too, where those of SECONDS do not

#: CPU seconds of each fuzzer; all of them together are to stay below 40.
SECONDS = 1.3


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name):
    target = TARGETS[name]
    paths = seed_paths(name)
    assert paths, f"{SEEDS / name} has no seeds"
    tracer = Tracer()
    for path in paths:
        check(target, path.read_bytes(), tracer, memory=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_some_seconds(name):
    """The same inputs each time, as long as the code is the same and the machine as fast."""
    fuzzer = Fuzzer(TARGETS[name], Random(0))
    try:
        fuzzer.run(SECONDS)
    except Fault as fault:
        path = WORK / "faults" / f"{name}-{name_of(fault.data)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(fault.data)
        fault.args = (f"{fault}\nagain: make fuzz FUZZ={name} FUZZ_REPLAY={path}",)
        raise
    assert fuzzer.inputs > 5


def test_the_seeds_are_small_and_have_a_fuzzer():
    paths = [path for path in SEEDS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in paths} == set(TARGETS)
    assert sum(path.stat().st_size for path in paths) < 500_000
