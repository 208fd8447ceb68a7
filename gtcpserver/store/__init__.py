"""Limits that several machines count together, by Redis.

Each process that serves is a member, with a random name and a lease, which it renews every second (`line`). What is
open is counted by client and member, so the counts of a member without a lease are void: those of a machine that died
are gone when its lease is over. A new connection, once the limits of its own machine have let it in, is one question:
a script (`scripts`) checks all of its limits and counts it, in one step.

`store` has what the rest of the package uses: questions, counts, and what holds while Redis is away.
"""
