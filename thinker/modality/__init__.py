"""Pictures and sound as embeddings in the stream: opening files, encoders, projectors, and the splice.

`pictures` and `sounds` turn files into small arrays, `media` tells which file a message means, `settings` says how
encoders are built. None of these imports torch, but for features in a safetensors file, of any type of numbers.
`vision`, `audio` and `projector` are the trained parts, `senses` puts them together, and `sequence` is the splice. What
is done with the stream is the model's business.
"""
