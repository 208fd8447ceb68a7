"""All fuzzers by name."""

from fuzz.engine import Target
from fuzz.targets import configuration, framing, http, lines, names, supervisor, wire

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (wire, http, names, configuration, framing, supervisor, lines)
    for target in module.TARGETS
}
