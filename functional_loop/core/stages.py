"""The stages of training."""

from __future__ import annotations

STAGES = (
    "begin",
    "epoch_begin",
    "batch_begin",
    "after_backward",
    "batch_end",
    "before_valid",
    "batch_valid_begin",
    "batch_valid_end",
    "valid_end",
    "epoch_end",
    "end",
    "exit",
)
"""The stages, in the order of the grammar::

    begin
    ( epoch_begin
      ( batch_begin  after_backward  batch_end )*
      before_valid
      [ ( batch_valid_begin  batch_valid_end )*  valid_end ]    in an epoch that validates
      epoch_end )*
    end
    exit                                                        always, also after an error
"""

BOUNDARIES = tuple(s for s in STAGES if s not in ("batch_begin", "after_backward", "batch_valid_begin", "exit"))
"""The stages after which a context holds durable fields only, and can be yielded, saved and continued."""
