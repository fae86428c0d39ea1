"""Many runs under one plan: compared backbones, ablations, and the tables made of them.

::

    OUT/
      plan.json                  the cells, each with its complete configuration, and the seeds
      runs/CELL-seedN/           a run folder, its eval-SPLIT.json, or error.json if it failed
      table.md, table.csv        what the run folders say, made again by `slotlab table OUT`
"""
