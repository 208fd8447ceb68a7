"""What operators read: log lines, errors, and what blocks the event loop."""
