"""``prerl report`` and ``prerl watch``: what a run's folder holds, as a page and in the terminal.

Everything here reads files only and imports neither torch nor lightning, so that both commands start at once.
``metrics`` and ``files`` read single files, ``reading`` a folder and what it was resumed from, as a ``runs.Run``;
``compare`` groups and compares runs. Of the page, ``figures`` says which figures there are, ``payload`` fits their data
into it, ``headline``, ``tables`` and ``background`` make what needs no script, and ``page`` assembles it. ``watch`` and
``frame`` are the terminal's side.
"""
