"""How much a model learns in a given time: yardsticks against other recipes, and the sweeps behind our own.

    python -m benchmarks.learning.nanogpt     nanoGPT's run on a processor, its recipe and ours
    python -m benchmarks.learning.bits        bits per byte after ten minutes, tuned AdamW and ours
    python -m benchmarks.learning.sweeps      what `thinker/train/recipes.py` chooses, and what it didn't

Speed alone is measured one folder up. Results lie beside the scripts, and say from which seeds they are.
"""
