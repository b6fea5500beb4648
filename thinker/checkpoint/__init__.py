"""What is kept on disk: strict readers and atomic writers, the exact state of a run, and its published view.

Names and shapes of other projects live in `formats/`. Import the rooms themselves; this package holds no names, so that
reading a file costs no more than it must.
"""
