"""The commands, one file each: `run(settings, options)` wires settings to the library.

`table.py` lists them; `options.py` makes command-line options from settings; `plan.py` is shared by several commands.
"""
