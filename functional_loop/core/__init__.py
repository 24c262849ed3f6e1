"""The records, and the pure functions of them: what training is made of.

To read in this order: `record` (frozen classes that are pytrees), `stages` and `callback` (the grammar, and hooks),
`context`; then `batch`, `measures`, and `rng` with `seeding` and `hook_seeds` (everything random is a function of a
seed and a place).
"""
