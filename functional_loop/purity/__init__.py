"""What is looked at so that nothing is silently wrong.

`probe` looks at the first step of a loop, by `outside`, `twice` and `reachable`: whether it depends on more than the
context. `check` watches hooks under ``check_pure``; `dry_run` walks all stages without values.
"""
