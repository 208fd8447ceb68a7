"""`make fuzz`: python -m fuzz [--seconds N] [--seed N] [--replay FILE] [NAME ...], in the folder tests."""

import argparse
import sys
import time
from random import Random, SystemRandom

from fuzz.engine import WORK, Fault, Fuzzer, Target, Tracer, check, name_of
from fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description="Feed any bytes to what reads bytes of strangers.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}; all of them if none is given"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of CPU for each fuzzer")
    parser.add_argument("--seed", type=int, help="of all choices; another each time if it is not given")
    parser.add_argument("--replay", metavar="FILE", help="run one fuzzer with this input, without catching anything")
    options = parser.parse_args()
    for name in options.names:
        if name not in TARGETS:
            parser.error(f"there is no fuzzer {name}; there are {', '.join(TARGETS)}")
    chosen = [TARGETS[name] for name in options.names or TARGETS]
    if options.replay is not None:
        if len(chosen) != 1:
            parser.error("--replay needs the name of one fuzzer")
        with open(options.replay, "rb") as file:
            data = file.read()
        chosen[0].function(data)
        check(chosen[0], data, Tracer(), memory=True)
        print(f"{chosen[0].name}: no fault with {options.replay}")
        return 0
    seed = SystemRandom().getrandbits(32) if options.seed is None else options.seed
    faults = [target.name for target in chosen if not _fuzz(target, options.seconds, seed)]
    if faults:
        print(f"faults in {', '.join(faults)}", file=sys.stderr)
    return 1 if faults else 0


def _fuzz(target: Target, seconds: float, seed: int) -> bool:
    """Whether no fault was found."""
    kept = WORK / "corpus" / target.name
    kept.mkdir(parents=True, exist_ok=True)
    # The kept inputs are tried anew: they took other ways through yesterday's code.
    fuzzer = Fuzzer(target, Random(seed), [path.read_bytes() for path in sorted(kept.iterdir())])
    began = time.process_time()
    fault = None
    try:
        fuzzer.run(seconds)
    except Fault as found:
        fault = found
    took = max(time.process_time() - began, 1e-3)
    for data in fuzzer.corpus:
        (kept / name_of(data)).write_bytes(data)
    print(
        f"{target.name}: {fuzzer.inputs:,} inputs, {fuzzer.inputs / took:,.0f} a second, {len(fuzzer.corpus):,} kept, "
        f"{fuzzer.ways:,} ways, {'no fault' if fault is None else 'a FAULT'}",
        flush=True,
    )
    if fault is None:
        return True
    path = WORK / "faults" / f"{target.name}-{name_of(fault.data)}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(fault.data)
    print(f"{fault}\nagain: make fuzz FUZZ={target.name} FUZZ_REPLAY={path}\n", file=sys.stderr, flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
