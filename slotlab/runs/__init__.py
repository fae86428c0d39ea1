"""Run folders. No other package names the files in one."""
