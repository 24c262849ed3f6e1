"""Saving and resuming: state dicts, files, and which run they are of.

`state` makes a context plain containers and back; `identity`, `settings` and `belonging` say which run it is; `store`
keeps contexts in a folder, by `file` (one checkpoint), `atomic`, `lock` and `writer`; `resume` goes on from it.
"""
