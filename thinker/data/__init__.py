"""From text to batches: `sources` finds the text, `shards` turns it into tokens on disk, `batches` cuts them.

`sources` rests on `named` (the sets with a name), `split` (what is held out) and `reading` (files to documents);
`places` says where all of it is kept, `progress` shows how far it is.

Nothing here knows of a model, and nothing imports torch: a batch is numpy arrays (inputs, targets, and
what packed rows have besides).
"""
