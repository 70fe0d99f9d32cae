"""The commands, one file each: `run(settings, options)` wires settings to the library.

`table.py` lists them; `options.py` makes command-line options from settings; `run_setup.py` is shared by several
commands. `foreign_options` and `foreign_line` answer options of other programs. Options, their defaults and their help
are in `lapwan.settings`.
"""
