"""Outputs of all members of an ensemble in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from ..core import measures
from ..core.batch import Batch, BatchSource, to_device
from ..core.context import Context
from ..core.outputs import plain, restored
from ..core.record import evolve
from ..data.reader import VALIDATION, check_validated
from ..engine.solo import SoloProgram
from .ensemble import member_seeds, split_context
from .member_data import fetch_members
from .members import MembersProgram
from .mode import chosen, fall_back
from .stacking import combine, split
from .trial import NotVectorisedError


def member_outputs(ctx: Context, source: BatchSource, with_loss: bool = False) -> Iterator[tuple[Any, Any, Batch]]:
    """The outputs, the losses if wanted, and the batch, stacked, for every batch of ``source``."""
    assert ctx.ensemble is not None
    seeds = member_seeds(ctx)
    fetched = fetch_members(source, VALIDATION, seeds, max(ctx.epoch, 1), 0, [()] * len(seeds))
    # Members that have finished are evaluated too.
    everyone = evolve(ctx, ensemble=attrs.evolve(ctx.ensemble, ends=(None,) * len(seeds)))
    together = MembersProgram(everyone, compiles=False) if chosen(ctx).vectorised else None
    alone = SoloProgram(split_context(ctx)[0]).open()
    try:
        position = 0
        for position, (batch, _, _) in enumerate(fetched, 1):
            batch, at = to_device(batch, ctx.loop.device), evolve(ctx, step_valid=position)
            if together is not None:
                try:
                    found = together.evaluated(at, batch, with_loss)
                except NotVectorisedError as error:
                    fall_back(ctx, error)
                    together = None
                else:
                    yield *found, batch
                    continue
            parts = zip(split_context(at), split(batch, len(seeds)), strict=True)
            made = [alone.evaluated(evolve(c, step_valid=position), own, with_loss) for c, own in parts]
            outputs, losses = combine([(plain(y_hats), loss) for y_hats, loss in made])
            yield restored(outputs), losses, batch
        check_validated(evolve(ctx, step_valid=position))
    finally:
        alone.close()
        if together is not None:
            together.close()


def member_scores(ctx: Context, source: BatchSource) -> dict[str, Any]:
    """The scores of all members by measure id."""
    assert ctx.ensemble is not None
    made, members = ctx.loop.measures_valid, ctx.ensemble.members
    running = [measures.start(made) for _ in range(members)]
    for y_hats, losses, batch in member_outputs(ctx, source, measures.need_loss(made)):
        for i, (outputs, own, loss) in enumerate(split((plain(y_hats), batch, losses), members)):
            running[i] = measures.accumulate(made, running[i], restored(outputs), own.y, own.x, loss)
    scores: dict[str, Any] = combine([measures.scores(made, each) for each in running], numbers=True)
    return scores
