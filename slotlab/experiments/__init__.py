"""Experiments: many runs under one plan, for comparisons of backbones and ablations, and their tables.

::

    OUT/
      plan.json                  the cells, each with its complete configuration, and the seeds
      runs/CELL-seedN/           a run folder, its eval-SPLIT.json, or error.json if it failed
      table.md, table.csv        made from the run folders; `slotlab table OUT` makes them again
"""
