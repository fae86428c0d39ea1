"""Addresses and copies: host memory, the kernel's advice, threads that move bytes. Knows no store."""
