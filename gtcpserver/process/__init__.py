"""What belongs to the whole process: its event loop, descriptors, clock, and forks."""
