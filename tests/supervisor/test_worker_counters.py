"""What a master takes over of a worker's counters."""

import dataclasses
import json

from gtcpserver import Server
from gtcpserver.supervisor.messages import checked_stats
from gtcpserver.supervisor.totals import GAUGES


def test_every_counter_of_a_server_gets_to_the_master():
    stats = dataclasses.asdict(Server("127.0.0.1:0", id).stats())
    for table in [value for value in stats.values() if isinstance(value, dict)]:
        table["kind"] = 1
    assert checked_stats(json.loads(json.dumps(stats))) == stats


def test_what_is_true_of_a_worker_at_the_moment_ends_with_it():
    names = {field.name for field in dataclasses.fields(Server("127.0.0.1:0", id).stats())}
    assert names >= GAUGES
