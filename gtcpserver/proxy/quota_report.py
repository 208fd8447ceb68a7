"""What users have moved, and may move: for `gtcpserver ctl users`."""

from __future__ import annotations

from typing import Any

from gtcpserver.errors import ConfigError

from .build import make_quota
from .quota import end_of_period, period_at
from .quota_file import FAILURES, read_usage
from .settings import ProxyConfig


def quota_report(config: ProxyConfig, at: float) -> list[dict[str, Any]]:
    """Return one row for each user that has moved bytes in this period, or has a quota of its own: who has moved most
    is first.

    Args:
        at: the time, seconds since 1970.

    Raises:
        ConfigError: there is no quota, or its file cannot be read.
    """
    quota, table = make_quota(config), config.quota
    if quota is None or table.file is None:
        raise ConfigError("the configuration has no quota.file")
    try:
        used = read_usage(table.file, period_at(table.period, at))
    except FileNotFoundError:
        used = {}  # nobody has come yet
    except FAILURES as error:
        raise ConfigError(f"the quota file {table.file} cannot be read: {error}") from None
    resets = f"{end_of_period(table.period, at):%Y-%m-%dT%H:%M:%SZ}"
    rows = [
        {"user": user, "used": used.get(user, 0), "limit": quota.most_of(user), "resets": resets}
        for user in used.keys() | table.users.keys()
    ]
    return sorted(rows, key=lambda row: (-row["used"], row["user"]))
