"""Handover: live connections move from a worker that leaves to workers that stay.

One line (a pair of sockets that the master makes) joins each worker that leaves with each that stays. For each
connection, at most one process reads and writes it, whichever of them dies:

    old worker                                        new worker
    freezes it (neither reads nor writes)
    offer: descriptor, state                   --->   takes its places; refuses if it cannot
                                               <---   ready (or refused: the old one goes on)
    gives it up for its own handler
    go (or withdrawn)                          --->   its handler begins (or closes the copy)
    closes its descriptor, quietly             <---   serving

The old one keeps its descriptor until "serving". End of file before that means that the new worker is dead, so the old
one serves the connection itself: its handler goes on waiting if "go" was not said, and begins anew otherwise. A time
limit counts only before "go"; a new worker that hangs after it is killed by the master, since its loop is blocked.
"""
