"""Host memory: buffers, advice to the kernel, and threads that copy. Knows nothing of stores."""
