"""Counts that all workers of a service have in common: in memory that the master shares with them, without locks."""
