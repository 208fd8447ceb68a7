"""Fuzzers: any bytes into whatever reads bytes of strangers. README.md says how to run and write them."""
