"""A soak test: mixed load and faults for hours, against a server process that is watched."""
