"""Run folders; the only owner of the names of the files in one."""
