"""`python -m thinker` is `thinker`, where scripts aren't on the path."""

from .commands import main

main()
