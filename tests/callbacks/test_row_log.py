"""csv_log and json_log: a file that has every row of the way to the present context once."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_loop as fl
from functional_loop.callbacks import history, rollback
from functional_loop.callbacks.logs.csv_log import CallbackSetCSVLog
from functional_loop.callbacks.logs.json_log import CallbackSetJSONLog
from functional_loop.callbacks.logs.row_log import CallbackSetRowLog
from tests.callbacks.laws import holds_for
from tests.sample_loops import counter, full_loop, make_loop, raising
from tests.strategies import examples

CLASSES: list[type[CallbackSetRowLog]] = [CallbackSetCSVLog, CallbackSetJSONLog]
KINDS = [*itertools.product(CLASSES, (None, 1, 2))]

either = pytest.mark.parametrize("cls", CLASSES)
every_kind = pytest.mark.parametrize(("cls", "every_steps"), KINDS)


def logged(cls: type[CallbackSetRowLog], path: Path, every_steps: int | None = None, **changes: Any) -> fl.Loop:
    return full_loop(**{"callbacks": [counter(), cls(path, every_steps)], **changes})


def rows(path: Path) -> list[dict[str, float]]:
    text = path.read_text()
    if text.startswith("{"):
        return [json.loads(line) for line in text.splitlines()]
    return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(text.splitlines())]


@either
def test_a_row_for_every_epoch_that_has_scores(cls: type[CallbackSetRowLog], tmp_path: Path) -> None:
    loop = logged(cls, tmp_path / "log", epochs=5, eval_freq=2)
    expected = [
        {
            "epoch": ctx.epoch,
            "train.error": dict(ctx.last_scores_train)["error"],
            "valid.error": dict(ctx.last_scores_valid)["error"],
        }
        for ctx in fl.iterate(fl.init(loop))
        if ctx.stage == "epoch_end" and ctx.epoch in (2, 4, 5)
    ]
    assert rows(tmp_path / "log") == expected


@either
def test_a_row_for_every_few_batches(cls: type[CallbackSetRowLog], tmp_path: Path) -> None:
    loop = logged(cls, tmp_path / "log", 2, epochs=3)
    expected = [
        {"global_step": ctx.global_step, "epoch": ctx.epoch, "step": ctx.step, "loss": ctx.last_loss.item()}  # type: ignore[union-attr]
        for ctx in fl.iterate(fl.init(loop))
        if ctx.stage == "batch_end" and ctx.global_step % 2 == 0
    ]
    assert rows(tmp_path / "log") == expected
    assert len(expected) == 4


@pytest.mark.parametrize("back", [1, 3])
@every_kind
def test_a_run_that_goes_back_has_the_rows_of_one_that_never_saw_the_batch(
    cls: type[CallbackSetRowLog], every_steps: int | None, back: int, tmp_path: Path
) -> None:
    """Back over the start of an epoch, whose row was written already."""
    steps = full_loop().train.length
    assert steps is not None
    bad = steps + 1
    went_back, never = tmp_path / "went back", tmp_path / "never"
    guard = rollback(when=lambda ctx: ctx.global_step == bad, back=back)
    fl.train(fl.init(logged(cls, went_back, epochs=3, callbacks=[cls(went_back, every_steps), guard])))
    fl.train(fl.init(logged(cls, never, epochs=3, callbacks=[cls(never, every_steps)], skip_batches={bad})))
    assert rows(went_back) == rows(never)
    assert len(rows(never)) == (3 if every_steps is None else 3 * steps // every_steps - (bad % every_steps == 0))


def test_csv_has_a_header_also_without_rows(tmp_path: Path) -> None:
    fl.train(fl.init(logged(CallbackSetCSVLog, tmp_path / "a.csv", epochs=0)))
    fl.train(fl.init(logged(CallbackSetCSVLog, tmp_path / "b.csv", 1, epochs=0)))
    fl.train(fl.init(logged(CallbackSetCSVLog, tmp_path / "c.csv", epochs=0, valid=None, measures_valid=[])))
    assert (tmp_path / "a.csv").read_text() == "epoch,train.error,valid.error\n"
    assert (tmp_path / "b.csv").read_text() == "global_step,epoch,step,loss\n"
    assert (tmp_path / "c.csv").read_text() == "epoch,train.error\n"


def test_names_of_measures_are_quoted(tmp_path: Path) -> None:
    odd = fl.measure('a "b",\nc', lambda y_hat, y: 1.5)
    fl.train(
        fl.init(
            logged(CallbackSetCSVLog, tmp_path / "log", measures_train=[odd], valid=None, measures_valid=[]), seed=1
        ),
        steps=4,
    )
    ctx = fl.train(
        fl.init(logged(CallbackSetCSVLog, tmp_path / "log", measures_train=[odd], valid=None, measures_valid=[]))
    )
    with open(tmp_path / "log", newline="") as file:
        assert list(csv.reader(file)) == [["epoch", 'train.a "b",\nc'], ["1", "1.5"], ["2", "1.5"]]
    assert ctx.epoch == 2


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    def nan(y_hats: Any, y: Any) -> Any:
        return (y_hats - y).sum() * math.nan

    for cls in CLASSES:
        fl.train(fl.init(make_loop(loss=nan, epochs=1, callbacks=[cls(tmp_path / cls.__name__, 3)])))
    assert json.loads((tmp_path / "CallbackSetJSONLog").read_text())["loss"] is None
    assert (tmp_path / "CallbackSetCSVLog").read_text().splitlines()[1] == "3,1,3,nan"


@every_kind
def test_a_run_resumed_anywhere_leaves_the_file_of_an_uninterrupted_one(
    cls: type[CallbackSetRowLog], every_steps: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    contexts = list(fl.iterate(fl.init(logged(cls, path, every_steps))))
    whole = path.read_bytes()
    for ctx in contexts[:-1]:
        # The run that died had come to its end, or to here.
        for left_behind in (whole, path_at(cls, every_steps, tmp_path / "prefix", ctx)):
            path.write_bytes(left_behind)
            fl.train(taken_up(logged(cls, path, every_steps), ctx))
            assert path.read_bytes() == whole, ctx


def path_at(cls: type[CallbackSetRowLog], every_steps: int | None, path: Path, ctx: fl.Context) -> bytes:
    """What the file of a run has at ``ctx``."""
    for here in fl.iterate(fl.init(logged(cls, path, every_steps))):
        if (here.stage, here.global_step, here.step_valid) == (ctx.stage, ctx.global_step, ctx.step_valid):
            return path.read_bytes()
    raise AssertionError


@given(data=st.data())
@examples(0.2)
def test_any_history_of_deaths_and_restarts_leaves_every_row_once(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A process dies anywhere, also in the middle of a line, and the next one goes on from a checkpoint of before."""
    cls, every_steps = data.draw(st.sampled_from(KINDS))
    folder = tmp_path_factory.mktemp("log")
    start = fl.init(logged(cls, folder / "whole", every_steps))
    contexts = [start, *fl.iterate(start)]
    path = folder / "log"
    place = 0
    for length in data.draw(st.lists(st.integers(1, 12), max_size=3)):
        runs = fl.iterate(taken_up(logged(cls, path, every_steps), contexts[place]))
        died_at = min(place + length, len(contexts) - 2)
        list(itertools.islice(runs, died_at - place))
        runs.close()
        torn = data.draw(st.integers(0, 12))
        with open(path, "ab") as file:
            file.write((b'{"epoch": 3, "tr' if cls is CallbackSetJSONLog else b"13,0.25,0.75")[:torn])
        place = data.draw(st.integers(0, died_at))
    fl.train(taken_up(logged(cls, path, every_steps), contexts[place]))
    assert path.read_bytes() == (folder / "whole").read_bytes()


def taken_up(loop: fl.Loop, ctx: fl.Context) -> fl.Context:
    return fl.load_state_dict(fl.init(loop), fl.state_dict(ctx))


@every_kind
def test_training_in_pieces_writes_the_same_file(
    cls: type[CallbackSetRowLog], every_steps: int | None, tmp_path: Path
) -> None:
    fl.train(fl.init(logged(cls, tmp_path / "whole", every_steps)))
    ctx = fl.init(logged(cls, tmp_path / "pieces", every_steps))
    while ctx.stage != "end":
        ctx = fl.train(ctx, steps=1)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


@either
def test_going_back_and_training_on_differently_leaves_the_rows_of_the_new_way(
    cls: type[CallbackSetRowLog], tmp_path: Path
) -> None:
    path = tmp_path / "log"
    origin = fl.train(fl.init(logged(cls, path, 1)), steps=3)
    prefix = rows(path)
    fl.train(origin)
    other_way = fl.train(origin.with_hyperparameters(lr=0.5), steps=2)
    assert rows(path)[:3] == prefix
    assert [row["global_step"] for row in rows(path)] == [1, 2, 3, 4, 5]
    assert rows(path)[-1]["loss"] == other_way.last_loss.item()  # type: ignore[union-attr]


@either
def test_a_run_that_starts_anew_starts_the_file_anew(cls: type[CallbackSetRowLog], tmp_path: Path) -> None:
    path = tmp_path / "log"
    fl.train(fl.init(logged(cls, path, 1), seed=1))
    fl.train(fl.init(logged(cls, path, 1), seed=2), steps=2)
    fl.train(fl.init(logged(cls, tmp_path / "other", 1), seed=2), steps=2)
    assert path.read_bytes() == (tmp_path / "other").read_bytes()


def test_a_killed_process_has_written_every_row(tmp_path: Path) -> None:
    path = tmp_path / "log"

    def kill(ctx: fl.Context) -> fl.Context:
        if ctx.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return ctx

    if (child := os.fork()) == 0:
        killer = fl.Callback("killer", batch_end=kill, weight=math.inf)
        fl.train(fl.init(full_loop(callbacks=[CallbackSetCSVLog(path, 1), killer])))
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [row["global_step"] for row in rows(path)] == [1, 2, 3, 4]


@either
def test_an_error_loses_no_row(cls: type[CallbackSetRowLog], tmp_path: Path) -> None:
    loop = full_loop(callbacks=[cls(tmp_path / "log", 1), raising("batch_end", RuntimeError("boom"))])
    with pytest.raises(RuntimeError, match="boom"):
        fl.train(fl.init(loop))
    assert [row["global_step"] for row in rows(tmp_path / "log")] == [1]


@either
def test_the_laws(cls: type[CallbackSetRowLog], tmp_path: Path) -> None:
    holds_for(lambda: logged(cls, tmp_path / "log", 1), tmp_path / "store")


@either
def test_the_callback_is_no_part_of_the_run(cls: type[CallbackSetRowLog], tmp_path: Path) -> None:
    with_log = fl.train(fl.init(logged(cls, tmp_path / "log")))
    without = fl.train(fl.init(full_loop()))
    assert fl.digest(with_log) == fl.digest(without)
    fl.load_state_dict(fl.init(full_loop()), fl.state_dict(with_log))


@either
def test_folders_are_made(cls: type[CallbackSetRowLog], tmp_path: Path) -> None:
    fl.train(fl.init(logged(cls, tmp_path / "a" / "b" / "log")))
    assert len(rows(tmp_path / "a" / "b" / "log")) == 2


@either
def test_a_function_is_asked_for_the_path_once_per_run(cls: type[CallbackSetRowLog], tmp_path: Path) -> None:
    numbers = itertools.count(1)
    log = cls(lambda: tmp_path / f"log-{next(numbers)}", every_steps=1)
    assert log.path is None
    loop = full_loop(callbacks=[log])
    ctx = fl.train(fl.init(loop), steps=4)
    fl.train(ctx)
    assert log.path == tmp_path / "log-1"
    fl.train(fl.init(loop, seed=1))
    assert log.path == tmp_path / "log-2"
    assert [len(rows(tmp_path / name)) for name in ("log-1", "log-2")] == [6, 6]
    assert next(numbers) == 3


@either
def test_a_train_step_writes_its_row(cls: type[CallbackSetRowLog], tmp_path: Path) -> None:
    for place in (tmp_path / "a", lambda: tmp_path / "b"):
        loop = full_loop(callbacks=[cls(place, every_steps=1)])
        ctx = next(ctx for ctx in fl.iterate(fl.init(full_loop(callbacks=[]))) if ctx.stage == "epoch_begin")
        fl.train_step(taken_up(loop, ctx), (torch.ones(4, 3), torch.ones(4, 2)))
    assert [row["global_step"] for row in rows(tmp_path / "a")] == [1]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("cls", "content"),
    [
        (CallbackSetCSVLog, "dear diary,\ntoday I trained\n"),
        (CallbackSetCSVLog, "epoch,train.loss\n1,0.5\n"),
        (CallbackSetCSVLog, "epoch,train.error,valid.error\nx,1,2\n"),
        (CallbackSetJSONLog, "dear diary\n"),
        (CallbackSetJSONLog, '{"global_step": 1, "epoch": 1}\n'),
        (CallbackSetJSONLog, "[1, 2]\n"),
        (CallbackSetJSONLog, '{"epoch": "one"}\n'),
        (CallbackSetJSONLog, "\udcff\n"),
        (CallbackSetJSONLog, "a line without an end"),
        (CallbackSetJSONLog, '{"epoch": 1}\na line without an end'),
        (CallbackSetCSVLog, "a line without an end"),
    ],
)
def test_foreign_files_are_refused_before_training_and_left_alone(
    cls: type[CallbackSetRowLog], content: str, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    path.write_text(content, errors="surrogateescape")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{path} is not a log of this run .*; give it a file of its own") as caught:
        fl.train(fl.init(logged(cls, path)))
    assert fl.context_of(caught.value).global_step == 0  # type: ignore[union-attr]
    assert path.read_bytes() == before


@either
@pytest.mark.parametrize("by", ["train", "train_step"])
def test_a_pipe_is_refused_and_not_waited_for(cls: type[CallbackSetRowLog], tmp_path: Path, by: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    loop = full_loop(callbacks=[cls(tmp_path / "pipe", every_steps=1)])
    begun = next(ctx for ctx in fl.iterate(fl.init(full_loop(callbacks=[]))) if ctx.stage == "epoch_begin")
    batch = torch.ones(4, 3), torch.ones(4, 2)
    with pytest.raises(ValueError, match="pipe is no regular file"):
        fl.train(fl.init(loop)) if by == "train" else fl.train_step(taken_up(loop, begun), batch)


@either
def test_nothing_is_kept_of_what_is_written_to_devnull(cls: type[CallbackSetRowLog]) -> None:
    fl.train(fl.init(logged(cls, Path(os.devnull), 1)))


@every_kind
@pytest.mark.parametrize(
    "what", ["moved", "removed", "replaced by a copy", "its folder moved", "written to", "emptied"]
)
def test_a_log_that_is_not_what_the_last_row_left_is_an_error_and_nothing_else(
    cls: type[CallbackSetRowLog], every_steps: int | None, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "run" / "log"
    after: dict[Path, bytes] = {}

    def change(ctx: fl.Context) -> fl.Context:
        if ctx.epoch == 2:
            if what == "written to":
                path.write_bytes(path.read_bytes() + b"more")
            elif what == "emptied":
                path.write_bytes(b"")
            elif what == "removed":
                path.unlink()
            elif what == "its folder moved":
                path.parent.rename(tmp_path / "moved")
            else:
                path.rename(tmp_path / "moved")
            if what == "replaced by a copy":
                path.write_bytes((tmp_path / "moved").read_bytes())
            after.update(files_in(tmp_path))
        return ctx

    log, changing = cls(path, every_steps), fl.Callback("change", epoch_begin=change)
    loop = full_loop(callbacks=[log, changing], epochs=3)
    with pytest.raises(RuntimeError, match=f"{path} was moved, removed, replaced or written to by others") as caught:
        fl.train(fl.init(loop))
    assert files_in(tmp_path) == after
    assert fl.context_of(caught.value) is not None
    # A run is entered anew where the file is a log, or none.
    if what not in ("its folder moved", "written to"):
        fl.train(fl.init(full_loop(callbacks=[log])))
        assert len(rows(path)) > 1


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@every_kind
def test_a_row_that_does_not_fit_on_the_disk_is_an_error_and_no_part_of_a_row(
    cls: type[CallbackSetRowLog], every_steps: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write, written = tmp_path / "log", os.write, []

    def nearly_full(descriptor: int, data: Any) -> int:
        written.append(len(data))
        if len(written) < 2:
            return write(descriptor, data)
        if len(written) % 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:5])

    with monkeypatch.context() as patched:
        patched.setattr("os.write", nearly_full)
        with pytest.raises(OSError, match="No space left") as caught:
            fl.train(fl.init(logged(cls, path, every_steps)))
    assert any(f"while saving {path}" in note for note in caught.value.__notes__)
    assert len(rows(path)) == 1


@either
def test_a_folder_is_no_file(cls: type[CallbackSetRowLog], tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        fl.train(fl.init(logged(cls, tmp_path)))


@pytest.mark.parametrize("every_steps", [0, -1, 1.0, True, "2"])
def test_bad_periods_are_refused_by_name(every_steps: Any) -> None:
    with pytest.raises(ValueError, match="csv_log: every_steps must be an integer of at least 1"):
        CallbackSetCSVLog("log", every_steps)


@pytest.mark.parametrize("path", [3, None, b"log"])
def test_bad_paths_are_refused_by_name(path: Any) -> None:
    with pytest.raises(TypeError, match="json_log: path is a string or a Path"):
        CallbackSetJSONLog(path)
    with pytest.raises(TypeError, match="mine: path is a string or a Path"):
        fl.train(fl.init(full_loop(callbacks=[CallbackSetJSONLog(lambda: path, id="mine")])))


# ---- scores that hooks add


def adding(stage: str, first: int = 1) -> fl.Callback:
    """Adds a score from epoch ``first`` on."""

    def add(ctx: fl.Context) -> fl.Context:
        if ctx.epoch < first:
            return ctx
        return fl.evolve(ctx, last_scores_valid={**dict(ctx.last_scores_valid), "mine": ctx.epoch / 2})

    hook: dict[str, Any] = {stage: add}
    return fl.Callback("adding", **hook)


@either
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("stage", "first"), [("valid_end", 1), ("valid_end", 3), ("epoch_end", 1), ("before_valid", 9)]
)
def test_a_score_that_a_hook_adds_is_logged(
    cls: type[CallbackSetRowLog], stage: str, first: int, order: int, tmp_path: Path
) -> None:
    callbacks: list[Any] = [adding(stage, first), cls(tmp_path / "log"), fl.Callback("other")]
    kept = fl.train(fl.init(full_loop(callbacks=[*callbacks[::order], history()], epochs=4)))
    found = rows(tmp_path / "log")
    assert [row.get("valid.mine") for row in found] == [n / 2 if n >= first else None for n in (1, 2, 3, 4)]
    assert found == rows_of(kept)


def rows_of(ctx: fl.Context) -> list[dict[str, float]]:
    return [dict(row) for row in ctx.callbacks["history"]]


@either
def test_a_score_in_an_epoch_that_does_not_evaluate_is_logged(cls: type[CallbackSetRowLog], tmp_path: Path) -> None:
    callbacks = [adding("epoch_end"), cls(tmp_path / "log"), history()]
    kept = fl.train(fl.init(full_loop(callbacks=callbacks, epochs=3, eval_freq=3)))
    assert [row["epoch"] for row in rows(tmp_path / "log")] == [1, 2, 3]
    assert rows(tmp_path / "log") == rows_of(kept)


@either
@pytest.mark.parametrize("steps", range(0, 13, 2))
def test_a_run_that_goes_on_has_every_row_once_with_the_columns_of_an_uninterrupted_one(
    cls: type[CallbackSetRowLog], steps: int, tmp_path: Path
) -> None:
    def loop(path: Path) -> fl.Loop:
        return full_loop(callbacks=[adding("valid_end", first=3), cls(path)], epochs=4)

    whole = fl.init(loop(tmp_path / "whole"))
    fl.train(whole)
    broken = tmp_path / "broken"
    middle = fl.train(fl.init(loop(broken)), steps=steps)
    # Went on from there, further than what is continued now.
    fl.train(middle)
    fl.train(fl.load_state_dict(fl.init(loop(broken)), fl.state_dict(middle)))
    assert rows(broken) == rows(tmp_path / "whole")
    fl.train(fl.init(loop(broken)))
    assert broken.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_run_that_starts_anew_has_only_the_columns_that_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for callbacks in ([adding("valid_end")], []):
        fl.train(fl.init(full_loop(callbacks=[*callbacks, CallbackSetCSVLog(path)])))
        assert ("valid.mine" in path.read_text()) is bool(callbacks)


def test_names_of_added_scores_are_quoted(tmp_path: Path) -> None:
    def add(ctx: fl.Context) -> fl.Context:
        return fl.evolve(
            ctx, last_scores_valid={**dict(ctx.last_scores_valid), f'a "b", {ctx.epoch}': torch.tensor(1.0)}
        )

    path = tmp_path / "log.csv"
    loop = full_loop(callbacks=[fl.Callback("add", valid_end=add), CallbackSetCSVLog(path)])
    fl.train(fl.init(loop))
    fl.train(fl.train(fl.init(loop), steps=4))
    assert list(rows(path)[1]) == ["epoch", "train.error", "valid.error", 'valid.a "b", 2']
    assert len(rows(path)) == 2
