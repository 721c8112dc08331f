"""Measurements that later work is compared with: ``python -m benchmarks``. Not part of the installed package."""
