"""From text to batches: `sources` finds the text, `shards` turns it into tokens on disk, `batches` cuts them.

Nothing here knows of a model, and nothing imports torch: a batch is two numpy arrays.
"""
