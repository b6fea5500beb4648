"""What `thinker generate MODEL PROMPT --max-new-tokens 1` does, with transformers: a program for `cold_start.py`."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

model, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
network = AutoModelForCausalLM.from_pretrained(model)
inputs = tokenizer(prompt, return_tensors="pt")
ids = network.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :]), end="", flush=True)
