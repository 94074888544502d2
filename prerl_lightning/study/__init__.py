"""``prerl study``: claims that are written down first, the runs they need, and a verdict for each.

``design`` reads the YAML; ``check`` parses its arms as ``prerl fit`` does, in a process of its own, so that nothing
here imports torch; ``plan`` says which runs there have to be, and ``schedule`` makes, resumes and reuses them;
``measures`` takes a number out of a run, ``verdicts`` compares such numbers, and ``record`` is study.json with the
registration. ``page`` and ``forest`` write study.html by the parts of ``prerl report``, and ``command`` puts all of it
together.
"""
