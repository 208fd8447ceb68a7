"""What operators read: log lines, faults, what blocks the event loop."""
