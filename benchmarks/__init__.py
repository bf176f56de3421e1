"""Benchmarks: the papers' experiments on real data, runnable from a checkout and tried at a tiny size by the tests."""
